// SPDX-License-Identifier: Apache-2.0

//! One end of a pipe, a pseudo-terminal or a stream socket, without blocking.
//!
//! Each operation first simply tries, and waits for readiness only after the kernel said that it would
//! block. So a readiness that [`Endpoint::gone`] has cleared is never waited for in vain.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::task::Poll;

use rustix::event::{PollFd, PollFlags};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What `gone` looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// An end of a pipe.
    Pipe,
    /// The master of a pseudo-terminal.
    Terminal,
    /// A stream socket.
    Socket,
}

/// One end of a byte stream.
#[derive(Debug)]
pub(crate) struct Endpoint {
    fd: AsyncFd<OwnedFd>,
    kind: Kind,
}

impl Endpoint {
    /// Makes `fd` non-blocking and watches it.
    ///
    /// # Errors
    /// When the file is of no kind that can be watched, or there is no runtime.
    pub(crate) fn new(fd: OwnedFd, kind: Kind) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        let fd = crate::sys::watch(fd, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self { fd, kind })
    }

    /// Reads what there is, up to the buffer's length; 0 at the end. A terminal whose other end was closed
    /// by everybody is at its end, too.
    ///
    /// # Errors
    /// When the stream is broken.
    pub(crate) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Poll::Ready(result) = self.try_read(buffer) {
                return result;
            }
            let mut guard = self.fd.readable().await?;
            if let Poll::Ready(result) = self.try_read(buffer) {
                return result;
            }
            guard.clear_ready();
        }
    }

    /// As [`Self::read`], or pending when nothing is there now.
    pub(crate) fn try_read(&self, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        loop {
            return match rustix::io::read(&self.fd, &mut *buffer) {
                Ok(count) => Poll::Ready(Ok(count)),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => Poll::Pending,
                Err(Errno::IO) if self.kind == Kind::Terminal => Poll::Ready(Ok(0)),
                Err(errno) => Poll::Ready(Err(errno.into())),
            };
        }
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// When nobody can read it any more.
    pub(crate) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = self.write(bytes).await?;
            bytes = bytes.get(written..).unwrap_or_default();
        }
        Ok(())
    }

    async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            if let Poll::Ready(result) = self.try_write(bytes) {
                return result;
            }
            let mut guard = self.fd.writable().await?;
            if let Poll::Ready(result) = self.try_write(bytes) {
                return result;
            }
            guard.clear_ready();
        }
    }

    fn try_write(&self, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let result = match self.kind {
                Kind::Socket => rustix::net::send(&self.fd, bytes, SendFlags::NOSIGNAL),
                Kind::Pipe | Kind::Terminal => rustix::io::write(&self.fd, bytes),
            };
            return match result {
                Ok(0) => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(count) => Poll::Ready(Ok(count)),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => Poll::Pending,
                Err(errno) => Poll::Ready(Err(errno.into())),
            };
        }
    }

    /// Returns once nobody can read any more what is written here: the pipe's read end was closed, the
    /// peer of the socket closed it (not merely its sending half). Never returns for a terminal, which can
    /// be opened again.
    pub(crate) async fn gone(&self) {
        if self.kind == Kind::Terminal {
            return std::future::pending().await;
        }
        loop {
            if self.is_gone() {
                return;
            }
            match self.fd.writable().await {
                Ok(mut guard) if !self.is_gone() => guard.clear_ready(),
                _ => return,
            }
        }
    }

    fn is_gone(&self) -> bool {
        let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
        let now = rustix::fs::Timespec::default();
        let polled = rustix::event::poll(&mut fds, Some(&now));
        let broken = PollFlags::HUP | PollFlags::ERR;
        if polled.is_ok() && fds.iter().any(|fd| fd.revents().intersects(broken)) {
            return true;
        }
        // A vsock socket whose peer has closed both halves does not report a hang-up, but does not take
        // an empty message either.
        self.kind == Kind::Socket
            && matches!(
                rustix::net::send(&self.fd, &[], SendFlags::NOSIGNAL | SendFlags::DONTWAIT),
                Err(Errno::PIPE | Errno::NOTCONN | Errno::CONNRESET)
            )
    }

    /// Most bytes that can be in the pipe or terminal now.
    pub(crate) fn capacity(&self) -> usize {
        const TERMINAL: usize = 64 << 10;
        rustix::pipe::fcntl_getpipe_size(&self.fd).unwrap_or(TERMINAL)
    }

    /// Says that nothing more will be written to the socket.
    pub(crate) fn shutdown_write(&self) {
        // A peer that is gone already needs no telling.
        let _ = rustix::net::shutdown(self.fd.as_fd(), Shutdown::Write);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use tokio::time::{Duration, timeout};

    fn pipe() -> (Endpoint, Endpoint) {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let make = |fd| Endpoint::new(fd, Kind::Pipe).unwrap();
        (make(read), make(write))
    }

    fn socket() -> (Endpoint, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Endpoint::new(ours.into(), Kind::Socket).unwrap(), theirs)
    }

    async fn soon<T>(future: impl Future<Output = T>) -> T {
        timeout(Duration::from_secs(10), future).await.unwrap()
    }

    async fn stays(future: impl Future<Output = ()>) {
        assert!(
            timeout(Duration::from_millis(50), future).await.is_err(),
            "not gone"
        );
    }

    #[tokio::test]
    async fn more_than_a_pipe_holds_goes_through_it() {
        let (read, write) = pipe();
        let bytes: Vec<u8> = (0..1_000_000u32).map(|n| (n % 251) as u8).collect();
        let expected = bytes.clone();
        let writer = tokio::spawn(async move { write.write_all(&bytes).await.unwrap() });
        let (mut got, mut buffer) = (Vec::new(), [0; 5000]);
        while let count @ 1.. = soon(read.read(&mut buffer)).await.unwrap() {
            got.extend_from_slice(&buffer[..count]);
        }
        writer.await.unwrap();
        assert!(got == expected);
    }

    #[tokio::test]
    async fn a_pipe_without_reader_is_gone() {
        let (read, write) = pipe();
        stays(write.gone()).await;
        drop(read);
        soon(write.gone()).await;
        assert!(write.write_all(b"x").await.is_err());
    }

    #[tokio::test]
    async fn a_half_closed_socket_is_not_gone_and_a_closed_one_is() {
        let (ours, theirs) = socket();
        stays(ours.gone()).await;
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        stays(ours.gone()).await;
        ours.write_all(b"still").await.unwrap();
        drop(theirs);
        soon(ours.gone()).await;
    }

    #[tokio::test]
    async fn writing_still_waits_for_room_after_gone_was_asked() {
        let (ours, theirs) = socket();
        stays(ours.gone()).await;
        let bytes = vec![7; 4 << 20];
        let reader = std::thread::spawn(move || {
            let mut got = Vec::new();
            std::io::Read::read_to_end(&mut &theirs, &mut got).unwrap();
            got.len()
        });
        soon(ours.write_all(&bytes)).await.unwrap();
        drop(ours);
        assert_eq!(reader.join().unwrap(), 4 << 20);
    }
}
