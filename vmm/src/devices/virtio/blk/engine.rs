// SPDX-License-Identifier: Apache-2.0

//! How a [`Call`] gets to the kernel: by io_uring, or as a system call here and now.
//!
//! The ring may do what a disk needs to its one file and nothing else (IORING_REGISTER_RESTRICTIONS): whoever
//! takes over this thread cannot open files or sockets through it. Where the host has no such rings (too old,
//! io_uring_disabled, a seccomp filter), calls are made one after another.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode};
use vmm_sys_util::eventfd::EventFd;

use super::task::Call;

/// The one file of the ring.
const FILE: Fixed = Fixed(0);

/// Makes `call` on `file` now. `write_flags` are RWF_* of writes.
///
/// # Errors
/// As the system call.
pub(super) fn call_now(file: &File, call: &Call<'_>, write_flags: i32) -> io::Result<usize> {
    let fd = file.as_raw_fd();
    let result = match *call {
        Call::Read { vectors, offset } => {
            let (count, offset) = ranges(vectors, offset)?;
            // SAFETY: `count` vectors of memory that whoever made the call keeps mapped.
            unsafe { libc::preadv2(fd, vectors.as_ptr(), count, offset, 0) }
        }
        Call::Write { vectors, offset } => {
            let (count, offset) = ranges(vectors, offset)?;
            // SAFETY: as above.
            unsafe { libc::pwritev2(fd, vectors.as_ptr(), count, offset, write_flags) }
        }
        Call::Sync => return file.sync_data().map(|()| 0),
        Call::Allocate { mode, offset, len } => {
            let signed = |value: u64| i64::try_from(value).map_err(|_| invalid());
            let (offset, len) = (signed(offset)?, signed(len)?);
            // SAFETY: no memory is passed.
            let result = unsafe { libc::fallocate64(fd, mode, offset, len) };
            isize::try_from(result).map_err(|_| invalid())?
        }
    };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn ranges(vectors: &[libc::iovec], offset: u64) -> io::Result<(i32, i64)> {
    let count = i32::try_from(vectors.len()).map_err(|_| invalid())?;
    Ok((count, i64::try_from(offset).map_err(|_| invalid())?))
}

fn invalid() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

/// An io_uring over one file.
pub(super) struct Uring {
    ring: IoUring,
    ready: EventFd,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring").finish_non_exhaustive()
    }
}

