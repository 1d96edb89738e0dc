// SPDX-License-Identifier: Apache-2.0

//! The transport as a driver sees it, with a device that records what it is given.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use serde_json::{Value, json};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::registers::{MmioState, MmioTransport};
use crate::bus::BusDevice;
use crate::devices::virtio::device::{
    ActivateError, Activation, GuestMemory, Interrupt, QueueSnapshot, SnapshotError, VirtioDevice,
};

const FEATURES: u64 = (1 << 32) | (1 << 29) | 1;
const SIZES: [u16; 2] = [256, 16];

/// What happened to the device.
#[derive(Debug, Default)]
struct Record {
    activations: Vec<Activation>,
    resets: usize,
    config: Vec<(u64, Vec<u8>)>,
    fail: bool,
}

#[derive(Debug)]
struct Fake(Arc<Mutex<Record>>);

impl VirtioDevice for Fake {
    fn device_type(&self) -> u32 {
        42
    }
    fn name(&self) -> &'static str {
        "fake"
    }
    fn features(&self) -> u64 {
        FEATURES
    }
    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = at as u8;
        }
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.0.lock().unwrap().config.push((offset, data.to_vec()));
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut record = self.0.lock().unwrap();
        if record.fail {
            return Err(ActivateError::QueueCount { got: 0, want: 1 });
        }
        record.activations.push(activation);
        Ok(())
    }
    fn reset(&mut self) {
        let mut record = self.0.lock().unwrap();
        record.resets += 1;
        record.activations.clear();
    }
    fn pause(&mut self) {}
    fn resume(&mut self) -> Result<(), ActivateError> {
        Ok(())
    }
    fn save(&self) -> Result<Value, SnapshotError> {
        let record = self.0.lock().unwrap();
        let queues = record.activations.last().map(|activation| {
            let snapshot = |queue: &Option<_>| {
                queue
                    .as_ref()
                    .map(|queue: &crate::devices::virtio::device::ActiveQueue| {
                        QueueSnapshot::from(&queue.queue)
                    })
            };
            activation.queues.iter().map(snapshot).collect::<Vec<_>>()
        });
        Ok(json!({ "queues": queues }))
    }
    fn restore(&mut self, _state: Value) -> Result<(), SnapshotError> {
        Ok(())
    }
}

struct Driver {
    transport: MmioTransport,
    record: Arc<Mutex<Record>>,
    interrupt: Arc<Interrupt>,
}

impl Driver {
    fn new() -> Self {
        let record = Arc::new(Mutex::new(Record::default()));
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let interrupt = Arc::new(Interrupt::new(event()));
        let transport = MmioTransport::new(
            Box::new(Fake(record.clone())),
            GuestMemory::new(memory),
            interrupt.clone(),
            vec![event(), event()],
        );
        Self {
            transport,
            record,
            interrupt,
        }
    }

