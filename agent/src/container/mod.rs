// SPDX-License-Identifier: Apache-2.0

//! A container: its directory and cgroup, its first process, its execs.
//!
//! ```text
//! create ──> Created ── start ──> Running <── pause, resume ──> Paused
//!                │                   │                             │
//!                └── the first process ends, in any state ──> Stopped ── remove
//! ```
//!
//! Calls that change the state wait for one another; signals, waits and questions do not.

pub(crate) mod cgroup;
mod create;
mod cwd;
mod error;
pub(crate) mod launch;
pub(crate) mod processes;
pub(crate) mod spec;

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use caisson_protocol::agent::agent::{ProcessInfo, state_container_response};
use libcgroups::common::{CgroupManager, ControllerOpt};
use oci_spec::runtime::{LinuxResources, Spec};

use self::cgroup::Cgroup;
pub(crate) use self::create::{NewContainer, NewExec};
pub(crate) use self::error::ContainerError;
use crate::events::Events;
use crate::helper::channel::AgentEnd;
use crate::id::Id;
use crate::process::{Finished, Process};
use crate::storage::Mounted;

/// Most execs of one container that are not yet forgotten.
pub(crate) const MAX_EXECS: usize = 1024;
/// Where containers have their directories.
pub(crate) const DIRECTORY: &str = "/run/caisson/containers";

/// As in the protocol.
pub(crate) type Status = state_container_response::Status;

#[derive(Debug)]
enum Phase {
    /// With the channel on which its execution is heard of.
    Created(Option<AgentEnd>),
    Running,
    Paused,
}

#[derive(Debug)]
enum Exec {
    /// Being made: the id is taken.
    Making,
    Ready(Arc<Process>),
}

/// See the module's story.
#[derive(Debug)]
pub(crate) struct Container {
    /// The host's id.
    pub(crate) id: Id,
    number: u64,
    directory: PathBuf,
    cgroup: Cgroup,
    spec: Spec,
    init: Arc<Process>,
    phase: tokio::sync::Mutex<Phase>,
    execs: Mutex<HashMap<Id, Exec>>,
    next_exec: AtomicU64,
    oom_watch: tokio::task::AbortHandle,
    _mounted: Mounted,
    events: Arc<Events>,
}

impl Drop for Container {
    fn drop(&mut self) {
        self.oom_watch.abort();
    }
}

fn wrong(text: impl Into<String>) -> ContainerError {
    ContainerError::State(text.into())
}

impl Container {
    fn execs(&self) -> MutexGuard<'_, HashMap<Id, Exec>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The container's own process, or an exec.
    ///
    /// # Errors
    /// When there is no such exec.
    pub(crate) fn process(&self, exec: Option<&Id>) -> Result<Arc<Process>, ContainerError> {
        let Some(exec) = exec else {
            return Ok(self.init.clone());
        };
        match self.execs().get(exec) {
            Some(Exec::Ready(process)) => Ok(process.clone()),
            _ => Err(ContainerError::NoExec(exec.clone(), self.id.clone())),
        }
    }

    /// Executes the created process's program.
    ///
    /// # Errors
    /// When it is started already, has ended, or cannot be executed.
    pub(crate) async fn start(&self) -> Result<(), ContainerError> {
        let mut phase = self.phase.lock().await;
        let Phase::Created(channel) = &mut *phase else {
            return Err(ContainerError::Started(self.id.clone()));
        };
        let channel = channel.take().filter(|_| !self.init.has_exited());
        let channel = channel.ok_or_else(|| wrong(format!("container {} has stopped", self.id)))?;
        *phase = Phase::Running;
        Ok(launch::start(&self.directory, channel).await?)
    }

    /// Where it is in its life.
    pub(crate) async fn status(&self) -> Status {
        if self.init.has_exited() {
            return Status::STOPPED;
        }
        match &*self.phase.lock().await {
            Phase::Created(_) => Status::CREATED,
            Phase::Running => Status::RUNNING,
            Phase::Paused => Status::PAUSED,
        }
    }

    /// Pid of its first process.
    pub(crate) fn pid(&self) -> i32 {
        self.init.pid
    }

    /// Freezes (or thaws) it.
    ///
    /// # Errors
    /// When it does not run (or is not paused).
    pub(crate) async fn pause(&self, pause: bool) -> Result<(), ContainerError> {
        let mut phase = self.phase.lock().await;
        if self.init.has_exited() {
            return Err(wrong(format!("container {} has stopped", self.id)));
        }
        let next = match (&*phase, pause) {
            (Phase::Running, true) => Phase::Paused,
            (Phase::Paused, false) => Phase::Running,
            (Phase::Paused, true) => {
                return Err(wrong(format!("container {} is paused already", self.id)));
            }
            (Phase::Created(_), _) => {
                return Err(wrong(format!("container {} is not running", self.id)));
            }
            (Phase::Running, false) => {
                return Err(wrong(format!("container {} is not paused", self.id)));
            }
        };
        self.cgroup.freeze(pause).await?;
        *phase = next;
        Ok(())
    }

