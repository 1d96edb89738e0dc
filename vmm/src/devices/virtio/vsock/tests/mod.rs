// SPDX-License-Identifier: Apache-2.0

//! The whole device: a driver in this thread, the device's own thread, real Unix sockets.

mod closing;
mod hostile;
mod lifecycle;
mod streams;

use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::thread;

use super::packet::Key;
use super::test_guest::TestGuest;

pub(super) fn pattern(len: usize, seed: u64) -> Vec<u8> {
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
pub(super) fn send_all(guest: &mut TestGuest, key: Key, bytes: &[u8]) {
    let mut sent = 0;
    guest.until("credit for all bytes", |guest| {
        sent += guest.data_within_credit(key, &bytes[sent..]);
        sent == bytes.len()
    });
}

pub(super) fn reader(mut end: UnixStream) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut all = Vec::new();
        end.read_to_end(&mut all).unwrap();
        all
    })
}
