// SPDX-License-Identifier: Apache-2.0

//! The whole device: a driver in this thread, the device's own thread, real Unix sockets.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use caisson_protocol::vm::VsockConfig;
use proptest::prelude::*;
use virtio_queue::Queue;
use vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _};

use super::credit::BUFFER;
use super::packet::{Key, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::state::VsockState;
use super::test_guest::{LONG, TestGuest};
use super::{VsockDevice, VsockError};
use crate::devices::virtio::device::{ActiveQueue, SnapshotError, VirtioDevice as _};

fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Sends all of `bytes`, as the credit comes.
fn send_all(guest: &mut TestGuest, key: Key, bytes: &[u8]) {
    let mut sent = 0;
    guest.until("credit for all bytes", |guest| {
        sent += guest.data_within_credit(key, &bytes[sent..]);
        sent == bytes.len()
    });
}

fn reader(mut end: UnixStream) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut all = Vec::new();
        end.read_to_end(&mut all).unwrap();
        all
    })
}

fn both_ways(features: u64, len: usize) {
    let mut guest = TestGuest::with(features, super::Patience::default());
    let host = guest.listen(1024);
    let (key, mut end) = guest.connect(&host, 1024, 5000);
    let (up, down) = (pattern(len, 1), pattern(len, 2));
    let got = reader(end.try_clone().unwrap());
    let to_send = down.clone();
    let writer = thread::spawn(move || {
        end.write_all(&to_send).unwrap();
        end.shutdown(Shutdown::Write).unwrap();
    });
    let mut sent = 0;
    guest.until("all bytes", |guest| {
        sent += guest.data_within_credit(key, &up[sent..]);
        sent == up.len() && guest.peers[&key].received.len() == down.len()
    });
    writer.join().unwrap();
    guest.until("the host's end", |guest| {
        guest.peers[&key].shutdown == SHUTDOWN_SEND
    });
    guest.shutdown(key, SHUTDOWN_SEND);
    assert!(got.join().unwrap() == up, "guest to host");
    assert!(guest.peers[&key].received == down, "host to guest");
    guest.until("the full close", |guest| {
        guest.peers[&key].shutdown == SHUTDOWN_BOTH
    });
    guest.control(key, Op::Reset);
    guest.peers.remove(&key);
    guest.assert_alive();
    assert_eq!(guest.metric("violations") + guest.metric("malformed"), 0);
}

#[test]
fn mebibytes_go_both_ways_at_once_with_event_idx() {
    both_ways(1 << 29, 24 << 20);
}

#[test]
fn mebibytes_go_both_ways_at_once_without_event_idx() {
    both_ways(0, 8 << 20);
}

#[test]
fn the_host_connects_with_its_handshake_and_may_talk_ahead() {
    let mut guest = TestGuest::new();
    let mut end = guest.dial();
    end.write_all(b"CONNECT 1025\nahead").unwrap();
    let key = guest.accept(1025);
    let mut line = vec![0; format!("OK {}\n", key.host_port).len()];
    end.read_exact(&mut line).unwrap();
    assert_eq!(line, format!("OK {}\n", key.host_port).into_bytes());
    guest.until("the bytes", |guest| guest.peers[&key].received == b"ahead");
    guest.data(key, b"answer");
    let mut got = [0; 6];
    end.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"answer");
    assert_eq!(guest.metric("accepted_from_host"), 1);
}

#[test]
fn connections_that_nobody_takes_are_refused_both_ways() {
    let mut guest = TestGuest::new();
    let key = guest.request(4242, 5000, 4096);
    guest.until("a RST", |guest| guest.peers[&key].reset);
    assert_eq!(guest.peers[&key].operations, [Op::Reset as u16]);

    let mut end = guest.dial();
    end.write_all(b"CONNECT 7\n").unwrap();
    guest.until("a REQUEST", |guest| !guest.stray.is_empty());
    let request = guest.stray.pop_front().unwrap();
    let key = Key {
        host_port: request.src_port,
        guest_port: 7,
    };
    guest.control(key, Op::Reset);
    let mut rest = Vec::new();
    end.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty(), "a refused host was told OK");
    assert_eq!(guest.metric("refused"), 2);
    guest.assert_alive();
}

