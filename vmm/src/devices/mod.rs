// SPDX-License-Identifier: Apache-2.0

//! The machine's devices.

pub mod virtio;
