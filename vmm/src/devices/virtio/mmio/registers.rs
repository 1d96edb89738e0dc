// SPDX-License-Identifier: Apache-2.0

//! The register file of a virtio-mmio device (virtio 1.2, 4.2.2) and its status state machine (2.1, 3.1.1).

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::queues::{Part, QueueSetup};
use crate::bus::BusDevice;
use crate::devices::virtio::device::{
    ActivateError, Activation, ActiveQueue, GuestMemory, Interrupt, QueueSnapshot, SnapshotError,
    VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING, VirtioDevice,
};

/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// Of QEMU; drivers do not look at it.
const VENDOR: u32 = 0x554d_4551;
/// Where configuration space begins.
const CONFIG: u64 = 0x100;

/// Device status bits (virtio 1.2, 2.1).
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 0x40;
const FAILED: u32 = 0x80;

/// VIRTIO_F_VERSION_1, without which no device here works.
const VERSION_1: u64 = 1 << 32;

mod offset {
    pub(super) const MAGIC: u64 = 0x00;
    pub(super) const VERSION: u64 = 0x04;
    pub(super) const DEVICE_ID: u64 = 0x08;
    pub(super) const VENDOR_ID: u64 = 0x0c;
    pub(super) const DEVICE_FEATURES: u64 = 0x10;
    pub(super) const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub(super) const DRIVER_FEATURES: u64 = 0x20;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub(super) const QUEUE_SEL: u64 = 0x30;
    pub(super) const QUEUE_NUM_MAX: u64 = 0x34;
    pub(super) const QUEUE_NUM: u64 = 0x38;
    pub(super) const QUEUE_READY: u64 = 0x44;
    pub(super) const QUEUE_NOTIFY: u64 = 0x50;
    pub(super) const INTERRUPT_STATUS: u64 = 0x60;
    pub(super) const INTERRUPT_ACK: u64 = 0x64;
    pub(super) const STATUS: u64 = 0x70;
    pub(super) const QUEUE_DESC_LOW: u64 = 0x80;
    pub(super) const QUEUE_DESC_HIGH: u64 = 0x84;
    pub(super) const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub(super) const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub(super) const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub(super) const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub(super) const SHM_LEN_LOW: u64 = 0xb0;
    pub(super) const SHM_LEN_HIGH: u64 = 0xb4;
    pub(super) const SHM_BASE_LOW: u64 = 0xb8;
    pub(super) const SHM_BASE_HIGH: u64 = 0xbc;
    pub(super) const CONFIG_GENERATION: u64 = 0xfc;
}

/// Where the guest's notifications go.
pub const QUEUE_NOTIFY_OFFSET: u64 = offset::QUEUE_NOTIFY;

/// A virtio device on the bus.
#[derive(Debug)]
pub struct MmioTransport {
    state: Mutex<Registers>,
}

/// Its state, for saving.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmioState {
    /// Device status register, without NEEDS_RESET.
    pub status: u32,
    /// The device asked for a reset.
    pub broken: bool,
    /// Which half of the device's features is read.
    pub device_features_sel: u32,
    /// Which half of the driver's features is written.
    pub driver_features_sel: u32,
    /// What the driver took.
    pub driver_features: u64,
    /// The queue that the registers are about.
    pub queue_sel: u32,
    /// Interrupt status bits.
    pub interrupt_status: u32,
    /// The queues as set up; of an active device their positions are in `device`.
    pub queues: Vec<QueueSnapshot>,
    /// The device's own state.
    pub device: serde_json::Value,
}

struct Registers {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
    kicks: Vec<EventFd>,
    queues: QueueSetup,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    /// The device has been given its queues.
    active: bool,
}

impl fmt::Debug for Registers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registers")
            .field("device", &self.device)
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}

