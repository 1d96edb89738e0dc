// SPDX-License-Identifier: Apache-2.0

//! virtio-rng (virtio 1.2, 5.4): entropy from the host's getrandom(2).
//!
//! One queue. A request gets at most [`MAX_REQUEST`] bytes, and all together at most [`BYTES_PER_SECOND`], so that
//! a guest cannot keep a host CPU busy with it. [`device`] is the virtio face, [`worker`] the thread that owns
//! the queue.

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

pub use device::RngDevice;

/// The queue of buffers to fill.
const QUEUE_SIZES: [u16; 1] = [64];
/// Most bytes per request.
pub const MAX_REQUEST: usize = 4096;
/// Most bytes per second, after a burst of as many.
pub const BYTES_PER_SECOND: u64 = 1 << 20;
