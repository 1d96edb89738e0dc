// SPDX-License-Identifier: Apache-2.0

//! The threads that serve a device's queues, from activation to reset, and what is saved of them in between.
//!
//! ```text
//! Inactive ── start ──> Running ── pause ──> Paused
//!     ^                 │     ^                │ │
//!     └───── stop ──────┘     └──── resume ────┘ │
//!     └───────────────── stop ───────────────────┘
//! ```

use std::fmt::Debug;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_queue::Queue;

use super::device::{ActivateError, Interrupt, QueueSnapshot, SnapshotError};
use crate::worker::{Worker, WorkerThread};

/// A worker that owns one or more of a device's queues.
pub(super) trait QueueWorker: Worker + Debug {
    /// Name of its thread, as `ps` shows it: at most 15 bytes.
    fn thread_name(&self) -> String;

    /// Where its queues stand, each with its index in the device; `None` for one that the driver left unready.
    fn queues(&self) -> Vec<(usize, Option<QueueSnapshot>)>;
}

/// Who serves a device.
#[derive(Debug)]
pub(super) struct Service<W> {
    state: State<W>,
    /// Of the activation: the guest is told of a thread that was lost.
    interrupt: Option<Arc<Interrupt>>,
}

#[derive(Debug)]
enum State<W> {
    Inactive,
    Running(Vec<WorkerThread<W>>),
    Paused(Vec<W>),
}

impl<W> Default for Service<W> {
    fn default() -> Self {
        Self {
            state: State::Inactive,
            interrupt: None,
        }
    }
}

impl<W: QueueWorker> Service<W> {
    /// Starts a thread for each worker; all or none.
    ///
    /// # Errors
    /// When a thread cannot be had. The workers are gone then.
    pub(super) fn start(
        &mut self,
        workers: Vec<W>,
        interrupt: Arc<Interrupt>,
    ) -> Result<(), ActivateError> {
        self.stop();
        self.state = State::Running(spawn(workers)?);
        self.interrupt = Some(interrupt);
        Ok(())
    }

    /// Ends all threads and drops the workers. Says whether there were any.
    pub(super) fn stop(&mut self) -> bool {
        let interrupt = self.interrupt.take();
        match std::mem::replace(&mut self.state, State::Inactive) {
            State::Inactive => false,
            State::Running(threads) => {
                drop(join(threads, interrupt.as_deref()));
                true
            }
            State::Paused(_) => true,
        }
    }

    /// Takes the workers from their threads, if these run.
    pub(super) fn pause(&mut self) {
        if let State::Running(threads) = &mut self.state {
            let threads = std::mem::take(threads);
            self.state = State::Paused(join(threads, self.interrupt.as_deref()));
        }
    }

    /// Gives the workers threads again, if they have none.
    ///
    /// # Errors
    /// As for [`Self::start`]; the device is inactive then.
    pub(super) fn resume(&mut self) -> Result<(), ActivateError> {
        match std::mem::replace(&mut self.state, State::Inactive) {
            State::Paused(workers) => self.state = State::Running(spawn(workers)?),
            other => self.state = other,
        }
        Ok(())
    }

    /// The workers, while they have no threads; none of an inactive device.
    ///
    /// # Errors
    /// While they run.
    pub(super) fn paused(&self) -> Result<Option<&[W]>, SnapshotError> {
        match &self.state {
            State::Inactive => Ok(None),
            State::Running(_) => Err(SnapshotError::NotPaused),
            State::Paused(workers) => Ok(Some(workers)),
        }
    }

    /// Where all `count` queues of the device stand; empty for an inactive one.
    ///
    /// # Errors
    /// While they are served.
    pub(super) fn snapshots(
        &self,
        count: usize,
    ) -> Result<Vec<Option<QueueSnapshot>>, SnapshotError> {
        let Some(workers) = self.paused()? else {
            return Ok(Vec::new());
        };
        let mut snapshots = vec![None; count];
        for (index, snapshot) in workers.iter().flat_map(W::queues) {
            if let Some(place) = snapshots.get_mut(index) {
                *place = snapshot;
            }
        }
        Ok(snapshots)
    }

    /// Checks that saved queues can be this device's, which has `sizes`, and that it is inactive.
    ///
    /// # Errors
    /// When they cannot, or it is not.
    pub(super) fn check(
        &self,
        saved: &[Option<QueueSnapshot>],
        sizes: &[u16],
    ) -> Result<(), SnapshotError> {
        let bad = |text: String| Err(SnapshotError::BadState(text));
        if !matches!(self.state, State::Inactive) {
            return bad("the device is active".to_owned());
        }
        if !saved.is_empty() && saved.len() != sizes.len() {
            return bad(format!("{} queues instead of {}", saved.len(), sizes.len()));
        }
        for (snapshot, size) in saved.iter().zip(sizes) {
            let Some(snapshot) = snapshot else { continue };
            Queue::try_from(snapshot)?;
            if snapshot.max_size != *size {
                return bad("a queue is of another size".to_owned());
            }
        }
        Ok(())
    }
}

fn spawn<W: QueueWorker>(workers: Vec<W>) -> Result<Vec<WorkerThread<W>>, ActivateError> {
    let mut threads = Vec::with_capacity(workers.len());
    for worker in workers {
        let name = worker.thread_name();
        match WorkerThread::spawn(&name, worker) {
            Ok(thread) => threads.push(thread),
            Err(source) => {
                drop(join(threads, None));
                return Err(ActivateError::Host {
                    what: "a device's thread",
                    source,
                });
            }
        }
    }
    Ok(threads)
}

