// SPDX-License-Identifier: Apache-2.0

//! `delete`: kills what is left and removes every trace, from the state directory alone.
//!
//! Needs no guest, works at any moment of a container's life, also on a half-made one, and any number of times.

use std::time::Duration;

use rustix::process::Signal;

use super::id::ContainerId;
use super::state::{Record, Status};
use super::store::{StateDir, Store, StoreError};
use crate::error::{OrderError, RuntimeError};
use crate::resources::cgroup::Cgroup;

/// How long killed processes may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// How long the per-container process of a stopped container may take to end by itself, with the exit status
/// that somebody waits for.
const END_LIMIT: Duration = Duration::from_secs(5);

/// Deletes container `id`. With `force` also a running one, and one that is not there is no error.
///
/// # Errors
/// When there is none, when it runs, or when something cannot be removed.
pub fn delete(store: &Store, id: &ContainerId, force: bool) -> Result<(), RuntimeError> {
    let state = match store.open(id) {
        Err(StoreError::NotFound(_)) if force => return Ok(()),
        other => other?,
    };
    if !force {
        let status = state.record()?.status();
        match status {
            // As runc: a container whose process was never started is simply removed.
            Status::Stopped | Status::Created => {}
            Status::Creating | Status::Running | Status::Paused => {
                let id = id.to_string();
                return Err(OrderError::DeleteRunning { id, status }.into());
            }
        }
    }
    match destroy(&state) {
        Err(RuntimeError::Store(StoreError::NotFound(_))) if force => Ok(()),
        other => other,
    }
}

/// Kills all processes of a container and removes its cgroup and state directory.
///
/// # Errors
/// When something does not go away.
pub(crate) fn destroy(state: &StateDir) -> Result<(), RuntimeError> {
    // Also when its VM has just ended: whoever waits for it is to get the right status. Before the lock is taken,
    // which the per-container process needs for writing that down.
    if let Ok(record) = state.record()
        && record.status() == Status::Stopped
        && let Some(monitor) = record.monitor
    {
        monitor.wait_end(END_LIMIT);
    }
    let lock = state.lock()?;
    match lock.record() {
        Ok(record) => kill_all(&record)?,
        // It has no process either, since the record is written before the first one starts.
        Err(StoreError::HalfMade(_)) => {}
        // One that cannot be read may have processes. Without it nobody would find them again.
        Err(error) => return Err(error.into()),
    }
    lock.remove().map_err(RuntimeError::from)
}

fn kill_all(record: &Record) -> Result<(), RuntimeError> {
    let cgroup = record.cgroup.as_deref().map(Cgroup::at);
    if record.monitor.is_none() {
        // No process was written down, so none of ours lives: the one that makes the cgroup does it under the
        // lock that is held here, and writes itself down before it gives that up. What it may have made before
        // it was killed goes; a cgroup with others in it is not ours.
        if let Some(cgroup) = &cgroup {
            cgroup.remove_unused();
        }
        return Ok(());
    }
    if let Some(cgroup) = &cgroup {
        cgroup.kill(KILL_LIMIT)?;
        // Without a cgroup of its own, or if they could not enter it, they are found one by one below.
    }
    for process in [record.vmm, record.monitor].into_iter().flatten() {
        process.signal(Signal::KILL);
        if !process.wait_end(KILL_LIMIT) {
            return Err(RuntimeError::System {
                operation: "kill the container's processes",
                source: std::io::ErrorKind::TimedOut.into(),
            });
        }
    }
    if let Some(cgroup) = &cgroup {
        cgroup.remove()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::process::ProcessRef;
    use super::super::state::Phase;
    use super::super::state::tests::record;
    use super::*;

    #[test]
    fn a_running_container_goes_only_by_force_and_half_made_ones_go() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path());
        let id = ContainerId::new("x").unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let state = store.create(&id).unwrap();
        let mut running = record("x");
        running.phase = Phase::Running;
        running.monitor = ProcessRef::of(i32::try_from(child.id()).unwrap());
        state.lock().unwrap().write_record(&running).unwrap();
        let error = delete(&store, &id, false).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot delete container x that is not stopped: running"
        );
        delete(&store, &id, true).unwrap();
        assert!(!state.path().exists());
        assert!(!child.wait().unwrap().success(), "it was killed");
        delete(&store, &id, true).unwrap();
        let error = delete(&store, &id, false).unwrap_err();
        assert_eq!(error.to_string(), "container does not exist");

        store.create(&id).unwrap();
        assert!(delete(&store, &id, false).is_err());
        delete(&store, &id, true).unwrap();
        assert_eq!(store.list().unwrap(), []);
    }

    #[test]
    fn a_record_that_cannot_be_read_is_not_thrown_away() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path());
        let id = ContainerId::new("x").unwrap();
        let state = store.create(&id).unwrap();
        let mut other = record("x");
        other.version += 1;
        state.lock().unwrap().write_record(&other).unwrap();
        let error = delete(&store, &id, true).unwrap_err();
        assert!(error.to_string().contains("version"), "{error}");
        assert!(state.path().exists());
    }

    #[test]
    fn a_process_that_writes_its_last_words_is_not_kept_from_it() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path());
        let state = store.create(&ContainerId::new("x").unwrap()).unwrap();
        // Stands for a per-container process whose VM has ended: it ends once it had the lock.
        let mut last_words = std::process::Command::new("flock");
        last_words.arg(state.path()).args(["sh", "-c", "exit 7"]);
        let held = state.lock().unwrap();
        let mut child = last_words.spawn().unwrap();
        let mut stopped = record("x");
        stopped.phase = Phase::Stopped;
        stopped.monitor = ProcessRef::of(i32::try_from(child.id()).unwrap());
        held.write_record(&stopped).unwrap();
        drop(held);
        destroy(&state).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(7));
    }
}