impl Uring {
    /// A ring for `entries` calls at once on `file`.
    ///
    /// # Errors
    /// When the host has none, or none that can be restricted (before Linux 5.10).
    pub(super) fn new(file: &File, entries: u16) -> io::Result<Self> {
        let ring = IoUring::builder()
            .dontfork()
            .setup_r_disabled()
            .build(u32::from(entries))?;
        let ready = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let submitter = ring.submitter();
        submitter.register_files(&[file.as_raw_fd()])?;
        submitter.register_eventfd(ready.as_raw_fd())?;
        submitter.register_restrictions(&mut [
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_op(opcode::Fallocate::CODE),
            Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()),
        ])?;
        submitter.register_enable_rings()?;
        Ok(Self { ring, ready })
    }

    /// Readable when calls are done. To be read before [`Self::completed`].
    pub(super) fn ready(&self) -> &EventFd {
        &self.ready
    }

    /// For epoll.
    pub(super) fn ready_fd(&self) -> RawFd {
        self.ready.as_raw_fd()
    }

    /// Queues `call`; its result comes with `id`.
    ///
    /// # Safety
    /// The vectors of `call` and the memory they point to must stay as they are until then.
    ///
    /// # Errors
    /// When the ring is full.
    pub(super) unsafe fn push(
        &mut self,
        call: &Call<'_>,
        id: u16,
        write_flags: i32,
    ) -> io::Result<()> {
        let count = |vectors: &[libc::iovec]| u32::try_from(vectors.len()).map_err(|_| invalid());
        let entry: Entry = match *call {
            Call::Read { vectors, offset } => {
                opcode::Readv::new(FILE, vectors.as_ptr(), count(vectors)?)
                    .offset(offset)
                    .build()
            }
            Call::Write { vectors, offset } => {
                opcode::Writev::new(FILE, vectors.as_ptr(), count(vectors)?)
                    .offset(offset)
                    .rw_flags(write_flags)
                    .build()
            }
            Call::Sync => opcode::Fsync::new(FILE).flags(FsyncFlags::DATASYNC).build(),
            Call::Allocate { mode, offset, len } => opcode::Fallocate::new(FILE, len)
                .offset(offset)
                .mode(mode)
                .build(),
        };
        let entry = entry.user_data(u64::from(id));
        // SAFETY: what the entry points to stays, as this function's caller promised.
        unsafe { self.ring.submission().push(&entry) }.map_err(io::Error::other)
    }

    /// Tells the kernel of what was queued, and waits until at least `wait` calls are done.
    ///
    /// # Errors
    /// As io_uring_enter(2); interruptions are not errors.
    pub(super) fn submit(&mut self, wait: usize) -> io::Result<()> {
        loop {
            match self.ring.submit_and_wait(wait) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
                Ok(_) if self.ring.submission().is_empty() => return Ok(()),
                Ok(_) => {}
            }
        }
    }

    /// The next finished call: its id and result.
    pub(super) fn completed(&mut self) -> Option<(u64, io::Result<usize>)> {
        let entry = self.ring.completion().next()?;
        let result = usize::try_from(entry.result())
            .map_err(|_| io::Error::from_raw_os_error(entry.result().wrapping_neg()));
        Some((entry.user_data(), result))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_is_restricted_to_what_a_disk_needs() {
        let file = tempfile::tempfile().unwrap();
        let mut uring = match Uring::new(&file, 8) {
            Ok(uring) => uring,
            Err(error) => {
                println!("skipped: no io_uring here: {error}");
                return;
            }
        };
        let open =
            opcode::OpenAt::new(io_uring::types::Fd(libc::AT_FDCWD), c"/etc/passwd".as_ptr())
                .build();
        // SAFETY: the path is a static.
        unsafe { uring.ring.submission().push(&open) }.unwrap();
        uring.submit(1).unwrap();
        let (_, refused) = uring.completed().unwrap();
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EACCES));
    }

    #[test]
    fn both_ways_of_calling_do_the_same() {
        use std::os::unix::fs::FileExt;
        let data = *b"some bytes";
        let vectors = [libc::iovec {
            iov_base: data.as_ptr().cast_mut().cast(),
            iov_len: data.len(),
        }];
        let calls = [
            Call::Write {
                vectors: &vectors,
                offset: 5,
            },
            Call::Sync,
            Call::Allocate {
                mode: libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                offset: 0,
                len: 7,
            },
        ];
        let content = |by_ring: bool| {
            let file = tempfile::tempfile().unwrap();
            let mut uring = by_ring.then(|| Uring::new(&file, 8));
            for call in &calls {
                match &mut uring {
                    Some(Ok(uring)) => {
                        // SAFETY: the vectors and the data outlive this function.
                        unsafe { uring.push(call, 3, 0) }.unwrap();
                        uring.submit(1).unwrap();
                        let (id, result) = uring.completed().unwrap();
                        assert_eq!(id, 3);
                        result.unwrap();
                    }
                    _ => {
                        call_now(&file, call, 0).unwrap();
                    }
                }
            }
            let mut content = vec![0; 15];
            file.read_exact_at(&mut content, 0).unwrap();
            content
        };
        assert_eq!(content(true), content(false));
        assert_eq!(content(true), b"\0\0\0\0\0\0\0me bytes");
        let negative = Call::Read {
            vectors: &[],
            offset: u64::MAX,
        };
        assert!(call_now(&tempfile::tempfile().unwrap(), &negative, 0).is_err());
    }
}
