// SPDX-License-Identifier: Apache-2.0

//! The steps that ask a running container for something: pause, resume, ps, update.

use caisson_protocol::agent::agent::ProcessInfo;
use oci_spec::runtime::LinuxResources;

use super::state::Status;
use super::store::StateDir;
use crate::bundle::translate::guest_resources;
use crate::error::{OrderError, RuntimeError};
use crate::guest::client::clean;

/// Most processes that are listed; a guest may claim any number.
const MAX_PROCESSES: usize = 65536;

/// Freezes the container's processes.
///
/// # Errors
/// When it does not run, or the guest fails.
pub async fn pause(state: &StateDir) -> Result<(), RuntimeError> {
    match state.record()?.status() {
        Status::Running | Status::Created => {}
        Status::Paused | Status::Stopped | Status::Creating => {
            return Err(OrderError::NotRunning.into());
        }
    }
    let (_, guest) = super::guest(state).await?;
    guest.pause(state.id().as_str()).await?;
    let written = state
        .lock()
        .and_then(|lock| lock.update(|record| record.paused = true));
    if let Err(error) = written {
        // A frozen container that its state says runs is worse than one that runs on.
        let undone = guest.resume(state.id().as_str()).await;
        undone.unwrap_or_else(|error| log::warn!("{}", crate::error::chain(&error)));
        return Err(error.into());
    }
    Ok(())
}

/// Lets them go on.
///
/// # Errors
/// When it is not paused, or the guest fails.
pub async fn resume(state: &StateDir) -> Result<(), RuntimeError> {
    let record = state.record()?;
    if record.status() == Status::Stopped || !record.paused {
        return Err(OrderError::NotPaused.into());
    }
    let (_, guest) = super::guest(state).await?;
    guest.resume(state.id().as_str()).await?;
    state.lock()?.update(|record| record.paused = false)?;
    Ok(())
}

/// The container's processes. Texts are cleaned; pids are the guest's.
///
/// # Errors
/// When it does not run, or the guest fails.
pub async fn processes(state: &StateDir) -> Result<Vec<ProcessInfo>, RuntimeError> {
    if matches!(state.record()?.status(), Status::Stopped | Status::Creating) {
        return Err(OrderError::NotRunning.into());
    }
    let (_, guest) = super::guest(state).await?;
    let mut answer = guest.list_processes(state.id().as_str()).await?;
    answer.processes.truncate(MAX_PROCESSES);
    for process in &mut answer.processes {
        process.command = clean(&process.command);
        process.terminal = clean(&process.terminal);
    }
    Ok(answer.processes)
}

/// Changes the container's limits in the guest. The size of the VM stays.
///
/// # Errors
/// When it does not run, or the guest fails.
pub async fn update(state: &StateDir, resources: LinuxResources) -> Result<(), RuntimeError> {
    if matches!(state.record()?.status(), Status::Stopped | Status::Creating) {
        return Err(OrderError::NotRunning.into());
    }
    let mut warnings = Vec::new();
    let resources = guest_resources(resources, &mut warnings);
    for warning in warnings {
        log::warn!("{warning}");
    }
    let json = serde_json::to_vec(&resources).map_err(std::io::Error::from);
    let json = json.map_err(RuntimeError::system("write the resources"))?;
    let (_, guest) = super::guest(state).await?;
    Ok(guest.update(state.id().as_str(), json).await?)
}
