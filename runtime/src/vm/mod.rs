// SPDX-License-Identifier: Apache-2.0

//! The VMM process: started by way of a helper, watched by pidfd and status pipe, asked on its control socket.

pub mod client;
pub mod launch;
pub mod spawn;
