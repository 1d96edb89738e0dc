// SPDX-License-Identifier: Apache-2.0

//! virtio: the contract between devices and their transport ([`device`]), the transport ([`mmio`]) and the
//! devices.

pub mod blk;
pub mod console;
pub mod device;
pub mod fs;
pub mod mmio;
pub mod rng;
mod service;
pub mod vsock;