impl MmioTransport {
    /// Puts `device` behind registers. `kicks` has one eventfd (EFD_NONBLOCK) per queue, which KVM writes.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        interrupt: Arc<Interrupt>,
        kicks: Vec<EventFd>,
    ) -> Self {
        let queues = QueueSetup::new(device.queue_sizes());
        Self {
            state: Mutex::new(Registers {
                device,
                memory,
                interrupt,
                kicks,
                queues,
                status: 0,
                device_features_sel: 0,
                driver_features_sel: 0,
                driver_features: 0,
                queue_sel: 0,
                active: false,
            }),
        }
    }

    /// See [`VirtioDevice::pause`]. To be called while no vCPU runs.
    pub fn pause(&self) {
        self.lock().device.pause();
    }

    /// See [`VirtioDevice::resume`].
    ///
    /// # Errors
    /// As there.
    pub fn resume(&self) -> Result<(), ActivateError> {
        self.lock().device.resume()
    }

    /// Stops the device for good; what it has taken from its rings is finished.
    pub fn stop(&self) {
        let mut state = self.lock();
        if state.active {
            state.device.reset();
            state.active = false;
        }
    }

    /// The device's counters, with its name before them.
    pub fn metrics(&self) -> Vec<(String, u64)> {
        let state = self.lock();
        let mut counters = Vec::new();
        state.device.metrics(&mut counters);
        let name = state.device.name();
        counters
            .into_iter()
            .map(|(counter, value)| (format!("{name}.{counter}"), value))
            .collect()
    }

    /// The registers and the device, while it is paused.
    ///
    /// # Errors
    /// When it is not paused.
    pub fn save(&self) -> Result<MmioState, SnapshotError> {
        let state = self.lock();
        Ok(MmioState {
            status: state.status,
            broken: state.interrupt.is_broken(),
            device_features_sel: state.device_features_sel,
            driver_features_sel: state.driver_features_sel,
            driver_features: state.driver_features,
            queue_sel: state.queue_sel,
            interrupt_status: state.interrupt.status(),
            queues: state.queues.snapshots().to_vec(),
            device: state.device.save()?,
        })
    }

    /// Takes the registers and the device's state over into a fresh transport. An active device is activated
    /// with its queues where they were.
    ///
    /// # Errors
    /// When the state does not fit the device.
    pub fn restore(&self, saved: MmioState) -> Result<(), SnapshotError> {
        self.lock().restore(saved)
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.lock();
        if let Some(offset) = offset.checked_sub(CONFIG) {
            state.device.read_config(offset, data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&state.read(offset).to_le_bytes());
        } else {
            log::debug!("read of {} bytes at register {offset:#x}", data.len());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        if let Some(offset) = offset.checked_sub(CONFIG) {
            state.write_config(offset, data);
        } else if let (Ok(bytes), 0) = (<[u8; 4]>::try_from(data), offset % 4) {
            state.write(offset, u32::from_le_bytes(bytes));
        } else {
            log::debug!("write of {} bytes at register {offset:#x}", data.len());
        }
    }
}

/// Where an active device stood in its queues: the `queues` of its state, which every device has.
fn positions(device: &serde_json::Value) -> Result<Vec<Option<QueueSnapshot>>, SnapshotError> {
    match device.get("queues") {
        None | Some(serde_json::Value::Null) => Ok(Vec::new()),
        Some(queues) => Ok(serde_json::from_value(queues.clone())?),
    }
}

/// The low or high half of features, by the driver's selection; zero beyond.
fn half(features: u64, select: u32) -> u32 {
    let shift = match select {
        0 => 0,
        1 => 32,
        _ => return 0,
    };
    u32::try_from((features >> shift) & 0xffff_ffff).unwrap_or(0)
}

