// SPDX-License-Identifier: Apache-2.0

//! The gate that every vCPU passes before each KVM_RUN: open, shut for a pause, or shut for good.
//!
//! Open costs one load. [`Gate::pause`] waits until all vCPUs stand at the gate, so that after it no guest
//! instruction runs. A vCPU that is inside KVM is brought out by its kick (see `vcpu`), after the gate is shut.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

const OPEN: u8 = 0;
const PAUSED: u8 = 1;
const STOPPED: u8 = 2;

/// See the module.
#[derive(Debug, Default)]
pub struct Gate {
    state: AtomicU8,
    /// vCPUs that stand still, and those that exist.
    counts: Mutex<Counts>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Counts {
    waiting: usize,
    threads: usize,
}

/// A vCPU thread's place among those that a pause waits for.
#[derive(Debug)]
pub struct Place<'a>(&'a Gate);

impl Gate {
    /// An open gate.
    pub fn new() -> Self {
        Self::default()
    }

    /// The calling thread is one that a pause waits for, until the place is dropped.
    pub fn enter(&self) -> Place<'_> {
        self.counts().threads += 1;
        Place(self)
    }

    /// Goes through, or waits. `false`: the machine ends.
    pub fn pass(&self) -> bool {
        loop {
            match self.state.load(Ordering::SeqCst) {
                OPEN => return true,
                PAUSED => self.wait(),
                _ => return false,
            }
        }
    }

    /// Shuts the gate; the threads are to be kicked then. `false` when the machine ends.
    pub fn shut(&self) -> bool {
        let exchange =
            self.state
                .compare_exchange(OPEN, PAUSED, Ordering::SeqCst, Ordering::SeqCst);
        !matches!(exchange, Err(STOPPED))
    }

    /// Waits until every thread stands at the shut gate or has ended.
    pub fn wait_until_all_stand(&self) {
        let mut counts = self.counts();
        while counts.waiting < counts.threads && self.state.load(Ordering::SeqCst) == PAUSED {
            counts = self
                .changed
                .wait(counts)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Opens the gate after a pause.
    pub fn open(&self) {
        let _counts = self.counts();
        let _ = self
            .state
            .compare_exchange(PAUSED, OPEN, Ordering::SeqCst, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Shuts the gate for good.
    pub fn stop(&self) {
        let _counts = self.counts();
        self.state.store(STOPPED, Ordering::SeqCst);
        self.changed.notify_all();
    }

    fn wait(&self) {
        let mut counts = self.counts();
        counts.waiting += 1;
        self.changed.notify_all();
        while self.state.load(Ordering::SeqCst) == PAUSED {
            counts = self
                .changed
                .wait(counts)
                .unwrap_or_else(PoisonError::into_inner);
        }
        counts.waiting -= 1;
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.counts().threads -= 1;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn after_a_pause_nobody_moves_until_it_is_over() {
        let gate = Arc::new(Gate::new());
        let steps = Arc::new(AtomicU64::new(0));
        let entered = Arc::new(std::sync::Barrier::new(4));
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let (gate, steps, entered) = (gate.clone(), steps.clone(), entered.clone());
                std::thread::spawn(move || {
                    let _place = gate.enter();
                    entered.wait();
                    while gate.pass() {
                        steps.fetch_add(1, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        entered.wait();
        for _ in 0..20 {
            assert!(gate.shut());
            gate.wait_until_all_stand();
            let before = steps.load(Ordering::SeqCst);
            std::thread::yield_now();
            assert_eq!(steps.load(Ordering::SeqCst), before);
            gate.open();
        }
        gate.stop();
        for thread in threads {
            thread.join().unwrap();
        }
        assert!(!gate.shut(), "a stopped gate is not paused");
        gate.open();
        assert!(!gate.pass(), "and not opened");
    }

    #[test]
    fn a_pause_does_not_wait_for_a_thread_that_has_ended() {
        let gate = Gate::new();
        drop(gate.enter());
        assert!(gate.shut());
        gate.wait_until_all_stand();
    }
}
