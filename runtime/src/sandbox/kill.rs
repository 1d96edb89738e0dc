// SPDX-License-Identifier: Apache-2.0

//! `kill`: a signal for the container's process, by the agent; SIGKILL also without it.

use std::time::Duration;

use caisson_protocol::error::ErrorCode;
use rustix::process::Signal;

use super::signals::SIGKILL;
use super::state::Status;
use super::store::StateDir;
use crate::bundle::plan::Plan;
use crate::error::{OrderError, RuntimeError};
use crate::guest::client::{GuestClient, GuestError, ProcessId};

/// Sends `signal` to the container's process, or with `all` to every process in it. After SIGKILL of the
/// container it has ended when this returns: if the guest does not see to that in time, its VM is killed.
///
/// # Errors
/// `container not running` when it is not; otherwise what the guest says.
pub async fn kill(state: &StateDir, signal: i32, all: bool) -> Result<(), RuntimeError> {
    let record = state.record()?;
    match record.status() {
        Status::Created | Status::Running | Status::Paused => {}
        Status::Stopped if all => return Ok(()),
        Status::Stopped | Status::Creating => return Err(OrderError::NotRunning.into()),
    }
    let sent = send(state, signal, all).await;
    if signal != SIGKILL {
        return match sent {
            Err(error) => Err(not_running_any_more(state, error).await),
            Ok(()) => Ok(()),
        };
    }
    let limit = match &sent {
        Ok(()) => state
            .read_json::<Plan>(super::PLAN_FILE)
            .map_or(Duration::ZERO, |plan| plan.timeouts.kill()),
        Err(error) => {
            log::warn!("the guest cannot be asked to end its processes: {error}");
            Duration::ZERO
        }
    };
    let Some(monitor) = record.monitor else {
        return Ok(());
    };
    if monitor.ends_within(limit).await {
        return Ok(());
    }
    log::warn!("the container did not end after SIGKILL: killing its VM");
    record.vmm.map(|vmm| vmm.signal(Signal::KILL));
    if !monitor.ends_within(Duration::from_secs(10)).await {
        monitor.signal(Signal::KILL);
    }
    Ok(())
}

async fn send(state: &StateDir, signal: i32, all: bool) -> Result<(), RuntimeError> {
    let plan: Plan = state.read_json(super::PLAN_FILE)?;
    let mut connector = super::connector(state, &plan);
    if signal == SIGKILL {
        connector.limit = connector.limit.min(plan.timeouts.kill());
    }
    let (guest, _) = GuestClient::connect(&connector).await?;
    let process = ProcessId {
        container: state.id().to_string(),
        exec: String::new(),
    };
    let number = u32::try_from(signal).unwrap_or_default();
    Ok(guest.signal(&process, number, all).await?)
}

/// An error because the container has ended meanwhile is told as such.
async fn not_running_any_more(state: &StateDir, error: RuntimeError) -> RuntimeError {
    let refused =
        |error: &GuestError| error.refuses_state() || error.code() == Some(ErrorCode::NotFound);
    if matches!(&error, RuntimeError::Guest(error) if refused(error))
        || super::ended_meanwhile(state, &error).await
    {
        return OrderError::NotRunning.into();
    }
    error
}
