// SPDX-License-Identifier: Apache-2.0

//! The agent's ttRPC service: each call decodes its arguments, does one thing, and maps the error. No logic
//! is here.
//!
//! Calls that change something run in a task of their own: a host that gives up waiting, or loses its
//! connection, does not leave them half done.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use caisson_protocol::PROTOCOL_VERSION;
use caisson_protocol::agent::agent::*;
use caisson_protocol::agent::agent_ttrpc;
use caisson_protocol::error::ErrorCode;
use ttrpc::r#async::TtrpcContext;

use crate::container::spec::parse;
use crate::container::{Container, ContainerError, NewContainer, NewExec};
use crate::helper::chain;
use crate::id::Id;
use crate::machine::{self, MachineError};
use crate::sandbox::{Sandbox, SetUpError};
use crate::storage::StorageRequest;

/// Longest time that a shutdown waits for containers to end by themselves.
const MAX_GRACE: Duration = Duration::from_secs(3600);
/// How long the host is given to end the VM after the answer to a shutdown; then the machine ends by itself.
const HOST_ENDS: Duration = Duration::from_secs(5);

type Answer<T> = ttrpc::Result<T>;

/// The service.
#[derive(Debug)]
pub(crate) struct Service {
    sandbox: Arc<Sandbox>,
    init_ns: u64,
    ready_ns: u64,
    greeted: AtomicBool,
}

impl Service {
    /// Serves `sandbox`; the times are of CLOCK_MONOTONIC, when PID 1 began and when it was ready.
    pub(crate) fn new(sandbox: Arc<Sandbox>, init_ns: u64, ready_ns: u64) -> Self {
        Self {
            sandbox,
            init_ns,
            ready_ns,
            greeted: AtomicBool::new(false),
        }
    }

    fn greeted(&self) -> Answer<Arc<Sandbox>> {
        if self.greeted.load(Ordering::Relaxed) {
            return Ok(self.sandbox.clone());
        }
        Err(ErrorCode::FailedPrecondition.to_ttrpc("no handshake was made"))
    }

    fn container(&self, id: &str) -> Answer<Arc<Container>> {
        let sandbox = self.greeted()?;
        answer(
            Id::parse(id)
                .map_err(Into::into)
                .and_then(|id| sandbox.container(&id)),
        )
    }
}

fn answer<T>(result: Result<T, ContainerError>) -> Answer<T> {
    result.map_err(|error| error.code().to_ttrpc(chain(&error)))
}

fn machine_error(error: &MachineError) -> ttrpc::Error {
    let code = match error {
        MachineError::Argument(_) => ErrorCode::InvalidArgument,
        MachineError::System(..) => ErrorCode::Internal,
    };
    code.to_ttrpc(chain(error))
}

/// Runs `call` to its end whatever becomes of the caller.
async fn whole<T: Send + 'static>(
    call: impl Future<Output = Result<T, ContainerError>> + Send + 'static,
) -> Answer<T> {
    match tokio::spawn(call).await {
        Ok(result) => answer(result),
        Err(error) => Err(ErrorCode::Internal.to_ttrpc(error.to_string())),
    }
}

fn exec_id(text: &str) -> Result<Option<Id>, ContainerError> {
    match text {
        "" => Ok(None),
        text => Ok(Some(Id::parse(text)?)),
    }
}

fn unsigned(pid: i32) -> u32 {
    u32::try_from(pid).unwrap_or_default()
}