#[test]
fn the_guests_half_close_reaches_the_host_after_the_last_byte() {
    let mut guest = TestGuest::new();
    let host = guest.listen(1024);
    let (key, mut end) = guest.connect(&host, 1024, 5000);
    let bytes = pattern(200_000, 3);
    send_all(&mut guest, key, &bytes);
    guest.shutdown(key, SHUTDOWN_SEND);
    let mut got = Vec::new();
    end.read_to_end(&mut got).unwrap();
    assert!(got == bytes);
    end.write_all(b"still open").unwrap();
    guest.until("the answer", |guest| {
        guest.peers[&key].received == b"still open"
    });
    drop(end);
    guest.until("the full close", |guest| {
        guest.peers[&key].shutdown == SHUTDOWN_BOTH
    });
}

#[test]
fn the_hosts_half_close_leaves_the_other_direction_open() {
    let mut guest = TestGuest::new();
    let host = guest.listen(1024);
    let (key, mut end) = guest.connect(&host, 1024, 5000);
    end.write_all(b"question").unwrap();
    end.shutdown(Shutdown::Write).unwrap();
    guest.until("the end", |guest| {
        guest.peers[&key].shutdown == SHUTDOWN_SEND
    });
    assert_eq!(guest.peers[&key].received, b"question");
    guest.data(key, b"answer");
    guest.shutdown(key, SHUTDOWN_SEND);
    let mut got = Vec::new();
    end.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"answer");
}

#[test]
fn a_guest_that_takes_no_more_makes_the_hosts_writes_fail() {
    let mut guest = TestGuest::new();
    let host = guest.listen(1024);
    let (key, mut end) = guest.connect(&host, 1024, 5000);
    guest.shutdown(key, SHUTDOWN_RECEIVE);
    guest.data(key, b"x");
    end.read_exact(&mut [0]).unwrap();
    assert_eq!(
        end.write_all(b"no").unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
}

#[test]
fn write_then_close_loses_nothing_to_a_slow_reader() {
    let mut guest = TestGuest::new();
    let host = guest.listen(1024);
    for round in 0..50 {
        let (key, end) = guest.connect(&host, 1024, 5000 + round);
        let bytes = pattern(BUFFER as usize, u64::from(round) + 9);
        let mut sent = 0;
        while sent < bytes.len() {
            sent += guest.data_within_credit(key, &bytes[sent..]);
        }
        guest.shutdown(key, SHUTDOWN_BOTH);
        guest.until("a RST", |guest| guest.peers[&key].reset);
        // Only now does the host look.
        let mut end = end;
        let mut got = Vec::new();
        end.read_to_end(&mut got).unwrap();
        assert!(got == bytes, "round {round}: {} bytes", got.len());
    }
    guest.until("the last stream", |guest| guest.metric("connections") == 0);
}

#[test]
fn the_hosts_close_is_told_and_ends_with_the_guests_reset() {
    let mut guest = TestGuest::new();
    let host = guest.listen(1024);
    let (key, mut end) = guest.connect(&host, 1024, 5000);
    end.write_all(b"last words").unwrap();
    drop(end);
    guest.until("the full close", |guest| {
        guest.peers[&key].shutdown == SHUTDOWN_BOTH
    });
    assert_eq!(guest.peers[&key].received, b"last words");
    assert_eq!(guest.metric("connections"), 1);
    guest.control(key, Op::Reset);
    guest.until("the end of the stream", |guest| {
        guest.metric("connections") == 0
    });
    assert!(!guest.peers[&key].reset, "a RST was answered with a RST");
}

#[test]
fn a_guest_that_never_answers_is_given_up() {
    let short = super::Patience {
        greeting: Duration::from_millis(30),
        request: Duration::from_millis(30),
        close: Duration::from_millis(30),
        ..super::Patience::default()
    };
    let mut guest = TestGuest::with(1 << 29, short);
    let host = guest.listen(1024);
    let (key, end) = guest.connect(&host, 1024, 5000);
    drop(end);
    guest.until("a RST for the close", |guest| guest.peers[&key].reset);
    assert_eq!(guest.peers[&key].shutdown, SHUTDOWN_BOTH);

    let mut asking = guest.dial();
    asking.write_all(b"CONNECT 9\n").unwrap();
    let mut rest = Vec::new();
    asking.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
    guest.until("REQUEST and RST", |guest| guest.stray.len() == 2);
    assert_eq!(guest.stray[0].op, Op::Request as u16);
    assert_eq!(guest.stray[1].op, Op::Reset as u16);

    let mut silent = guest.dial();
    silent.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
    assert_eq!(guest.metric("timeouts"), 3);
    assert_eq!(guest.metric("connections"), 0);
}

#[test]
fn bad_connect_lines_end_the_connection() {
    let mut guest = TestGuest::new();
    for line in [
        &[b'1'; 5000][..],
        b"CONNECT x\n",
        b"\n",
        b"CONNECT 99999999999\n",
    ] {
        let mut end = guest.dial();
        // The device may close before all of it is written.
        let _ = end.write_all(line);
        let mut rest = Vec::new();
        match end.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
        }
        assert!(rest.is_empty());
    }
    guest.for_a_while(Duration::from_millis(20));
    assert!(guest.stray.is_empty(), "the guest heard of it");
    guest.assert_alive();
}