impl Registers {
    fn read(&mut self, register: u64) -> u32 {
        match register {
            offset::MAGIC => MAGIC,
            offset::VERSION => VERSION,
            offset::DEVICE_ID => self.device.device_type(),
            offset::VENDOR_ID => VENDOR,
            offset::DEVICE_FEATURES => half(self.device.features(), self.device_features_sel),
            offset::QUEUE_NUM_MAX => self
                .queues
                .get(self.queue_sel)
                .map_or(0, |queue| queue.max_size.into()),
            offset::QUEUE_READY => self
                .queues
                .get(self.queue_sel)
                .map_or(0, |queue| queue.ready.into()),
            offset::INTERRUPT_STATUS => self.interrupt.status(),
            offset::STATUS => self.status(),
            // No shared memory regions: a length of -1 (virtio 1.2, 4.2.2).
            offset::SHM_LEN_LOW
            | offset::SHM_LEN_HIGH
            | offset::SHM_BASE_LOW
            | offset::SHM_BASE_HIGH => u32::MAX,
            offset::CONFIG_GENERATION => self.interrupt.config_generation(),
            _ => 0,
        }
    }

    fn write(&mut self, register: u64, value: u32) {
        match register {
            offset::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            offset::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            offset::DRIVER_FEATURES => self.set_driver_features(value),
            offset::QUEUE_SEL => self.queue_sel = value,
            offset::QUEUE_NOTIFY => self.notify(value),
            offset::INTERRUPT_ACK => {
                let known = VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG;
                self.interrupt.acknowledge(value & known);
            }
            offset::STATUS => self.set_status(value),
            _ if self.may_set_up_queues() => self.write_queue(register, value),
            _ => log::debug!("write to register {register:#x} at the wrong time"),
        }
    }

    fn write_queue(&mut self, register: u64, value: u32) {
        let select = self.queue_sel;
        let (part, high) = match register {
            offset::QUEUE_NUM => return self.queues.set_size(select, value),
            offset::QUEUE_READY => return self.queues.set_ready(select, value == 1),
            offset::QUEUE_DESC_LOW => (Part::Descriptors, false),
            offset::QUEUE_DESC_HIGH => (Part::Descriptors, true),
            offset::QUEUE_DRIVER_LOW => (Part::Available, false),
            offset::QUEUE_DRIVER_HIGH => (Part::Available, true),
            offset::QUEUE_DEVICE_LOW => (Part::Used, false),
            offset::QUEUE_DEVICE_HIGH => (Part::Used, true),
            _ => return,
        };
        self.queues.set_address(select, part, high, value);
    }

    fn status(&self) -> u32 {
        let broken = if self.interrupt.is_broken() {
            NEEDS_RESET
        } else {
            0
        };
        self.status | broken
    }

    /// Between FEATURES_OK and DRIVER_OK, and not after a failure.
    fn may_set_up_queues(&self) -> bool {
        self.status & (FEATURES_OK | DRIVER_OK | FAILED) == FEATURES_OK
    }

    /// Between DRIVER and FEATURES_OK.
    fn set_driver_features(&mut self, value: u32) {
        if self.status & (DRIVER | FEATURES_OK | FAILED) != DRIVER {
            log::debug!("driver features written at the wrong time");
            return;
        }
        let value = u64::from(value);
        match self.driver_features_sel {
            0 => self.driver_features = (self.driver_features & !0xffff_ffff) | value,
            1 => self.driver_features = (self.driver_features & 0xffff_ffff) | (value << 32),
            _ => {}
        }
    }

    /// A notification that did not go by ioeventfd.
    fn notify(&mut self, queue: u32) {
        let kick = usize::try_from(queue)
            .ok()
            .and_then(|index| self.kicks.get(index));
        if let Some(Err(error)) = kick.map(|kick| kick.write(1)) {
            log::debug!("notification of queue {queue}: {error}");
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if self.status & (DRIVER | FAILED) == DRIVER {
            self.device.write_config(offset, data);
        }
    }

    /// Bits are only ever added, in their order; zero is a reset.
    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let new = value & !self.status;
        if new & FAILED != 0 {
            self.status |= FAILED;
        }
        if self.status & FAILED != 0 {
            return;
        }
        if new & ACKNOWLEDGE != 0 {
            self.status |= ACKNOWLEDGE;
        }
        if new & DRIVER != 0 && self.status & ACKNOWLEDGE != 0 {
            self.status |= DRIVER;
        }
        if new & FEATURES_OK != 0 && self.status & DRIVER != 0 && self.features_are_good() {
            self.status |= FEATURES_OK;
        }
        if new & DRIVER_OK != 0 && self.status & FEATURES_OK != 0 {
            self.status |= DRIVER_OK;
            self.activate();
        }
    }

