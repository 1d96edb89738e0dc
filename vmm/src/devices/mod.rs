// SPDX-License-Identifier: Apache-2.0

//! The machine's devices.

pub mod console_ring;
pub mod i8042;
pub mod serial;
pub mod virtio;
