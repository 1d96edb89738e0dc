// SPDX-License-Identifier: Apache-2.0

//! Making a container, and processes in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use caisson_protocol::agent::agent::{Event, Stdio, event};
use nix::unistd::Pid;
use oci_spec::runtime::{Process as SpecProcess, Spec};
use tokio::sync::oneshot;

use super::cgroup::Cgroup;
use super::launch::{self, Launched, Launcher};
use super::{Container, ContainerError, DIRECTORY, Exec, MAX_EXECS, Phase, cwd, spec, wrong};
use crate::events::Events;
use crate::helper::SPEC_FILE;
use crate::helper::channel::{AgentEnd, Request, Task};
use crate::id::Id;
use crate::process::stdio::{HostEnds, make_pipes};
use crate::process::{Finished, Process, resize};
use crate::reaper::Exit;
use crate::storage::{Mounted, StorageRequest};

/// What a new container is made of.
#[derive(Debug)]
pub(crate) struct NewContainer {
    /// The host's id.
    pub(crate) id: Id,
    /// Our number of it, never used twice.
    pub(crate) number: u64,
    /// Its specification as the host sent it.
    pub(crate) spec: Spec,
    /// File systems of its own.
    pub(crate) storages: Vec<StorageRequest>,
    /// Its streams.
    pub(crate) stdio: Stdio,
    /// First process of the pid namespace that all containers share, if they do.
    pub(crate) pod_pid_namespace: Option<Pid>,
    /// Where its exits and OOM kills go.
    pub(crate) events: Arc<Events>,
}

/// What a new exec is made of.
#[derive(Debug)]
pub(crate) struct NewExec {
    /// The host's id.
    pub(crate) id: Id,
    /// The process.
    pub(crate) process: SpecProcess,
    /// Its streams.
    pub(crate) stdio: Stdio,
}

/// A process before anybody knows of it.
struct Made {
    pid: i32,
    exit: oneshot::Receiver<Exit>,
    ends: HostEnds,
    channel: AgentEnd,
}

impl NewContainer {
    /// Makes the container; its process waits for its start. On failure nothing is left.
    ///
    /// # Errors
    /// When a part of the specification is wrong or cannot be done.
    pub(crate) async fn create(
        self,
        launcher: &Launcher,
    ) -> Result<Arc<Container>, ContainerError> {
        let spec = spec::adapt(self.spec.clone(), self.pod_pid_namespace)?;
        let mounted = Mounted::mount_all(&self.storages)?;
        cwd::make(&spec);
        let directory = Path::new(DIRECTORY).join(self.number.to_string());
        let cgroup = Cgroup::of(self.number);
        let request = Request {
            task: Task::Create,
            name: self.number.to_string(),
            directory: directory.clone(),
            cgroup: Cgroup::name(self.number),
            terminal: self.stdio.terminal,
        };
        match make(launcher, &request, &spec, &self.stdio).await {
            Ok(made) => Ok(self.finish(spec, mounted, directory, made)),
            Err(error) => {
                let out_of_memory = cgroup.oom_kills() > 0;
                let removed = cgroup.remove().await;
                let forgotten = fs::remove_dir_all(&directory);
                if let Err(error) = removed {
                    log::error!("failed to clean up after a container that was not made: {error}");
                } else if let Err(error) = forgotten {
                    log::warn!("failed to remove the directory of a container: {error}");
                }
                Err(match error {
                    ContainerError::Launch(_) if out_of_memory => ContainerError::OutOfMemory,
                    error => error,
                })
            }
        }
    }

    fn finish(
        self,
        spec: Spec,
        mounted: Mounted,
        directory: PathBuf,
        made: Made,
    ) -> Arc<Container> {
        let cgroup = Cgroup::of(self.number);
        let oom_watch = tokio::spawn(watch_oom(
            cgroup.clone(),
            self.id.clone(),
            self.events.clone(),
        ));
        let on_exit = exit_event(self.id.clone(), None, self.events.clone());
        Arc::new(Container {
            id: self.id,
            number: self.number,
            directory,
            cgroup,
            spec,
            init: Process::new(made.pid, made.ends, made.exit, on_exit),
            phase: tokio::sync::Mutex::new(Phase::Created(Some(made.channel))),
            execs: Mutex::default(),
            next_exec: AtomicU64::new(1),
            oom_watch: oom_watch.abort_handle(),
            _mounted: mounted,
            events: self.events,
        })
    }
}

