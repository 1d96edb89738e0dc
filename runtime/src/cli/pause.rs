// SPDX-License-Identifier: Apache-2.0

//! `caisson pause` and `caisson resume`.

use caisson_runtime::error::RuntimeError;
use caisson_runtime::sandbox::control;
use clap::Args;

use super::{Global, block_on};

#[derive(Debug, Args)]
pub(crate) struct PauseArgs {
    /// The container's id.
    id: String,
}

#[derive(Debug, Args)]
pub(crate) struct ResumeArgs {
    /// The container's id.
    id: String,
}

pub(crate) fn pause(global: &Global, args: &PauseArgs) -> Result<u8, RuntimeError> {
    block_on(control::pause(&global.open(&args.id)?)).map(|()| 0)
}

pub(crate) fn resume(global: &Global, args: &ResumeArgs) -> Result<u8, RuntimeError> {
    block_on(control::resume(&global.open(&args.id)?)).map(|()| 0)
}
