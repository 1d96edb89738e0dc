// SPDX-License-Identifier: Apache-2.0

//! The device with its threads, driven through a ring, with io_uring and without.

use std::collections::HashMap;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use caisson_protocol::vm::BlkConfig;
use proptest::prelude::*;
use tempfile::NamedTempFile;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::{BlkDevice, BlkError};
use crate::devices::virtio::device::{
    Activation, ActiveQueue, Interrupt, SnapshotError, VirtioDevice,
};

const TABLE: u64 = 0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADERS: u64 = 0x3000;
const DATA: u64 = 0x10000;
const MEMORY: usize = 0x200000;
const RING: u16 = 16;
const SECTORS: u64 = 1000;

const WRITABLE: u16 = VRING_DESC_F_WRITE as u16;
const NEXT: u16 = VRING_DESC_F_NEXT as u16;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;

/// One descriptor: address, length, writable.
type Piece = (u64, u32, bool);

struct Driver {
    memory: GuestMemoryMmap,
    kick: EventFd,
    line: EventFd,
    interrupt: Arc<Interrupt>,
    next_avail: u16,
    next_used: u16,
    next_descriptor: u16,
}

impl Driver {
    fn new() -> Self {
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        Self {
            memory: GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap(),
            kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            interrupt: Arc::new(Interrupt::new(line.try_clone().unwrap())),
            line,
            next_avail: 0,
            next_used: 0,
            next_descriptor: 0,
        }
    }

    fn queue() -> Queue {
        let mut queue = Queue::new(256).unwrap();
        queue.set_size(RING);
        queue.set_desc_table_address(u32::try_from(TABLE).ok(), Some(0));
        queue.set_avail_ring_address(u32::try_from(AVAIL).ok(), Some(0));
        queue.set_used_ring_address(u32::try_from(USED).ok(), Some(0));
        queue.set_ready(true);
        queue
    }

    fn activation(&self, queue: Queue, features: u64) -> Activation {
        let kick = self.kick.try_clone().unwrap();
        Activation {
            memory: GuestMemoryAtomic::new(self.memory.clone()),
            queues: vec![Some(ActiveQueue { queue, kick })],
            interrupt: self.interrupt.clone(),
            features,
        }
    }

    /// Puts a chain into the available ring; returns its head.
    fn offer(&mut self, pieces: &[Piece]) -> u16 {
        let head = self.next_descriptor % RING;
        for (nth, (address, len, writable)) in pieces.iter().enumerate() {
            let index = self.next_descriptor % RING;
            self.next_descriptor += 1;
            let mut flags = if *writable { WRITABLE } else { 0 };
            if nth + 1 < pieces.len() {
                flags |= NEXT;
            }
            let next = self.next_descriptor % RING;
            let descriptor = Descriptor::new(*address, *len, flags, next);
            let at = GuestAddress(TABLE + u64::from(index) * 16);
            self.memory
                .write_obj(RawDescriptor::from(descriptor), at)
                .unwrap();
        }
        self.announce(head);
        head
    }

    fn announce(&mut self, head: u16) {
        let slot = GuestAddress(AVAIL + 4 + u64::from(self.next_avail % RING) * 2);
        self.memory.write_obj(head, slot).unwrap();
        self.next_avail = self.next_avail.wrapping_add(1);
        self.memory
            .write_obj(self.next_avail, GuestAddress(AVAIL + 2))
            .unwrap();
    }

    fn header(&self, slot: u64, kind: u32, sector: u64) -> u64 {
        let at = HEADERS + slot * 32;
        self.memory.write_obj(kind, GuestAddress(at)).unwrap();
        self.memory.write_obj(0u32, GuestAddress(at + 4)).unwrap();
        self.memory.write_obj(sector, GuestAddress(at + 8)).unwrap();
        self.memory
            .write_obj(0xffu8, GuestAddress(at + 16))
            .unwrap();
        at
    }

    fn interrupted(&self) {
        let mut poll = [libc::pollfd {
            fd: self.line.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        }];
        // SAFETY: one valid pollfd.
        let ready = unsafe { libc::poll(poll.as_mut_ptr(), 1, 10_000) };
        assert_eq!(ready, 1, "no interrupt within ten seconds");
        self.line.read().unwrap();
    }

    /// Waits for `count` chains: head and used length of each.
    fn used(&mut self, count: usize) -> HashMap<u32, u32> {
        let mut used = HashMap::new();
        loop {
            let index: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
            while self.next_used != index {
                let at = USED + 4 + u64::from(self.next_used % RING) * 8;
                let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
                let len = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
                assert!(used.insert(head, len).is_none(), "used twice");
                self.next_used = self.next_used.wrapping_add(1);
            }
            assert!(used.len() <= count);
            if used.len() == count {
                return used;
            }
            self.interrupted();
        }
    }

