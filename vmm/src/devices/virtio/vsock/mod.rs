// SPDX-License-Identifier: Apache-2.0

//! virtio-vsock in user space: Unix sockets of the host as streams of the guest (virtio 1.2, 5.10).
//!
//! ```text
//!  guest app ── AF_VSOCK ── tx queue ──> from_guest ──> connection ──> endpoint ──> Unix socket of a host process
//!            <───────────── rx queue <── to_guest   <── (credit)   <──
//! ```
//!
//! - [`device`]: the virtio face; `worker`: one thread with all queues and sockets in one epoll set; `ring`: queues;
//!   `chain`: descriptor chains as slices of guest memory; `packet`: headers; `credit` and `connection`: the life of one
//!   stream, pure; `endpoint`: its Unix socket and buffer; `host`: the sockets' names and the CONNECT handshake; `muxer`:
//!   all streams; `timers`: deadlines; [`state`]: what is saved.
//! - Stream sockets only. The names of the sockets and the handshake are in [`caisson_protocol::ports`].
//! - Payloads go between guest memory and socket in one system call, without a copy of ours. Only what a host process
//!   does not take at once is buffered, at most the credit that the guest was given for the stream.
//! - What the guest says is never trusted: a false length, a packet out of order or beyond the credit ends its own
//!   stream by RST; a broken ring ends the device until the guest resets it.
//! - A socket is in the epoll set only for what can be acted on, so a stream without credit or buffers costs nothing.
//! - Streams do not survive a restore: the guest is told by a transport reset event, and dials anew.

mod chain;
mod connection;
mod counters;
mod credit;
pub mod device;
mod endpoint;
mod from_guest;
mod host;
mod iov;
mod muxer;
mod packet;
mod ring;
pub mod state;
#[cfg(test)]
mod test_driver;
#[cfg(test)]
mod test_guest;
#[cfg(test)]
mod tests;
mod timers;
mod to_guest;
mod worker;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

pub use device::VsockDevice;

/// Most bytes of payload in one packet, either way.
const MAX_PAYLOAD: usize = 64 * 1024;
/// Most streams at once, the unanswered and the draining ones among them; more are refused.
const MAX_CONNECTIONS: usize = 1024;
/// Most host processes that connected and have not finished their CONNECT line; more wait in the backlog.
const MAX_GREETINGS: usize = 64;
/// Most RSTs waiting for buffers of the guest; at this many its packets wait until it gives some.
const MAX_RESETS: usize = 256;

/// How long others may take.
#[derive(Debug, Clone, Copy)]
struct Patience {
    /// A host process, for its CONNECT line.
    greeting: Duration,
    /// The guest, for its answer to a connection of the host.
    request: Duration,
    /// The guest, for its RST after both directions were closed. (Linux waits as long for ours.)
    close: Duration,
    /// Until accepting is tried again after the process ran out of descriptors or memory.
    accept: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            greeting: Duration::from_secs(10),
            request: Duration::from_secs(20),
            close: Duration::from_secs(8),
            accept: Duration::from_secs(1),
        }
    }
}

/// The device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// Reserved context ids are below 3, and the field has 32 bits with the highest value reserved.
    #[error("guest context id {0} is not between 3 and 4294967294")]
    GuestCid(u32),
    /// The directory of the sockets.
    #[error("failed to open socket directory {path}")]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another VMM owns it, or one that died left it: whoever made the directory has to remove it.
    #[error("socket {path} exists already")]
    SocketExists {
        /// Which.
        path: PathBuf,
    },
    /// The listening socket.
    #[error("failed to listen on socket {path}")]
    Listen {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}
