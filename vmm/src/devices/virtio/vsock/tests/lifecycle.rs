// SPDX-License-Identifier: Apache-2.0

//! Pause, resume, reset, save and restore.

use std::io::{ErrorKind, Read as _, Write as _};
use std::time::Duration;

use caisson_protocol::vm::VsockConfig;
use virtio_queue::Queue;
use vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _};

use super::super::packet::Op;
use super::super::test_guest::{LONG, TestGuest};
use crate::devices::virtio::device::{ActiveQueue, SnapshotError, VirtioDevice as _};
use crate::devices::virtio::vsock::state::VsockState;
use crate::devices::virtio::vsock::{VsockDevice, VsockError};

#[test]
fn the_socket_waits_while_the_device_is_not_active() {
    let mut guest = TestGuest::new();
    guest.device_reset();
    let mut early = guest.dial();
    early.write_all(b"CONNECT 5\n").unwrap();
    guest.fresh_rings();
    guest.activate();
    let key = guest.accept(5);
    let mut line = [0; 3];
    early.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"OK ");
    guest.control(key, Op::Reset);
    early.set_read_timeout(Some(LONG)).unwrap();
    early.read_to_end(&mut Vec::new()).unwrap();
}

#[test]
fn streams_live_through_a_pause_and_nothing_moves_meanwhile() {
    let mut guest = TestGuest::new();
    let host = guest.listen(1024);
    let (key, mut end) = guest.connect(&host, 1024, 5000);
    guest.device.pause();
    end.write_all(b"while paused").unwrap();
    guest.data(key, b"sent in the pause");
    let half_way = guest.dial();
    (&half_way).write_all(b"CONN").unwrap();
    guest.for_a_while(Duration::from_millis(30));
    assert!(guest.peers[&key].received.is_empty());
    end.set_nonblocking(true).unwrap();
    let nothing = end.read(&mut [0]).unwrap_err();
    assert_eq!(nothing.kind(), ErrorKind::WouldBlock);
    end.set_nonblocking(false).unwrap();
    for _ in 0..3 {
        guest.device.resume().unwrap();
        guest.device.pause();
    }
    guest.device.resume().unwrap();
    guest.until("the host's bytes", |guest| {
        guest.peers[&key].received == b"while paused"
    });
    let mut got = [0; 17];
    end.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"sent in the pause");
    (&half_way).write_all(b"ECT 6\n").unwrap();
    guest.accept(6);
}

#[test]
fn a_restored_guest_is_told_that_its_streams_are_gone() {
    let mut guest = TestGuest::new();
    let host = guest.listen(1024);
    let (key, _end) = guest.connect(&host, 1024, 5000);
    assert!(matches!(guest.device.save(), Err(SnapshotError::NotPaused)));
    guest.device.pause();
    let state = guest.device.save().unwrap();
    let read: VsockState = serde_json::from_value(state.clone()).unwrap();
    assert_eq!(serde_json::to_value(&read).unwrap(), state);
    let queues = read.queues.iter().flatten();
    let queues: Vec<Queue> = queues.map(|queue| queue.try_into().unwrap()).collect();

    guest.device.reset();
    guest.device.restore(state).unwrap();
    let mem = guest.memory.memory();
    guest.events.add(&mem, &[(0x9000, 4, 2)]);
    let kicks = [&guest.rx, &guest.tx, &guest.events].map(|ring| ring.active().kick);
    let active = queues.into_iter().zip(kicks);
    let active = active.map(|(queue, kick)| Some(ActiveQueue { queue, kick }));
    guest.activate_queues(active.collect());
    guest.until("the event", |guest| guest.events.used(&mem) == Some((0, 4)));
    let event: u32 = mem.read_obj(GuestAddress(0x9000)).unwrap();
    assert_eq!(event, 0);
    // The old stream is unknown now.
    guest.data(key, b"?");
    guest.until("a RST", |guest| guest.peers[&key].reset);
    guest.assert_alive();
}

#[test]
fn a_reset_event_waits_for_its_buffer() {
    let mut guest = TestGuest::new();
    guest.device.pause();
    let state = guest.device.save().unwrap();
    guest.device_reset();
    guest.device.restore(state).unwrap();
    guest.fresh_rings();
    guest.activate();
    guest.assert_alive();
    guest.device.pause();
    let owed: VsockState = serde_json::from_value(guest.device.save().unwrap()).unwrap();
    assert!(owed.transport_reset_owed);
    guest.device.resume().unwrap();
    let mem = guest.memory.memory();
    let head = guest.events.add(&mem, &[(0x9000, 2, 2)]);
    guest.events.notify(&mem);
    guest.until("the short one back", |guest| {
        guest.events.used(&mem) == Some((head, 0))
    });
    let head = guest.events.add(&mem, &[(0x9000, 4, 2)]);
    guest.events.notify(&mem);
    guest.until("the event", |guest| {
        guest.events.used(&mem) == Some((head, 4))
    });
}

#[test]
fn states_of_other_devices_are_refused() {
    let mut guest = TestGuest::new();
    guest.device.pause();
    let good = guest.device.save().unwrap();
    assert!(guest.device.restore(good.clone()).is_err(), "it is active");
    guest.device_reset();
    let inactive = guest.device.save().unwrap();
    guest.device.restore(inactive).unwrap();
    for (field, value) in [
        ("features", serde_json::json!(1 << 5)),
        ("queues", serde_json::json!([])),
        ("active", serde_json::json!(false)),
        ("unknown", serde_json::json!(1)),
    ] {
        let mut bad = good.clone();
        bad[field] = value;
        assert!(guest.device.restore(bad).is_err(), "{field}");
    }
    let mut bad = good.clone();
    bad["queues"][0]["size"] = serde_json::json!(100);
    assert!(guest.device.restore(bad).is_err());
    guest.device.restore(good).unwrap();
}

#[test]
fn the_configuration_is_the_context_id() {
    let guest = TestGuest::new();
    let mut bytes = [0xff; 12];
    guest.device.read_config(0, &mut bytes);
    assert_eq!(bytes, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    guest.device.read_config(u64::MAX, &mut bytes);
    assert_eq!(bytes, [0; 12]);
    let config = VsockConfig {
        guest_cid: 2,
        socket_dir: std::path::PathBuf::from("/nonexistent"),
    };
    let error = VsockDevice::new(&config).unwrap_err();
    assert!(matches!(error, VsockError::GuestCid(2)));
}
