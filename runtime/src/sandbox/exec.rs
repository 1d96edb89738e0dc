// SPDX-License-Identifier: Apache-2.0

//! `exec`: another process in a running container, with stdio or a terminal of its own.
//!
//! In the foreground the caller's own process carries it; detached, a process that it leaves behind, whose pid
//! goes into the pid file. Both do the same ([`exec`]).

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use caisson_protocol::agent::agent::ExecProcessRequest;
use caisson_protocol::error::ErrorCode;
use oci_spec::runtime::Process;
use serde::{Deserialize, Serialize};

use super::monitor::first_size;
use super::signals::{self, SIGWINCH};
use super::state::Status;
use super::store::StateDir;
use crate::bundle::plan::Plan;
use crate::bundle::translate::guest_process;
use crate::bundle::validate::check_process;
use crate::error::{CommandError, OrderError, RuntimeError, chain};
use crate::guest::client::{GuestClient, GuestError, ProcessId, exit_status};
use crate::guest::console::{Console, Size};
use crate::guest::stdio::{LocalStdio, Outputs, attach};

/// What a caller asks for.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    /// The runtime-spec's process object.
    pub process: Process,
    /// Where to send the terminal's master.
    pub console_socket: Option<PathBuf>,
    /// Nobody stays at this process's terminal.
    pub detached: bool,
}

/// The container's own process with its arguments taken out: what runc's `exec` starts from.
///
/// # Errors
/// When the container is not there.
pub fn process_of_container(state: &StateDir) -> Result<Process, RuntimeError> {
    let plan: Plan = state.read_json(super::PLAN_FILE)?;
    let mut process = plan.process();
    process.set_args(None).set_terminal(None);
    Ok(process)
}

/// Refuses what cannot be, before anything is started.
///
/// # Errors
/// When the container does not run, or the request is wrong.
pub fn check(state: &StateDir, request: &ExecRequest) -> Result<(), RuntimeError> {
    match state.record()?.status() {
        Status::Running | Status::Created => {}
        Status::Paused => return Err(OrderError::ExecPaused.into()),
        Status::Stopped | Status::Creating => return Err(OrderError::ExecStopped.into()),
    }
    check_process(&request.process, "process")?;
    let terminal = request.process.terminal().unwrap_or(false);
    match (&request.console_socket, terminal, request.detached) {
        (None, true, true) => Err(OrderError::DetachedTerminal.into()),
        (Some(_), false, _) | (Some(_), true, false) => {
            Err(OrderError::ConsoleSocketWithoutTerminal.into())
        }
        (None, _, _) | (Some(_), true, true) => Ok(()),
    }
}

/// Runs the process to its end with this process's stdio; gives back its exit status. `started` is called once
/// it runs.
///
/// # Errors
/// When it cannot be started, or the container ends before it.
pub async fn exec(
    state: &StateDir,
    request: &ExecRequest,
    started: impl FnOnce(),
) -> Result<u8, RuntimeError> {
    check(state, request)?;
    let mut signals = signals::catch().map_err(RuntimeError::system("catch signals"))?;
    let (plan, guest) = match super::guest(state).await {
        Err(error) if super::ended_meanwhile(state, &error).await => {
            return Err(OrderError::ExecStopped.into());
        }
        other => other?,
    };
    let connector = super::connector(state, &plan);
    let console = open_console(request)?;
    let process = ProcessId {
        container: state.id().to_string(),
        exec: unique_id(),
    };
    let local = match &console {
        Some(console) => console.stdio()?,
        None => LocalStdio::inherited(),
    };
    if let Err(error) = begin(&guest, request, &process, &local, console.as_ref()).await {
        return Err(ended_instead(state, error).await);
    }
    let outputs = match attach(&connector, &process, local).await {
        Ok(outputs) => outputs,
        Err(error) => {
            let error = ended_instead(state, error.into()).await;
            if !matches!(error, RuntimeError::Command(_)) {
                // It must not run on without anybody who knows of it.
                let killed = guest
                    .signal(&process, libc::SIGKILL.unsigned_abs(), false)
                    .await;
                killed.unwrap_or_else(|error| log::warn!("{}", chain(&error)));
            }
            return Err(error);
        }
    };
    started();
    let status = wait(&guest, &process, outputs, console.as_ref(), &mut signals).await;
    drop(console);
    status
}

