// SPDX-License-Identifier: Apache-2.0

//! `caisson start`.

use caisson_runtime::error::RuntimeError;
use caisson_runtime::sandbox::start::start;
use clap::Args;

use super::{Global, block_on};

#[derive(Debug, Args)]
pub(crate) struct StartArgs {
    /// The container's id.
    id: String,
}

pub(crate) fn run(global: &Global, args: &StartArgs) -> Result<u8, RuntimeError> {
    let state = global.open(&args.id)?;
    block_on(start(&state)).map(|()| 0)
}
