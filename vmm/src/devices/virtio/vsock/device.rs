// SPDX-License-Identifier: Apache-2.0

//! The virtio face of the device: configuration, activation, pause, reset and state.

use std::io;
use std::sync::Arc;

use caisson_protocol::vm::VsockConfig;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::counters::Counters;
use super::host::{HostDir, HostSocket};
use super::muxer::Muxer;
use super::ring::Ring;
use super::state::VsockState;
use super::timers::Timers;
use super::worker::VsockWorker;
use super::{Patience, VsockError};
use crate::devices::virtio::device::{
    ActivateError, Activation, ActiveQueue, SnapshotError, VirtioDevice,
};
use crate::devices::virtio::service::Service;

/// Largest sizes of the queues: rx, tx, event. Linux fills the rx queue with buffers of 4 KiB, so it costs memory.
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];
/// VIRTIO_VSOCK_F_STREAM: stream sockets, and no others.
const VIRTIO_VSOCK_F_STREAM: u32 = 0;

/// virtio-vsock with Unix sockets on the host.
///
/// While the device is not active, host processes that connect wait in the backlog of `vsock.sock`.
#[derive(Debug)]
pub struct VsockDevice {
    guest_cid: u32,
    dir: Arc<HostDir>,
    socket: HostSocket,
    counters: Arc<Counters>,
    patience: Patience,
    service: Service<VsockWorker>,
    /// The guest is to be told that its streams are gone.
    reset_owed: bool,
}

impl VsockDevice {
    /// Makes the device and its `vsock.sock` (mode 0600), which goes when the device is dropped.
    ///
    /// # Errors
    /// When the context id is reserved, the directory cannot be opened, or the socket is there already or cannot be
    /// made.
    pub fn new(config: &VsockConfig) -> Result<Self, VsockError> {
        if config.guest_cid < 3 || config.guest_cid == u32::MAX {
            return Err(VsockError::GuestCid(config.guest_cid));
        }
        let dir = Arc::new(HostDir::open(&config.socket_dir)?);
        Ok(Self {
            guest_cid: config.guest_cid,
            socket: HostSocket::bind(Arc::clone(&dir))?,
            dir,
            counters: Arc::default(),
            patience: Patience::default(),
            service: Service::default(),
            reset_owed: false,
        })
    }

    #[cfg(test)]
    pub(super) fn set_patience(&mut self, patience: Patience) {
        self.patience = patience;
    }

    fn worker(&self, activation: Activation) -> Result<VsockWorker, ActivateError> {
        let queues: [Option<ActiveQueue>; 3] =
            activation
                .queues
                .try_into()
                .map_err(|queues: Vec<_>| ActivateError::QueueCount {
                    got: queues.len(),
                    want: QUEUE_SIZES.len(),
                })?;
        let [mut rx, mut tx, mut events] = queues.map(Ring::new);
        let event_idx = activation.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        for ring in [&mut rx, &mut tx, &mut events] {
            ring.set_event_idx(event_idx);
        }
        let host = |what| move |source: io::Error| ActivateError::Host { what, source };
        let timers = Timers::new().map_err(host("vsock timer"))?;
        let muxer = Muxer::new(
            self.guest_cid,
            Arc::clone(&self.dir),
            Arc::clone(&self.counters),
            self.patience,
            timers,
        );
        Ok(VsockWorker {
            memory: activation.memory,
            interrupt: activation.interrupt,
            rx,
            tx,
            events,
            muxer,
            listener: self.socket.listener().map_err(host("vsock listener"))?,
            reset_owed: self.reset_owed,
            features: activation.features,
            tx_blocked: false,
            broken: false,
            listening: false,
            accept_later: false,
        })
    }
}

impl Drop for VsockDevice {
    fn drop(&mut self) {
        self.reset();
    }
}

impl VirtioDevice for VsockDevice {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn name(&self) -> &'static str {
        "vsock"
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_VSOCK_F_STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = u64::from(self.guest_cid).to_le_bytes();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = config.iter().skip(start).chain(std::iter::repeat(&0));
        for (byte, value) in data.iter_mut().zip(bytes) {
            *byte = *value;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.reset();
        let interrupt = Arc::clone(&activation.interrupt);
        let worker = self.worker(activation)?;
        self.service.start(vec![worker], interrupt)?;
        self.reset_owed = false;
        Ok(())
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
        let workers = self.service.paused()?;
        let worker = workers.and_then(<[_]>::first);
        Ok(serde_json::to_value(VsockState {
            active: workers.is_some(),
            features: worker.map_or(0, |worker| worker.features),
            queues: self.service.snapshots(QUEUE_SIZES.len())?,
            transport_reset_owed: worker.map_or(self.reset_owed, |worker| worker.reset_owed),
        })?)
    }

    fn restore(&mut self, state: serde_json::Value) -> Result<(), SnapshotError> {
        let state: VsockState = serde_json::from_value(state)?;
        let bad = |what: &str| Err(SnapshotError::BadState(format!("vsock: {what}")));
        if state.features & !self.features() != 0 {
            return bad("features that the device does not have");
        }
        if state.active == state.queues.is_empty() {
            return bad("queues of a device that is not active, or none of one that is");
        }
        self.service.check(&state.queues, &QUEUE_SIZES)?;
        self.reset_owed = state.active || state.transport_reset_owed;
        Ok(())
    }

    fn metrics(&self, out: &mut Vec<(&'static str, u64)>) {
        self.counters.list(out);
    }
}
