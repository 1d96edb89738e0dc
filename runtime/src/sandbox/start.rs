// SPDX-License-Identifier: Apache-2.0

//! `start`: lets the container's process run.

use caisson_protocol::error::ErrorCode;
use rustix::process::Signal;

use super::monotonic_ns;
use super::state::{Status, Transition};
use super::store::StateDir;
use crate::error::{OrderError, RuntimeError};
use crate::guest::client::GuestError;

/// Starts a created container.
///
/// # Errors
/// When it is not in the state *created*, when its program cannot be run, or when the guest does not answer.
pub async fn start(state: &StateDir) -> Result<(), RuntimeError> {
    let record = state.record()?;
    match record.status() {
        Status::Created => {}
        Status::Stopped => return Err(OrderError::StartStopped.into()),
        Status::Creating => return Err(OrderError::NotRunning.into()),
        Status::Running | Status::Paused => return Err(OrderError::StartRunning.into()),
    }
    let asked_ns = match ask(state).await {
        Ok(asked_ns) => asked_ns,
        Err(RuntimeError::Guest(error)) if error.refuses_state() => {
            return Err(OrderError::StartStopped.into());
        }
        // What else the agent answers is told as it is: it may be the reason for the end.
        Err(
            error @ (RuntimeError::Guest(GuestError::Answer { .. }) | RuntimeError::Command(_)),
        ) => {
            return Err(error);
        }
        Err(error) if super::ended_meanwhile(state, &error).await => {
            return Err(OrderError::StartStopped.into());
        }
        Err(error) => return Err(error),
    };
    let written = state.lock().and_then(|lock| {
        lock.update(|record| {
            // It may have ended by now, and then it stays stopped.
            if let Some(phase) = record.phase.after(Transition::Started) {
                record.phase = phase;
            }
            record.timings_ns.insert("start_asked".into(), asked_ns);
            record.timings_ns.insert("started".into(), monotonic_ns());
        })
    });
    if let Err(error) = written {
        // One that runs and whose state says that it does not would never be ended by its caller.
        record.vmm.map(|vmm| vmm.signal(Signal::KILL));
        return Err(error.into());
    }
    Ok(())
}

/// Asks the agent. Gives back when.
async fn ask(state: &StateDir) -> Result<u64, RuntimeError> {
    let (plan, guest) = super::guest(state).await?;
    let asked_ns = monotonic_ns();
    match guest.start_container(state.id().as_str()).await {
        Ok(()) => Ok(asked_ns),
        // Of two at once one is second, perhaps before the first has written down that it was.
        Err(GuestError::Answer {
            code: ErrorCode::AlreadyExists,
            ..
        }) => Err(OrderError::StartRunning.into()),
        Err(error) => {
            let process = plan.process();
            let program = process.args().as_ref().and_then(|args| args.first());
            Err(RuntimeError::of_command(error, program))
        }
    }
}
