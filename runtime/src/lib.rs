// SPDX-License-Identifier: Apache-2.0

//! The host side of Caisson: from an OCI bundle to a container in a microVM of its own, and back to nothing.
//!
//! ```text
//! config.json ─ bundle ─> Plan ─ sandbox::create ─> per-container process (sandbox::monitor)
//!                                                      │ resources: cgroup, detached mounts
//!                                                      │ vm: caisson-vmm in a mount namespace of its own
//!                                                      │ guest: ttRPC and stdio streams over vsock
//!                                                      v
//! start, exec, kill, pause, …: separate processes that find all of it by the state directory (sandbox::store)
//! ```
//!
//! Whatever a container owns on the host hangs off three things: its state directory, its cgroup and its VMM
//! process. [`sandbox::delete`] destroys it from those alone, at any moment, without the guest.
//!
//! The library knows no command line and keeps no process-wide state; the `caisson` binary is one front door
//! over it.

pub mod bundle;
pub mod config;
pub mod error;
pub mod guest;
pub mod resources;
pub mod sandbox;
pub mod vm;

mod sys;
