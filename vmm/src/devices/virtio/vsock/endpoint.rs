// SPDX-License-Identifier: Apache-2.0

//! The host's end of one stream: a Unix socket, and the bytes of the guest that it did not take yet.
//!
//! The buffer exists only while it holds something. Its bound is the credit that the guest was given, which
//! [`super::connection::Connection`] keeps.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::net::UnixStream;

use vm_memory::VolatileSlice;

use super::chain::{Slice, truncate};
use super::iov;

/// The host process takes no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gone;

/// What came of reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Received {
    /// So many bytes, not 0.
    Bytes(usize),
    /// Nothing now.
    Nothing,
    /// The host process sends no more.
    End,
}

/// A Unix socket with its buffer.
#[derive(Debug)]
pub(super) struct Endpoint {
    stream: UnixStream,
    buffer: VecDeque<u8>,
    /// The guest sends no more: once the buffer is empty, the host process is to see the end.
    finish: bool,
}

impl Endpoint {
    /// A connected socket.
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            buffer: VecDeque::new(),
            finish: false,
        }
    }

    /// For the epoll set.
    pub(super) fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Bytes that wait for the host process.
    pub(super) fn buffered(&self) -> usize {
        self.buffer.len()
    }

    /// Takes `payload` from guest memory, what the socket does not take into the buffer. Gives back how many bytes the
    /// host process has for certain.
    ///
    /// # Errors
    /// When the host process takes no more; the buffer is empty then.
    pub(super) fn deliver(&mut self, payload: &[Slice<'_>], len: usize) -> Result<usize, Gone> {
        let payload = truncate(payload, len);
        let sent = if self.buffer.is_empty() {
            self.send(&payload)?
        } else {
            0
        };
        let mut skip = sent;
        for slice in &payload {
            let from = skip.min(slice.len());
            skip -= from;
            if let Ok(rest) = slice.offset(from) {
                self.keep(&rest);
            }
        }
        Ok(sent)
    }

    fn keep(&mut self, slice: &Slice<'_>) {
        let mut copy = vec![0; slice.len()];
        slice.copy_to(&mut copy[..]);
        self.buffer.extend(&copy);
    }

    /// Sends bytes of our own, which come before any of the guest's.
    ///
    /// # Errors
    /// When the host process takes no more.
    pub(super) fn say(&mut self, text: &str) -> Result<(), Gone> {
        let mut bytes = text.as_bytes().to_vec();
        let len = bytes.len();
        self.deliver(&[VolatileSlice::from(&mut bytes[..])], len)
            .map(|_| ())
    }

    /// Sends from the buffer what the socket takes, and after the last byte the end if it was asked for. Gives back
    /// how many bytes left.
    ///
    /// # Errors
    /// When the host process takes no more; the buffer is empty then.
    pub(super) fn flush(&mut self) -> Result<usize, Gone> {
        let mut flushed = 0;
        while !self.buffer.is_empty() {
            let mut buffer = std::mem::take(&mut self.buffer);
            let (front, back) = buffer.as_mut_slices();
            let sent = self.send(&[VolatileSlice::from(front), VolatileSlice::from(back)])?;
            if sent == 0 {
                self.buffer = buffer;
                return Ok(flushed);
            }
            flushed += sent;
            buffer.drain(..sent);
            if !buffer.is_empty() {
                self.buffer = buffer;
            }
        }
        if self.finish {
            self.shut(Shutdown::Write);
        }
        Ok(flushed)
    }

    /// The guest sends no more: the host process sees the end after the last byte.
    pub(super) fn finish(&mut self) {
        self.finish = true;
        if self.buffer.is_empty() {
            self.shut(Shutdown::Write);
        }
    }

    /// The guest takes no more: the host process cannot send any longer.
    pub(super) fn refuse(&mut self) {
        self.shut(Shutdown::Read);
    }

    /// Reads into guest memory.
    pub(super) fn receive(&mut self, slices: &[Slice<'_>]) -> Received {
        match iov::receive(&self.stream, slices) {
            Ok(0) => Received::End,
            Ok(count) => Received::Bytes(count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Received::Nothing,
            // A reset of the host process: nothing more comes.
            Err(_) => Received::End,
        }
    }

    fn send(&mut self, slices: &[Slice<'_>]) -> Result<usize, Gone> {
        match iov::send(&self.stream, slices) {
            Ok(sent) => Ok(sent),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(_) => {
                self.buffer = VecDeque::new();
                Err(Gone)
            }
        }
    }

    fn shut(&self, how: Shutdown) {
        // It fails only when the host process has closed already, and then there is nobody to tell.
        let _ = self.stream.shutdown(how);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn deliver(endpoint: &mut Endpoint, bytes: &[u8]) -> Result<usize, Gone> {
        let mut copy = bytes.to_vec();
        let (first, second) = copy.split_at_mut(bytes.len() / 3);
        let slices = [VolatileSlice::from(first), VolatileSlice::from(second)];
        endpoint.deliver(&slices, bytes.len())
    }

    #[test]
    fn what_the_socket_does_not_take_waits_in_order_and_the_end_comes_last() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut endpoint = Endpoint::new(ours);
        let bytes: Vec<u8> = (0..1_000_000u32).map(|n| (n % 251) as u8).collect();
        let mut taken = 0;
        for part in bytes.chunks(50_000) {
            taken += deliver(&mut endpoint, part).unwrap();
        }
        assert_eq!(taken + endpoint.buffered(), bytes.len());
        assert!(endpoint.buffered() > 0, "the socket took it all");
        endpoint.finish();
        let mut got = Vec::new();
        let mut block = vec![0; 100_000];
        loop {
            endpoint.flush().unwrap();
            match theirs.read(&mut block).unwrap() {
                0 => break,
                count => got.extend_from_slice(&block[..count]),
            }
        }
        assert!(got == bytes, "bytes were lost or changed");
        assert_eq!(endpoint.buffered(), 0);
        assert_eq!(
            endpoint.buffer.capacity(),
            0,
            "an empty buffer keeps no memory"
        );
    }

    #[test]
    fn a_peer_that_went_away_empties_the_buffer() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut endpoint = Endpoint::new(ours);
        while endpoint.buffered() == 0 {
            deliver(&mut endpoint, &[7; 60_000]).unwrap();
        }
        drop(theirs);
        assert_eq!(endpoint.flush(), Err(Gone));
        assert_eq!(endpoint.buffered(), 0);
    }
}
