// SPDX-License-Identifier: Apache-2.0

//! The first process of a pid namespace that all containers of a pod share: it reaps and does nothing else.
//! The agent's own program once more, so that the namespace does not end with any container.

use std::io;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

/// First argument of the agent's program when it is this.
pub(crate) const ARGUMENT: &str = "pod-init";

/// Makes the namespace and its first process; gives its pid in the agent's.
///
/// # Errors
/// When the namespace or the process cannot be made.
pub(crate) fn spawn(program: &Path) -> io::Result<Pid> {
    let own = std::fs::File::open("/proc/self/ns/pid")?;
    unshare(CloneFlags::CLONE_NEWPID)?;
    let child = Command::new(program)
        .arg(ARGUMENT)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    // Whatever came of it, our next children are to be in our own namespace again.
    setns(own, CloneFlags::CLONE_NEWPID)?;
    let pid = i32::try_from(child?.id()).map_err(io::Error::other)?;
    Ok(Pid::from_raw(pid))
}

/// The process's life: reap, until killed.
pub(crate) fn run() -> ExitCode {
    let children = SigSet::from(Signal::SIGCHLD);
    if children.thread_block().is_err() {
        return ExitCode::FAILURE;
    }
    loop {
        while !matches!(
            waitpid(None, Some(WaitPidFlag::WNOHANG)),
            Ok(nix::sys::wait::WaitStatus::StillAlive) | Err(Errno::ECHILD)
        ) {}
        if children.wait().is_err() {
            return ExitCode::FAILURE;
        }
    }
}
