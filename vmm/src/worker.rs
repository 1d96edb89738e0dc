// SPDX-License-Identifier: Apache-2.0

//! A device's thread: an epoll loop that owns its worker and gives it back.
//!
//! A [`Worker`] owns the device's queues and host resources. [`WorkerThread::spawn`] moves it into a thread,
//! [`WorkerThread::stop`] ends the loop between two events and returns it: so pausing a device is taking
//! its worker back, saving it is reading the worker, and resuming is spawning it again. No locks.

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// Events taken from the kernel in one go.
const EVENTS_PER_WAIT: usize = 64;
/// Token of the stop event; workers use smaller ones.
const STOP_TOKEN: u64 = u64::MAX;

/// The worker's view of the epoll set.
#[derive(Debug)]
pub struct Poller {
    epoll: Epoll,
}

impl Poller {
    /// Watches `fd`; its events come with `token` (not `u64::MAX`).
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn add(&self, fd: RawFd, token: u64, events: EventSet) -> io::Result<()> {
        self.epoll
            .ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))
    }

    /// Changes what is watched for on `fd`.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn modify(&self, fd: RawFd, token: u64, events: EventSet) -> io::Result<()> {
        self.epoll
            .ctl(ControlOperation::Modify, fd, EpollEvent::new(events, token))
    }

    /// Stops watching `fd`. To be called before the descriptor is closed.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn remove(&self, fd: RawFd) -> io::Result<()> {
        self.epoll
            .ctl(ControlOperation::Delete, fd, EpollEvent::default())
    }
}

/// What runs in a [`WorkerThread`].
pub trait Worker: Send + 'static {
    /// Called in the thread before the loop, at each spawn: watch the descriptors, and look once at every
    /// queue for what came before.
    ///
    /// # Errors
    /// Ends the loop; the error is logged and the worker still comes back at stop.
    fn start(&mut self, poller: &Poller) -> io::Result<()>;

    /// Something happened on the descriptor watched with `token`. What the guest broke is handled inside
    /// (`Interrupt::needs_reset`), not reported.
    ///
    /// # Errors
    /// A failing host resource without which the device cannot go on; ends the loop as in [`Self::start`].
    fn ready(&mut self, token: u64, events: EventSet, poller: &Poller) -> io::Result<()>;

    /// Called after the loop, at each stop: finish what was taken from the rings.
    fn finish(&mut self) {}
}

/// A running worker.
pub struct WorkerThread<W> {
    stop: EventFd,
    thread: JoinHandle<W>,
}

impl<W> fmt::Debug for WorkerThread<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerThread")
            .field("name", &self.thread.thread().name())
            .finish()
    }
}

impl<W: Worker> WorkerThread<W> {
    /// Moves `worker` into a thread called `name` (at most 15 bytes are seen in `ps`).
    ///
    /// # Errors
    /// When the thread, its eventfd or epoll instance cannot be made; the worker is lost with it, as its
    /// resources cannot be served without a thread.
    pub fn spawn(name: &str, mut worker: W) -> io::Result<Self> {
        let stop = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let poller = Poller {
            epoll: Epoll::new()?,
        };
        let stop_fd = std::os::fd::AsRawFd::as_raw_fd(&stop);
        poller.add(stop_fd, STOP_TOKEN, EventSet::IN)?;
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                if let Err(error) = run(&mut worker, &poller) {
                    log::error!("device thread ended: {error}");
                }
                worker.finish();
                worker
            })?;
        Ok(Self { stop, thread })
    }

    /// Ends the loop after the event in hand and gives the worker back; `None` when the thread panicked.
    pub fn stop(self) -> Option<W> {
        if let Err(error) = self.stop.write(1) {
            log::error!("failed to stop a device thread: {error}");
            return None;
        }
        self.thread.join().ok()
    }
}

fn run<W: Worker>(worker: &mut W, poller: &Poller) -> io::Result<()> {
    worker.start(poller)?;
    let mut events = vec![EpollEvent::default(); EVENTS_PER_WAIT];
    loop {
        let count = match poller.epoll.wait(-1, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        for event in events.iter().take(count) {
            if event.data() == STOP_TOKEN {
                return Ok(());
            }
            worker.ready(event.data(), event.event_set(), poller)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::sync::mpsc::{Sender, channel};

    struct Counter {
        kick: EventFd,
        seen: u64,
        report: Sender<u64>,
    }

    impl Worker for Counter {
        fn start(&mut self, poller: &Poller) -> io::Result<()> {
            poller.add(self.kick.as_raw_fd(), 1, EventSet::IN)
        }

        fn ready(&mut self, _token: u64, _events: EventSet, _poller: &Poller) -> io::Result<()> {
            self.seen += self.kick.read()?;
            self.report.send(self.seen).map_err(io::Error::other)
        }
    }

    #[test]
    fn a_worker_comes_back_and_goes_on_where_it_was() {
        let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (report, seen) = channel();
        let worker = Counter {
            kick: kick.try_clone().unwrap(),
            seen: 0,
            report,
        };
        let thread = WorkerThread::spawn("counter", worker).unwrap();
        kick.write(3).unwrap();
        assert_eq!(seen.recv().unwrap(), 3);
        let worker = thread.stop().unwrap();
        assert_eq!(worker.seen, 3);
        kick.write(2).unwrap();
        let thread = WorkerThread::spawn("counter", worker).unwrap();
        assert_eq!(seen.recv().unwrap(), 5);
        assert_eq!(thread.stop().unwrap().seen, 5);
    }
}