#[test]
fn more_data_than_credit_ends_the_stream_and_no_other() {
    let mut guest = TestGuest::new();
    let host = guest.listen(1024);
    let (liar, end) = guest.connect(&host, 1024, 5000);
    let (honest, mut other) = guest.connect(&host, 1024, 5001);
    // Nobody reads: the socket takes some, then the buffer fills, then it is too much.
    let mut sent = 0;
    guest.until("a RST", |guest| {
        if !guest.peers[&liar].reset {
            guest.data(liar, &[1; 65536]);
            sent += 65536;
        }
        guest.peers[&liar].reset
    });
    assert!(sent < 4 << 20, "{sent} bytes were taken");
    assert_eq!(guest.metric("violations"), 1);
    guest.data(honest, b"fine");
    let mut got = [0; 4];
    other.read_exact(&mut got).unwrap();
    drop(end);
    guest.assert_alive();
}

#[test]
fn lengths_that_are_not_there_end_the_stream() {
    let mut guest = TestGuest::new();
    let host = guest.listen(1024);
    for (round, len) in [1u32, 65537, 1 << 20, u32::MAX].into_iter().enumerate() {
        let (key, mut end) = guest.connect(&host, 1024, 5000 + round as u32);
        let mut header = guest.header(key, Op::Data);
        header.len = len;
        guest.send(header, &[]);
        guest.until("a RST", |guest| guest.peers[&key].reset);
        let mut rest = Vec::new();
        end.read_to_end(&mut rest).unwrap();
        assert!(rest.is_empty());
    }
    assert_eq!(guest.metric("malformed"), 4);
    guest.assert_alive();
}

