// SPDX-License-Identifier: Apache-2.0

//! Runs a helper and follows it until the process that it makes waits for its start.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::helper;
use crate::helper::channel::{
    AgentEnd, ChannelError, FailureKind, Received, Report, Request, bounded, pair,
};
use crate::reaper::{Exit, Reaper};

/// Longest time until a process is created: mounts and programs come from the host.
const CREATE: Duration = Duration::from_secs(120);
/// Longest time until a created process has executed its program.
const START: Duration = Duration::from_secs(60);
/// Most lines of libcontainer's log in one error.
const MAX_LOG: usize = 4;

/// Why there is no process.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaunchError {
    /// It could not be spoken with.
    #[error("failed to speak with the helper")]
    Channel(#[from] ChannelError),
    /// It could not be run.
    #[error("failed to run the helper")]
    Spawn(#[source] io::Error),
    /// It ended without a word.
    #[error("the helper ended early with status {0}")]
    Ended(u32),
    /// It did not end.
    #[error("the process was not made within {0:?}")]
    Deadline(Duration),
    /// It says why.
    #[error("{message}")]
    Failed {
        /// What kind.
        kind: FailureKind,
        /// Why.
        message: String,
    },
    /// The created process cannot be reached.
    #[error("failed to reach the created process")]
    Start(#[source] io::Error),
}

/// Knows how helpers are run.
#[derive(Debug)]
pub(crate) struct Launcher {
    /// The agent's own program, on a read-only mount.
    pub(crate) program: PathBuf,
    /// Who tells of exits.
    pub(crate) reaper: Arc<Reaper>,
}

/// A process that waits for its start.
#[derive(Debug)]
pub(crate) struct Launched {
    /// In the agent's pid namespace.
    pub(crate) pid: i32,
    /// Its end.
    pub(crate) exit: oneshot::Receiver<Exit>,
    /// Its terminal's master.
    pub(crate) terminal: Option<OwnedFd>,
    /// To hear of the execution.
    pub(crate) channel: AgentEnd,
}

impl Launcher {
    /// Makes the process of `request` with these descriptors.
    ///
    /// # Errors
    /// When it was not made; what there is of it may have to be killed by its cgroup.
    pub(crate) async fn launch(
        &self,
        request: &Request,
        stdio: [OwnedFd; 3],
    ) -> Result<Launched, LaunchError> {
        let (channel, theirs) = pair()?;
        let (helper_pid, mut helper) = self.spawn(theirs).map_err(LaunchError::Spawn)?;
        channel.request(request, &stdio)?;
        drop(stdio);
        let created = timeout(CREATE, self.follow(&channel, &mut helper)).await;
        let Ok(created) = created else {
            if helper.try_recv().is_err() {
                // Not reaped, so the pid is still the helper's.
                let _ = crate::sys::send_signal(helper_pid, libc::SIGKILL);
            }
            return Err(LaunchError::Deadline(CREATE));
        };
        let (pid, terminal) = created?;
        let exit = self.reaper.watch(pid);
        channel.go()?;
        Ok(Launched {
            pid,
            exit,
            terminal,
            channel,
        })
    }

    /// Starts the helper and, in the same breath, registers it with the reaper.
    fn spawn(&self, channel: OwnedFd) -> io::Result<(i32, oneshot::Receiver<Exit>)> {
        let log = || -> io::Result<File> {
            let kmsg = File::options().write(true).open("/dev/kmsg");
            kmsg.or_else(|_| File::options().write(true).open("/dev/null"))
        };
        let child = Command::new(&self.program)
            .arg(helper::ARGUMENT)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(channel))
            .stdout(log()?)
            .stderr(log()?)
            .spawn()?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        Ok((pid, self.reaper.watch(pid)))
    }

    async fn follow(
        &self,
        channel: &AgentEnd,
        helper: &mut oneshot::Receiver<Exit>,
    ) -> Result<(i32, Option<OwnedFd>), LaunchError> {
        let (mut terminal, mut log) = (None, Vec::new());
        loop {
            let received = tokio::select! {
                biased;
                received = channel.receive() => received?,
                ended = &mut *helper => {
                    let status = ended.map_or(0, |exit| exit.status);
                    return Err(LaunchError::Ended(status));
                }
            };
            match received {
                Received::Terminal(master) => terminal = Some(master),
                Received::Report(Report::Log(text)) => keep(&mut log, text),
                Received::Report(Report::Created { pid }) => return Ok((pid, terminal)),
                Received::Report(Report::Failed { kind, message }) => {
                    return Err(failed(kind, message, log));
                }
                Received::End => return Err(LaunchError::Ended(0)),
            }
        }
    }
}

/// Keeps a line of libcontainer's log, of a few.
fn keep(log: &mut Vec<String>, text: String) {
    if log.len() < MAX_LOG {
        log.push(text);
    }
}

/// The failure, with what libcontainer's log says more: some of its errors leave out their cause.
fn failed(kind: FailureKind, mut message: String, log: Vec<String>) -> LaunchError {
    if kind == FailureKind::Other {
        for text in log {
            if !message.contains(&text) {
                message.push_str(": ");
                message.push_str(&text);
            }
        }
    }
    LaunchError::Failed {
        kind,
        message: bounded(message),
    }
}

/// Starts the created process that waits in `directory`, and returns once it has executed its program (or
/// has ended: that is the reaper's to tell).
///
/// # Errors
/// When the program was not executed.
pub(crate) async fn start(directory: &Path, channel: AgentEnd) -> Result<(), LaunchError> {
    let started = async {
        let socket = directory.join(helper::START_SOCKET);
        let mut stream = UnixStream::connect(socket)
            .await
            .map_err(LaunchError::Start)?;
        stream
            .write_all(b"start")
            .await
            .map_err(LaunchError::Start)?;
        drop(stream);
        let mut log = Vec::new();
        loop {
            match channel.receive().await? {
                Received::End => return Ok(()),
                Received::Report(Report::Log(text)) => keep(&mut log, text),
                Received::Report(Report::Failed { kind, message }) => {
                    return Err(failed(kind, message, log));
                }
                Received::Report(Report::Created { .. }) | Received::Terminal(_) => {}
            }
        }
    };
    let deadline = Err(LaunchError::Deadline(START));
    timeout(START, started).await.unwrap_or(deadline)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(error: &LaunchError) -> String {
        error.to_string()
    }

    #[test]
    fn a_failure_carries_its_cause_once() {
        let other = FailureKind::Other;
        let cause = || vec!["mount: ENOENT".to_owned(), "ENOENT".to_owned()];
        let error = failed(other, "failed to prepare rootfs".into(), cause());
        assert_eq!(text(&error), "failed to prepare rootfs: mount: ENOENT");
        let error = failed(other, "x: mount: ENOENT".into(), cause());
        assert_eq!(text(&error), "x: mount: ENOENT");
        let error = failed(FailureKind::CommandNotFound, "exec".into(), cause());
        assert_eq!(text(&error), "exec");
    }
}
