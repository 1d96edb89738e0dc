// SPDX-License-Identifier: Apache-2.0

//! The virtio-mmio transport (virtio 1.2, 4.2), version 2.
//!
//! [`registers`] is the driver's side: the register file with the status state machine, which the bus calls.
//! [`queues`] holds the queues while the driver sets them up and checks them. At DRIVER_OK they are moved into
//! the device; from then on no register write changes anything but notifications, interrupt
//! acknowledgement, configuration space and a reset.

#![cfg_attr(
    not(test),
    warn(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::indexing_slicing
    )
)]

pub mod queues;
pub mod registers;

pub use registers::{MmioState, MmioTransport};

#[cfg(test)]
mod tests;
