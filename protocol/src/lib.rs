// SPDX-License-Identifier: Apache-2.0

//! Everything in Caisson that crosses a process boundary, once.
//!
//! ```text
//!  caisson (CLI, per-container process)          host
//!     │ VmConfig on stdin, VmEvent lines on the status pipe, control requests on a Unix socket
//!     v
//!  caisson-vmm ────────────── KVM ──────────────
//!     ^                                          guest
//!     │ kernel command line (BootParams), ttRPC and raw byte streams over vsock
//!     v
//!  caisson-agent (PID 1)
//! ```
//!
//! - [`vm`]: the microVM's configuration, one JSON document;
//! - [`control`]: the VMM's control socket and its status pipe, newline-delimited JSON;
//! - [`boot`]: what the host tells the agent by the kernel's command line;
//! - [`ports`]: vsock addresses and the small handshakes on raw streams;
//! - [`agent`]: the agent's ttRPC service, generated from `proto/agent.proto`;
//! - [`error`]: error codes of the agent's answers.
//!
//! # Order of calls
//!
//! 1. The host listens for the guest on [`ports::HOST_READY`], then starts the VMM.
//! 2. The agent connects there when it serves, and sends one [`ports::Ready`] line.
//! 3. The host connects to [`ports::AGENT_RPC`]: `Handshake`, then once per guest `CreateSandbox`.
//! 4. Per container: `CreateContainer`; the host attaches the streams on [`ports::AGENT_STDIO`];
//!    `StartContainer`; `ExecProcess` (with its own streams) any number of times; `WaitProcess`;
//!    `RemoveContainer`.
//! 5. `Shutdown`, or the host simply ends the VMM.
//!
//! Neither end trusts the other: the guest is hostile to the host, and containers to the agent.

#![deny(unsafe_code)]

pub mod boot;
pub mod control;
pub mod error;
pub mod ports;
pub mod vm;

/// The agent's messages ([`agent::agent`]) and its ttRPC client and service ([`agent::agent_ttrpc`]).
#[expect(
    clippy::all,
    clippy::restriction,
    clippy::pedantic,
    reason = "generated from proto/agent.proto, where the documentation is"
)]
pub mod agent {
    include!(concat!(env!("OUT_DIR"), "/modules.rs"));
}

/// Version of everything in this crate together. Host and guest must have the same.
pub const PROTOCOL_VERSION: u32 = 1;
