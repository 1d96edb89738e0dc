// SPDX-License-Identifier: Apache-2.0

//! vsock addresses, and the handshakes on raw streams.
//!
//! On the host every vsock port is a Unix socket in the directory of [`crate::vm::VsockConfig`]:
//!
//! - guest → host: the VMM connects to `port-<N>.sock`, which the host process listens on;
//! - host → guest: a process connects to [`HOST_SOCKET`] and sends `CONNECT <N>\n`; the VMM answers
//!   `OK <source port>\n` when the guest took the connection, or closes. After that line the stream is
//!   the guest's. (Firecracker's and Cloud Hypervisor's convention.)
//!
//! A stdio stream (port [`AGENT_STDIO`]) begins with one [`StdioHello`] line from the host and one `OK\n` or
//! `ERR <text>\n` line of the agent; then it is raw bytes. The agent's half-close (`SHUT_WR`) after stdout or
//! stderr says that everything was sent; the host's half-close on stdin closes the process's stdin.

use serde::{Deserialize, Serialize};

/// Context id of the host (linux/vm_sockets.h, `VMADDR_CID_HOST`).
pub const HOST_CID: u32 = 2;
/// Context id that every guest has; guests are told apart by their VMM's directory.
pub const GUEST_CID: u32 = 3;
/// Port of the host that the agent dials when it serves.
pub const HOST_READY: u32 = 1024;
/// Port of the guest with the agent's ttRPC service.
pub const AGENT_RPC: u32 = 1024;
/// Port of the guest for stdio streams.
pub const AGENT_STDIO: u32 = 1025;
/// Name of the Unix socket through which the host connects to guest ports.
pub const HOST_SOCKET: &str = "vsock.sock";
/// Longest line in any of the handshakes here, bytes, with its newline. Longer ones end the connection.
pub const MAX_LINE: usize = 4096;

/// File name of the Unix socket on which the host serves connections of the guest to host port `port`.
pub fn guest_to_host_socket(port: u32) -> String {
    format!("port-{port}.sock")
}

/// The line the agent sends on [`HOST_READY`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ready {
    /// [`crate::PROTOCOL_VERSION`] of the agent.
    pub protocol_version: u32,
    /// Version of the agent, for people.
    pub agent_version: String,
}

/// Which stream of a process a stdio connection carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// Host to guest.
    Stdin,
    /// Guest to host; with a terminal, everything that it shows.
    Stdout,
    /// Guest to host; not with a terminal.
    Stderr,
}

/// First line of a stdio connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StdioHello {
    /// Id of the container.
    pub container: String,
    /// Id of the exec; empty for the container's own process.
    pub exec: String,
    /// Which of its streams. Each can be attached once.
    pub stream: Stream,
}