    fn features_are_good(&self) -> bool {
        let unknown = self.driver_features & !self.device.features();
        let modern = self.driver_features & VERSION_1 != 0;
        if unknown != 0 || !modern {
            let (name, features) = (self.device.name(), self.driver_features);
            log::debug!("{name}: driver features {features:#x} are refused");
        }
        unknown == 0 && modern
    }

    /// Moves the queues into the device. What goes wrong is the driver's to see as NEEDS_RESET.
    fn activate(&mut self) {
        if let Err(problem) = self.try_activate(self.queues.clone()) {
            log::warn!("{}: not activated: {problem}", self.device.name());
            self.interrupt.needs_reset();
        }
    }

    fn try_activate(&mut self, setup: QueueSetup) -> Result<(), String> {
        let event_idx = self.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let queues = setup
            .activate(&self.memory.memory(), event_idx)
            .map_err(|error| error.to_string())?;
        let queues = queues
            .into_iter()
            .zip(&self.kicks)
            .map(|(queue, kick)| {
                let Some(queue) = queue else { return Ok(None) };
                let kick = kick.try_clone()?;
                Ok(Some(ActiveQueue { queue, kick }))
            })
            .collect::<std::io::Result<Vec<_>>>()
            .map_err(|error| format!("failed to duplicate an eventfd: {error}"))?;
        let activation = Activation {
            memory: self.memory.clone(),
            queues,
            interrupt: self.interrupt.clone(),
            features: self.driver_features,
        };
        self.device
            .activate(activation)
            .map_err(|error| error.to_string())?;
        self.active = true;
        Ok(())
    }

    fn reset(&mut self) {
        if self.active {
            self.device.reset();
            self.active = false;
        }
        self.interrupt.clear();
        for kick in &self.kicks {
            // Nothing to read is what is wanted.
            let _ = kick.read();
        }
        self.queues = QueueSetup::new(self.device.queue_sizes());
        self.status = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
    }

    fn restore(&mut self, saved: MmioState) -> Result<(), SnapshotError> {
        let bad = |text: &str| SnapshotError::BadState(text.to_owned());
        if self.status != 0 {
            return Err(bad("the transport is in use"));
        }
        let sizes = saved.queues.iter().map(|queue| queue.max_size);
        if !sizes.eq(self.device.queue_sizes().iter().copied()) {
            return Err(bad("it has other queues"));
        }
        if saved.driver_features & !self.device.features() != 0 {
            return Err(bad("it has features that the device has not"));
        }
        let setup = QueueSetup::from(saved.queues);
        let positions = positions(&saved.device)?;
        self.device.restore(saved.device)?;
        self.status = saved.status & (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED);
        self.device_features_sel = saved.device_features_sel;
        self.driver_features_sel = saved.driver_features_sel;
        self.driver_features = saved.driver_features;
        self.queue_sel = saved.queue_sel;
        self.queues = setup;
        if saved.broken {
            self.interrupt.needs_reset();
        }
        self.interrupt.restore(saved.interrupt_status);
        if self.status & (DRIVER_OK | FAILED) == DRIVER_OK && !saved.broken {
            let setup = self.queues.at(&positions)?;
            self.try_activate(setup).map_err(SnapshotError::BadState)?;
        }
        Ok(())
    }
}
