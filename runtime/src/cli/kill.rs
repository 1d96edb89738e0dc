// SPDX-License-Identifier: Apache-2.0

//! `caisson kill`.

use caisson_runtime::error::RuntimeError;
use caisson_runtime::sandbox::kill::kill;
use caisson_runtime::sandbox::signals;
use clap::Args;

use super::{Global, block_on};

#[derive(Debug, Args)]
pub(crate) struct KillArgs {
    /// The container's id.
    id: String,
    /// Name or number.
    #[arg(default_value = "TERM")]
    signal: String,
    /// To every process in the container.
    #[arg(long, short)]
    all: bool,
}

pub(crate) fn run(global: &Global, args: &KillArgs) -> Result<u8, RuntimeError> {
    let signal = signals::parse(&args.signal)
        .ok_or_else(|| RuntimeError::Unsupported(format!("signal {:?}", args.signal)))?;
    let state = global.open(&args.id)?;
    block_on(kill(&state, signal, args.all)).map(|()| 0)
}
