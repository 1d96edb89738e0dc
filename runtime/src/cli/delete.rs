// SPDX-License-Identifier: Apache-2.0

//! `caisson delete`.

use caisson_runtime::error::RuntimeError;
use caisson_runtime::sandbox::delete::delete;
use caisson_runtime::sandbox::id::ContainerId;
use clap::Args;

use super::Global;

#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    /// The container's id.
    id: String,
    /// Kill it if it runs; no error if there is none.
    #[arg(long, short)]
    force: bool,
}

pub(crate) fn run(global: &Global, args: &DeleteArgs) -> Result<u8, RuntimeError> {
    let id = ContainerId::new(&args.id)?;
    delete(&global.store(), &id, args.force).map(|()| 0)
}