/// Ends all threads and takes their workers back. Of a thread that was lost the guest is told.
fn join<W: QueueWorker>(threads: Vec<WorkerThread<W>>, interrupt: Option<&Interrupt>) -> Vec<W> {
    let joined = threads.into_iter().filter_map(|thread| {
        let worker = thread.stop();
        if worker.is_none() {
            log::error!("a device's thread was lost");
            if let Some(interrupt) = interrupt {
                interrupt.needs_reset();
            }
        }
        worker
    });
    joined.collect()
}

/// What is saved of a device that has nothing of its own to save.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PlainState {
    /// Of this structure.
    version: u32,
    queues: Vec<Option<QueueSnapshot>>,
}

impl PlainState {
    const VERSION: u32 = 1;

    /// Of a device with `count` queues.
    ///
    /// # Errors
    /// While they are served.
    pub(super) fn save<W: QueueWorker>(
        service: &Service<W>,
        count: usize,
    ) -> Result<serde_json::Value, SnapshotError> {
        Ok(serde_json::to_value(Self {
            version: Self::VERSION,
            queues: service.snapshots(count)?,
        })?)
    }

    /// Checks a saved one for a device with queues of `sizes`.
    ///
    /// # Errors
    /// When it cannot be this device's.
    pub(super) fn check<W: QueueWorker>(
        state: serde_json::Value,
        service: &Service<W>,
        sizes: &[u16],
    ) -> Result<(), SnapshotError> {
        let state: Self = serde_json::from_value(state)?;
        check_version(state.version, Self::VERSION)?;
        service.check(&state.queues, sizes)
    }
}

/// Checks the version of a saved state.
///
/// # Errors
/// When it is not `known`.
pub(super) fn check_version(version: u32, known: u32) -> Result<(), SnapshotError> {
    if version == known {
        return Ok(());
    }
    let text = format!("its version is {version}, this is {known}");
    Err(SnapshotError::BadState(text))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::devices::virtio::device::{Activation, VirtioDevice};
    use crate::worker::Poller;
    use virtio_queue::QueueT;
    use vmm_sys_util::epoll::EventSet;
    use vmm_sys_util::eventfd::EventFd;

    /// Restores `state` into a fresh device; its queue `index`, of which one chain was served, goes on where it
    /// was. The device is paused then.
    pub(in super::super) fn goes_on_restored(
        again: &mut impl VirtioDevice,
        state: &serde_json::Value,
        index: usize,
        activation: impl FnOnce(Queue) -> Activation,
    ) {
        again.restore(state.clone()).unwrap();
        let queues: Vec<Option<QueueSnapshot>> =
            serde_json::from_value(state["queues"].clone()).unwrap();
        let snapshot = queues[index].clone().unwrap();
        assert_eq!((snapshot.next_avail, snapshot.next_used), (1, 1));
        again
            .activate(activation(Queue::try_from(&snapshot).unwrap()))
            .unwrap();
        again.pause();
        assert_eq!(again.save().unwrap(), *state);
    }

    #[derive(Debug)]
    struct Nobody {
        index: usize,
        panics: bool,
    }

    impl Worker for Nobody {
        fn start(&mut self, _poller: &Poller) -> std::io::Result<()> {
            assert!(!self.panics, "as asked for");
            Ok(())
        }

        fn ready(&mut self, _: u64, _: EventSet, _: &Poller) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl QueueWorker for Nobody {
        fn thread_name(&self) -> String {
            "nobody".to_owned()
        }

        fn queues(&self) -> Vec<(usize, Option<QueueSnapshot>)> {
            let queue = Queue::new(64).unwrap();
            vec![(self.index, Some(QueueSnapshot::from(&queue)))]
        }
    }

    fn workers(panics: bool) -> Vec<Nobody> {
        [0, 2].map(|index| Nobody { index, panics }).into()
    }

    fn interrupt() -> Arc<Interrupt> {
        Arc::new(Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()))
    }

    #[test]
    fn queues_are_saved_in_a_pause_only_each_at_its_place() {
        let mut service = Service::default();
        assert!(service.snapshots(3).unwrap().is_empty());
        service.start(workers(false), interrupt()).unwrap();
        assert!(service.snapshots(3).is_err());
        service.pause();
        let saved = service.snapshots(3).unwrap();
        let there: Vec<_> = saved.iter().map(Option::is_some).collect();
        assert_eq!(there, [true, false, true]);
        assert!(service.check(&saved, &[64; 3]).is_err(), "it is active");
        service.resume().unwrap();
        assert!(service.snapshots(3).is_err());
        assert!(service.stop());
        assert!(!service.stop());

        service.check(&saved, &[64; 3]).unwrap();
        assert!(service.check(&saved, &[64; 2]).is_err());
        assert!(service.check(&saved, &[64, 64, 128]).is_err());
        let mut odd = saved.clone();
        odd[0].as_mut().unwrap().size = 48;
        assert!(service.check(&odd, &[64; 3]).is_err());
    }

    #[test]
    fn the_guest_is_told_of_a_thread_that_was_lost() {
        let mut service = Service::default();
        let interrupt = interrupt();
        service.start(workers(true), interrupt.clone()).unwrap();
        assert!(!interrupt.is_broken());
        service.pause();
        assert!(interrupt.is_broken());
    }
}