#[test]
fn the_host_never_sends_more_than_the_guests_credit() {
    let mut guest = TestGuest::new();
    let host = guest.listen(1024);
    let (key, mut end) = guest.connect_with(&host, 1024, 5000, 10_000);
    guest.peers.get_mut(&key).unwrap().takes = false;
    let bytes = pattern(50_000, 5);
    let to_send = bytes.clone();
    let writer = thread::spawn(move || {
        end.write_all(&to_send).unwrap();
        // Closed while the guest has no credit: the rest has to come all the same.
        drop(end);
    });
    guest.until("a full buffer", |guest| {
        guest.peers[&key].received.len() == 10_000
    });
    writer.join().unwrap();
    guest.for_a_while(Duration::from_millis(30));
    assert_eq!(guest.peers[&key].received.len(), 10_000);
    let before = guest.metric("events");
    thread::sleep(Duration::from_millis(100));
    let busy = guest.metric("events") - before;
    assert!(busy < 3, "{busy} events while there is nothing to do");
    while guest.peers[&key].received.len() < bytes.len() {
        let peer = guest.peers.get_mut(&key).unwrap();
        peer.forwarded = peer.received.len() as u32;
        let had = peer.received.len();
        guest.control(key, Op::CreditUpdate);
        guest.until("more", |guest| guest.peers[&key].received.len() > had);
    }
    assert!(guest.peers[&key].received == bytes);
    let peer = guest.peers.get_mut(&key).unwrap();
    peer.forwarded = peer.received.len() as u32;
    guest.control(key, Op::CreditUpdate);
    guest.until("the full close", |guest| {
        guest.peers[&key].shutdown == SHUTDOWN_BOTH
    });
}

#[test]
fn without_rx_buffers_nothing_is_read_and_nothing_spins() {
    let mut guest = TestGuest::new();
    let host = guest.listen(1024);
    let (key, mut end) = guest.connect_with(&host, 1024, 5000, 1 << 30);
    // The driver keeps all 128 buffers.
    end.set_nonblocking(true).unwrap();
    let block = pattern(1 << 20, 6);
    let mut written = 0;
    let mut idle = 0;
    while idle < 5 {
        match end.write(&block[written..]) {
            Ok(count) => {
                written += count;
                idle = 0;
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                thread::sleep(Duration::from_millis(10));
                idle += 1;
            }
        }
    }
    assert!(
        written < block.len(),
        "the host's writes are never held back"
    );
    drop(end);
    let before = guest.metric("events");
    thread::sleep(Duration::from_millis(100));
    let busy = guest.metric("events") - before;
    assert!(busy < 3, "{busy} events while there is nothing to do");
    guest.until("all of it", |guest| {
        guest.peers[&key].shutdown == SHUTDOWN_BOTH
    });
    assert!(guest.peers[&key].received == block[..written]);
}

#[test]
fn a_storm_of_stray_packets_waits_for_buffers_and_each_is_answered() {
    let mut guest = TestGuest::new();
    let total = 3000;
    let mut sent = 0;
    let mut stuck = 0;
    while sent < total && stuck < 3 {
        let mem = guest.memory.memory();
        while guest.tx.used(&mem).is_some() {}
        drop(mem);
        if guest.tx.free() == 0 {
            stuck += u32::from(!guest.wait_interrupt(Duration::from_millis(50)));
            continue;
        }
        let key = Key {
            host_port: 1,
            guest_port: sent,
        };
        guest.send_now(guest.header(key, Op::Data), &[]);
        sent += 1;
    }
    assert!(
        sent < total,
        "{sent} packets were taken with 128 buffers to answer"
    );
    // A RST is never answered, however many there are.
    let answered = guest.stray.len();
    assert_eq!(answered, 0);
    guest.until("an answer to each", |guest| {
        guest.stray.len() == sent as usize
    });
    let mut ports: Vec<u32> = guest.stray.iter().map(|reset| reset.dst_port).collect();
    ports.dedup();
    assert_eq!(ports, (0..sent).collect::<Vec<_>>());
    for _ in 0..5000 {
        let key = Key {
            host_port: 1,
            guest_port: 1,
        };
        guest.control(key, Op::Reset);
    }
    guest.stray.clear();
    guest.assert_alive();
    assert!(guest.stray.is_empty());
}

