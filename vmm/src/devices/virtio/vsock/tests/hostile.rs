// SPDX-License-Identifier: Apache-2.0

//! Guests, and host processes, that do not keep to the rules.

use std::io::{ErrorKind, Read as _, Write as _};
use std::thread;
use std::time::Duration;

use proptest::prelude::*;
use vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _};

use super::super::packet::{Key, Op};
use super::super::test_guest::TestGuest;
use super::pattern;

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
