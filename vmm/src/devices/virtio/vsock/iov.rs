// SPDX-License-Identifier: Apache-2.0

//! Scatter and gather between sockets and guest memory: the two system calls of the data path, and all of this device's
//! unsafe code.
//!
//! Guest memory is shared with running vCPUs, so there may be no Rust reference to it, which all safe wrappers of these
//! calls take; the kernel copies from and to the addresses instead.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::Bitmap as _;

/// Most pieces of one call (`UIO_MAXIOV`); callers with more move the rest with another call.
const MAX_PIECES: usize = 1024;

/// Sends as much of `slices` as the socket takes now. Never blocks, never raises SIGPIPE.
///
/// # Errors
/// As sendmsg(2); `WouldBlock` when it takes nothing.
pub(super) fn send(socket: impl AsFd, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let mut pieces = pieces(slices);
    let message = message(&mut pieces);
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    loop {
        // SAFETY: `message` points at `pieces`, which lives to the end of this function; each piece is a `VolatileSlice`,
        // memory that is mapped for as long as the slices are borrowed; the kernel only reads it.
        let sent = unsafe { libc::sendmsg(socket.as_fd().as_raw_fd(), &raw const message, flags) };
        match usize::try_from(sent) {
            Ok(sent) => return Ok(sent),
            Err(_) => retry_if_interrupted()?,
        }
    }
}

/// Receives into `slices` what is there now. Never blocks. 0 is the end of the stream (or no room in `slices`).
///
/// # Errors
/// As recvmsg(2); `WouldBlock` when nothing is there.
pub(super) fn receive(socket: impl AsFd, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let mut pieces = pieces(slices);
    let mut message = message(&mut pieces);
    loop {
        // SAFETY: as in `send`; the kernel writes at most the length of each piece, to memory that is nobody's Rust
        // reference. Ancillary data has no buffer, so descriptors that come along are closed by the kernel.
        let received = unsafe {
            libc::recvmsg(
                socket.as_fd().as_raw_fd(),
                &raw mut message,
                libc::MSG_DONTWAIT,
            )
        };
        match usize::try_from(received) {
            Ok(received) => {
                mark_dirty(slices, received);
                return Ok(received);
            }
            Err(_) => retry_if_interrupted()?,
        }
    }
}

fn retry_if_interrupted() -> io::Result<()> {
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::Interrupted {
        Ok(())
    } else {
        Err(error)
    }
}

fn pieces(slices: &[VolatileSlice<'_>]) -> Vec<libc::iovec> {
    slices
        .iter()
        .take(MAX_PIECES)
        .map(|slice| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        })
        .collect()
}

fn message(pieces: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: `msghdr` is plain data of the kernel's, for which all zeroes are valid: no name, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = pieces.len();
    message
}

/// Tells the dirty bitmap of guest memory, where there is one, what the kernel wrote.
fn mark_dirty(slices: &[VolatileSlice<'_>], mut written: usize) {
    for slice in slices {
        let here = slice.len().min(written);
        slice.bitmap().mark_dirty(0, here);
        written -= here;
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn pieces_arrive_in_order() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (mut first, mut second) = (*b"hello ", *b"world");
        let slices = [
            VolatileSlice::from(&mut first[..]),
            VolatileSlice::from(&mut second[..]),
        ];
        assert_eq!(send(&ours, &slices).unwrap(), 11);
        let mut got = [0; 11];
        theirs.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hello world");

        theirs.write_all(b"goodbye").unwrap();
        assert_eq!(receive(&ours, &slices).unwrap(), 7);
        assert_eq!((&first, &second), (b"goodby", b"eorld"));
    }

    #[test]
    fn neither_call_waits() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut block = vec![1; 64 * 1024];
        let slices = [VolatileSlice::from(&mut block[..])];
        let error = receive(&ours, &slices).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        let full = loop {
            if let Err(error) = send(&ours, &slices) {
                break error;
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        drop(theirs);
        let gone = send(&ours, &slices).unwrap_err();
        let kinds = [io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset];
        assert!(kinds.contains(&gone.kind()), "{gone}");
    }
}
