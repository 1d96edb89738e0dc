// SPDX-License-Identifier: Apache-2.0

//! `start`: lets the container's process run.

use super::monotonic_ns;
use super::state::{Status, Transition};
use super::store::StateDir;
use crate::error::{OrderError, RuntimeError};

/// Starts a created container.
///
/// # Errors
/// When it is not in the state *created*, when its program cannot be run, or when the guest does not answer.
pub async fn start(state: &StateDir) -> Result<(), RuntimeError> {
    match state.record()?.status() {
        Status::Created => {}
        Status::Stopped => return Err(OrderError::StartStopped.into()),
        Status::Creating => return Err(OrderError::NotRunning.into()),
        Status::Running | Status::Paused => return Err(OrderError::StartRunning.into()),
    }
    let (plan, guest) = super::guest(state).await?;
    let asked_ns = monotonic_ns();
    if let Err(error) = guest.start_container(state.id().as_str()).await {
        let process = plan.process();
        let program = process.args().as_ref().and_then(|args| args.first());
        return Err(RuntimeError::of_command(error, program));
    }
    state.lock()?.update(|record| {
        // It may have ended by now, and then it stays stopped.
        if let Some(phase) = record.phase.after(Transition::Started) {
            record.phase = phase;
        }
        record.timings_ns.insert("start_asked".into(), asked_ns);
        record.timings_ns.insert("started".into(), monotonic_ns());
    })?;
    Ok(())
}
