// SPDX-License-Identifier: Apache-2.0

//! `caisson state`.

use caisson_runtime::error::RuntimeError;
use clap::Args;

use super::{Global, print_json};

#[derive(Debug, Args)]
pub(crate) struct StateArgs {
    /// The container's id.
    id: String,
}

pub(crate) fn run(global: &Global, args: &StateArgs) -> Result<u8, RuntimeError> {
    let record = global.open(&args.id)?.record()?;
    print_json(&record.oci_state())?;
    Ok(0)
}
