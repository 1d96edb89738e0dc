// SPDX-License-Identifier: Apache-2.0

//! The agent in the guest: its ttRPC service, the raw streams of processes, and terminals on this side.
//!
//! Everything that comes from there is hostile: messages are bounded (ttRPC: 4 MiB), texts cut and cleaned before
//! anybody sees them, numbers clamped, and every call but the wait for a process's end has a deadline.

pub mod client;
pub mod console;
pub mod stdio;
