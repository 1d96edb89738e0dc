// SPDX-License-Identifier: Apache-2.0

//! `caisson run`: create, start, and in the foreground wait and delete.

use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};

use caisson_runtime::error::RuntimeError;
use caisson_runtime::sandbox::delete::delete;
use caisson_runtime::sandbox::id::ContainerId;
use caisson_runtime::sandbox::process::ProcessWatch;
use caisson_runtime::sandbox::signals;
use caisson_runtime::sandbox::start::start;
use clap::Args;
use rustix::process::Signal;
use tokio::sync::mpsc::UnboundedReceiver;

use super::create::CreateArgs;
use super::{Global, block_on};

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    create: CreateArgs,
    /// Do not wait for the container.
    #[arg(long, short)]
    detach: bool,
    /// Do not delete the container when it has ended.
    #[arg(long)]
    keep: bool,
    /// Accepted and ignored: the parent process is a subreaper where that matters.
    #[arg(long, hide = true)]
    no_subreaper: bool,
}

pub(crate) fn run(global: &Global, args: RunArgs) -> Result<u8, RuntimeError> {
    let id = ContainerId::new(&args.create.id)?;
    let store = global.store();
    block_on(async {
        // Before there is a container: from here on ^C is for it.
        let mut signals = signals::catch().map_err(RuntimeError::system("catch signals"))?;
        let mut child = args.create.create(global, !args.detach)?;
        let started = async { start(&store.open(&id)?).await };
        if let Err(error) = started.await {
            if let Err(error) = delete(&store, &id, true) {
                log::warn!("{}", caisson_runtime::error::chain(&error));
            }
            // Killed by now.
            child.wait().map(drop).unwrap_or_default();
            return Err(error);
        }
        if args.detach {
            return Ok(0);
        }
        let status = wait(&mut child, &mut signals).await?;
        let record = store.open(&id).and_then(|state| state.record());
        if let Some(cause) = record.ok().and_then(|r| r.exit).and_then(|e| e.cause) {
            log::error!("{cause}");
        }
        if !args.keep {
            delete(&store, &id, true)?;
        }
        Ok(status)
    })
}

/// Passes on signals until the per-container process has ended.
async fn wait(child: &mut Child, signals: &mut UnboundedReceiver<i32>) -> Result<u8, RuntimeError> {
    let wait_error = || RuntimeError::system("wait for the container");
    let watch = ProcessWatch::of_child(child.id()).map_err(wait_error())?;
    loop {
        tokio::select! {
            () = watch.ended() => break,
            Some(number) = signals.recv() => {
                if let Some(signal) = Signal::from_named_raw(number) {
                    watch.signal(signal);
                }
            }
        }
    }
    Ok(exit_status(child.wait().map_err(wait_error())?))
}

fn exit_status(status: ExitStatus) -> u8 {
    let number = match (status.code(), status.signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => 255,
    };
    u8::try_from(number).unwrap_or(255)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_killed_process_counts_as_128_and_its_signal() {
        assert_eq!(exit_status(ExitStatus::from_raw(42 << 8)), 42);
        assert_eq!(exit_status(ExitStatus::from_raw(9)), 137);
    }
}
