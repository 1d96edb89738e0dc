// SPDX-License-Identifier: Apache-2.0

//! The newest console output, bounded.
//!
//! The early console and the virtio console write here; the control socket and the final report read. Every byte
//! is the guest's. The memory is taken as it fills.

#![cfg_attr(
    not(test),
    warn(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::indexing_slicing
    )
)]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a kernel prints at the start of a panic.
const PANIC: &[u8] = b"Kernel panic - not syncing";
/// Longest panic line reported, bytes.
const MAX_PANIC_LINE: usize = 512;

/// A ring that all consoles share.
#[derive(Debug, Clone)]
pub struct ConsoleRing {
    shared: Arc<Mutex<Ring>>,
}

#[derive(Debug)]
struct Ring {
    bytes: VecDeque<u8>,
    capacity: usize,
    dropped: u64,
    total: u64,
}

impl ConsoleRing {
    /// A ring that keeps `capacity` bytes.
    pub fn new(capacity: usize) -> Self {
        Self {
            shared: Arc::new(Mutex::new(Ring {
                bytes: VecDeque::new(),
                capacity,
                dropped: 0,
                total: 0,
            })),
        }
    }

    /// Adds output; the oldest goes.
    pub fn write(&self, data: &[u8]) {
        let mut ring = self.lock();
        ring.total += data.len() as u64;
        let kept = data.len().min(ring.capacity);
        let skipped = data.len() - kept;
        let overflow = (ring.bytes.len() + kept).saturating_sub(ring.capacity);
        ring.bytes.drain(..overflow);
        ring.bytes.extend(data.iter().skip(skipped));
        ring.dropped += (overflow + skipped) as u64;
    }

    /// All that is kept, and how many bytes before it are lost.
    pub fn contents(&self) -> (Vec<u8>, u64) {
        let ring = self.lock();
        (ring.bytes.iter().copied().collect(), ring.dropped)
    }

    /// The newest bytes, at most `max`.
    pub fn tail(&self, max: usize) -> Vec<u8> {
        let ring = self.lock();
        let skip = ring.bytes.len().saturating_sub(max);
        ring.bytes.iter().skip(skip).copied().collect()
    }

    /// Bytes written since the start.
    pub fn total(&self) -> u64 {
        self.lock().total
    }

    /// The line of the newest kernel panic that is kept, without its time stamp.
    pub fn panic_line(&self) -> Option<String> {
        let (bytes, _) = self.contents();
        let start = bytes
            .windows(PANIC.len())
            .rposition(|window| window == PANIC)?;
        let line: Vec<u8> = bytes
            .iter()
            .skip(start)
            .take(MAX_PANIC_LINE)
            .take_while(|byte| !matches!(byte, b'\n' | b'\r'))
            .copied()
            .collect();
        Some(String::from_utf8_lossy(&line).into_owned())
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Output of the early console.
impl std::io::Write for ConsoleRing {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        ConsoleRing::write(self, data);
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_newest_bytes_are_kept_and_the_others_counted(
            capacity in 1usize..64,
            writes in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..100), 0..10),
        ) {
            let ring = ConsoleRing::new(capacity);
            for data in &writes {
                ring.write(data);
            }
            let all = writes.concat();
            let kept = all.len().min(capacity);
            let (bytes, dropped) = ring.contents();
            prop_assert_eq!(&bytes, &all[all.len() - kept..]);
            prop_assert_eq!(dropped, (all.len() - kept) as u64);
            prop_assert_eq!(ring.total(), all.len() as u64);
            prop_assert_eq!(ring.tail(7), &bytes[bytes.len() - bytes.len().min(7)..]);
        }
    }

    #[test]
    fn the_newest_panic_line_is_found() {
        let ring = ConsoleRing::new(4096);
        assert_eq!(ring.panic_line(), None);
        ring.write(b"[    0.1] Kernel panic - not syncing: first\r\n");
        ring.write(b"[    0.2] Kernel panic - not syncing: no \xff init\r\n[ 0.2] CPU: 0\r\n");
        let line = ring.panic_line().unwrap();
        assert_eq!(line, "Kernel panic - not syncing: no \u{fffd} init");
        ring.write(b"Kernel panic - not syncing: ");
        ring.write(&[b'x'; 2000]);
        assert_eq!(ring.panic_line().unwrap().len(), MAX_PANIC_LINE);
    }
}