    /// One request with its data in two pieces; returns status and used length.
    fn call(&mut self, kind: u32, sector: u64, data_len: u32, device_writes: bool) -> (u8, u32) {
        let header = self.header(0, kind, sector);
        let first = data_len / 3;
        let pieces: Vec<Piece> = [
            (header, 16, false),
            (DATA, first, device_writes),
            (DATA + u64::from(first), data_len - first, device_writes),
            (header + 16, 1, true),
        ]
        .into_iter()
        .filter(|(_, len, _)| *len > 0)
        .collect();
        let head = self.offer(&pieces);
        self.kick.write(1).unwrap();
        let used = self.used(1)[&u32::from(head)];
        let status = self.memory.read_obj(GuestAddress(header + 16)).unwrap();
        (status, used)
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.memory.write_slice(data, GuestAddress(DATA)).unwrap();
        let len = u32::try_from(data.len()).unwrap();
        self.call(OUT, sector, len, false).0
    }

    fn read(&mut self, sector: u64, len: u32) -> (u8, Vec<u8>) {
        let (status, used) = self.call(IN, sector, len, true);
        let mut data = vec![0; len as usize];
        if status == 0 {
            assert_eq!(used, len + 1);
            self.memory
                .read_slice(&mut data, GuestAddress(DATA))
                .unwrap();
        }
        (status, data)
    }

    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let mut bytes = Vec::new();
        for (sector, sectors, flags) in ranges {
            bytes.extend_from_slice(&sector.to_le_bytes());
            bytes.extend_from_slice(&sectors.to_le_bytes());
            bytes.extend_from_slice(&flags.to_le_bytes());
        }
        self.memory.write_slice(&bytes, GuestAddress(DATA)).unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        self.call(kind, 0, len, false).0
    }
}

fn image() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(SECTORS * 512).unwrap();
    file
}

fn config(image: &NamedTempFile) -> BlkConfig {
    BlkConfig {
        serial: "disk-1".to_owned(),
        path: image.path().to_owned(),
        read_only: false,
        queues: 1,
    }
}

fn running(image: &NamedTempFile, calls_only: bool) -> (BlkDevice, Driver) {
    let mut device = BlkDevice::new(&config(image)).unwrap();
    device.calls_only = calls_only;
    let driver = Driver::new();
    let features = device.features();
    device
        .activate(driver.activation(Driver::queue(), features))
        .unwrap();
    (device, driver)
}

#[test]
fn data_goes_to_the_image_and_back() {
    for calls_only in [false, true] {
        let image = image();
        let (_device, mut driver) = running(&image, calls_only);
        let data: Vec<u8> = (0..8192u32).map(|n| (n * 7 % 251) as u8).collect();
        assert_eq!(driver.write(10, &data), 0);
        let mut on_host = vec![0; 8192];
        image.as_file().read_exact_at(&mut on_host, 5120).unwrap();
        assert_eq!(on_host, data);
        assert_eq!(driver.read(10, 8192), (0, data));
        assert_eq!(driver.call(FLUSH, 0, 0, false), (0, 1));
        assert_eq!(driver.read(SECTORS - 1, 512).0, 0);
        assert_eq!(driver.read(SECTORS - 1, 1024).0, 1);
        assert_eq!(driver.write(SECTORS, &[0; 512]), 1);
        assert_eq!(driver.read(u64::MAX, 512).0, 1);
        assert_eq!(driver.call(99, 0, 0, false), (2, 1));
        assert_eq!(
            std::fs::metadata(image.path()).unwrap().len(),
            SECTORS * 512
        );
    }
}

#[test]
fn space_is_given_back_and_zeroes_are_zeroes() {
    use std::os::unix::fs::MetadataExt;
    for calls_only in [false, true] {
        let image = image();
        let (_device, mut driver) = running(&image, calls_only);
        for sector in (0..SECTORS - 100).step_by(100) {
            assert_eq!(driver.write(sector, &[7; 51200]), 0);
        }
        let blocks = || std::fs::metadata(image.path()).unwrap().blocks();
        image.as_file().sync_all().unwrap();
        let before = blocks();
        assert_eq!(driver.ranges(DISCARD, &[(0, 100, 0), (200, 100, 0)]), 0);
        assert!(blocks() < before, "nothing was given back");
        assert_eq!(driver.read(250, 512), (0, vec![0; 512]));
        assert_eq!(driver.read(150, 512), (0, vec![7; 512]));
        for flags in [0, 1] {
            assert_eq!(driver.write(400, &[9; 1024]), 0);
            assert_eq!(driver.ranges(ZEROES, &[(401, 1, flags), (0, 0, 0)]), 0);
            assert_eq!(driver.read(400, 512), (0, vec![9; 512]));
            assert_eq!(driver.read(401, 512), (0, vec![0; 512]));
        }
        assert_eq!(driver.ranges(ZEROES, &[(SECTORS - 1, 2, 0)]), 1);
        assert_eq!(driver.ranges(ZEROES, &[(u64::MAX, 2, 0)]), 1);
        assert_eq!(driver.ranges(DISCARD, &[(0, 1, 1)]), 2);
    }
}