#[async_trait]
impl agent_ttrpc::Agent for Service {
    async fn handshake(
        &self,
        _: &TtrpcContext,
        request: HandshakeRequest,
    ) -> Answer<HandshakeResponse> {
        if request.protocol_version != PROTOCOL_VERSION {
            return Err(ErrorCode::FailedPrecondition.to_ttrpc(format!(
                "the host ({}) speaks protocol version {}, the agent ({}) version {PROTOCOL_VERSION}",
                request.host_version,
                request.protocol_version,
                env!("CARGO_PKG_VERSION"),
            )));
        }
        self.greeted.store(true, Ordering::Relaxed);
        let kernel = rustix::system::uname();
        Ok(HandshakeResponse {
            protocol_version: PROTOCOL_VERSION,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: kernel.release().to_string_lossy().into_owned(),
            init_ns: self.init_ns,
            ready_ns: self.ready_ns,
            ..Default::default()
        })
    }

    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> Answer<Empty> {
        self.greeted()?
            .set_up(&request)
            .map_err(|error| match &error {
                SetUpError::Twice => ErrorCode::FailedPrecondition.to_ttrpc(error.to_string()),
                SetUpError::Machine(error) => machine_error(error),
                SetUpError::Container(cause) => cause.code().to_ttrpc(chain(cause)),
                SetUpError::PodInit(_) => ErrorCode::Internal.to_ttrpc(chain(&error)),
            })?;
        Ok(Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> Answer<CreateContainerResponse> {
        let sandbox = self.greeted()?;
        let created = whole(async move {
            let id = Id::parse(&request.container_id)?;
            let spec = parse("spec_json", &request.spec_json)?;
            let storages = StorageRequest::parse_all(&request.storages)?;
            let stdio = request.stdio.into_option().unwrap_or_default();
            let make = |id, number, pod_pid_namespace, events| NewContainer {
                id,
                number,
                spec,
                storages,
                stdio,
                pod_pid_namespace,
                events,
            };
            sandbox.create(id, make).await
        });
        Ok(CreateContainerResponse {
            pid: unsigned(created.await?),
            ..Default::default()
        })
    }

    async fn start_container(&self, _: &TtrpcContext, request: ContainerRequest) -> Answer<Empty> {
        let container = self.container(&request.container_id)?;
        whole(async move { container.start().await }).await?;
        Ok(Empty::new())
    }

    async fn remove_container(
        &self,
        _: &TtrpcContext,
        request: RemoveContainerRequest,
    ) -> Answer<Empty> {
        let sandbox = self.greeted()?;
        let removed = whole(async move {
            let id = Id::parse(&request.container_id)?;
            sandbox.remove(&id, request.force).await
        });
        removed.await?;
        Ok(Empty::new())
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> Answer<ExecProcessResponse> {
        let container = self.container(&request.container_id)?;
        let sandbox = self.sandbox.clone();
        let made = whole(async move {
            let new = NewExec {
                id: Id::parse(&request.exec_id)?,
                process: parse("process_json", &request.process_json)?,
                stdio: request.stdio.into_option().unwrap_or_default(),
            };
            container.exec(sandbox.launcher(), new).await
        });
        Ok(ExecProcessResponse {
            pid: unsigned(made.await?),
            ..Default::default()
        })
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: SignalProcessRequest,
    ) -> Answer<Empty> {
        let container = self.container(&request.container_id)?;
        let exec = answer(exec_id(&request.exec_id))?;
        if !request.all {
            answer(container.signal(exec.as_ref(), request.signal))?;
            return Ok(Empty::new());
        }
        if exec.is_some() {
            let text = "a signal to all processes goes to no exec";
            return Err(ErrorCode::InvalidArgument.to_ttrpc(text));
        }
        whole(async move { container.signal_all(request.signal).await }).await?;
        Ok(Empty::new())
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: ProcessRequest,
    ) -> Answer<WaitProcessResponse> {
        let container = self.container(&request.container_id)?;
        let exec = answer(exec_id(&request.exec_id))?;
        let (finished, oom_killed) = answer(container.wait(exec.as_ref()).await)?;
        Ok(WaitProcessResponse {
            exit_status: finished.exit.status,
            exited_at_ns: finished.at_ns,
            oom_killed,
            signal: finished.exit.signal,
            ..Default::default()
        })
    }

    async fn remove_process(&self, _: &TtrpcContext, request: ProcessRequest) -> Answer<Empty> {
        let container = self.container(&request.container_id)?;
        let exec = Id::parse(&request.exec_id).map_err(Into::into);
        answer(exec.and_then(|exec| container.remove_exec(&exec)))?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Answer<Empty> {
        let container = self.container(&request.container_id)?;
        answer(exec_id(&request.exec_id).and_then(|exec| {
            let process = container.process(exec.as_ref())?;
            Ok(process.resize(request.rows, request.columns)?)
        }))?;
        Ok(Empty::new())
    }

    async fn close_stdin(&self, _: &TtrpcContext, request: ProcessRequest) -> Answer<Empty> {
        let container = self.container(&request.container_id)?;
        let process = exec_id(&request.exec_id).and_then(|exec| container.process(exec.as_ref()));
        answer(process)?.close_stdin();
        Ok(Empty::new())
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> Answer<ListProcessesResponse> {
        let container = self.container(&request.container_id)?;
        Ok(ListProcessesResponse {
            processes: container.processes(),
            ..Default::default()
        })
    }

    async fn pause_container(&self, _: &TtrpcContext, request: ContainerRequest) -> Answer<Empty> {
        let container = self.container(&request.container_id)?;
        whole(async move { container.pause(true).await }).await?;
        Ok(Empty::new())
    }

    async fn resume_container(&self, _: &TtrpcContext, request: ContainerRequest) -> Answer<Empty> {
        let container = self.container(&request.container_id)?;
        whole(async move { container.pause(false).await }).await?;
        Ok(Empty::new())
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> Answer<Empty> {
        let container = self.container(&request.container_id)?;
        let updated = whole(async move {
            let resources = parse("resources_json", &request.resources_json)?;
            container.update(resources).await
        });
        updated.await?;
        Ok(Empty::new())
    }

    async fn stats_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> Answer<StatsContainerResponse> {
        let container = self.container(&request.container_id)?;
        Ok(StatsContainerResponse {
            cgroup_files: container.statistics(),
            ..Default::default()
        })
    }

    async fn state_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> Answer<StateContainerResponse> {
        let container = self.container(&request.container_id)?;
        Ok(StateContainerResponse {
            status: container.status().await.into(),
            pid: unsigned(container.pid()),
            ..Default::default()
        })
    }

    async fn get_events(&self, _: &TtrpcContext, _: GetEventsRequest) -> Answer<GetEventsResponse> {
        let sandbox = self.greeted()?;
        let events = sandbox.events.next().await;
        events.ok_or_else(|| {
            ErrorCode::FailedPrecondition.to_ttrpc("somebody else waits for events already")
        })
    }

    async fn set_time(&self, _: &TtrpcContext, request: SetTimeRequest) -> Answer<Empty> {
        self.greeted()?;
        machine::set_time(request.time_ns).map_err(|error| machine_error(&error))?;
        Ok(Empty::new())
    }

    async fn add_entropy(&self, _: &TtrpcContext, request: AddEntropyRequest) -> Answer<Empty> {
        self.greeted()?;
        machine::add_entropy(&request.entropy).map_err(|error| machine_error(&error))?;
        Ok(Empty::new())
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> Answer<Empty> {
        let sandbox = self.greeted()?;
        let grace = Duration::from_millis(request.grace_ms.into()).min(MAX_GRACE);
        whole(async move {
            sandbox.stop_all(grace).await;
            // Written back before the answer, as the host may end the VM as soon as it has that.
            let _ = tokio::task::spawn_blocking(nix::unistd::sync).await;
            tokio::spawn(async {
                tokio::time::sleep(HOST_ENDS).await;
                machine::power_off();
            });
            Ok(())
        })
        .await?;
        Ok(Empty::new())
    }
}