impl Container {
    /// Makes and starts one more process.
    ///
    /// # Errors
    /// When the container does not run, the id is taken, or the process cannot be made.
    pub(crate) async fn exec(
        &self,
        launcher: &Launcher,
        new: NewExec,
    ) -> Result<i32, ContainerError> {
        // None is made across a pause or the removal.
        let phase = self.phase.lock().await;
        if self.init.has_exited() {
            return Err(wrong(format!("container {} has stopped", self.id)));
        }
        if matches!(*phase, Phase::Paused) {
            return Err(wrong(format!("container {} is paused", self.id)));
        }
        self.reserve(&new.id)?;
        let id = new.id.clone();
        let made = self.make_exec(launcher, new).await;
        drop(phase);
        let (process, channel, directory) = match made {
            Ok(made) => made,
            Err(error) => {
                self.execs().remove(&id);
                return Err(error);
            }
        };
        let pid = process.pid;
        self.execs().insert(id.clone(), Exec::Ready(process));
        let started = launch::start(&directory, channel).await;
        // Its socket and specification are of no more use.
        let _ = fs::remove_dir_all(&directory);
        if let Err(error) = started {
            self.execs().remove(&id);
            return Err(error.into());
        }
        Ok(pid)
    }

    fn reserve(&self, id: &Id) -> Result<(), ContainerError> {
        let mut execs = self.execs();
        if execs.contains_key(id) {
            return Err(ContainerError::Exists(id.clone()));
        }
        if execs.len() >= MAX_EXECS {
            return Err(ContainerError::TooMany(MAX_EXECS, "execs of a container"));
        }
        execs.insert(id.clone(), Exec::Making);
        Ok(())
    }

    async fn make_exec(
        &self,
        launcher: &Launcher,
        new: NewExec,
    ) -> Result<(Arc<Process>, AgentEnd, PathBuf), ContainerError> {
        let spec = spec::of_exec(&self.spec, new.process, self.init.pid)?;
        let gone =
            |error| ContainerError::System("find the cgroup of the container's process", error);
        let request = Request {
            task: Task::Exec,
            name: self.number.to_string(),
            directory: self.directory.join(format!("exec-{}", self.next_exec())),
            cgroup: Cgroup::name_of_process(self.init.pid).map_err(gone)?,
            terminal: new.stdio.terminal,
        };
        let directory = request.directory.clone();
        let made = match make(launcher, &request, &spec, &new.stdio).await {
            Ok(made) => made,
            Err(error) => {
                // There may be nothing to remove.
                let _ = fs::remove_dir_all(&directory);
                return Err(error);
            }
        };
        let on_exit = exit_event(self.id.clone(), Some(new.id), self.events.clone());
        let process = Process::new(made.pid, made.ends, made.exit, on_exit);
        Ok((process, made.channel, directory))
    }
}

/// Writes the specification and has the process made.
async fn make(
    launcher: &Launcher,
    request: &Request,
    spec: &Spec,
    stdio: &Stdio,
) -> Result<Made, ContainerError> {
    let system = |what| move |error| ContainerError::System(what, error);
    fs::create_dir_all(&request.directory).map_err(system("make the container's directory"))?;
    spec.save(request.directory.join(SPEC_FILE))
        .map_err(|error| {
            ContainerError::System("write the specification", std::io::Error::other(error))
        })?;
    let process = spec.process().as_ref();
    let owner = process.map_or((0, 0), |process| spec::owner(spec, process));
    let (ends, theirs) = make_pipes(stdio, owner).map_err(system("make the process's pipes"))?;
    let Launched {
        pid,
        exit,
        terminal,
        channel,
    } = launcher.launch(request, theirs).await?;
    let ends = match terminal {
        Some(master) if stdio.terminal => {
            if stdio.rows != 0 && stdio.columns != 0 {
                resize(&master, stdio.rows, stdio.columns)?;
            }
            give_terminal(&master, owner);
            HostEnds::of_terminal(master, stdio).map_err(system("use the terminal"))?
        }
        _ => ends,
    };
    Ok(Made {
        pid,
        exit,
        ends,
        channel,
    })
}

/// Makes the terminal the process's user's, as `runc` does.
fn give_terminal(master: &std::os::fd::OwnedFd, owner: (u32, u32)) {
    let flags = rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY;
    let given = rustix::pty::ioctl_tiocgptpeer(master, flags).and_then(|terminal| {
        let uid = rustix::fs::Uid::from_raw(owner.0);
        rustix::fs::fchown(terminal, Some(uid), None)
    });
    if let Err(errno) = given {
        log::warn!("failed to give the terminal to user {}: {errno}", owner.0);
    }
}

fn exit_event(
    container: Id,
    exec: Option<Id>,
    events: Arc<Events>,
) -> impl FnOnce(Finished) + Send + 'static {
    move |finished| {
        events.push(Event {
            kind: event::Kind::EXIT.into(),
            container_id: container.to_string(),
            exec_id: exec.map(|exec| exec.to_string()).unwrap_or_default(),
            exit_status: finished.exit.status,
            at_ns: finished.at_ns,
            ..Default::default()
        });
    }
}

async fn watch_oom(cgroup: Cgroup, container: Id, events: Arc<Events>) {
    let watched = cgroup.watch_oom(|| {
        events.push(Event {
            kind: event::Kind::OOM.into(),
            container_id: container.to_string(),
            at_ns: crate::process::wall_clock_ns(),
            ..Default::default()
        });
    });
    if let Err(error) = watched.await {
        log::warn!("failed to watch container {container} for lack of memory: {error}");
    }
}
