// SPDX-License-Identifier: Apache-2.0

//! The per-container process: it makes the VM and the container, and stands for the container on the host.
//!
//! Its pid is the container's pid for clients, who wait for it; it carries the container's stdio, passes on the
//! signals that it gets, and ends with the container's exit status, after that status was written down. The VMM is
//! its child and dies with it.
//!
//! ```text
//! create ── starts ──> enter cgroup ─ VMM ─ agent ─ container ── Report::Ready ──> create ends
//!                      wait for: the process's end, the VM's end, signals
//!                      drain stdio ─ end the VM ─ write "stopped" ─ exit with the status
//! ```

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use caisson_protocol::agent::agent::{CreateContainerRequest, CreateSandboxRequest, Storage};
use caisson_protocol::boot::{GUEST_SHARED_DIR, SHARED_TAG};
use tokio::sync::mpsc::UnboundedReceiver;

use super::boot;
use super::id::ContainerId;
use super::process::ProcessRef;
use super::report::{Channel, Report};
use super::signals::{self, SIGWINCH};
use super::state::{ExitRecord, Phase, Record, Transition};
use super::store::{StateDir, Store, StoreError};
use super::{END_LIMIT, PLAN_FILE, connector, monotonic_ns, now_rfc3339};
use crate::bundle::plan::Plan;
use crate::bundle::translate::ROOTFS_NAME;
use crate::error::{OrderError, RuntimeError, chain};
use crate::guest::client::{Connector, GuestClient, ProcessId, exit_status};
use crate::guest::console::{Console, Size};
use crate::guest::stdio::{LocalStdio, Outputs, attach};
use crate::resources::cgroup::{Cgroup, CgroupError};
use crate::vm::launch::{LaunchPlan, LaunchTarget};
use crate::vm::spawn::{Vm, VmEnd, run_in_namespace};

/// Exit status of a container whose VM died under it: as if by SIGKILL.
const VM_DIED: u8 = 128 + 9;

/// The stage of a start after the boot.
const BUILDING: &str = "while the agent made the container";

/// What this process was started with.
#[derive(Debug)]
pub struct MonitorRequest {
    /// Which container.
    pub id: ContainerId,
    /// Where to send the terminal's master.
    pub console_socket: Option<PathBuf>,
    /// To whoever started it.
    pub channel: Channel,
}

/// Makes the container and lives as long as it; gives back its exit status.
pub async fn monitor(store: &Store, mut request: MonitorRequest) -> u8 {
    let made = match prepare(store, &request.id) {
        Err(error) => Err(error),
        Ok((state, plan)) => match make(&state, &plan, &request).await {
            Ok(container) => Ok((state, container)),
            Err(error) => {
                write_end(&state, 1, false, Some(chain(&error)));
                Err(error)
            }
        },
    };
    let (state, container) = match made {
        Ok(made) => made,
        Err(error) => {
            // If the caller is gone there is nobody to tell; the record tells the next one.
            request
                .channel
                .send(&Report::of(&error))
                .unwrap_or_default();
            return error.exit_status();
        }
    };
    if request.channel.send(&Report::Ready {}).is_err() {
        // Whoever wanted the container died while it was made. It stays, created, as with runc.
        log::warn!("nobody waits for the container any more");
    }
    drop(request);
    container.run(&state).await
}