    fn read(&self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    fn features(&self, features: u64) {
        self.write(0x24, 0);
        self.write(0x20, features as u32);
        self.write(0x24, 1);
        self.write(0x20, (features >> 32) as u32);
    }

    fn queue(&self, index: u32, size: u32, at: u32) {
        self.write(0x30, index);
        self.write(0x38, size);
        self.write(0x80, at);
        self.write(0x90, at + 0x1000);
        self.write(0xa0, at + 0x2000);
        self.write(0x44, 1);
    }

    /// Up to FEATURES_OK.
    fn negotiate(&self) {
        self.write(0x70, 1);
        self.write(0x70, 3);
        self.features(FEATURES);
        self.write(0x70, 0xb);
        assert_eq!(self.read(0x70), 0xb);
    }

    fn bring_up(&self) {
        self.negotiate();
        self.queue(0, 128, 0x1000);
        self.queue(1, 16, 0x5000);
        self.write(0x70, 0xf);
    }

    fn activations(&self) -> usize {
        self.record.lock().unwrap().activations.len()
    }
}

#[test]
fn a_driver_brings_the_device_up_and_it_gets_what_was_agreed() {
    let driver = Driver::new();
    assert_eq!(driver.read(0x00), 0x7472_6976);
    assert_eq!(driver.read(0x04), 2);
    assert_eq!(driver.read(0x08), 42);
    driver.write(0x14, 1);
    assert_eq!(driver.read(0x10), 1);
    driver.write(0x14, 2);
    assert_eq!(driver.read(0x10), 0);
    driver.bring_up();
    assert_eq!(driver.read(0x70), 0xf);
    let record = driver.record.lock().unwrap();
    let activation = &record.activations[0];
    assert_eq!(activation.features, FEATURES);
    let queues: Vec<QueueSnapshot> = activation
        .queues
        .iter()
        .map(|queue| QueueSnapshot::from(&queue.as_ref().unwrap().queue))
        .collect();
    assert_eq!((queues[0].size, queues[0].desc_table), (128, 0x1000));
    assert_eq!((queues[1].size, queues[1].used_ring), (16, 0x7000));
    assert!(queues[0].event_idx);
}

#[test]
fn a_queue_that_is_not_made_ready_is_not_given() {
    let driver = Driver::new();
    driver.negotiate();
    driver.queue(1, 16, 0x5000);
    driver.write(0x70, 0xf);
    let record = driver.record.lock().unwrap();
    assert!(record.activations[0].queues[0].is_none());
    assert!(record.activations[0].queues[1].is_some());
}

#[test]
fn steps_cannot_be_left_out() {
    let driver = Driver::new();
    driver.write(0x70, 4);
    driver.write(0x70, 8);
    driver.write(0x70, 2);
    assert_eq!(driver.read(0x70), 0);
    driver.write(0x70, 1);
    driver.write(0x70, 1 | 4);
    driver.write(0x70, 1 | 8);
    assert_eq!(driver.read(0x70), 1);
    driver.write(0x70, 3);
    driver.write(0x70, 1);
    assert_eq!(driver.read(0x70), 3, "bits are not taken back");
    assert_eq!(driver.activations(), 0);
}

#[test]
fn features_beyond_the_offer_or_without_version_1_are_refused() {
    for features in [0, 1, FEATURES | 2, u64::MAX, FEATURES & !(1 << 32)] {
        let driver = Driver::new();
        driver.write(0x70, 3);
        driver.features(features);
        driver.write(0x70, 0xb);
        assert_eq!(driver.read(0x70), 3, "{features:#x}");
    }
}

#[test]
fn features_are_fixed_once_agreed_and_not_written_before_driver() {
    let driver = Driver::new();
    driver.features(FEATURES);
    driver.write(0x70, 3);
    driver.write(0x70, 0xb);
    assert_eq!(driver.read(0x70), 3, "written too early");
    driver.features(FEATURES);
    driver.write(0x70, 0xb);
    driver.features(1 << 32);
    driver.write(0x70, 0xf);
    let record = driver.record.lock().unwrap();
    assert_eq!(record.activations[0].features, FEATURES);
}

#[test]
fn after_driver_ok_nothing_changes_but_a_reset_takes_everything_back() {
    let driver = Driver::new();
    driver.bring_up();
    let before = driver.transport.save().unwrap();
    driver.queue(0, 64, 0x3000);
    driver.write(0x44, 0);
    driver.features(1 << 32);
    driver.write(0x70, 0xf);
    let after = driver.transport.save().unwrap();
    assert_eq!(after.queues, before.queues);
    assert_eq!(after.driver_features, before.driver_features);
    assert_eq!(driver.activations(), 1);
    driver.interrupt.needs_reset();
    assert_eq!(driver.read(0x70), 0x4f);
    driver.write(0x70, 0);
    assert_eq!(driver.read(0x70), 0);
    assert_eq!(driver.read(0x60), 0);
    assert_eq!(driver.record.lock().unwrap().resets, 1);
    driver.write(0x30, 0);
    assert_eq!(driver.read(0x44), 0);
    driver.bring_up();
    assert_eq!(driver.activations(), 1);
}

#[test]
fn queues_that_are_not_in_memory_and_devices_that_fail_ask_for_a_reset() {
    let driver = Driver::new();
    driver.negotiate();
    driver.queue(0, 256, 0xf000);
    driver.write(0x70, 0xf);
    assert_eq!(driver.read(0x70), 0x4f);
    assert_eq!(driver.activations(), 0);

    let driver = Driver::new();
    driver.record.lock().unwrap().fail = true;
    driver.bring_up();
    assert_eq!(driver.read(0x70), 0x4f);
    assert_eq!(driver.read(0x60), 2);
    driver.write(0x70, 0);
    driver.record.lock().unwrap().fail = false;
    driver.bring_up();
    assert_eq!(driver.read(0x70), 0xf);
}

#[test]
fn a_failed_device_does_nothing_until_its_reset() {
    let driver = Driver::new();
    driver.negotiate();
    driver.write(0x70, 0x80);
    driver.queue(0, 128, 0x1000);
    driver.write(0x70, 0xf);
    assert_eq!(driver.read(0x70), 0x8b);
    assert_eq!(driver.activations(), 0);
}

#[test]
fn a_queue_that_does_not_exist_reads_as_zero() {
    let driver = Driver::new();
    driver.negotiate();
    for index in [2, 1000, u32::MAX] {
        driver.queue(index, 16, 0x1000);
        assert_eq!(driver.read(0x34), 0);
        assert_eq!(driver.read(0x44), 0);
        driver.write(0x50, index);
    }
    driver.write(0x30, 1);
    assert_eq!(driver.read(0x34), 16);
}

#[test]
fn config_space_takes_any_width_and_registers_only_theirs() {
    let driver = Driver::new();
    for width in [1, 2, 4, 8] {
        let mut data = vec![0; width];
        driver.transport.read(0x103, &mut data);
        assert_eq!(data[0], 3);
        let mut data = vec![0; width];
        driver
            .transport
            .read(if width == 4 { 0x02 } else { 0x00 }, &mut data);
        assert_eq!(data, vec![0; width]);
    }
    driver.transport.write(0x100, &[1]);
    assert!(driver.record.lock().unwrap().config.is_empty());
    driver.write(0x70, 3);
    driver.transport.write(0x104, &[1, 2]);
    assert_eq!(driver.record.lock().unwrap().config, [(4, vec![1, 2])]);
    driver.transport.write(0x70, &[0]);
    assert_eq!(driver.read(0x70), 3, "a byte is no status");
}

#[test]
fn interrupts_are_acknowledged_bit_by_bit() {
    let driver = Driver::new();
    driver.interrupt.signal_used();
    driver.interrupt.signal_config();
    assert_eq!(driver.read(0xfc), 1);
    assert_eq!(driver.read(0x60), 3);
    driver.write(0x64, 1);
    assert_eq!(driver.read(0x60), 2);
    driver.write(0x64, u32::MAX);
    assert_eq!(driver.read(0x60), 0);
}

#[test]
fn the_whole_state_comes_back_and_an_active_device_with_it() {
    let driver = Driver::new();
    driver.bring_up();
    driver.interrupt.signal_used();
    let mut saved = driver.transport.save().unwrap();
    saved.device["queues"][0]["next_avail"] = json!(7);
    saved.device["queues"][0]["next_used"] = json!(5);
    let json = serde_json::to_string(&saved).unwrap();
    let read: MmioState = serde_json::from_str(&json).unwrap();
    assert_eq!(read, saved);

    let again = Driver::new();
    again.transport.restore(read).unwrap();
    assert_eq!(again.read(0x70), 0xf);
    assert_eq!(again.read(0x60), 1);
    let resaved = again.transport.save().unwrap();
    assert_eq!(resaved.device, saved.device);
    assert!(again.transport.restore(saved).is_err(), "it is in use");
}

#[test]
fn a_state_that_does_not_fit_is_refused() {
    let driver = Driver::new();
    driver.bring_up();
    let good = driver.transport.save().unwrap();
    let refused = |change: fn(&mut MmioState)| {
        let mut bad = good.clone();
        change(&mut bad);
        Driver::new().transport.restore(bad).is_err()
    };
    assert!(refused(|state| state.driver_features |= 2));
    assert!(refused(|state| state.queues.truncate(1)));
    assert!(refused(|state| state.queues[0].max_size = 512));
    assert!(refused(|state| state.queues[0].size = 3));
    assert!(refused(|state| state.queues[0].desc_table = 0xffff_0000));
    assert!(refused(
        |state| state.device["queues"][0]["size"] = json!(64)
    ));
    assert!(refused(|state| state.device["queues"] = json!("x")));
    assert!(!refused(|_| {}));
}

proptest! {
    /// Whatever a driver writes, the VMM goes on and active queues are in memory.
    #[test]
    fn no_sequence_of_accesses_does_harm(
        accesses in prop::collection::vec((0u64..0x120, any::<u32>(), 0u32..0x10000, any::<bool>()), 0..200),
    ) {
        let driver = Driver::new();
        for (index, (register, wild, tame, kind)) in accesses.into_iter().enumerate() {
            match index % 4 {
                0 => driver.write(register & !3, wild),
                1 => driver.write(register & !3, tame),
                2 => driver.write(0x70, driver.read(0x70) | (1 << (wild % 4))),
                _ if kind => driver.features(FEATURES),
                _ => { driver.read(register & !3); }
            }
        }
        let record = driver.record.lock().unwrap();
        for activation in &record.activations {
            prop_assert_eq!(activation.queues.len(), SIZES.len());
            prop_assert!(activation.features & (1 << 32) != 0);
            prop_assert_eq!(activation.features & !FEATURES, 0);
        }
    }
}
