// SPDX-License-Identifier: Apache-2.0

//! Ends of streams: half and whole, from both sides, answered and unanswered.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::time::Duration;

use super::super::credit::BUFFER;
use super::super::packet::{Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::super::test_guest::TestGuest;
use super::{pattern, send_all};
use crate::devices::virtio::vsock::Patience;

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
    let short = Patience {
        greeting: Duration::from_millis(30),
        request: Duration::from_millis(30),
        close: Duration::from_millis(30),
        ..Patience::default()
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