/// Makes the cgroup, writes itself down and enters it, under the lock: from then on `delete --force` finds this
/// process and all that it starts. In this order: while nobody is written down, nobody of ours is in the cgroup, so that
/// it can be removed; a process that dies gives up its locks before it leaves its cgroup.
fn prepare(store: &Store, id: &ContainerId) -> Result<(StateDir, Plan), RuntimeError> {
    // For a controlling terminal of its own, and so that the caller's ^C is not for us. Fails only if we are a
    // session leader already.
    rustix::process::setsid().map(drop).unwrap_or_default();
    std::env::set_current_dir("/").map_err(RuntimeError::file("change to", "/"))?;
    let gone = |error| match error {
        StoreError::NotFound(_) => OrderError::DeletedMeanwhile.into(),
        other => RuntimeError::from(other),
    };
    let state = store.open(id).map_err(gone)?;
    let lock = state.lock().map_err(gone)?;
    let mut record = lock.record().map_err(gone)?;
    if record.phase != Phase::Creating || record.monitor.is_some() {
        return Err(StoreError::Exists(id.clone()).into());
    }
    if !is_our_parent(record.creator) {
        // Its state is that of a container that came to nothing; or the id was deleted and is another's now.
        return Err(OrderError::Abandoned.into());
    }
    let cgroup = make_cgroup(&mut record)?;
    record.monitor = ProcessRef::current();
    record.timings_ns.insert("monitor".into(), monotonic_ns());
    lock.write_record(&record)?;
    if let Some(cgroup) = cgroup
        && let Err(error) = cgroup.enter()
    {
        without_cgroup(&mut record, &error);
        cgroup.remove_unused();
        lock.write_record(&record)?;
    }
    drop(lock);
    let plan = state.read_json(PLAN_FILE)?;
    Ok((state, plan))
}

/// Whether this is the process that started us, and lives.
fn is_our_parent(creator: Option<ProcessRef>) -> bool {
    let parent = rustix::process::getppid().map(rustix::process::Pid::as_raw_pid);
    creator.is_some_and(|creator| Some(creator.pid) == parent && creator.is_alive())
}

fn make_cgroup(record: &mut Record) -> Result<Option<Cgroup>, RuntimeError> {
    let Some(cgroup) = record.cgroup.as_deref().map(Cgroup::at) else {
        return Ok(None);
    };
    match cgroup.create() {
        Ok(()) => Ok(Some(cgroup)),
        Err(error @ CgroupError::NotEmpty(_)) => Err(error.into()),
        Err(error) => {
            without_cgroup(record, &error);
            Ok(None)
        }
    }
}

/// cgroup v2 is there but not for us (a container without delegation): go on without.
fn without_cgroup(record: &mut Record, error: &CgroupError) {
    log::warn!("the pod has no cgroup of its own: {}", chain(error));
    record.cgroup = None;
}

/// A made container, as long as it lives.
struct Container {
    vm: Vm,
    guest: GuestClient,
    process: ProcessId,
    outputs: Outputs,
    console: Option<Console>,
    signals: UnboundedReceiver<i32>,
    plan: Plan,
}

async fn make(
    state: &StateDir,
    plan: &Plan,
    request: &MonitorRequest,
) -> Result<Container, RuntimeError> {
    let mut signals = signals::catch().map_err(RuntimeError::system("catch signals"))?;
    let console = open_console(plan, request)?;
    let log_path = state.path().join("monitor.log");
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&log_path)
        .map_err(RuntimeError::file("open", &log_path))?;
    let listener = boot::listen(state)?;
    let mut vm = boot::spawn(state, plan, &log)?;
    let vmm = vm.process();
    state.lock()?.update(|record| record.vmm = Some(vmm))?;
    boot::wait_ready(state, plan, &mut vm, &listener, &mut signals).await?;
    let ready_ns = monotonic_ns();
    drop(listener);

    let connector = connector(state, plan);
    let process = ProcessId {
        container: state.id().to_string(),
        exec: String::new(),
    };
    let built = {
        let build = build(&connector, plan, &process, console.as_ref());
        tokio::select! {
            built = build => built,
            end = vm.ended() => {
                return Err(boot::ended(BUILDING, &end).into());
            }
            signal = boot::terminating(&mut signals) => {
                return Err(crate::error::BootError::Interrupted(signal).into());
            }
        }
    };
    let (guest, outputs) = match built {
        Ok(built) => built,
        Err(error) => return Err(boot::explain(&mut vm, BUILDING, error).await),
    };
    seal_rootfs(state, plan, vmm, &log)?;
    let started = vm.started;
    state.lock()?.update(|record| {
        if let Some(phase) = record.phase.after(Transition::Made) {
            record.phase = phase;
        }
        let times = &mut record.timings_ns;
        if let Some((exec_ns, run_ns)) = started {
            times.insert("vmm_exec".into(), exec_ns);
            times.insert("vmm_run".into(), run_ns);
        }
        times.insert("agent_ready".into(), ready_ns);
        times.insert("created".into(), monotonic_ns());
    })?;
    Ok(Container {
        vm,
        guest,
        process,
        outputs,
        console,
        signals,
        plan: plan.clone(),
    })
}