#[test]
fn the_serial_number_is_told() {
    let image = image();
    let (_device, mut driver) = running(&image, false);
    assert_eq!(driver.call(GET_ID, 0, 20, true).0, 0);
    let mut serial = [0xff; 20];
    driver
        .memory
        .read_slice(&mut serial, GuestAddress(DATA))
        .unwrap();
    assert_eq!(&serial, b"disk-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn a_read_only_disk_is_announced_and_stays_as_it_is() {
    let image = image();
    let mut config = config(&image);
    config.read_only = true;
    let mut device = BlkDevice::new(&config).unwrap();
    assert_eq!(device.features() & (1 << 5), 1 << 5);
    assert_eq!(device.features() & (1 << 13 | 1 << 14), 0);
    let mut driver = Driver::new();
    let features = device.features();
    device
        .activate(driver.activation(Driver::queue(), features))
        .unwrap();
    assert_eq!(driver.write(0, &[1; 512]), 1);
    assert_eq!(driver.ranges(DISCARD, &[(0, 1, 0)]), 1);
    assert_eq!(driver.read(0, 512), (0, vec![0; 512]));
}

#[test]
fn many_requests_at_once_all_come_back() {
    for calls_only in [false, true] {
        let image = image();
        let (_device, mut driver) = running(&image, calls_only);
        for round in 0..50u64 {
            let mut heads = Vec::new();
            for slot in 0..5 {
                let header = driver.header(slot, OUT, slot * 8);
                let data = DATA + slot * 4096;
                let byte = (round + slot) as u8;
                driver
                    .memory
                    .write_slice(&[byte; 4096], GuestAddress(data))
                    .unwrap();
                let pieces = [
                    (header, 16, false),
                    (data, 4096, false),
                    (header + 16, 1, true),
                ];
                heads.push(driver.offer(&pieces));
            }
            driver.kick.write(1).unwrap();
            let used = driver.used(5);
            for (slot, head) in heads.into_iter().enumerate() {
                assert_eq!(used[&u32::from(head)], 1);
                let status = HEADERS + slot as u64 * 32 + 16;
                let status: u8 = driver.memory.read_obj(GuestAddress(status)).unwrap();
                assert_eq!(status, 0);
            }
        }
        for slot in 0..5u64 {
            let expected = vec![(49 + slot) as u8; 4096];
            assert_eq!(driver.read(slot * 8, 4096), (0, expected));
        }
    }
}

#[test]
fn a_chain_without_a_status_or_header_is_given_back() {
    let image = image();
    let (device, mut driver) = running(&image, false);
    let header = driver.header(0, IN, 0);
    for pieces in [
        vec![(header, 16, false)],
        vec![(header, 16, false), (MEMORY as u64, 512, true)],
        vec![(header, 16, false), (u64::MAX, 1, true)],
    ] {
        let head = driver.offer(&pieces);
        driver.kick.write(1).unwrap();
        assert_eq!(driver.used(1)[&u32::from(head)], 0);
    }
    // A header that is too short still gets a status.
    let head = driver.offer(&[(header, 15, false), (header + 16, 1, true)]);
    driver.kick.write(1).unwrap();
    assert_eq!(driver.used(1)[&u32::from(head)], 1);
    let status: u8 = driver.memory.read_obj(GuestAddress(header + 16)).unwrap();
    assert_eq!(status, 1);
    let mut metrics = Vec::new();
    device.metrics(&mut metrics);
    assert_eq!(metrics, [("requests", 4), ("errors", 1), ("malformed", 3)]);
}

#[test]
fn a_chain_offered_twice_breaks_the_ring_and_nothing_else() {
    let image = image();
    let (mut device, mut driver) = running(&image, false);
    let header = driver.header(0, OUT, 0);
    // Before the device looks, so that both are seen at once.
    device.pause();
    let pieces = [
        (header, 16, false),
        (DATA, 512 * 900, false),
        (header + 16, 1, true),
    ];
    let head = driver.offer(&pieces);
    driver.announce(head);
    device.resume().unwrap();
    driver.interrupted();
    if !driver.interrupt.is_broken() {
        // Without io_uring the first is done before the second is seen.
        println!("skipped: no io_uring here");
        return;
    }
    device.reset();
    driver.interrupt.clear();
    let mut fresh = Driver::new();
    let features = device.features();
    device
        .activate(fresh.activation(Driver::queue(), features))
        .unwrap();
    assert_eq!(fresh.read(0, 512).0, 0);
}

#[test]
fn a_ring_that_runs_ahead_is_broken() {
    let image = image();
    let (_device, driver) = running(&image, true);
    driver
        .memory
        .write_obj(RING * 2, GuestAddress(AVAIL + 2))
        .unwrap();
    driver.kick.write(1).unwrap();
    driver.interrupted();
    assert!(driver.interrupt.is_broken());
}

#[test]
fn a_pause_finishes_what_is_under_way_and_a_saved_device_goes_on() {
    let image = image();
    let (mut device, mut driver) = running(&image, false);
    assert_eq!(driver.write(3, &[5; 512]), 0);
    assert!(matches!(device.save(), Err(SnapshotError::NotPaused)));
    let header = driver.header(0, IN, 3);
    let pieces = [
        (header, 16, false),
        (DATA, 512, true),
        (header + 16, 1, true),
    ];
    driver.offer(&pieces);
    driver.kick.write(1).unwrap();
    device.pause();
    let index: u16 = driver.memory.read_obj(GuestAddress(USED + 2)).unwrap();
    driver.offer(&pieces);
    let state = device.save().unwrap();
    let snapshot = serde_json::from_value(state["queues"][0].clone()).unwrap();
    drop(device);
    assert!(index == 1 || index == 2);

    let mut restored = BlkDevice::new(&config(&image)).unwrap();
    restored.restore(state.clone()).unwrap();
    let queue = Queue::try_from(&snapshot).unwrap();
    let features = restored.features();
    restored
        .activate(driver.activation(queue, features))
        .unwrap();
    driver.used(2);
    assert_eq!(driver.read(3, 512), (0, vec![5; 512]));
    drop(restored);

    image.as_file().set_len(512).unwrap();
    let mut other = BlkDevice::new(&config(&image)).unwrap();
    assert!(matches!(
        other.restore(state),
        Err(SnapshotError::BadState(_))
    ));
}

#[test]
fn an_image_that_shrinks_fails_reads_and_not_the_vmm() {
    for calls_only in [false, true] {
        let image = image();
        let (_device, mut driver) = running(&image, calls_only);
        image.as_file().set_len(1024 + 100).unwrap();
        assert_eq!(driver.read(1, 512).0, 0);
        assert_eq!(driver.read(2, 512).0, 1);
        assert_eq!(driver.read(500, 512).0, 1);
    }
}

#[test]
fn the_configuration_is_checked_and_shown() {
    let image = image();
    let device = BlkDevice::new(&config(&image)).unwrap();
    assert_eq!(device.device_type(), 2);
    assert_eq!(device.queue_sizes(), [256]);
    let mut space = [0xff; 64];
    device.read_config(0, &mut space);
    let word = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
    assert_eq!(u64::from(word(0)), SECTORS);
    assert_eq!((word(4), word(8), word(12), word(20)), (0, 0, 254, 512));
    assert_eq!(word(32) >> 16, 1);
    assert!(word(36) > 0 && word(40) > 0 && word(48) > 0 && space[56] == 1);
    assert_eq!(space[60..], [0; 4]);
    drop(device);
    for serial in ["", "a\0", "123456789012345678901"] {
        let mut bad = config(&image);
        bad.serial = serial.to_owned();
        assert!(matches!(BlkDevice::new(&bad), Err(BlkError::Serial { .. })));
    }
    for queues in [0, 9] {
        let mut bad = config(&image);
        bad.queues = queues;
        assert!(matches!(BlkDevice::new(&bad), Err(BlkError::Queues { .. })));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_chain_is_given_back_once(
        header in proptest::collection::vec(any::<u8>(), 0..20),
        kind in prop_oneof![0u32..14, any::<u32>()],
        pieces in proptest::collection::vec(
            (0u64..MEMORY as u64 + 4096, 0u32..5000, any::<bool>()),
            0..6,
        ),
    ) {
        let image = image();
        let (_device, mut driver) = running(&image, false);
        let memory = &driver.memory;
        memory.write_slice(&header, GuestAddress(HEADERS)).unwrap();
        memory.write_obj(kind, GuestAddress(HEADERS)).unwrap();
        let mut chain = vec![(HEADERS, header.len() as u32, false)];
        // Not into the rings: that is the driver's own.
        chain.extend(pieces.into_iter().filter(|(at, _, _)| *at >= DATA));
        let head = driver.offer(&chain);
        driver.kick.write(1).unwrap();
        prop_assert!(driver.used(1).contains_key(&u32::from(head)));
    }
}
