// SPDX-License-Identifier: Apache-2.0

//! The helper: the agent's own program, run once per container or exec, with one thread and a short life.
//!
//! libcontainer forks, and a fork in the agent with its runtime would be unsafe. So the agent starts this,
//! sends it a [`Request`] with the process's descriptors, and the helper calls libcontainer: helper →
//! intermediate process (cgroup, user and pid namespace) → the container's process, a child of the helper
//! and, when that has ended, of PID 1. Whatever fails is told on the channel, with libcontainer's own
//! account of it. Nothing is written to the container's streams.

pub(crate) mod channel;
mod environment;
mod program;

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;

use libcgroups::common::CgroupConfig;
use libcontainer::container::{Container, ContainerStatus};
use libcontainer::error::{ErrInvalidSpec, LibcontainerError};
use libcontainer::notify_socket::{NotifyListener, NotifyListenerError};
use libcontainer::process::args::{ContainerArgs, ContainerType};
use libcontainer::process::container_main_process::{ProcessError, container_main_process};
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::user_ns::{UserNamespaceConfig, UserNamespaceError};
use libcontainer::validator::Validator;
use log::{LevelFilter, Log, Metadata, Record};
use oci_spec::runtime::Spec;

use self::channel::{
    ChannelError, FailureKind, Report, Request, Task, bounded, receive_request, send_report,
    wait_for_go,
};
use self::program::Program;

/// First argument of the agent's program when it is a helper.
pub(crate) const ARGUMENT: &str = "container-helper";
/// Name of the socket on which a created process waits for its start.
pub(crate) const START_SOCKET: &str = "start.sock";
/// Name of the specification.
pub(crate) const SPEC_FILE: &str = "config.json";

