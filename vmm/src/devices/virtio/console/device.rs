// SPDX-License-Identifier: Apache-2.0

//! The virtio face of the console.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::worker::ConsoleWorker;
use super::{OUTPUT, QUEUE_SIZES};
use crate::devices::console_ring::ConsoleRing;
use crate::devices::virtio::device::{
    ActivateError, Activation, QueueSnapshot, SnapshotError, VirtioDevice,
};
use crate::worker::WorkerThread;

/// See the module.
#[derive(Debug)]
pub struct ConsoleDevice {
    ring: ConsoleRing,
    bytes: Arc<AtomicU64>,
    state: State,
}

#[derive(Debug)]
enum State {
    Inactive,
    Running(WorkerThread<ConsoleWorker>),
    Paused(ConsoleWorker),
}

/// What a restore needs.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConsoleState {
    /// Of this structure.
    version: u32,
    queues: Vec<Option<QueueSnapshot>>,
}

const STATE_VERSION: u32 = 1;

impl ConsoleDevice {
    /// A console that writes to `ring`.
    pub fn new(ring: ConsoleRing) -> Self {
        Self {
            ring,
            bytes: Arc::default(),
            state: State::Inactive,
        }
    }

    fn start(&mut self, worker: ConsoleWorker) -> Result<(), ActivateError> {
        let thread =
            WorkerThread::spawn("console", worker).map_err(|source| ActivateError::Host {
                what: "the console's thread",
                source,
            })?;
        self.state = State::Running(thread);
        Ok(())
    }
}

impl VirtioDevice for ConsoleDevice {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn name(&self) -> &'static str {
        "console"
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        // No size, one port, no emergency write: all zero without the features.
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let got = activation.queues.len();
        let want = QUEUE_SIZES.len();
        if got != want {
            return Err(ActivateError::QueueCount { got, want });
        }
        let mut queues = activation.queues.into_iter();
        let input = queues.next().flatten();
        let output = queues.next().flatten();
        self.start(ConsoleWorker {
            memory: activation.memory,
            interrupt: activation.interrupt,
            input,
            output,
            ring: self.ring.clone(),
            bytes: self.bytes.clone(),
            broken: false,
        })
    }

    fn reset(&mut self) {
        if let State::Running(thread) = std::mem::replace(&mut self.state, State::Inactive) {
            drop(thread.stop());
        }
    }

    fn pause(&mut self) {
        self.state = match std::mem::replace(&mut self.state, State::Inactive) {
            State::Running(thread) => match thread.stop() {
                Some(worker) => State::Paused(worker),
                None => State::Inactive,
            },
            other => other,
        };
    }

    fn resume(&mut self) -> Result<(), ActivateError> {
        match std::mem::replace(&mut self.state, State::Inactive) {
            State::Paused(worker) => self.start(worker),
            other => {
                self.state = other;
                Ok(())
            }
        }
    }

    fn save(&self) -> Result<serde_json::Value, SnapshotError> {
        let queues = match &self.state {
            State::Inactive => Vec::new(),
            State::Running(_) => return Err(SnapshotError::NotPaused),
            State::Paused(worker) => worker.queues(),
        };
        Ok(serde_json::to_value(ConsoleState {
            version: STATE_VERSION,
            queues,
        })?)
    }

    fn restore(&mut self, state: serde_json::Value) -> Result<(), SnapshotError> {
        let state: ConsoleState = serde_json::from_value(state)?;
        if state.version != STATE_VERSION {
            let text = format!("version {} of the console's state", state.version);
            return Err(SnapshotError::BadState(text));
        }
        if !state.queues.is_empty() && state.queues.len() != QUEUE_SIZES.len() {
            let text = format!("{} queues instead of {}", state.queues.len(), OUTPUT + 1);
            return Err(SnapshotError::BadState(text));
        }
        Ok(())
    }

    fn metrics(&self, out: &mut Vec<(&'static str, u64)>) {
        out.push(("bytes", self.bytes.load(Ordering::Relaxed)));
    }
}
