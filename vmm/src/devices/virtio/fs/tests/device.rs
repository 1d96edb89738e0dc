// SPDX-License-Identifier: Apache-2.0

//! The device with its threads, driven through its rings.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryAtomic;
use vmm_sys_util::eventfd::EventFd;

use super::super::FsDeviceError;
use super::super::device::FsDevice;
use super::*;
use crate::devices::virtio::device::{
    ActivateError, Activation, ActiveQueue, Interrupt, SnapshotError, VirtioDevice,
};

/// A driver of one request queue (queue 1 of 3).
struct Driver {
    memory: GuestMemoryMmap,
    kick: EventFd,
    line: EventFd,
    interrupt: Arc<Interrupt>,
}

impl Driver {
    fn new() -> Self {
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        Self {
            memory: memory(),
            kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            interrupt: Arc::new(Interrupt::new(line.try_clone().unwrap())),
            line,
        }
    }

    fn activation(&self, queue: Queue) -> Activation {
        let active = ActiveQueue {
            queue,
            kick: self.kick.try_clone().unwrap(),
        };
        Activation {
            memory: GuestMemoryAtomic::new(self.memory.clone()),
            queues: vec![None, Some(active), None],
            interrupt: self.interrupt.clone(),
            features: 0,
        }
    }

    /// A ring of 16 where the device allows 1024.
    fn fresh_queue(&self) -> Queue {
        let mock = MockSplitQueue::new(&self.memory, 16);
        let mut queue = Queue::new(1024).unwrap();
        queue.set_size(16);
        for (address, set) in [
            (
                mock.desc_table_addr(),
                Queue::set_desc_table_address as fn(&mut _, _, _),
            ),
            (mock.avail_addr(), Queue::set_avail_ring_address),
            (mock.used_addr(), Queue::set_used_ring_address),
        ] {
            set(&mut queue, u32::try_from(address.0).ok(), Some(0));
        }
        queue.set_ready(true);
        queue
    }

    /// Offers a request as chain number `nth` and waits until it was used.
    fn call(&self, nth: u16, opcode: Opcode, node: u64, body: &[u8]) -> Answer {
        self.offer(nth, opcode, node, body);
        self.kick.write(1).unwrap();
        self.wait(nth)
    }

    fn offer(&self, nth: u16, opcode: Opcode, node: u64, body: &[u8]) {
        let header = InHeader {
            len: u32::try_from(40 + body.len()).unwrap(),
            opcode: opcode as u32,
            unique: 7,
            nodeid: node,
            ..Default::default()
        };
        let (request, answer) = (
            REQUEST + u64::from(nth) * 0x1000,
            ANSWER + u64::from(nth) * 0x1000,
        );
        let memory = &self.memory;
        memory.write_obj(header, GuestAddress(request)).unwrap();
        memory
            .write_slice(body, GuestAddress(request + 40))
            .unwrap();
        // Straight into the rings: the mock would clear them.
        let table = |index: u16, address, len, flags, next| {
            let descriptor = Descriptor::new(address, len, flags, next);
            memory
                .write_obj(
                    RawDescriptor::from(descriptor),
                    GuestAddress(u64::from(index) * 16),
                )
                .unwrap();
        };
        let head = nth * 2 % 16;
        table(head, request, header.len, 1, head + 1);
        table(head + 1, answer, 0x1000, WRITABLE, 0);
        let avail = 256;
        memory
            .write_obj(head, GuestAddress(avail + 4 + u64::from(nth % 16) * 2))
            .unwrap();
        memory.write_obj(nth + 1, GuestAddress(avail + 2)).unwrap();
    }

    fn wait(&self, nth: u16) -> Answer {
        let mut poll = [libc::pollfd {
            fd: self.line.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        }];
        // SAFETY: one valid pollfd.
        let ready = unsafe { libc::poll(poll.as_mut_ptr(), 1, 10_000) };
        assert_eq!(ready, 1, "no interrupt within ten seconds");
        self.line.read().unwrap();
        let answer = ANSWER + u64::from(nth) * 0x1000;
        let header: OutHeader = self.memory.read_obj(GuestAddress(answer)).unwrap();
        let mut payload = vec![0; header.len as usize - 16];
        self.memory
            .read_slice(&mut payload, GuestAddress(answer + 16))
            .unwrap();
        Answer {
            error: header.error,
            payload,
        }
    }
}

