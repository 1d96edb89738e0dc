// SPDX-License-Identifier: Apache-2.0

//! Everything in the guest: its containers by id, its events, what was set up once for all of them.

use std::collections::HashMap;
use std::future::Future;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use caisson_protocol::agent::agent::CreateSandboxRequest;
use nix::unistd::Pid;

use crate::container::launch::Launcher;
use crate::container::{Container, ContainerError, NewContainer};
use crate::events::Events;
use crate::id::Id;
use crate::machine::{self, MachineError};
use crate::pod_init;
use crate::process::Process;
use crate::reaper::Reaper;
use crate::storage::{Mounted, StorageRequest};

/// Most containers at a time.
const MAX_CONTAINERS: usize = 1024;

#[derive(Debug)]
enum Slot {
    /// Being made or removed: the id is taken.
    Busy,
    Ready(Arc<Container>),
}

/// What [`Sandbox::set_up`] left.
#[derive(Debug, Default)]
struct Pod {
    pid_namespace: Option<Pid>,
    _mounted: Mounted,
}

/// See the module's story.
#[derive(Debug)]
pub(crate) struct Sandbox {
    launcher: Launcher,
    containers: Mutex<HashMap<Id, Slot>>,
    numbers: AtomicU64,
    pod: Mutex<Option<Pod>>,
    ending: AtomicBool,
    /// What happened.
    pub(crate) events: Arc<Events>,
}

impl Sandbox {
    /// A guest without containers. `program` is the agent's own, for helpers.
    pub(crate) fn new(program: PathBuf, reaper: Arc<Reaper>) -> Self {
        Self {
            launcher: Launcher { program, reaper },
            containers: Mutex::default(),
            numbers: AtomicU64::new(1),
            pod: Mutex::new(None),
            ending: AtomicBool::new(false),
            events: Arc::default(),
        }
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<Id, Slot>> {
        { self.containers.lock() }.unwrap_or_else(PoisonError::into_inner)
    }

    /// What the host sets up once.
    ///
    /// # Errors
    /// The second time, or when a part fails.
    pub(crate) fn set_up(&self, request: &CreateSandboxRequest) -> Result<(), SetUpError> {
        let mut pod = self.pod.lock().unwrap_or_else(PoisonError::into_inner);
        if pod.is_some() {
            return Err(SetUpError::Twice);
        }
        let storages =
            StorageRequest::parse_all(&request.storages).map_err(ContainerError::from)?;
        if request.sysctls.len() > machine::MAX_SYSCTLS {
            let text = format!("number of kernel parameters: {}", request.sysctls.len());
            return Err(MachineError::Argument(text).into());
        }
        if request.time_ns != 0 {
            machine::set_time(request.time_ns)?;
        }
        if !request.entropy.is_empty() {
            machine::add_entropy(&request.entropy)?;
        }
        let mounted = Mounted::mount_all(&storages).map_err(ContainerError::from)?;
        if !request.hostname.is_empty() {
            machine::set_hostname(&request.hostname)?;
        }
        for (name, value) in &request.sysctls {
            machine::set_sysctl(name, value)?;
        }
        if request.shm_size_bytes != 0 {
            machine::set_shm_size(request.shm_size_bytes)?;
        }
        let pid_namespace = match request.shared_pid_namespace {
            true => Some(pod_init::spawn(&self.launcher.program).map_err(SetUpError::PodInit)?),
            false => None,
        };
        *pod = Some(Pod {
            pid_namespace,
            _mounted: mounted,
        });
        Ok(())
    }

    /// Makes a container with the rest of the arguments. On failure the id is free again.
    ///
    /// # Errors
    /// When the id is taken, the guest is full or not set up, or it cannot be made.
    pub(crate) async fn create(
        &self,
        id: Id,
        new: impl FnOnce(Id, u64, Option<Pid>, Arc<Events>) -> NewContainer,
    ) -> Result<i32, ContainerError> {
        let pod_pid_namespace = {
            let pod = self.pod.lock().unwrap_or_else(PoisonError::into_inner);
            let pod = pod
                .as_ref()
                .ok_or_else(|| ContainerError::State("the sandbox is not set up yet".into()))?;
            pod.pid_namespace
        };
        self.reserve(&id)?;
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let new = new(id.clone(), number, pod_pid_namespace, self.events.clone());
        match new.create(&self.launcher).await {
            Ok(container) => {
                let pid = container.pid();
                self.containers().insert(id, Slot::Ready(container));
                Ok(pid)
            }
            Err(error) => {
                self.containers().remove(&id);
                Err(error)
            }
        }
    }

    fn reserve(&self, id: &Id) -> Result<(), ContainerError> {
        let mut containers = self.containers();
        if self.ending.load(Ordering::Relaxed) {
            return Err(ContainerError::State("the guest is being shut down".into()));
        }
        if containers.contains_key(id) {
            return Err(ContainerError::Exists(id.clone()));
        }
        if containers.len() >= MAX_CONTAINERS {
            return Err(ContainerError::TooMany(MAX_CONTAINERS, "containers"));
        }
        containers.insert(id.clone(), Slot::Busy);
        Ok(())
    }

    /// The container `id`.
    ///
    /// # Errors
    /// When there is none (or it is not complete).
    pub(crate) fn container(&self, id: &Id) -> Result<Arc<Container>, ContainerError> {
        match self.containers().get(id) {
            Some(Slot::Ready(container)) => Ok(container.clone()),
            _ => Err(ContainerError::NotFound(id.clone())),
        }
    }

    /// A process of a container: an exec, or its own.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn process(
        &self,
        id: &Id,
        exec: Option<&Id>,
    ) -> Result<Arc<Process>, ContainerError> {
        self.container(id)?.process(exec)
    }