/// What failed because the container ended says so.
async fn ended_instead(state: &StateDir, error: RuntimeError) -> RuntimeError {
    // It refuses an exec for its state when the container has ended, perhaps before that was written down, or is
    // paused.
    let paused = || state.record().is_ok_and(|record| record.paused);
    match error {
        RuntimeError::Guest(error) if error.refuses_state() && !paused() => {
            OrderError::ExecStopped.into()
        }
        RuntimeError::Guest(GuestError::Answer { code, .. }) if code != ErrorCode::Internal => {
            error
        }
        _ if !super::ended_meanwhile(state, &error).await => error,
        RuntimeError::Guest(broken) => CommandError::ContainerEnded(broken).into(),
        other => other,
    }
}

fn open_console(request: &ExecRequest) -> Result<Option<Console>, RuntimeError> {
    if !request.process.terminal().unwrap_or(false) {
        return Ok(None);
    }
    let console = match &request.console_socket {
        Some(socket) => Console::send_to(socket, first_size(&request.process), true)?,
        None => Console::own()?,
    };
    Ok(Some(console))
}

async fn begin(
    guest: &GuestClient,
    request: &ExecRequest,
    process: &ProcessId,
    local: &LocalStdio,
    console: Option<&Console>,
) -> Result<(), RuntimeError> {
    let mut warnings = Vec::new();
    let asked = guest_process(request.process.clone(), &mut warnings);
    let program = asked.args().as_ref().and_then(|args| args.first()).cloned();
    let mut stdio = local.request();
    if let Some(console) = console {
        let Size { rows, columns } = console.size();
        stdio.terminal = true;
        stdio.rows = rows.into();
        stdio.columns = columns.into();
    }
    let json = serde_json::to_vec(&asked).map_err(std::io::Error::from);
    let message = ExecProcessRequest {
        container_id: process.container.clone(),
        exec_id: process.exec.clone(),
        process_json: json.map_err(RuntimeError::system("write the process"))?,
        stdio: Some(stdio).into(),
        ..Default::default()
    };
    let begun = guest.exec_process(message).await;
    begun.map_err(|error| RuntimeError::of_command(error, program.as_ref()))
}

async fn wait(
    guest: &GuestClient,
    process: &ProcessId,
    outputs: Outputs,
    console: Option<&Console>,
    signals: &mut tokio::sync::mpsc::UnboundedReceiver<i32>,
) -> Result<u8, RuntimeError> {
    let mut ended = std::pin::pin!(guest.wait_process(process));
    let answer = loop {
        tokio::select! {
            answer = &mut ended => break answer,
            Some(signal) = signals.recv() => forward(guest, process, console, signal),
        }
    };
    outputs.drained().await;
    match answer {
        Ok(answer) => {
            if let Err(error) = guest.remove_process(process).await {
                // The container may be gone with it by now.
                log::debug!("{}", chain(&error));
            }
            Ok(exit_status(&answer))
        }
        Err(error) => Err(CommandError::ContainerEnded(error).into()),
    }
}

fn forward(guest: &GuestClient, process: &ProcessId, console: Option<&Console>, signal: i32) {
    let (guest, process) = (guest.clone(), process.clone());
    let size = console.map(Console::size);
    tokio::spawn(async move {
        let done = match (signal, size) {
            (SIGWINCH, Some(size)) => guest.resize_pty(&process, size.rows, size.columns).await,
            (SIGWINCH, None) => Ok(()),
            (_, _) => {
                let number = u32::try_from(signal).unwrap_or_default();
                guest.signal(&process, number, false).await
            }
        };
        done.unwrap_or_else(|error| log::warn!("{}", chain(&error)));
    });
}

/// An id that no other exec of this container has: who and when.
fn unique_id() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |now| now.as_nanos());
    format!("exec-{}-{now:x}", std::process::id())
}
