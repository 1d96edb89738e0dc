// SPDX-License-Identifier: Apache-2.0

//! Deadlines of many things on one timerfd: each thing has at most one.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, RawFd};
use std::time::{Duration, Instant};

use nix::sys::time::TimeSpec;
use nix::sys::timer::Expiration;
use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags, TimerSetTimeFlags};

/// Deadlines by id.
#[derive(Debug)]
pub(super) struct Timers {
    fd: TimerFd,
    order: BTreeSet<(Instant, u64)>,
    by_id: HashMap<u64, Instant>,
    /// What the descriptor is set to.
    armed: Option<Instant>,
    /// Since when time stands still.
    stopped: Option<Instant>,
}

impl Timers {
    /// No deadlines.
    ///
    /// # Errors
    /// As timerfd_create(2).
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        Ok(Self {
            fd: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?,
            order: BTreeSet::new(),
            by_id: HashMap::new(),
            armed: None,
            stopped: None,
        })
    }

    /// Readable when a deadline has passed.
    pub(super) fn fd(&self) -> RawFd {
        self.fd.as_fd().as_raw_fd()
    }

    /// Gives `id` a deadline, in place of any that it had.
    pub(super) fn set(&mut self, id: u64, after: Duration) {
        self.cancel(id);
        let at = Instant::now() + after;
        self.order.insert((at, id));
        self.by_id.insert(id, at);
    }

    /// Takes the deadline of `id` away.
    pub(super) fn cancel(&mut self, id: u64) {
        if let Some(at) = self.by_id.remove(&id) {
            self.order.remove(&(at, id));
        }
    }

    /// Sets the descriptor to the first deadline. To be called after changes, before waiting.
    ///
    /// # Errors
    /// As timerfd_settime(2).
    pub(super) fn arm(&mut self) -> io::Result<()> {
        let first = self.order.first().map(|(at, _)| *at);
        // A descriptor that is set too early wakes us once for nothing, which is cheaper than setting it each time.
        if first.is_none() || self.armed.is_some_and(|armed| Some(armed) <= first) {
            return Ok(());
        }
        if let Some(at) = first {
            let after = at
                .saturating_duration_since(Instant::now())
                .max(Duration::from_nanos(1));
            let expiration = Expiration::OneShot(TimeSpec::from_duration(after));
            self.fd.set(expiration, TimerSetTimeFlags::empty())?;
            self.armed = first;
        }
        Ok(())
    }

    /// After the descriptor became readable: takes all ids whose deadline has passed.
    pub(super) fn expired(&mut self) -> Vec<u64> {
        // It was readable, or this is a stale event: then there is nothing to read, which is fine, too.
        let _ = rustix::io::read(&self.fd, &mut [0; 8]);
        self.armed = None;
        let now = Instant::now();
        let mut ids = Vec::new();
        while let Some((at, id)) = self.order.first().copied() {
            if at > now {
                break;
            }
            self.order.remove(&(at, id));
            self.by_id.remove(&id);
            ids.push(id);
        }
        ids
    }

    /// Time stands still while the device is paused.
    pub(super) fn stop(&mut self) {
        self.stopped = Some(Instant::now());
    }

    /// Goes on: deadlines move by as long as time stood still.
    pub(super) fn go_on(&mut self) {
        let Some(stopped) = self.stopped.take() else {
            return;
        };
        let pause = stopped.elapsed();
        let moved = self.by_id.iter().map(|(id, at)| (*id, *at + pause));
        self.by_id = moved.collect();
        self.order = self.by_id.iter().map(|(id, at)| (*at, *id)).collect();
        self.armed = None;
    }
}

#[cfg(test)]
mod tests {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    fn fires(timers: &mut Timers, within_ms: u16) -> bool {
        timers.arm().unwrap();
        let mut fds = [PollFd::new(timers.fd.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(within_ms)).unwrap() == 1
    }

    #[test]
    fn deadlines_pass_in_their_order_and_cancelled_ones_do_not() {
        let mut timers = Timers::new().unwrap();
        timers.set(1, Duration::from_millis(40));
        timers.set(2, Duration::from_millis(1));
        timers.set(3, Duration::from_millis(2));
        timers.cancel(3);
        assert!(fires(&mut timers, 5000));
        assert_eq!(timers.expired(), [2]);
        assert!(fires(&mut timers, 5000));
        assert_eq!(timers.expired(), [1]);
        assert!(!fires(&mut timers, 20));
    }

    #[test]
    fn an_earlier_deadline_moves_the_alarm_forward() {
        let mut timers = Timers::new().unwrap();
        timers.set(1, Duration::from_secs(3600));
        timers.arm().unwrap();
        timers.set(2, Duration::from_millis(1));
        assert!(fires(&mut timers, 5000));
        assert_eq!(timers.expired(), [2]);
    }

    #[test]
    fn a_pause_does_not_count() {
        let mut timers = Timers::new().unwrap();
        timers.set(1, Duration::from_millis(30));
        let before = timers.by_id[&1];
        timers.stop();
        std::thread::sleep(Duration::from_millis(40));
        timers.go_on();
        assert!(timers.by_id[&1] >= before + Duration::from_millis(40));
        assert!(fires(&mut timers, 5000));
        assert_eq!(timers.expired(), [1]);
    }
}