#[test]
fn the_configuration_is_checked_and_shown() {
    let directory = tempfile::tempdir().unwrap();
    let good = config(directory.path());
    let device = FsDevice::new(&good).unwrap();
    assert_eq!(device.device_type(), 26);
    assert_eq!(device.queue_sizes(), [128, 1024, 1024]);
    let mut space = [0xff; 48];
    device.read_config(0, &mut space);
    assert_eq!(&space[..6], b"share\0");
    assert_eq!(&space[36..], [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let mut byte = [0xff];
    device.read_config(u64::MAX, &mut byte);
    assert_eq!(byte, [0]);
    for tag in ["", "a\0b", &"x".repeat(37)] {
        let mut bad = good.clone();
        bad.tag = tag.to_owned();
        assert!(matches!(
            FsDevice::new(&bad),
            Err(FsDeviceError::Tag { .. })
        ));
    }
    for queues in [0, 9] {
        let mut bad = good.clone();
        bad.queues = queues;
        assert!(matches!(
            FsDevice::new(&bad),
            Err(FsDeviceError::Queues { .. })
        ));
    }
}

#[test]
fn a_request_goes_through_the_ring_also_after_a_pause() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("file"), b"").unwrap();
    let mut device = FsDevice::new(&config(directory.path())).unwrap();
    let driver = Driver::new();
    device
        .activate(driver.activation(driver.fresh_queue()))
        .unwrap();
    assert_eq!(driver.call(0, Opcode::Init, 0, &init_body()).error, 0);
    let found: EntryOut = driver.call(1, Opcode::Lookup, ROOT, b"file\0").object();
    assert!(matches!(device.save(), Err(SnapshotError::NotPaused)));
    device.pause();
    // Offered while nobody looks, and its notification lost.
    driver.offer(2, Opcode::Getattr, found.nodeid, &[0; 16]);
    device.resume().unwrap();
    assert_eq!(driver.wait(2).error, 0);
    let mut metrics = Vec::new();
    device.metrics(&mut metrics);
    assert!(metrics.contains(&("requests", 3)) && metrics.contains(&("malformed", 0)));
    device.reset();
    device
        .activate(driver.activation(driver.fresh_queue()))
        .unwrap();
    let forgotten = driver.call(0, Opcode::Getattr, found.nodeid, &[0; 16]);
    assert_eq!(forgotten.error, -libc::EBADF);
}

#[test]
fn a_saved_device_goes_on_in_another_process() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("dir")).unwrap();
    std::fs::write(directory.path().join("dir/file"), b"content").unwrap();
    let mut device = FsDevice::new(&config(directory.path())).unwrap();
    let driver = Driver::new();
    device
        .activate(driver.activation(driver.fresh_queue()))
        .unwrap();
    driver.call(0, Opcode::Init, 0, &init_body());
    let parent: EntryOut = driver.call(1, Opcode::Lookup, ROOT, b"dir\0").object();
    let node: EntryOut = driver
        .call(2, Opcode::Lookup, parent.nodeid, b"file\0")
        .object();
    let opened: OpenOut = driver
        .call(3, Opcode::Open, node.nodeid, OpenIn::default().as_slice())
        .object();
    device.pause();
    let state = device.save().unwrap();
    let snapshot = serde_json::from_value(state["queues"][1].clone()).unwrap();
    drop(device);

    let mut restored = FsDevice::new(&config(directory.path())).unwrap();
    restored.restore(state).unwrap();
    let queue = Queue::try_from(&snapshot).unwrap();
    restored.activate(driver.activation(queue)).unwrap();
    let args = ReadIn {
        fh: opened.fh,
        size: 7,
        ..Default::default()
    };
    let read = driver.call(4, Opcode::Read, node.nodeid, args.as_slice());
    assert_eq!((read.error, read.payload), (0, b"content".to_vec()));
}

#[test]
fn a_state_of_another_device_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let device = FsDevice::new(&config(directory.path())).unwrap();
    let good = device.save().unwrap();
    let refused = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut state = good.clone();
        change(&mut state);
        let mut device = FsDevice::new(&config(directory.path())).unwrap();
        assert!(device.restore(state).is_err());
    };
    refused(&|state| state["version"] = 2.into());
    refused(&|state| state["tag"] = "other".into());
    refused(&|state| state["queues"] = serde_json::json!([null]));
    refused(&|state| state["file_system"] = serde_json::json!([255, 255, 255]));
    refused(&|state| state["more"] = 1.into());
}

#[test]
fn a_broken_ring_breaks_the_device_until_its_reset() {
    let directory = tempfile::tempdir().unwrap();
    let mut device = FsDevice::new(&config(directory.path())).unwrap();
    let driver = Driver::new();
    device
        .activate(driver.activation(driver.fresh_queue()))
        .unwrap();
    driver.call(0, Opcode::Init, 0, &init_body());
    // An index further ahead than the ring is long.
    driver
        .memory
        .write_obj(1000u16, GuestAddress(256 + 2))
        .unwrap();
    driver.kick.write(1).unwrap();
    let mut poll = [libc::pollfd {
        fd: driver.line.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    }];
    // SAFETY: one valid pollfd.
    assert_eq!(unsafe { libc::poll(poll.as_mut_ptr(), 1, 10_000) }, 1);
    assert!(driver.interrupt.is_broken());
    device.reset();
    driver.interrupt.clear();
    driver.line.read().unwrap();
    device
        .activate(driver.activation(driver.fresh_queue()))
        .unwrap();
    assert_eq!(driver.call(0, Opcode::Init, 0, &init_body()).error, 0);
}

#[test]
fn the_number_of_queues_must_be_the_devices() {
    let directory = tempfile::tempdir().unwrap();
    let mut device = FsDevice::new(&config(directory.path())).unwrap();
    let driver = Driver::new();
    let mut activation = driver.activation(driver.fresh_queue());
    activation.queues.pop();
    assert!(matches!(
        device.activate(activation),
        Err(ActivateError::QueueCount { got: 2, want: 3 })
    ));
}