#[test]
fn a_thousand_streams_work_at_once_and_one_too_many_is_refused() {
    let mut guest = TestGuest::new();
    let host = guest.listen(1024);
    let mut ends = Vec::new();
    for port in 0..1024 {
        ends.push(guest.connect(&host, 1024, port));
    }
    let extra = guest.request(1024, 5000, 4096);
    guest.until("a RST", |guest| guest.peers[&extra].reset);
    let mut late = guest.dial();
    let mut rest = Vec::new();
    late.read_to_end(&mut rest).unwrap();
    for (key, end) in &mut ends {
        end.write_all(&pattern(3000, u64::from(key.guest_port) + 1))
            .unwrap();
    }
    for (key, _) in &ends {
        guest.data(*key, &key.guest_port.to_le_bytes());
    }
    for (key, end) in &mut ends {
        let mut got = [0; 4];
        end.read_exact(&mut got).unwrap();
        assert_eq!(u32::from_le_bytes(got), key.guest_port);
    }
    let keys: Vec<Key> = ends.iter().map(|(key, _)| *key).collect();
    guest.until("all streams' bytes", |guest| {
        keys.iter()
            .all(|key| guest.peers[key].received.len() == 3000)
    });
    for key in &keys {
        let expected = pattern(3000, u64::from(key.guest_port) + 1);
        assert!(guest.peers[key].received == expected);
        guest.shutdown(*key, SHUTDOWN_BOTH);
        // The answers need buffers: whoever takes none is not served any more in the end.
        while guest.take_packet(false).is_some() {}
    }
    guest.until("all RSTs", |guest| {
        keys.iter().all(|key| guest.peers[key].reset)
    });
    assert_eq!(guest.metric("connections"), 0);
    guest.assert_alive();
}

#[test]
fn a_flooding_stream_does_not_starve_another() {
    let mut guest = TestGuest::new();
    let host = guest.listen(1024);
    let (_flood, mut flooding) = guest.connect(&host, 1024, 5000);
    let (small, mut other) = guest.connect(&host, 1024, 5001);
    let writer = thread::spawn(move || while flooding.write_all(&[7; 65536]).is_ok() {});
    for round in 1..=200 {
        other.write_all(b"x").unwrap();
        let mut packets = 0;
        guest.until("the small stream's byte", |guest| {
            packets += 1;
            guest.peers[&small].received.len() == round
        });
        assert!(packets < 1000, "{packets} packets before one byte");
    }
    drop(guest);
    writer.join().unwrap();
}

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
fn payloads_may_be_cut_and_indirect_as_the_guest_likes() {
    let mut guest = TestGuest::new();
    let host = guest.listen(1024);
    let (key, mut end) = guest.connect(&host, 1024, 5000);
    let mut header = guest.header(key, Op::Data);
    header.len = 300;
    let bytes = pattern(300, 4);
    let mem = guest.memory.memory();
    let base = 0xd0_0000;
    // Across the border of two regions, too: the payload begins before it.
    let border = (8 << 20) - 100;
    mem.write_slice(&header.to_bytes(), GuestAddress(base))
        .unwrap();
    mem.write_slice(&bytes, GuestAddress(border)).unwrap();
    let pieces = [
        (base, 10, 0),
        (base + 10, 0, 0),
        (base + 10, 34, 0),
        (border, 200, 0),
        (border + 200, 100, 0),
    ];
    guest.tx.add(&mem, &pieces);
    guest.tx.notify(&mem);
    let mut got = [0; 300];
    end.read_exact(&mut got).unwrap();
    assert!(got[..] == bytes[..]);
    guest.tx.add_indirect(&mem, 0xd1_0000, &pieces);
    guest.tx.notify(&mem);
    end.read_exact(&mut got).unwrap();
    assert!(got[..] == bytes[..]);
}

#[test]
fn chains_that_make_no_sense_go_back_unused_and_hurt_nobody() {
    let mut guest = TestGuest::new();
    let mem = guest.memory.memory();
    let base = 0xd0_0000;
    let chains: [&[(u64, u32, u16)]; 6] = [
        &[(base, 43, 0)],
        &[(base, 44, 2)],
        &[(base, 44, 0), (base, 10, 2)],
        &[(1 << 40, 44, 0)],
        &[((24 << 20) - 20, 44, 0)],
        &[(u64::MAX - 3, u32::MAX, 0)],
    ];
    for chain in chains {
        guest.tx.add(&mem, chain);
    }
    guest.tx.add_indirect(&mem, u64::MAX - 64, &[]);
    guest.tx.notify(&mem);
    guest.until("all back", |guest| guest.metric("malformed") == 7);
    assert!(guest.stray.is_empty());
    guest.assert_alive();
}

