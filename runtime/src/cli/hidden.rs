// SPDX-License-Identifier: Apache-2.0

//! Sub-commands that only this program itself runs: the processes that `create` and `exec -d` leave behind.

use std::ffi::CStr;
use std::path::PathBuf;

use caisson_runtime::error::RuntimeError;
use caisson_runtime::sandbox::exec::{self, ExecRequest};
use caisson_runtime::sandbox::id::ContainerId;
use caisson_runtime::sandbox::monitor::{self, MonitorRequest};
use caisson_runtime::sandbox::report::{Channel, Report};
use clap::Args;

use super::{Global, block_on};

/// The per-container process.
pub(crate) const MONITOR: &str = "monitor";
/// The process of a detached exec.
pub(crate) const EXEC_MONITOR: &str = "exec-monitor";

#[derive(Debug, Args)]
pub(crate) struct MonitorArgs {
    id: String,
    #[arg(long)]
    sync_fd: i32,
    #[arg(long)]
    console_socket: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct ExecMonitorArgs {
    id: String,
    #[arg(long)]
    sync_fd: i32,
}

/// The process that becomes a VMM, or does something in the mount namespace of one.
pub(crate) fn launch_helper() -> Result<u8, RuntimeError> {
    name(c"caisson-launch");
    caisson_runtime::vm::launch::run_helper()?;
    Ok(0)
}

/// What `ps` shows: having been started by /proc/self/exe it would be `exe`.
fn name(name: &CStr) {
    // It is only for people.
    rustix::thread::set_name(name).unwrap_or_default();
}

pub(crate) fn monitor(global: &Global, args: MonitorArgs) -> Result<u8, RuntimeError> {
    let channel = Channel::inherited(args.sync_fd)?;
    name(c"caisson-monitor");
    let request = MonitorRequest {
        id: ContainerId::new(&args.id)?,
        console_socket: args.console_socket,
        channel,
    };
    block_on(async { Ok(monitor::monitor(&global.store(), request).await) })
}

pub(crate) fn exec_monitor(global: &Global, args: &ExecMonitorArgs) -> Result<u8, RuntimeError> {
    let mut channel = Channel::inherited(args.sync_fd)?;
    name(c"caisson-exec");
    // A session of its own, for a controlling terminal; fails only where it has one already.
    rustix::process::setsid().map(drop).unwrap_or_default();
    let request: ExecRequest = channel
        .receive()
        .map_err(RuntimeError::system("read the request"))?
        .ok_or_else(|| RuntimeError::Unsupported("exec-monitor without a request".to_owned()))?;
    let state = global.open(&args.id)?;
    let mut channel = Some(channel);
    let mut report = |report: Report| {
        if let Some(mut channel) = channel.take() {
            // The caller may be gone; the process runs all the same.
            channel.send(&report).unwrap_or_default();
        }
    };
    let status = block_on(exec::exec(&state, &request, || report(Report::Ready {})));
    match status {
        Ok(status) => Ok(status),
        Err(error) => {
            report(Report::of(&error));
            // The caller prints it.
            Ok(error.exit_status())
        }
    }
}
