// SPDX-License-Identifier: Apache-2.0

//! virtio-console (virtio 1.2, 5.3): `hvc0`, the guest's console, into the console ring.
//!
//! One port, no features beyond VERSION_1. What the guest sends goes to the [`ConsoleRing`]; input is not
//! supported: buffers for it stay where the driver put them. [`device`] is the virtio face, [`worker`] the
//! thread that owns the queues.
//!
//! [`ConsoleRing`]: crate::devices::console_ring::ConsoleRing

#![cfg_attr(
    not(test),
    warn(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::indexing_slicing
    )
)]

pub mod device;
mod worker;

pub use device::ConsoleDevice;

/// Queue of input (never used) and of output. Linux fills the input queue at start, a page and an exit for each
/// entry, so it is short.
const QUEUE_SIZES: [u16; 2] = [2, 64];
/// Index of the queue that carries output.
const OUTPUT: usize = 1;
