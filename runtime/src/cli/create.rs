// SPDX-License-Identifier: Apache-2.0

//! `caisson create`.

use std::path::PathBuf;
use std::process::Child;

use caisson_runtime::error::RuntimeError;
use caisson_runtime::sandbox::create::{CreateRequest, create};
use caisson_runtime::sandbox::delete::delete;
use caisson_runtime::sandbox::id::ContainerId;
use clap::Args;

use super::{Global, hidden, pid_file};

/// What `create` and `run` have in common.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// The container's id.
    pub(crate) id: String,
    /// Directory of the OCI bundle.
    #[arg(long, short, default_value = ".")]
    bundle: PathBuf,
    /// File to write the per-container process's pid into.
    #[arg(long)]
    pid_file: Option<PathBuf>,
    /// Unix socket to send the terminal's master to.
    #[arg(long)]
    console_socket: Option<PathBuf>,
    /// Accepted: the guest's root is its own.
    #[arg(long)]
    no_pivot: bool,
    /// Accepted: the guest's keyrings are its own.
    #[arg(long)]
    no_new_keyring: bool,
    /// Descriptors to pass to the container: none can be.
    #[arg(long, default_value_t = 0)]
    preserve_fds: u32,
}

impl CreateArgs {
    /// Creates the container; its per-container process is our child.
    pub(crate) fn create(&self, global: &Global, foreground: bool) -> Result<Child, RuntimeError> {
        if self.preserve_fds > 0 {
            return Err(RuntimeError::Unsupported("--preserve-fds".to_owned()));
        }
        let id = ContainerId::new(&self.id)?;
        let config = global.configuration()?;
        let request = CreateRequest {
            id: id.clone(),
            bundle: self.bundle.clone(),
            console_socket: self.console_socket.clone(),
            foreground,
            monitor_arguments: global.arguments(hidden::MONITOR, &id),
        };
        let store = global.store();
        let child = create(&store, &config, &request)?;
        if let Some(path) = &self.pid_file
            && let Err(error) = pid_file::write(path, child.id())
        {
            delete(&store, &id, true)?;
            return Err(error);
        }
        Ok(child)
    }
}

pub(crate) fn run(global: &Global, args: CreateArgs) -> Result<u8, RuntimeError> {
    // The child lives on: it is the container on the host.
    args.create(global, false).map(|_| 0)
}
