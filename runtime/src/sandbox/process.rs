// SPDX-License-Identifier: Apache-2.0

//! Another process, remembered across our own runs: its pid and the time it began.
//!
//! A pid alone may belong to somebody else by now; with the start time it cannot be mistaken. Signals go
//! through a pidfd that was compared first.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

use crate::sys;

/// A process that cannot be mistaken for a later one with its pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessRef {
    /// Its pid in our pid namespace.
    pub pid: i32,
    /// When it began: clock ticks since boot (field 22 of /proc/PID/stat).
    pub start_time: u64,
}

impl ProcessRef {
    /// This process.
    pub fn current() -> Option<Self> {
        i32::try_from(std::process::id()).ok().and_then(Self::of)
    }

    /// The living process with this pid; `None` if there is none, or only a zombie.
    pub fn of(pid: i32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let start_time = start_time_of_living(&stat)?;
        Some(Self { pid, start_time })
    }

    /// Whether it still runs. A zombie does not.
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// A pidfd of it; `None` when it has ended.
    pub fn pidfd(self) -> Option<OwnedFd> {
        let pid = Pid::from_raw(self.pid)?;
        let fd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // The pidfd is of whoever had the pid when it was opened; if our process is still alive now, it is it.
        self.is_alive().then_some(fd)
    }

    /// Sends `signal`; false when the process has ended (or may not be signalled by us).
    pub fn signal(self, signal: Signal) -> bool {
        self.pidfd()
            .is_some_and(|fd| pidfd_send_signal(fd, signal).is_ok())
    }

    /// As [`Self::wait_end`], for an event loop.
    pub async fn ends_within(self, limit: Duration) -> bool {
        let wait = tokio::task::spawn_blocking(move || self.wait_end(limit));
        // A task that was cancelled saw nothing.
        wait.await.unwrap_or(false)
    }

    /// Waits until it has ended, at most `limit`; false when it still runs then.
    pub fn wait_end(self, limit: Duration) -> bool {
        let Some(fd) = self.pidfd() else {
            return true;
        };
        let mut fds = [PollFd::new(&fd, PollFlags::IN)];
        let deadline = std::time::Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            let timeout = Timespec::try_from(left).ok();
            match poll(&mut fds, timeout.as_ref()) {
                Ok(0) => return false,
                Ok(_) => return true,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return !self.is_alive(),
            }
        }
    }
}

/// A process whose end can be waited for among other things.
#[derive(Debug)]
pub struct ProcessWatch {
    pidfd: AsyncFd<OwnedFd>,
}

impl ProcessWatch {
    /// Watches the child of ours with this pid, which must not have been reaped.
    ///
    /// # Errors
    /// When there is none.
    pub fn of_child(pid: u32) -> io::Result<Self> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or(io::ErrorKind::NotFound)?;
        let pidfd = pidfd_open(pid, PidfdFlags::NONBLOCK)?;
        Ok(Self {
            pidfd: sys::register(pidfd)?,
        })
    }

    /// Waits until it has ended. It is then still to be reaped.
    pub async fn ended(&self) {
        // The event loop only fails when it is shut down, and then nobody waits.
        self.pidfd.readable().await.map(drop).unwrap_or_default();
    }

    /// Sends `signal`. An error means that it has ended, which [`Self::ended`] tells.
    pub fn signal(&self, signal: Signal) {
        pidfd_send_signal(self.pidfd.get_ref(), signal).unwrap_or_default();
    }
}

/// Field 22 of a /proc/PID/stat line, `None` for a zombie or a line that is none. The command name in it may
/// hold spaces and brackets, so counting begins after the last `)`.
fn start_time_of_living(stat: &str) -> Option<u64> {
    let rest = &stat[stat.rfind(')')? + 1..];
    let mut fields = rest.split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X" | "x") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_name_with_brackets_does_not_shift_the_fields() {
        let tail = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        assert_eq!(
            start_time_of_living(&format!("7 (a) S) b) {tail}")),
            Some(4711)
        );
        let zombie = tail.replacen('S', "Z", 1);
        assert_eq!(start_time_of_living(&format!("7 (a) {zombie}")), None);
        assert_eq!(start_time_of_living("7 (a"), None);
        assert_eq!(start_time_of_living("7 (a) S 1"), None);
    }

    #[test]
    fn a_process_is_known_by_its_start_and_not_by_its_pid_alone() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let living = ProcessRef::of(pid).unwrap();
        let other = ProcessRef {
            start_time: living.start_time + 1,
            ..living
        };
        assert!(living.is_alive());
        assert!(!other.is_alive());
        assert!(!other.signal(Signal::KILL));
        assert!(!living.wait_end(Duration::from_millis(1)));
        assert!(living.signal(Signal::KILL));
        assert!(living.wait_end(Duration::from_secs(10)));
        assert!(!living.is_alive(), "a zombie counts as ended");
        child.wait().unwrap();
        assert!(!living.signal(Signal::KILL));
    }
}
