// SPDX-License-Identifier: Apache-2.0

//! The control socket (see [`caisson_protocol::control`]): one loop in the main thread that waits for requests,
//! for the end of the machine, and for signals that ask for it.
//!
//! [`connection`] is one client's lines, [`requests`] what they do.

pub mod connection;
pub mod requests;
pub mod server;

pub use server::{ControlError, ControlServer};
