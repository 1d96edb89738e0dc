// SPDX-License-Identifier: Apache-2.0

//! The virtio face of the device: configuration, activation, pause, reset and state.

use std::io;
use std::sync::Arc;

use caisson_protocol::vm::VsockConfig;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::Queue;

use super::counters::Counters;
use super::host::{HostDir, HostSocket};
use super::muxer::Muxer;
use super::ring::Ring;
use super::state::VsockState;
use super::timers::Timers;
use super::worker::VsockWorker;
use super::{Patience, VsockError};
use crate::devices::virtio::device::{
    ActivateError, Activation, ActiveQueue, Interrupt, SnapshotError, VirtioDevice,
};
use crate::worker::WorkerThread;

/// Name of the thread, as `ps` shows it.
const THREAD_NAME: &str = "vsock";
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
    service: Service,
    /// For a device whose thread was lost.
    interrupt: Option<Arc<Interrupt>>,
    /// The guest is to be told that its streams are gone.
    reset_owed: bool,
}

/// Who has the queues.
#[derive(Debug)]
enum Service {
    /// Nobody.
    Idle,
    /// The thread.
    Running(WorkerThread<VsockWorker>),
    /// The worker, between two threads.
    Paused(Box<VsockWorker>),
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
            service: Service::Idle,
            interrupt: None,
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

    fn spawn(worker: VsockWorker) -> Result<Service, ActivateError> {
        match WorkerThread::spawn(THREAD_NAME, worker) {
            Ok(thread) => Ok(Service::Running(thread)),
            Err(source) => Err(ActivateError::Host {
                what: "vsock thread",
                source,
            }),
        }
    }

    /// Takes the worker from its thread, if there is one.
    fn stop(&mut self) -> Option<Box<VsockWorker>> {
        match std::mem::replace(&mut self.service, Service::Idle) {
            Service::Idle => None,
            Service::Paused(worker) => Some(worker),
            Service::Running(thread) => {
                let worker = thread.stop();
                if worker.is_none() {
                    log::error!("the vsock thread was lost");
                    if let Some(interrupt) = &self.interrupt {
                        interrupt.needs_reset();
                    }
                }
                worker.map(Box::new)
            }
        }
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
        self.service = Self::spawn(self.worker(activation)?)?;
        self.interrupt = Some(interrupt);
        self.reset_owed = false;
        Ok(())
    }

    fn reset(&mut self) {
        drop(self.stop());
        self.interrupt = None;
    }

    fn pause(&mut self) {
        if let Some(worker) = self.stop() {
            self.service = Service::Paused(worker);
        }
    }

    fn resume(&mut self) -> Result<(), ActivateError> {
        self.service = match std::mem::replace(&mut self.service, Service::Idle) {
            Service::Paused(worker) => Self::spawn(*worker)?,
            other @ (Service::Idle | Service::Running(_)) => other,
        };
        Ok(())
    }

    fn save(&self) -> Result<serde_json::Value, SnapshotError> {
        let state = match &self.service {
            Service::Running(_) => return Err(SnapshotError::NotPaused),
            Service::Idle => VsockState {
                active: false,
                features: 0,
                queues: Vec::new(),
                transport_reset_owed: self.reset_owed,
            },
            Service::Paused(worker) => VsockState {
                active: true,
                features: worker.features,
                queues: worker.queues(),
                transport_reset_owed: worker.reset_owed,
            },
        };
        Ok(serde_json::to_value(state)?)
    }

    fn restore(&mut self, state: serde_json::Value) -> Result<(), SnapshotError> {
        if !matches!(self.service, Service::Idle) {
            return Err(SnapshotError::NotPaused);
        }
        let state: VsockState = serde_json::from_value(state)?;
        let bad = |what: &str| Err(SnapshotError::BadState(format!("vsock: {what}")));
        if state.features & !self.features() != 0 {
            return bad("features that the device does not have");
        }
        let queues = if state.active { QUEUE_SIZES.len() } else { 0 };
        if state.queues.len() != queues {
            return bad("wrong number of queues");
        }
        for (snapshot, max_size) in state.queues.iter().zip(QUEUE_SIZES) {
            if let Some(snapshot) = snapshot {
                Queue::try_from(snapshot)?;
                if snapshot.max_size > max_size {
                    return bad("a queue is larger than the device has");
                }
            }
        }
        self.reset_owed = state.active || state.transport_reset_owed;
        Ok(())
    }

    fn metrics(&self, out: &mut Vec<(&'static str, u64)>) {
        self.counters.list(out);
    }
}
