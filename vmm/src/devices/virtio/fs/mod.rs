// SPDX-License-Identifier: Apache-2.0

//! virtio-fs: a directory of the host as a file system of the guest, served in this process (virtio 1.2,
//! 5.11).
//!
//! A request comes through these files in this order:
//!
//! - [`device`]: the virtio face: features, configuration space, life cycle;
//! - `worker`: one thread per queue, takes chains off the ring;
//! - `segments`: a chain as checked slices of guest memory;
//! - `request`, `body`, `names`: the guest's bytes, parsed without I/O;
//! - `server`, `operations`, `answers`, `transfer`: what each FUSE operation does;
//! - `unnamed`, `unnamed_answers`: the same for files without a name (`O_TMPFILE`);
//! - `passthrough`: the host's files, by virtiofsd's `PassthroughFs`;
//! - `reply`: the answer.
//!
//! The guest is taken for hostile: it can do to the served directory and the mounts below it what the host
//! lets this process do, and reach nothing else. Device nodes, FIFOs and sockets of the host are never opened
//! (the guest's kernel has its own behind those names), and it cannot make device nodes either.
//!
//! The directory is opened when the device is made, in the mount namespace of that moment. Mounts that are moved
//! below it later are seen and announced as submounts; one moved onto it is not. A directory that the guest looked
//! up *before* something was mounted on it keeps showing what was there until the guest's cache entry runs out:
//! mount first, tell the guest then.

mod answers;
mod body;
pub mod device;
mod names;
mod operations;
mod passthrough;
mod reply;
mod request;
pub(crate) mod segments;
mod server;
mod sys;
#[cfg(test)]
mod tests;
mod transfer;
mod unnamed;
mod unnamed_answers;
mod worker;

use std::path::PathBuf;

pub use device::FsDevice;

/// A virtio-fs device that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum FsDeviceError {
    /// The tag is empty, longer than 36 bytes, or has a NUL.
    #[error("tag {tag:?} is not 1 to 36 bytes without NUL")]
    Tag {
        /// What was given.
        tag: String,
    },
    /// The number of request queues is out of range.
    #[error("{queues} request queues are not 1 to 8")]
    Queues {
        /// What was given.
        queues: u16,
    },
    /// The directory cannot be served.
    #[error("failed to open directory {path}")]
    Directory {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// RLIMIT_NOFILE cannot be raised.
    #[error("failed to raise the limit of open files")]
    DescriptorLimit(#[source] std::io::Error),
    /// RLIMIT_NOFILE is too low.
    #[error("the limit of {limit} open files is too low to serve a file system")]
    TooFewDescriptors {
        /// The limit.
        limit: u64,
    },
}
