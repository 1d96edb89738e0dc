// SPDX-License-Identifier: Apache-2.0

//! The virtio face of the entropy device.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::QUEUE_SIZES;
use super::worker::RngWorker;
use crate::devices::virtio::device::{ActivateError, Activation, SnapshotError, VirtioDevice};
use crate::devices::virtio::service::{PlainState, Service};

/// See the module.
#[derive(Debug)]
pub struct RngDevice {
    bytes: Arc<AtomicU64>,
    service: Service<RngWorker>,
}

impl RngDevice {
    /// An entropy device.
    pub fn new() -> Self {
        Self {
            bytes: Arc::default(),
            service: Service::default(),
        }
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
        activation.check_queues(QUEUE_SIZES.len())?;
        let interrupt = Arc::clone(&activation.interrupt);
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
