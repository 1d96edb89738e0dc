// SPDX-License-Identifier: Apache-2.0

//! The virtio face of the entropy device.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::QUEUE_SIZES;
use super::worker::RngWorker;
use crate::devices::virtio::device::{
    ActivateError, Activation, QueueSnapshot, SnapshotError, VirtioDevice,
};
use crate::worker::WorkerThread;

/// See the module.
#[derive(Debug)]
pub struct RngDevice {
    bytes: Arc<AtomicU64>,
    state: State,
}

#[derive(Debug)]
enum State {
    Inactive,
    Running(WorkerThread<RngWorker>),
    Paused(RngWorker),
}

/// What a restore needs.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RngState {
    /// Of this structure.
    version: u32,
    queues: Vec<Option<QueueSnapshot>>,
}

const STATE_VERSION: u32 = 1;

impl RngDevice {
    /// An entropy device.
    pub fn new() -> Self {
        Self {
            bytes: Arc::default(),
            state: State::Inactive,
        }
    }

    fn start(&mut self, worker: RngWorker) -> Result<(), ActivateError> {
        let thread = WorkerThread::spawn("rng", worker).map_err(|source| ActivateError::Host {
            what: "the entropy device's thread",
            source,
        })?;
        self.state = State::Running(thread);
        Ok(())
    }
}

impl Default for RngDevice {
    fn default() -> Self {
        Self::new()
    }
}

impl VirtioDevice for RngDevice {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn name(&self) -> &'static str {
        "rng"
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        // It has none.
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let got = activation.queues.len();
        let want = QUEUE_SIZES.len();
        if got != want {
            return Err(ActivateError::QueueCount { got, want });
        }
        let worker = RngWorker::new(
            activation.memory,
            activation.interrupt,
            activation.queues.into_iter().next().flatten(),
            self.bytes.clone(),
        );
        let worker = worker.map_err(|source| ActivateError::Host {
            what: "the entropy device's timer",
            source,
        })?;
        self.start(worker)
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
        Ok(serde_json::to_value(RngState {
            version: STATE_VERSION,
            queues,
        })?)
    }

    fn restore(&mut self, state: serde_json::Value) -> Result<(), SnapshotError> {
        let state: RngState = serde_json::from_value(state)?;
        if state.version != STATE_VERSION {
            let text = format!("version {} of the entropy device's state", state.version);
            return Err(SnapshotError::BadState(text));
        }
        if !state.queues.is_empty() && state.queues.len() != QUEUE_SIZES.len() {
            let text = format!(
                "{} queues instead of {}",
                state.queues.len(),
                QUEUE_SIZES.len()
            );
            return Err(SnapshotError::BadState(text));
        }
        Ok(())
    }

    fn metrics(&self, out: &mut Vec<(&'static str, u64)>) {
        out.push(("bytes", self.bytes.load(Ordering::Relaxed)));
    }
}
