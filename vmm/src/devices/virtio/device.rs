// SPDX-License-Identifier: Apache-2.0

//! The contract between a virtio device and its transport (virtio 1.2, part 2).
//!
//! The transport owns the queues while the driver sets them up, and checks them. At DRIVER_OK it *moves* them
//! into the device ([`VirtioDevice::activate`]), which gives them to its worker; from then on nobody else holds
//! them, so no register write can change them. A reset gives everything back: the device is as it was made.
//!
//! A guest that breaks a ring breaks its device, never the VMM: the worker calls
//! [`Interrupt::needs_reset`] and stops serving; the guest can reset the device.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use serde::{Deserialize, Serialize};
use virtio_queue::Queue;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// Guest memory as devices see it. The set of regions may grow while the VM runs (virtio-mem), so a
/// device takes a fresh snapshot (`memory()`) for every batch of work and keeps none.
pub type GuestMemory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Interrupt status bit: used buffers (virtio 1.2, 4.2.2).
pub const VIRTIO_MMIO_INT_VRING: u32 = 1;
/// Interrupt status bit: the configuration changed, or the device needs a reset.
pub const VIRTIO_MMIO_INT_CONFIG: u32 = 2;

/// A device that cannot be brought to life. The transport sets DEVICE_NEEDS_RESET; the VMM lives on.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// Not the number of queues this device has.
    #[error("{got} queues were given, the device has {want}")]
    QueueCount {
        /// How many came.
        got: usize,
        /// How many the device has.
        want: usize,
    },
    /// A host resource (thread, eventfd, epoll) could not be had.
    #[error("failed to start {what}")]
    Host {
        /// Which one.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// One queue at activation: valid (checked against guest memory), ready, and nobody else's.
#[derive(Debug)]
pub struct ActiveQueue {
    /// The ring.
    pub queue: Queue,
    /// Written by KVM (ioeventfd) when the guest notifies this queue.
    pub kick: EventFd,
}

/// Everything a device needs to come to life.
#[derive(Debug)]
pub struct Activation {
    /// Guest memory.
    pub memory: GuestMemory,
    /// All queues of the device, in their order. A queue the driver left unready is `None`.
    pub queues: Vec<Option<ActiveQueue>>,
    /// The way to the guest.
    pub interrupt: Arc<Interrupt>,
    /// What both sides agreed on: a subset of [`VirtioDevice::features`].
    pub features: u64,
}

impl Activation {
    /// Checks the number of queues.
    ///
    /// # Errors
    /// When it is not `want`.
    pub(super) fn check_queues(&self, want: usize) -> Result<(), ActivateError> {
        let got = self.queues.len();
        if got == want {
            Ok(())
        } else {
            Err(ActivateError::QueueCount { got, want })
        }
    }
}

/// The device's interrupt line, with the status bits of its transport.
#[derive(Debug)]
pub struct Interrupt {
    status: AtomicU32,
    broken: AtomicBool,
    generation: AtomicU32,
    line: EventFd,
}

impl Interrupt {
    /// An interrupt that raises `line` (an irqfd).
    pub fn new(line: EventFd) -> Self {
        Self {
            status: AtomicU32::new(0),
            broken: AtomicBool::new(false),
            generation: AtomicU32::new(0),
            line,
        }
    }

    /// Tells the guest that buffers were used. Ask the queue's `needs_notification` first.
    pub fn signal_used(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// Tells the guest that the device's configuration changed. To be called after the change.
    pub fn signal_config(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// The guest broke the device: DEVICE_NEEDS_RESET is set until it resets it (virtio 1.2, 2.1.1).
    pub fn needs_reset(&self) {
        self.broken.store(true, Ordering::Release);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// Whether [`Self::needs_reset`] was called since the last [`Self::clear`].
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// The status bits, for the InterruptStatus register.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    /// How often the configuration changed, for the ConfigGeneration register.
    pub fn config_generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// The guest acknowledged `bits`.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }

    /// Back to the beginning, at a device reset.
    pub fn clear(&self) {
        self.status.store(0, Ordering::Release);
        self.broken.store(false, Ordering::Release);
    }

    /// Sets the status bits of a restored VM without raising the line.
    pub fn restore(&self, status: u32) {
        self.status.store(status, Ordering::Release);
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::AcqRel);
        if let Err(error) = self.line.write(1) {
            // Only a full counter (2^64 - 2 unread events) gets here, and then the line is up already.
            log::warn!("interrupt line is full: {error}");
        }
    }
}

/// A virtio device behind a transport.
///
/// Order of calls: `features`, `queue_sizes`, `read_config`, `write_config` at any time; `activate` once after
/// each reset; `pause` and `resume` in pairs while active; `reset` at any time.
pub trait VirtioDevice: Send + fmt::Debug {
    /// Device id (virtio 1.2, part 5).
    fn device_type(&self) -> u32;

    /// Short name for logs and metrics: `fs`, `vsock`, `blk`, `console`, `rng`.
    fn name(&self) -> &'static str;

    /// Features offered, VIRTIO_F_VERSION_1 among them.
    fn features(&self) -> u64;

    /// Largest size of each queue; its length is the number of queues. Powers of two, at most 1024.
    fn queue_sizes(&self) -> &[u16];

    /// Reads configuration space. Bytes beyond its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes configuration space. What is not writable is ignored. No device here has writable bytes unless it
    /// says so.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Takes the queues and starts serving.
    ///
    /// # Errors
    /// When it cannot; the device is then as after a reset.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops serving and drops the queues. Returns when no thread of the device touches guest memory any more.
    fn reset(&mut self);

    /// Finishes what was taken from the rings and stands still; returns then. Nothing touches guest memory
    /// afterwards until [`Self::resume`]. Without effect when not active.
    fn pause(&mut self);

    /// Goes on after [`Self::pause`], with a look at every queue for what came meanwhile.
    ///
    /// # Errors
    /// When a thread cannot be started.
    fn resume(&mut self) -> Result<(), ActivateError>;

    /// The device's own state while paused or inactive, as JSON of its serde struct: what a restore needs
    /// beside the configuration. Its field `queues` is a list with one `Option` of a [`QueueSnapshot`] per
    /// queue, or empty when the device is not active; the transport reads it to activate the device again.
    ///
    /// # Errors
    /// When it is not paused.
    fn save(&self) -> Result<serde_json::Value, SnapshotError>;

    /// Checks and takes a state made by [`Self::save`] of the same version, before activation. The queues of
    /// an active device are handed to the transport, which activates it again.
    ///
    /// # Errors
    /// When the state is not one of this device's.
    fn restore(&mut self, state: serde_json::Value) -> Result<(), SnapshotError>;

    /// Adds the device's counters to `out`, named without the device's own name.
    fn metrics(&self, _out: &mut Vec<(&'static str, u64)>) {}
}

/// A device's state that cannot be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// Asked for while the device runs.
    #[error("the device is not paused")]
    NotPaused,
    /// Not a state of this device.
    #[error("the state does not fit the device: {0}")]
    BadState(String),
    /// JSON.
    #[error("failed to encode or decode the state")]
    Json(#[from] serde_json::Error),
}

/// A queue's registers and positions, for saving.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueSnapshot {
    /// Largest size.
    pub max_size: u16,
    /// Size the driver chose.
    pub size: u16,
    /// The driver made it ready.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub desc_table: u64,
    /// Guest physical address of the available ring.
    pub avail_ring: u64,
    /// Guest physical address of the used ring.
    pub used_ring: u64,
    /// Next entry of the available ring.
    pub next_avail: u16,
    /// Next entry of the used ring.
    pub next_used: u16,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
}

impl From<&Queue> for QueueSnapshot {
    fn from(queue: &Queue) -> Self {
        let state = queue.state();
        Self {
            max_size: state.max_size,
            size: state.size,
            ready: state.ready,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx: state.event_idx_enabled,
        }
    }
}

impl From<&ActiveQueue> for QueueSnapshot {
    fn from(active: &ActiveQueue) -> Self {
        Self::from(&active.queue)
    }
}

impl TryFrom<&QueueSnapshot> for Queue {
    type Error = SnapshotError;

    fn try_from(snapshot: &QueueSnapshot) -> Result<Self, SnapshotError> {
        Queue::try_from(virtio_queue::QueueState {
            max_size: snapshot.max_size,
            size: snapshot.size,
            ready: snapshot.ready,
            desc_table: snapshot.desc_table,
            avail_ring: snapshot.avail_ring,
            used_ring: snapshot.used_ring,
            next_avail: snapshot.next_avail,
            next_used: snapshot.next_used,
            event_idx_enabled: snapshot.event_idx,
        })
        .map_err(|error| SnapshotError::BadState(format!("queue: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_queue::QueueT;

    #[test]
    fn interrupt_bits_stay_until_acknowledged() {
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let interrupt = Interrupt::new(line.try_clone().unwrap());
        interrupt.signal_used();
        interrupt.signal_config();
        assert_eq!(interrupt.status(), 3);
        assert_eq!(line.read().unwrap(), 2);
        interrupt.acknowledge(VIRTIO_MMIO_INT_VRING);
        assert_eq!(interrupt.status(), VIRTIO_MMIO_INT_CONFIG);
        assert!(!interrupt.is_broken());
        interrupt.needs_reset();
        assert!(interrupt.is_broken());
        interrupt.clear();
        assert!(!interrupt.is_broken());
        assert_eq!(interrupt.status(), 0);
    }

    #[test]
    fn a_queue_comes_back_from_its_snapshot() {
        let mut queue = Queue::new(256).unwrap();
        queue.set_size(64);
        queue.set_desc_table_address(Some(0x1000), None);
        queue.set_avail_ring_address(Some(0x2000), None);
        queue.set_used_ring_address(Some(0x3000), None);
        queue.set_next_avail(7);
        queue.set_next_used(5);
        queue.set_event_idx(true);
        queue.set_ready(true);
        let snapshot = QueueSnapshot::from(&queue);
        let json = serde_json::to_string(&snapshot).unwrap();
        let read: QueueSnapshot = serde_json::from_str(&json).unwrap();
        let again = Queue::try_from(&read).unwrap();
        assert_eq!(again.state(), queue.state());
    }

    #[test]
    fn a_snapshot_that_is_no_queue_is_refused() {
        let queue = Queue::new(256).unwrap();
        let mut snapshot = QueueSnapshot::from(&queue);
        snapshot.size = 3;
        assert!(Queue::try_from(&snapshot).is_err());
    }
}