    /// Sends a signal to one process.
    ///
    /// # Errors
    /// When it has ended or does not exist, or for a number that is no signal.
    pub(crate) fn signal(&self, exec: Option<&Id>, signal: u32) -> Result<(), ContainerError> {
        let signal = checked_signal(signal)?;
        let process = self.process(exec)?;
        // It is reaped by the thread that runs this, so the pid is its own as long as this says so.
        if process.has_exited() {
            return Err(wrong("the process has ended already"));
        }
        crate::sys::send_signal(process.pid, signal)
            .map_err(|errno| ContainerError::System("send the signal", errno.into()))
    }

    /// Sends a signal to every process in the container, also when its first has ended.
    ///
    /// # Errors
    /// For a number that is no signal, or when the cgroup cannot be used.
    pub(crate) async fn signal_all(&self, signal: u32) -> Result<(), ContainerError> {
        let signal = checked_signal(signal)?;
        if signal == libc::SIGKILL {
            return Ok(self.cgroup.kill()?);
        }
        let phase = self.phase.lock().await;
        let frozen = matches!(*phase, Phase::Paused);
        Ok(self.cgroup.signal(signal, frozen).await?)
    }

    /// Sets new limits.
    ///
    /// # Errors
    /// When the kernel refuses one.
    pub(crate) async fn update(&self, resources: LinuxResources) -> Result<(), ContainerError> {
        let _phase = self.phase.lock().await;
        let cgroup = Cgroup::name(self.number);
        // Lowering a memory limit reclaims in this call.
        let applied = tokio::task::spawn_blocking(move || {
            let root = PathBuf::from(crate::boot::mounts::CGROUP_ROOT);
            let manager = libcgroups::v2::manager::Manager::new(root, cgroup)
                .map_err(|error| error.to_string())?;
            let options = ControllerOpt {
                resources: &resources,
                disable_oom_killer: false,
                oom_score_adj: None,
                freezer_state: None,
            };
            manager.apply(&options).map_err(|error| error.to_string())
        });
        let failed = |error: tokio::task::JoinError| Err(error.to_string());
        applied
            .await
            .unwrap_or_else(failed)
            .map_err(ContainerError::Resources)
    }

    /// The cgroup's files.
    pub(crate) fn statistics(&self) -> HashMap<String, String> {
        self.cgroup.statistics()
    }

    /// Its processes.
    pub(crate) fn processes(&self) -> Vec<ProcessInfo> {
        let execs = self
            .execs()
            .iter()
            .filter_map(|(id, exec)| match exec {
                Exec::Ready(process) if !process.has_exited() => {
                    Some((process.pid, id.as_str().to_owned()))
                }
                _ => None,
            })
            .collect();
        processes::list(&self.cgroup.pids(), &execs)
    }

    /// Waits for the end of a process and for its output.
    ///
    /// # Errors
    /// When there is no such process.
    pub(crate) async fn wait(&self, exec: Option<&Id>) -> Result<(Finished, bool), ContainerError> {
        let finished = self.process(exec)?.finished().await;
        let finished = finished.ok_or_else(|| wrong("the process was forgotten"))?;
        Ok((finished, self.cgroup.oom_kills() > 0))
    }

    /// Forgets an ended exec.
    ///
    /// # Errors
    /// When it runs or does not exist.
    pub(crate) fn remove_exec(&self, exec: &Id) -> Result<(), ContainerError> {
        if !self.process(Some(exec))?.has_exited() {
            return Err(wrong(format!("exec {exec} is running")));
        }
        self.execs().remove(exec);
        Ok(())
    }

    /// Kills what is left, waits for its end, and removes what the container had in the guest.
    ///
    /// # Errors
    /// While it runs, unless `force`; or when something stays.
    pub(crate) async fn remove(&self, force: bool) -> Result<(), ContainerError> {
        let mut phase = self.phase.lock().await;
        let started = !matches!(*phase, Phase::Created(_));
        if started && !force && !self.init.has_exited() {
            return Err(wrong(format!("container {} is running", self.id)));
        }
        if matches!(*phase, Phase::Paused) {
            // What is frozen is killed all the same, but is slow to leave a frozen cgroup.
            self.cgroup.freeze(false).await?;
            *phase = Phase::Running;
        }
        self.cgroup.remove().await?;
        self.init.exited().await;
        match fs::remove_dir_all(&self.directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(
                ContainerError::System("remove the container's directory", error),
            ),
            _ => Ok(()),
        }
    }

    /// Asks its first process to end.
    pub(crate) fn terminate(&self) {
        if !self.init.has_exited() {
            // Who ended in between needs no asking.
            let _ = crate::sys::send_signal(self.init.pid, libc::SIGTERM);
        }
    }

    /// Waits until its first process has ended.
    pub(crate) async fn stopped(&self) {
        self.init.exited().await;
    }

    fn next_exec(&self) -> u64 {
        self.next_exec.fetch_add(1, Ordering::Relaxed)
    }
}

fn checked_signal(signal: u32) -> Result<i32, ContainerError> {
    let number = i32::try_from(signal).ok();
    let number = number.filter(|number| (1..=libc::SIGRTMAX()).contains(number));
    number.ok_or_else(|| ContainerError::Argument(format!("{signal} is no signal")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_those_the_kernel_has() {
        for good in [1, 9, 15, 34, 64] {
            assert!(checked_signal(good).is_ok(), "{good}");
        }
        for bad in [0, 65, u32::MAX, 1 << 31] {
            assert!(checked_signal(bad).is_err(), "{bad}");
        }
    }
}
