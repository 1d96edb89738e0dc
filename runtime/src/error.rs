// SPDX-License-Identifier: Apache-2.0

//! The library's error: every module's own, and the exit status that a front door ends with.

use std::error::Error;
use std::fmt::Write;
use std::io;
use std::path::PathBuf;

use caisson_protocol::error::ErrorCode;

use crate::bundle::load::LoadError;
use crate::bundle::translate::TranslateError;
use crate::bundle::validate::SpecError;
use crate::config::ConfigError;
use crate::guest::client::GuestError;
use crate::guest::console::ConsoleError;
use crate::resources::cgroup::CgroupError;
use crate::sandbox::id::IdError;
use crate::sandbox::state::Status;
use crate::sandbox::store::StoreError;
use crate::vm::client::ControlError;
use crate::vm::launch::LaunchError;
use crate::vm::spawn::SpawnError;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each is its module's error")]
pub enum RuntimeError {
    #[error(transparent)]
    Id(#[from] IdError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Translate(#[from] TranslateError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error(transparent)]
    Console(#[from] ConsoleError),
    #[error(transparent)]
    Order(#[from] OrderError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Command(#[from] CommandError),
    /// Told by a per-container process; its whole chain in one text.
    #[error("{message}")]
    Reported { message: String, exit_status: u8 },
    #[error("failed to {operation} {path}")]
    File {
        operation: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("failed to {operation}")]
    System {
        operation: &'static str,
        source: io::Error,
    },
    #[error("{0} is not supported")]
    Unsupported(String),
}

/// A command that does not fit the container's state. The texts are runc's, which clients look for.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the texts say it")]
pub enum OrderError {
    #[error("container not running")]
    NotRunning,
    #[error("container not paused")]
    NotPaused,
    #[error("cannot delete container {id} that is not stopped: {status}")]
    DeleteRunning { id: String, status: Status },
    #[error("cannot start a container that has stopped")]
    StartStopped,
    #[error("cannot start an already running container")]
    StartRunning,
    #[error("cannot exec in a stopped container")]
    ExecStopped,
    #[error("cannot exec in a paused container")]
    ExecPaused,
    #[error("cannot allocate tty if runc will detach without setting console socket")]
    DetachedTerminal,
    #[error("cannot use console socket if runc will not detach or allocate tty")]
    ConsoleSocketWithoutTerminal,
    #[error("the container was deleted while it was being created")]
    DeletedMeanwhile,
    #[error("the process that was creating the container has ended")]
    Abandoned,
}

/// A VM that did not come up, with the stage that it reached.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the texts say it")]
pub enum BootError {
    #[error("the VM ended {stage}: {cause}{console}")]
    Ended {
        stage: &'static str,
        cause: String,
        console: ConsoleTail,
    },
    #[error("the VM was not ready within {limit_ms} ms, {stage}{console}")]
    Timeout {
        stage: &'static str,
        limit_ms: u64,
        console: ConsoleTail,
    },
    #[error("the agent in the guest said something that is no greeting: {0}")]
    Greeting(String),
    #[error("interrupted by signal {0} while the VM was starting")]
    Interrupted(i32),
}

/// The end of the guest's console output, cleaned, as an addition to a message. Empty when there is none.
#[derive(Debug, Default)]
pub struct ConsoleTail(String);

impl ConsoleTail {
    /// The last lines of `text`, at most 4 KiB, without control characters.
    pub fn new(text: &str) -> Self {
        const MAX: usize = 4096;
        let skipped = text.chars().count().saturating_sub(MAX);
        let kept = text.chars().skip(skipped);
        let clean = kept.filter(|c| *c == '\n' || !c.is_control()).collect();
        Self(clean)
    }
}

impl std::fmt::Display for ConsoleTail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = self.0.trim();
        if text.is_empty() {
            return Ok(());
        }
        write!(f, "; end of the guest's console:\n{text}")
    }
}

/// A process that did not start, or not end by itself. The texts hold what Docker and Podman look for.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the texts say it")]
pub enum CommandError {
    #[error("unable to start container process: exec: {0:?}: executable file not found in $PATH")]
    NotFound(String),
    #[error("unable to start container process: exec: {0:?}: permission denied")]
    NotExecutable(String),
    #[error("the container ended before the process did: {0}")]
    ContainerEnded(GuestError),
}

impl RuntimeError {
    /// What the program ends with: 127, 126 and 137 as shells have it, else 1.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Command(CommandError::NotFound(_)) => 127,
            Self::Command(CommandError::NotExecutable(_)) => 126,
            // As if by SIGKILL, which is what a container's end is for the other processes in it.
            Self::Command(CommandError::ContainerEnded(_)) => 128 + 9,
            Self::Reported { exit_status, .. } => *exit_status,
            _ => 1,
        }
    }

    /// The agent's failure to run `program`, told in runc's words where it was the program's fault.
    pub fn of_command(error: GuestError, program: Option<&String>) -> Self {
        let program = program.cloned().unwrap_or_default();
        match error.code() {
            Some(ErrorCode::CommandNotFound) => CommandError::NotFound(program).into(),
            Some(ErrorCode::CommandNotExecutable) => CommandError::NotExecutable(program).into(),
            _ => error.into(),
        }
    }

    /// For `map_err` on a file.
    pub fn file(
        operation: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File {
            operation,
            path,
            source,
        }
    }

    /// For `map_err` on a system call.
    pub fn system<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System {
            operation,
            source: source.into(),
        }
    }
}

/// An error with all its causes, in one line (but for the guest's console).
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // A transparent error says what its source says.
        if !text.ends_with(&cause_text) {
            // Writing to a string does not fail.
            write!(text, ": {cause_text}").unwrap_or_default();
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_names_every_cause_once() {
        let error = RuntimeError::from(StoreError::Io {
            operation: "open",
            path: "/x".into(),
            source: io::Error::from_raw_os_error(libc::ENOSPC),
        });
        assert_eq!(
            chain(&error),
            "failed to open /x: No space left on device (os error 28)"
        );
    }

    #[test]
    fn a_missing_program_is_told_as_runc_does_with_status_127() {
        let guest = |code| GuestError::Answer {
            call: "x",
            code,
            text: "lies".into(),
        };
        let program = "foo".to_owned();
        let error = RuntimeError::of_command(guest(ErrorCode::CommandNotFound), Some(&program));
        assert_eq!(error.exit_status(), 127);
        assert!(
            chain(&error).ends_with("exec: \"foo\": executable file not found in $PATH"),
            "{error}"
        );
        let error =
            RuntimeError::of_command(guest(ErrorCode::CommandNotExecutable), Some(&program));
        assert_eq!(error.exit_status(), 126);
        let error = RuntimeError::of_command(guest(ErrorCode::Internal), Some(&program));
        assert_eq!(error.exit_status(), 1);
    }

    #[test]
    fn the_consoles_tail_is_bounded_and_clean() {
        assert_eq!(ConsoleTail::new("\x1b\n").to_string(), "");
        let tail = ConsoleTail::new(&format!("{}\x1b[0mlast", "x".repeat(9000))).to_string();
        assert!(tail.ends_with("[0mlast"));
        assert!(tail.len() < 4200);
    }
}