/// Why no process was made.
#[derive(Debug, thiserror::Error)]
enum HelperError {
    #[error("failed to receive the request")]
    Request(#[source] ChannelError),
    #[error("failed to prepare the helper")]
    Prepare(#[source] io::Error),
    #[error("failed to read the specification")]
    Spec(#[source] io::Error),
    #[error("failed to parse the specification")]
    Json(#[source] serde_json::Error),
    #[error("invalid specification")]
    InvalidSpec(#[source] ErrInvalidSpec),
    #[error("invalid user namespace in the specification")]
    UserNamespace(#[source] UserNamespaceError),
    #[error("root.path is missing in the specification")]
    NoRoot,
    #[error("failed to open the root file system {path}")]
    Root { path: String, source: io::Error },
    #[error("failed to make the start socket")]
    StartSocket(#[source] NotifyListenerError),
    #[error("failed to make the container's state")]
    State(#[source] Box<LibcontainerError>),
    #[error("failed to make the container's process")]
    Process(#[source] Box<ProcessError>),
}

/// The helper's life. Its channel is descriptor 0.
pub(crate) fn run() -> ExitCode {
    let prepared = io::stdin().as_fd().try_clone_to_owned();
    let Ok(channel) = prepared.map(Rc::new) else {
        return ExitCode::FAILURE;
    };
    let logger = ChannelLog {
        channel: channel.as_raw_fd(),
    };
    if log::set_boxed_logger(Box::new(logger)).is_ok() {
        log::set_max_level(LevelFilter::Error);
    }
    match make(&channel) {
        Ok(pid) => {
            send_report(channel.as_ref(), &Report::Created { pid });
            wait_for_go(&channel);
            ExitCode::SUCCESS
        }
        Err(error) => {
            let report = Report::Failed {
                kind: FailureKind::Other,
                message: bounded(chain(&error)),
            };
            send_report(channel.as_ref(), &report);
            ExitCode::FAILURE
        }
    }
}

fn make(channel: &Rc<OwnedFd>) -> Result<i32, HelperError> {
    let (request, stdio) = receive_request(channel).map_err(HelperError::Request)?;
    // As the agent parses it: `Spec::load` would have all of the parser in the program once more.
    let json = fs::read(request.directory.join(SPEC_FILE)).map_err(HelperError::Spec)?;
    let mut spec: Spec = serde_json::from_slice(&json).map_err(HelperError::Json)?;
    Validator::validate_spec(&spec).map_err(HelperError::InvalidSpec)?;
    prepare(&spec).map_err(HelperError::Prepare)?;
    let listener = NotifyListener::new(&request.directory.join(START_SOCKET))
        .map_err(HelperError::StartSocket)?;
    let (container_type, _kept) = container_type(request.task).map_err(HelperError::Prepare)?;
    let terminal = match request.terminal {
        true => Some(channel.try_clone().map_err(HelperError::Prepare)?),
        false => None,
    };
    let environment = environment::reserve_home(&mut spec);
    let [stdin, stdout, stderr] = stdio.map(|fd| Some(fd_for_libcontainer(fd)));
    let arguments = ContainerArgs {
        container_type,
        syscall: SyscallType::Linux,
        rootfs: root(&spec, request.task)?,
        console_socket: terminal.map(fd_for_libcontainer),
        notify_listener: listener,
        preserve_fds: 0,
        container: Some(state(&request)?),
        user_ns_config: UserNamespaceConfig::new(&spec).map_err(HelperError::UserNamespace)?,
        cgroup_config: CgroupConfig {
            cgroup_path: request.cgroup,
            systemd_cgroup: false,
            container_name: request.name,
        },
        detached: true,
        executor: Box::new(Program::new(channel.clone(), environment)),
        no_pivot: false,
        stdin,
        stdout,
        stderr,
        as_sibling: false,
        pid_file: None,
        spec: Rc::new(spec),
    };
    let pid = container_main_process(&arguments)
        .map_err(|error| HelperError::Process(Box::new(error)))?;
    Ok(pid.as_raw())
}

/// libcontainer takes descriptors as numbers and closes some of them itself.
fn fd_for_libcontainer(fd: OwnedFd) -> i32 {
    use std::os::fd::IntoRawFd;
    fd.into_raw_fd()
}

/// What the processes to come inherit: the OOM score; and nobody in the namespaces to be joined may look
/// at us on the way in.
fn prepare(spec: &Spec) -> io::Result<()> {
    let process = spec.process().as_ref();
    let score = process.and_then(|process| process.oom_score_adj());
    fs::write(
        "/proc/self/oom_score_adj",
        score.unwrap_or_default().to_string(),
    )?;
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    Ok(())
}

/// For an exec, libcontainer wants a pipe for errors; ours go to the channel, so its read end is merely
/// kept.
fn container_type(task: Task) -> io::Result<(ContainerType, Option<OwnedFd>)> {
    match task {
        Task::Create => Ok((ContainerType::InitContainer, None)),
        Task::Exec => {
            let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
            let exec_notify_fd = fd_for_libcontainer(write);
            let container_type = ContainerType::TenantContainer { exec_notify_fd };
            Ok((container_type, Some(read)))
        }
    }
}

/// The root's path; that of an exec is where it ends up, in the container's mount namespace.
fn root(spec: &Spec, task: Task) -> Result<std::path::PathBuf, HelperError> {
    let path = spec.root().as_ref().ok_or(HelperError::NoRoot)?.path();
    match task {
        Task::Exec => Ok(Path::new("/").to_owned()),
        Task::Create => path.canonicalize().map_err(|source| HelperError::Root {
            path: path.display().to_string(),
            source,
        }),
    }
}

fn state(request: &Request) -> Result<Container, HelperError> {
    let status = match request.task {
        Task::Create => ContainerStatus::Creating,
        Task::Exec => ContainerStatus::Running,
    };
    let directory = &request.directory;
    Container::new(&request.name, status, None, directory, directory)
        .map_err(|error| HelperError::State(Box::new(error)))
}

/// An error and its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let next = cause.to_string();
        // libcontainer's transparent errors repeat their source.
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        source = cause.source();
    }
    text
}

/// Sends libcontainer's error records to the agent. libcontainer tells its parent only the outermost
/// text of an error; its log has the cause.
struct ChannelLog {
    channel: i32,
}

impl Log for ChannelLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Error
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let text = bounded(record.args().to_string());
            // SAFETY: the descriptor is the channel's, which is open until the program is executed, and
            // then no record is written any more.
            let channel = unsafe { std::os::fd::BorrowedFd::borrow_raw(self.channel) };
            send_report(channel, &Report::Log(text));
        }
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_names_every_cause_once() {
        let io = io::Error::from(io::ErrorKind::NotFound);
        let error = HelperError::Root {
            path: "/x".into(),
            source: io,
        };
        assert_eq!(
            chain(&error),
            "failed to open the root file system /x: entity not found"
        );
    }

    #[test]
    fn a_root_that_does_not_exist_is_named() {
        let spec: Spec = serde_json::from_str(
            r#"{"ociVersion": "1.0.2", "root": {"path": "/no/such/root"}, "linux": {}}"#,
        )
        .unwrap();
        let error = root(&spec, Task::Create).unwrap_err();
        assert!(chain(&error).contains("/no/such/root"));
    }
}