fn open_console(plan: &Plan, request: &MonitorRequest) -> Result<Option<Console>, RuntimeError> {
    let process = plan.process();
    if !process.terminal().unwrap_or(false) {
        return Ok(None);
    }
    let console = match &request.console_socket {
        Some(socket) => Console::send_to(socket, first_size(&process), true)?,
        None => Console::own()?,
    };
    Ok(Some(console))
}

/// The size of a terminal that the spec asks for.
pub(super) fn first_size(process: &oci_spec::runtime::Process) -> Size {
    process.console_size().map_or(Size::default(), |size| Size {
        rows: u16::try_from(size.height()).unwrap_or(0),
        columns: u16::try_from(size.width()).unwrap_or(0),
    })
}

/// From an agent that has greeted to a container that waits for its start.
async fn build(
    connector: &Connector,
    plan: &Plan,
    process: &ProcessId,
    console: Option<&Console>,
) -> Result<(GuestClient, Outputs), RuntimeError> {
    let (guest, _) = GuestClient::connect(connector).await?;
    guest.create_sandbox(sandbox_request(plan)).await?;
    let local = match console {
        Some(console) => console.stdio()?,
        None => LocalStdio::inherited(),
    };
    let mut stdio = local.request();
    if let Some(console) = console {
        let size = console.size();
        stdio.terminal = true;
        stdio.rows = size.rows.into();
        stdio.columns = size.columns.into();
    }
    let spec_json = serde_json::to_vec(&plan.guest_spec).map_err(std::io::Error::from);
    let request = CreateContainerRequest {
        container_id: process.container.clone(),
        spec_json: spec_json.map_err(RuntimeError::system("write the guest's spec"))?,
        stdio: Some(stdio).into(),
        ..Default::default()
    };
    if let Err(error) = guest.create_container(request).await {
        let process = plan.process();
        let program = process.args().as_ref().and_then(|args| args.first());
        return Err(RuntimeError::of_command(error, program));
    }
    let outputs = attach(connector, process, local).await?;
    Ok((guest, outputs))
}

fn sandbox_request(plan: &Plan) -> CreateSandboxRequest {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let time_ns = now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(0));
    CreateSandboxRequest {
        hostname: plan.sandbox.hostname.clone(),
        storages: vec![Storage {
            fstype: "virtiofs".to_owned(),
            source: SHARED_TAG.to_owned(),
            mount_point: GUEST_SHARED_DIR.to_owned(),
            ..Default::default()
        }],
        time_ns,
        entropy: entropy(),
        shm_size_bytes: plan.sandbox.shm_size_bytes,
        sysctls: plan.sandbox.sysctls.clone().into_iter().collect(),
        ..Default::default()
    }
}

/// 64 bytes of the host's entropy; none if there is none to be had, which the guest survives.
fn entropy() -> Vec<u8> {
    let mut bytes = vec![0; 64];
    let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.map_or(Vec::new(), |()| bytes)
}

/// A read-only root file system becomes so on the host, too, now that the guest has made its mount points in it.
fn seal_rootfs(
    state: &StateDir,
    plan: &Plan,
    vmm: ProcessRef,
    log: &File,
) -> Result<(), RuntimeError> {
    let root = plan.guest_spec.root().as_ref();
    if !root.and_then(|root| root.readonly()).unwrap_or(false) {
        return Ok(());
    }
    let launch = LaunchPlan {
        shared: state.path().join("shared"),
        mounts: Vec::new(),
        target: LaunchTarget::RunningVm {
            vmm,
            seal: Some((state.id().to_string(), ROOTFS_NAME.to_owned())),
        },
    };
    Ok(run_in_namespace(&launch, log)?)
}

