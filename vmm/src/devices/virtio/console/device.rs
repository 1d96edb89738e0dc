// SPDX-License-Identifier: Apache-2.0

//! The virtio face of the console.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::QUEUE_SIZES;
use super::worker::ConsoleWorker;
use crate::devices::console_ring::ConsoleRing;
use crate::devices::virtio::device::{ActivateError, Activation, SnapshotError, VirtioDevice};
use crate::devices::virtio::service::{PlainState, Service};

/// See the module.
#[derive(Debug)]
pub struct ConsoleDevice {
    ring: ConsoleRing,
    bytes: Arc<AtomicU64>,
    service: Service<ConsoleWorker>,
}

impl ConsoleDevice {
    /// A console that writes to `ring`.
    pub fn new(ring: ConsoleRing) -> Self {
        Self {
            ring,
            bytes: Arc::default(),
            service: Service::default(),
        }
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
        activation.check_queues(QUEUE_SIZES.len())?;
        let interrupt = Arc::clone(&activation.interrupt);
        let mut queues = activation.queues.into_iter();
        let input = queues.next().flatten();
        let output = queues.next().flatten();
        let worker = ConsoleWorker {
            memory: activation.memory,
            interrupt: activation.interrupt,
            input,
            output,
            ring: self.ring.clone(),
            bytes: self.bytes.clone(),
            broken: false,
        };
        self.service.start(vec![worker], interrupt)
    }

    fn reset(&mut self) {
        self.service.stop();
    }

    fn pause(&mut self) {
        self.service.pause();
    }

    fn resume(&mut self) -> Result<(), ActivateError> {
        self.service.resume()
    }

    fn save(&self) -> Result<serde_json::Value, SnapshotError> {
        PlainState::save(&self.service, QUEUE_SIZES.len())
    }

    fn restore(&mut self, state: serde_json::Value) -> Result<(), SnapshotError> {
        PlainState::check(state, &self.service, &QUEUE_SIZES)
    }

    fn metrics(&self, out: &mut Vec<(&'static str, u64)>) {
        out.push(("bytes", self.bytes.load(Ordering::Relaxed)));
    }
}
