// SPDX-License-Identifier: Apache-2.0

//! Reaps every child that PID 1 has or inherits, and tells those who wait for one of them.
//!
//! There is one place in the agent that calls wait(2), this one; nothing else ever waits for a child, so no
//! exit can be stolen. Whoever wants to know of a process registers its pid *before it can have been
//! reaped*: a helper in the same breath as it is spawned (the agent has one thread that spawns and reaps),
//! a container's process while it is still a child of the helper, which ends only when told to. Orphans
//! that nobody registered are reaped and forgotten.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// As a shell has it: 0 to 255, 128+N after signal N.
    pub(crate) status: u32,
    /// The signal that ended it, 0 when it exited by itself.
    pub(crate) signal: u32,
}

/// Who waits for which child.
#[derive(Debug, Default)]
pub(crate) struct Reaper {
    waiting: Mutex<HashMap<i32, oneshot::Sender<Exit>>>,
}

impl Reaper {
    /// The end of the child `pid`, which must not have been reaped yet (see the module's story).
    pub(crate) fn watch(&self, pid: i32) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.insert(pid, sender);
        receiver
    }

    /// Takes SIGCHLD over. To be called before the first child is made.
    ///
    /// # Errors
    /// When the handler cannot be installed.
    pub(crate) fn signals() -> std::io::Result<Signal> {
        signal(SignalKind::child())
    }

    /// Reaps for ever.
    pub(crate) async fn run(&self, mut signals: Signal) {
        loop {
            self.reap();
            if signals.recv().await.is_none() {
                log::error!("no more SIGCHLD is delivered");
                return;
            }
        }
    }

    /// Reaps every child that has ended by now.
    fn reap(&self) {
        loop {
            let (pid, exit) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, status)) => (pid, Exit::exited(status)),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, Exit::killed(signal as i32)),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(errno) => {
                    log::error!("failed to wait for children: {errno}");
                    return;
                }
            };
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(sender) = waiting.remove(&pid.as_raw()) {
                // Whoever stopped waiting does not need to know.
                let _ = sender.send(exit);
            }
        }
    }
}

impl Exit {
    fn exited(status: i32) -> Self {
        Self {
            status: u32::try_from(status & 0xff).unwrap_or_default(),
            signal: 0,
        }
    }

    fn killed(signal: i32) -> Self {
        let signal = u32::try_from(signal).unwrap_or_default();
        Self {
            status: 128 + signal,
            signal,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// Reaping takes every child of the process, so these tests run in processes of their own.
    fn alone(name: &str, test: impl Future<Output = ()>) {
        if std::env::var_os("CAISSON_ALONE").is_some() {
            let runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = { runtime }.enable_all().build().unwrap();
            return runtime.block_on(test);
        }
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &format!("reaper::tests::{name}")])
            .env("CAISSON_ALONE", "1")
            .status();
        assert!(status.unwrap().success());
    }

    fn spawn(script: &str) -> i32 {
        let child = Command::new("/bin/sh").args(["-c", script]).spawn();
        child.unwrap().id().try_into().unwrap()
    }

    #[test]
    fn every_exit_reaches_its_watcher_also_when_many_end_at_once() {
        alone(
            "every_exit_reaches_its_watcher_also_when_many_end_at_once",
            async {
                let reaper = std::sync::Arc::new(Reaper::default());
                let signals = Reaper::signals().unwrap();
                let watched: Vec<_> = (0..50u32)
                    .map(|status| (status, reaper.watch(spawn(&format!("exit {status}")))))
                    .collect();
                let killed = reaper.watch(spawn("kill -9 $$"));
                tokio::spawn(async move { reaper.run(signals).await });
                for (status, exit) in watched {
                    assert_eq!(exit.await.unwrap(), Exit { status, signal: 0 });
                }
                let want = Exit {
                    status: 137,
                    signal: 9,
                };
                assert_eq!(killed.await.unwrap(), want);
            },
        );
    }

    #[test]
    fn a_child_that_ended_before_reaping_began_is_not_lost() {
        alone(
            "a_child_that_ended_before_reaping_began_is_not_lost",
            async {
                let reaper = std::sync::Arc::new(Reaper::default());
                let pid = spawn("exit 7");
                let stat = format!("/proc/{pid}/stat");
                while !std::fs::read_to_string(&stat).unwrap().contains(") Z ") {
                    std::thread::yield_now();
                }
                let exit = reaper.watch(pid);
                let signals = Reaper::signals().unwrap();
                tokio::spawn(async move { reaper.run(signals).await });
                assert_eq!(exit.await.unwrap().status, 7);
            },
        );
    }
}