    /// For making execs.
    pub(crate) fn launcher(&self) -> &Launcher {
        &self.launcher
    }

    /// Removes a container and forgets it. On failure it stays.
    ///
    /// # Errors
    /// When there is none, it runs, or something of it stays.
    pub(crate) async fn remove(&self, id: &Id, force: bool) -> Result<(), ContainerError> {
        let container = self.container(id)?;
        container.remove(force).await?;
        let mut containers = self.containers();
        let current = containers.get(id);
        if matches!(current, Some(Slot::Ready(now)) if Arc::ptr_eq(now, &container)) {
            containers.remove(id);
        }
        Ok(())
    }

    /// Ends every container: SIGTERM, SIGKILL after `grace`.
    pub(crate) async fn stop_all(&self, grace: Duration) {
        self.ending.store(true, Ordering::Relaxed);
        let containers: Vec<Arc<Container>> = self
            .containers()
            .values()
            .filter_map(|slot| match slot {
                Slot::Ready(container) => Some(container.clone()),
                Slot::Busy => None,
            })
            .collect();
        containers
            .iter()
            .for_each(|container| container.terminate());
        if !within(grace, all_stopped(&containers)).await {
            for container in &containers {
                if let Err(error) = container.signal_all(libc::SIGKILL.unsigned_abs()).await {
                    log::warn!("failed to kill container {}: {error}", container.id);
                }
            }
            within(Duration::from_secs(5), all_stopped(&containers)).await;
        }
    }
}

async fn within(limit: Duration, future: impl Future<Output = ()>) -> bool {
    tokio::time::timeout(limit, future).await.is_ok()
}

async fn all_stopped(containers: &[Arc<Container>]) {
    for container in containers {
        container.stopped().await;
    }
}

/// Why the sandbox was not set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SetUpError {
    /// It is set up.
    #[error("the sandbox is set up already")]
    Twice,
    /// A part of the machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A file system.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// The shared pid namespace.
    #[error("failed to make the pid namespace of the pod")]
    PodInit(#[source] std::io::Error),
}
