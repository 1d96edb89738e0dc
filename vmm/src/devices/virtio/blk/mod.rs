// SPDX-License-Identifier: Apache-2.0

//! virtio-blk: a raw file or block device of the host as a disk of the guest (virtio 1.2, 5.2).
//!
//! A request comes through these files in this order:
//!
//! - [`device`]: the virtio face: features, configuration space, life cycle;
//! - `worker`: one thread per queue, takes chains off the ring and puts them back when they are done;
//! - `request`: the guest's bytes, parsed without I/O;
//! - `task`: a request under way, as the system calls that are left to do;
//! - `engine`: those calls, by io_uring, or one after another where the host has none;
//! - `backend`: the file.
//!
//! The image is raw, always: no format is ever guessed from what the guest wrote. Read-only is how the file is
//! opened, not a promise of the guest. Writers lock the file against others, readers against writers.

pub mod backend;
pub mod device;
mod engine;
mod request;
mod task;
#[cfg(test)]
mod tests;
mod worker;

use std::path::PathBuf;

pub use device::BlkDevice;

/// Bytes of a sector, the unit of everything in the protocol.
pub const SECTOR_LEN: u64 = 512;

/// A virtio-blk device that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BlkError {
    /// The serial number is empty, longer than 20 bytes, or has a NUL.
    #[error("serial number {serial:?} is not 1 to 20 bytes without NUL")]
    Serial {
        /// What was given.
        serial: String,
    },
    /// The number of queues is out of range.
    #[error("{queues} queues are not 1 to 8")]
    Queues {
        /// What was given.
        queues: u16,
    },
    /// The image cannot be opened or its size not be found out.
    #[error("failed to open disk image {path}")]
    Open {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("disk image {path} is neither a file nor a block device")]
    Kind {
        /// The path.
        path: PathBuf,
    },
    /// Smaller than a sector.
    #[error("disk image {path} is smaller than a sector")]
    Empty {
        /// The path.
        path: PathBuf,
    },
    /// Somebody else has it open.
    #[error("disk image {path} is in use by another process")]
    Locked {
        /// The path.
        path: PathBuf,
        /// What the lock call answered.
        #[source]
        source: std::io::Error,
    },
}