impl Container {
    /// Until the container has ended. Gives back its exit status.
    async fn run(mut self, state: &StateDir) -> u8 {
        let waiter = self.guest.clone();
        let process = self.process.clone();
        let mut wait = std::pin::pin!(waiter.wait_process(&process));
        let ended = loop {
            tokio::select! {
                answer = &mut wait => break Ok(answer),
                end = self.vm.ended() => break Err(end),
                Some(signal) = self.signals.recv() => self.forward(signal),
            }
        };
        let (status, oom_killed, cause) = match ended {
            Ok(Ok(answer)) => (exit_status(&answer), answer.oom_killed, None),
            Ok(Err(error)) => (VM_DIED, false, Some(self.lost_agent(&error).await)),
            Err(end) => (VM_DIED, false, Some(describe(&end))),
        };
        if let Some(cause) = &cause {
            log::error!("container {}: {cause}", state.id());
        }
        self.finish(state, cause.is_none()).await;
        write_end(state, status, oom_killed, cause);
        status
    }

    fn forward(&self, signal: i32) {
        let (guest, process) = (self.guest.clone(), self.process.clone());
        if signal == SIGWINCH {
            let Some(size) = self.console.as_ref().map(Console::size) else {
                return;
            };
            tokio::spawn(async move {
                let resized = guest.resize_pty(&process, size.rows, size.columns).await;
                resized.unwrap_or_else(|error| log::warn!("{}", chain(&error)));
            });
            return;
        }
        tokio::spawn(async move {
            let number = u32::try_from(signal).unwrap_or_default();
            let sent = guest.signal(&process, number, false).await;
            sent.unwrap_or_else(|error| log::warn!("{}", chain(&error)));
        });
    }

    /// The connection to the agent broke: the VM is about to end, or is made to.
    async fn lost_agent(&mut self, error: &dyn std::error::Error) -> String {
        if let Ok(end) = tokio::time::timeout(END_LIMIT, self.vm.ended()).await {
            return describe(&end);
        }
        self.vm.kill();
        self.vm.ended().await;
        chain(error)
    }

    /// Writes out what the container has written, and ends the VM: in an orderly way if it can be.
    async fn finish(self, state: &StateDir, orderly: bool) {
        let Self {
            mut vm,
            guest,
            outputs,
            console,
            plan,
            ..
        } = self;
        {
            let mut drained = std::pin::pin!(outputs.drained());
            tokio::select! {
                () = &mut drained => {}
                // The streams end with the VM; what had arrived is still written.
                _ = vm.ended() => drained.await,
            }
        }
        if orderly {
            // The guest has written everything back when it answers, so nothing is lost by ending it then.
            let limit = plan.timeouts.request();
            let stopped = async {
                tokio::select! {
                    result = guest.shutdown(0) => result,
                    // It may end before its answer is read.
                    _ = vm.ended() => Ok(()),
                }
            };
            match tokio::time::timeout(limit, stopped).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => log::warn!("{}", chain(&error)),
                Err(_) => log::warn!("the guest of {} did not stop: killing its VM", state.id()),
            }
        }
        vm.kill();
        vm.ended().await;
        drop(console);
    }
}

fn describe(end: &VmEnd) -> String {
    let tail = crate::error::ConsoleTail::new(&end.console_tail);
    format!("{}{tail}", crate::guest::client::clean(&end.to_string()))
}

/// Writes down how it ended. If that is impossible (the state directory is deleted, the disk is full), the process's
/// own end still tells.
fn write_end(state: &StateDir, status: u8, oom_killed: bool, cause: Option<String>) {
    let written = state.lock().and_then(|lock| {
        lock.update(|record| {
            if let Some(phase) = record.phase.after(Transition::Ended) {
                record.phase = phase;
            }
            record.exit = Some(ExitRecord {
                status,
                oom_killed,
                cause,
                at: now_rfc3339(),
            });
            record.timings_ns.insert("ended".into(), monotonic_ns());
        })
    });
    match written {
        Ok(_) | Err(StoreError::NotFound(_)) => {}
        Err(error) => log::error!("{}", chain(&error)),
    }
}
