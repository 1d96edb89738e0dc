// SPDX-License-Identifier: Apache-2.0

//! A running VMM as the per-container process has it: its pidfd, its status pipe, and how it ended.
//!
//! What comes on the status pipe is as trustworthy as the VMM, which a guest may have taken over: lines are
//! bounded, and nothing in them is used but for messages.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use caisson_protocol::control::{ExitCause, MAX_LINE, VmEvent};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::Signal;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use super::launch::{HELPER_COMMAND, LaunchPlan};
use crate::sandbox::process::{ProcessRef, ProcessWatch};

/// Why a VMM could not be started or watched.
#[derive(Debug, thiserror::Error)]
#[error("failed to {operation}")]
pub struct SpawnError {
    operation: &'static str,
    #[source]
    source: io::Error,
}

fn spawn_error<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> SpawnError {
    move |source| SpawnError {
        operation,
        source: source.into(),
    }
}

/// A VMM that was started and not yet reaped. Dropped, it is killed.
#[derive(Debug)]
pub struct Vm {
    child: Child,
    process: ProcessRef,
    watch: ProcessWatch,
    status: pipe::Receiver,
    /// The beginning of a line that has not come whole.
    partial: Vec<u8>,
    /// [`VmEvent::Started`]: when the VMM began, and when its vCPUs did; CLOCK_MONOTONIC, nanoseconds.
    pub started: Option<(u64, u64)>,
    /// [`VmEvent::Exited`], once it was read.
    said: Option<(ExitCause, String)>,
    end: Option<VmEnd>,
}

/// How a VMM ended.
#[derive(Debug, Clone)]
pub struct VmEnd {
    /// What it said itself; `None` when it was killed.
    pub cause: Option<ExitCause>,
    /// The end of the guest's console output, at most 4 KiB.
    pub console_tail: String,
    status: Option<ExitStatus>,
}

impl std::fmt::Display for VmEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.cause, self.status.map(|s| (s.signal(), s.code()))) {
            (Some(cause), _) => write!(f, "{cause}"),
            (None, Some((Some(signal), _))) => write!(f, "the VMM was killed by signal {signal}"),
            (None, Some((_, Some(code)))) => {
                write!(f, "the VMM ended with status {code} and did not say why")
            }
            (None, _) => write!(f, "the VMM ended and did not say why"),
        }
    }
}

/// Runs the helper of [`super::launch`] with `plan` on stdin.
fn helper(plan: &LaunchPlan, log: &File) -> Result<Command, SpawnError> {
    let document =
        memfd_create("launch-plan", MemfdFlags::CLOEXEC).map_err(spawn_error("make a memfd"))?;
    let mut document = File::from(document);
    // In one piece: a serializer on a file makes a system call of every token.
    serde_json::to_vec(plan)
        .map_err(io::Error::from)
        .and_then(|text| document.write_all(&text))
        .and_then(|()| document.rewind())
        .map_err(spawn_error("write the launch plan"))?;
    let log = log.try_clone().map_err(spawn_error("share the log"))?;
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("caisson")
        .arg(HELPER_COMMAND)
        .stdin(document)
        .stderr(log);
    Ok(command)
}

/// Does `plan` in the mount namespace of a running VMM, and waits for it.
///
/// # Errors
/// When the helper cannot be run, or fails: with what it said.
pub fn run_in_namespace(plan: &LaunchPlan, log: &File) -> Result<(), SpawnError> {
    let operation = "change the VM's file systems";
    let output = helper(plan, log)?
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .map_err(spawn_error(operation))?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr);
    Err(spawn_error(operation)(io::Error::other(
        message.trim().to_owned(),
    )))
}

impl Vm {
    /// Starts the VMM that `plan` describes, with `directory` as its working directory and `log` for what it
    /// has to say.
    ///
    /// # Errors
    /// When the helper cannot be started. Later failures come as its end.
    pub fn spawn(plan: &LaunchPlan, directory: &Path, log: &File) -> Result<Self, SpawnError> {
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .map_err(spawn_error("make the status pipe"))?;
        let child = helper(plan, log)?
            .stdout(writer)
            .current_dir(directory)
            .spawn()
            .map_err(spawn_error("start the VMM"))?;
        let mut unwatched = KillOnDrop(Some(child));
        let pid = unwatched.pid();
        let watch = ProcessWatch::of_child(pid).map_err(spawn_error("watch the VMM"))?;
        let status =
            pipe::Receiver::from_owned_fd(reader).map_err(spawn_error("watch the status pipe"))?;
        // It is our child and not reaped, so its pid is its own; a zombie has no start time that matters.
        let process = ProcessRef::of(raw_pid(pid)).unwrap_or(ProcessRef {
            pid: raw_pid(pid),
            start_time: 0,
        });
        let child = unwatched
            .0
            .take()
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound));
        Ok(Self {
            child: child.map_err(spawn_error("start the VMM"))?,
            process,
            watch,
            status,
            partial: Vec::new(),
            started: None,
            said: None,
            end: None,
        })
    }

    /// The VMM's process.
    pub fn process(&self) -> ProcessRef {
        self.process
    }

    /// Kills it. [`Self::ended`] then tells.
    pub fn kill(&self) {
        self.watch.signal(Signal::KILL);
    }

    /// Waits until it has ended and was reaped. May be dropped and called again.
    pub async fn ended(&mut self) -> VmEnd {
        if let Some(end) = &self.end {
            return end.clone();
        }
        let mut chunk = [0; 4096];
        let mut open = true;
        loop {
            tokio::select! {
                biased;
                read = self.status.read(&mut chunk), if open => match read {
                    Ok(count) if count > 0 => self.take_lines(&chunk[..count]),
                    Ok(_) | Err(_) => open = false,
                },
                () = self.watch.ended() => break,
            }
        }
        while open {
            match self.status.try_read(&mut chunk) {
                Ok(count) if count > 0 => self.take_lines(&chunk[..count]),
                Ok(_) | Err(_) => open = false,
            }
        }
        let (cause, console_tail) = self.said.take().unzip();
        let end = VmEnd {
            cause,
            console_tail: console_tail.unwrap_or_default(),
            status: self.child.wait().ok(),
        };
        self.end.insert(end).clone()
    }

    fn take_lines(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if *byte != b'\n' {
                // A longer line is cut, and then no event.
                if self.partial.len() < MAX_LINE {
                    self.partial.push(*byte);
                }
                continue;
            }
            match serde_json::from_slice(&self.partial) {
                Ok(VmEvent::Started { exec_ns, run_ns }) => self.started = Some((exec_ns, run_ns)),
                Ok(VmEvent::Exited {
                    cause,
                    console_tail,
                }) => self.said = Some((cause, console_tail)),
                Err(error) => log::warn!("a line on the status pipe is no event: {error}"),
            }
            self.partial.clear();
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if self.end.is_none() {
            self.kill();
            self.child.wait().map(drop).unwrap_or_default();
        }
    }
}

fn raw_pid(pid: u32) -> i32 {
    // The kernel's pids are below 2^22.
    i32::try_from(pid).unwrap_or(0)
}

/// A child that is not given up before somebody watches it.
struct KillOnDrop(Option<Child>);

impl KillOnDrop {
    fn pid(&self) -> u32 {
        self.0.as_ref().map_or(0, Child::id)
    }
}

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            child.kill().unwrap_or_default();
            child.wait().map(drop).unwrap_or_default();
        }
    }
}
