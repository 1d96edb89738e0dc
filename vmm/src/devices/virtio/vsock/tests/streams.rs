// SPDX-License-Identifier: Apache-2.0

//! Streams that do what streams are for: data, credit, many at once.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::thread;
use std::time::Duration;

use super::super::packet::{Key, Op, SHUTDOWN_BOTH, SHUTDOWN_SEND};
use super::super::test_guest::TestGuest;
use super::{pattern, reader};
use crate::devices::virtio::vsock::Patience;

fn both_ways(features: u64, len: usize) {
    let mut guest = TestGuest::with(features, Patience::default());
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