#[test]
fn a_broken_ring_ends_service_until_the_reset() {
    let mut guest = TestGuest::new();
    let host = guest.listen(1024);
    let (_key, mut end) = guest.connect(&host, 1024, 5000);
    let mem = guest.memory.memory();
    guest.tx.set_avail(&mem, 30_000);
    guest.tx.kick();
    end.read_to_end(&mut Vec::new()).unwrap();
    guest.until("DEVICE_NEEDS_RESET", |guest| guest.interrupt.is_broken());
    let before = guest.metric("events");
    guest.tx.kick();
    guest.rx.kick();
    thread::sleep(Duration::from_millis(30));
    assert_eq!(guest.metric("events"), before, "a broken device works on");
    guest.device_reset();
    guest.fresh_rings();
    guest.activate();
    guest.assert_alive();
    assert_eq!(guest.metric("broken_rings"), 1);
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever a guest sends, no thread dies, the streams stay within their number, and a good stream works after.
    #[test]
    fn random_packets_hurt_nobody_but_the_guest(
        packets in prop::collection::vec(
            (0u16..10, 0u32..6, 0u32..4, any::<u32>(), 0u32..5, any::<u32>(), any::<u32>(), 0usize..3000),
            1..400,
        )
    ) {
        let mut guest = TestGuest::new();
        let host = guest.listen(1);
        host.set_nonblocking(true).unwrap();
        let mut ends = Vec::new();
        for (op, port, guest_port, flags, kind, buf_alloc, fwd_cnt, payload) in packets {
            let key = Key { host_port: port.min(1), guest_port };
            let mut header = guest.header(key, Op::Data);
            header.op = op;
            header.flags = flags;
            header.kind = u16::try_from(kind.max(1)).unwrap();
            (header.buf_alloc, header.fwd_cnt) = (buf_alloc, fwd_cnt);
            header.len = if flags % 7 == 0 { flags } else { u32::try_from(payload).unwrap() };
            guest.send(header, &pattern(payload, 8));
            while guest.take_packet(false).is_some() {}
            while let Ok((mut end, _)) = host.accept() {
                let _ = end.write_all(b"from the host");
                ends.push(end);
            }
        }
        prop_assert!(guest.metric("connections") <= 8);
        prop_assert!(!guest.interrupt.is_broken());
        guest.assert_alive();
    }

    /// Random descriptors in all rings.
    #[test]
    fn random_descriptors_hurt_nobody_but_the_guest(
        chains in prop::collection::vec(
            prop::collection::vec((any::<u64>(), any::<u32>(), 0u16..8, any::<bool>()), 1..5),
            1..60,
        ),
        to_rx in any::<bool>(),
    ) {
        let mut guest = TestGuest::new();
        let mem = guest.memory.memory();
        if to_rx {
            guest.device_reset();
            guest.fresh_rings();
            let queues = [&guest.rx, &guest.tx, &guest.events].map(|ring| Some(ring.active()));
            guest.activate_queues(queues.into());
        }
        for chain in &chains {
            let pieces: Vec<_> = chain
                .iter()
                .map(|(address, len, flags, near)| {
                    let near_address = 0xd0_0000 + address % 0x1000;
                    (if *near { near_address } else { *address }, len % 100_000, flags & 6)
                })
                .collect();
            let ring = if to_rx { &mut guest.rx } else { &mut guest.tx };
            if ring.free() >= pieces.len() {
                ring.add(&mem, &pieces);
            }
        }
        if to_rx {
            guest.request(4242, 1, 1000);
        }
        guest.rx.notify(&mem);
        guest.tx.notify(&mem);
        thread::sleep(Duration::from_millis(2));
        guest.device_reset();
        guest.interrupt.clear();
        guest.fresh_rings();
        guest.activate();
        guest.assert_alive();
    }
}
