// SPDX-License-Identifier: Apache-2.0

//! A request under way: which system call is next, and what its result means.
//!
//! No I/O happens here, so that io_uring and plain calls share every decision: short transfers go on where they
//! ended, ranges are done one after another, and a file system that cannot write zeroes by itself has them
//! written.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use vm_memory::{GuestMemoryMmap, VolatileSlice};

use super::request::{Range, Status};
use crate::devices::virtio::fs::segments::Segments;

/// Zeroes to write where the file system cannot.
static ZEROES: [u8; 4096] = [0; 4096];
/// How many times in one call.
const ZEROES_COUNT: u64 = 256;

/// Guest memory, or zeroes, as the kernel takes it, kept mapped as long as this exists.
#[derive(Debug)]
pub(super) struct Buffers {
    vectors: VecDeque<libc::iovec>,
    left: usize,
    _memory: Option<Arc<GuestMemoryMmap>>,
}

// SAFETY: the pointers are to guest memory, which `_memory` keeps mapped, or to a static; both may be used from
// any thread, and Rust code never goes through them.
unsafe impl Send for Buffers {}

impl Buffers {
    /// The bytes of `segments`, which are slices of `memory`.
    pub(super) fn guest(memory: Arc<GuestMemoryMmap>, segments: &Segments<'_>) -> Self {
        let vector = |slice: &VolatileSlice<'_>| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        };
        Self {
            vectors: segments.slices().iter().map(vector).collect(),
            left: segments.len(),
            _memory: Some(memory),
        }
    }

    /// At most `len` zeroes, only to be written from.
    fn zeroes(len: u64) -> Self {
        let mut buffers = Self {
            vectors: VecDeque::new(),
            left: 0,
            _memory: None,
        };
        let mut left = usize::try_from(len.min(ZEROES_COUNT * ZEROES.len() as u64)).unwrap_or(0);
        while left > 0 {
            let part = left.min(ZEROES.len());
            buffers.vectors.push_back(libc::iovec {
                iov_base: ZEROES.as_ptr().cast_mut().cast(),
                iov_len: part,
            });
            buffers.left += part;
            left -= part;
        }
        buffers
    }

    /// What is left, for the kernel. Stays where it is in memory until the next [`Self::advance`].
    pub(super) fn vectors(&mut self) -> &[libc::iovec] {
        self.vectors.make_contiguous()
    }

    /// The first `count` bytes are done.
    fn advance(&mut self, count: usize) {
        let mut count = count.min(self.left);
        self.left -= count;
        while let Some(first) = self.vectors.front_mut() {
            if count < first.iov_len {
                first.iov_base = first.iov_base.wrapping_byte_add(count);
                first.iov_len -= count;
                break;
            }
            count -= first.iov_len;
            self.vectors.pop_front();
        }
    }
}

/// One system call on the disk's file.
#[derive(Debug)]
pub(super) enum Call<'a> {
    /// preadv2(2).
    Read {
        vectors: &'a [libc::iovec],
        offset: u64,
    },
    /// pwritev2(2).
    Write {
        vectors: &'a [libc::iovec],
        offset: u64,
    },
    /// fdatasync(2).
    Sync,
    /// fallocate(2).
    Allocate { mode: i32, offset: u64, len: u64 },
}

/// How zeroes get onto the disk; each falls back to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Zeroing {
    Allocate,
    Punch,
    Write,
}

/// A request under way.
#[derive(Debug)]
pub(super) struct Task(Work);

#[derive(Debug)]
enum Work {
    Transfer {
        buffers: Buffers,
        offset: u64,
        write: bool,
    },
    Flush,
    Discard(VecDeque<Range>),
    Zero {
        ranges: VecDeque<Range>,
        zeroing: Zeroing,
        buffers: Buffers,
    },
}

/// What comes after a call.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Another one.
    Again,
    /// The end.
    Done(Status),
}

impl Task {
    /// READ.
    pub(super) fn read(buffers: Buffers, offset: u64) -> Self {
        Self(Work::Transfer {
            buffers,
            offset,
            write: false,
        })
    }

    /// WRITE.
    pub(super) fn write(buffers: Buffers, offset: u64) -> Self {
        Self(Work::Transfer {
            buffers,
            offset,
            write: true,
        })
    }

    /// FLUSH.
    pub(super) fn flush() -> Self {
        Self(Work::Flush)
    }

    /// DISCARD.
    pub(super) fn discard(ranges: Vec<Range>) -> Self {
        Self(Work::Discard(used(ranges)))
    }

    /// WRITE_ZEROES.
    pub(super) fn zero(ranges: Vec<Range>) -> Self {
        Self(Work::Zero {
            ranges: used(ranges),
            zeroing: Zeroing::Allocate,
            buffers: Buffers::zeroes(0),
        })
    }

    /// The next call; `None` when nothing is left to do.
    pub(super) fn call(&mut self) -> Option<Call<'_>> {
        match &mut self.0 {
            Work::Transfer { buffers, .. } if buffers.left == 0 => None,
            Work::Transfer {
                buffers,
                offset,
                write,
            } => {
                let (vectors, offset) = (buffers.vectors(), *offset);
                Some(if *write {
                    Call::Write { vectors, offset }
                } else {
                    Call::Read { vectors, offset }
                })
            }
            Work::Flush => Some(Call::Sync),
            Work::Discard(ranges) => ranges.front().map(|range| Call::Allocate {
                mode: libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                offset: range.offset,
                len: range.len,
            }),
            Work::Zero {
                ranges,
                zeroing,
                buffers,
            } => {
                let range = *ranges.front()?;
                let mode = match zeroing {
                    Zeroing::Allocate if !range.unmap => libc::FALLOC_FL_ZERO_RANGE,
                    Zeroing::Allocate | Zeroing::Punch => libc::FALLOC_FL_PUNCH_HOLE,
                    Zeroing::Write => {
                        *buffers = Buffers::zeroes(range.len);
                        return Some(Call::Write {
                            vectors: buffers.vectors(),
                            offset: range.offset,
                        });
                    }
                };
                Some(Call::Allocate {
                    mode: mode | libc::FALLOC_FL_KEEP_SIZE,
                    offset: range.offset,
                    len: range.len,
                })
            }
        }
    }

    /// Takes the result of the last [`Self::call`].
    pub(super) fn done(&mut self, result: io::Result<usize>) -> Next {
        let count = match result {
            Ok(count) => count,
            Err(error) => return self.failed(&error),
        };
        match &mut self.0 {
            // The file became shorter than it was.
            Work::Transfer { .. } if count == 0 => Next::Done(Status::IoError),
            Work::Transfer {
                buffers, offset, ..
            } => {
                buffers.advance(count);
                *offset = offset.saturating_add(count as u64);
                again_unless(buffers.left == 0)
            }
            Work::Flush => Next::Done(Status::Ok),
            Work::Discard(ranges) => {
                ranges.pop_front();
                again_unless(ranges.is_empty())
            }
            Work::Zero {
                ranges, zeroing, ..
            } => {
                if *zeroing == Zeroing::Write {
                    let Some(range) = ranges.front_mut().filter(|_| count > 0) else {
                        return Next::Done(Status::IoError);
                    };
                    let count = (count as u64).min(range.len);
                    range.offset = range.offset.saturating_add(count);
                    range.len -= count;
                    if range.len > 0 {
                        return Next::Again;
                    }
                }
                ranges.pop_front();
                again_unless(ranges.is_empty())
            }
        }
    }

    fn failed(&mut self, error: &io::Error) -> Next {
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        if [libc::EINTR, libc::EAGAIN].contains(&errno) {
            return Next::Again;
        }
        let unsupported = [libc::EOPNOTSUPP, libc::ENOSYS, libc::ENODEV].contains(&errno);
        match &mut self.0 {
            // Discarding is a hint.
            Work::Discard(_) if unsupported => Next::Done(Status::Ok),
            Work::Zero { zeroing, .. } if unsupported && *zeroing != Zeroing::Write => {
                *zeroing = match zeroing {
                    Zeroing::Allocate => Zeroing::Punch,
                    Zeroing::Punch | Zeroing::Write => Zeroing::Write,
                };
                Next::Again
            }
            _ => {
                log::debug!("blk: request failed: {error}");
                Next::Done(Status::IoError)
            }
        }
    }
}

/// fallocate(2) refuses empty ranges.
fn used(ranges: Vec<Range>) -> VecDeque<Range> {
    ranges.into_iter().filter(|range| range.len > 0).collect()
}

fn again_unless(end: bool) -> Next {
    if end {
        Next::Done(Status::Ok)
    } else {
        Next::Again
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(offset: u64, len: u64) -> Range {
        Range {
            offset,
            len,
            unmap: false,
        }
    }

    fn errno(errno: i32) -> io::Result<usize> {
        Err(io::Error::from_raw_os_error(errno))
    }

    #[test]
    fn a_short_transfer_goes_on_where_it_ended() {
        let mut task = Task::write(Buffers::zeroes(10_000), 512);
        let shape = |task: &mut Task| match task.call() {
            Some(Call::Write { vectors, offset }) => {
                let lens: Vec<usize> = vectors.iter().map(|vector| vector.iov_len).collect();
                (lens, offset)
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(shape(&mut task), (vec![4096, 4096, 1808], 512));
        assert_eq!(task.done(Ok(5000)), Next::Again);
        assert_eq!(shape(&mut task), (vec![3192, 1808], 5512));
        assert_eq!(task.done(errno(libc::EINTR)), Next::Again);
        assert_eq!(shape(&mut task), (vec![3192, 1808], 5512));
        assert_eq!(task.done(Ok(5000)), Next::Done(Status::Ok));
        assert!(task.call().is_none());
    }

    #[test]
    fn a_transfer_that_moves_nothing_fails() {
        let mut task = Task::read(Buffers::zeroes(512), 0);
        assert_eq!(task.done(Ok(0)), Next::Done(Status::IoError));
        let mut task = Task::write(Buffers::zeroes(512), 0);
        assert_eq!(task.done(errno(libc::ENOSPC)), Next::Done(Status::IoError));
    }

    #[test]
    fn zeroes_are_written_where_nothing_better_works() {
        let mut task = Task::zero(vec![range(0, 512), range(4096, 3 << 20), range(9, 0)]);
        let mode = |task: &mut Task| match task.call() {
            Some(Call::Allocate { mode, .. }) => mode & !libc::FALLOC_FL_KEEP_SIZE,
            _ => 0,
        };
        assert_eq!(mode(&mut task), libc::FALLOC_FL_ZERO_RANGE);
        assert_eq!(task.done(errno(libc::EOPNOTSUPP)), Next::Again);
        assert_eq!(mode(&mut task), libc::FALLOC_FL_PUNCH_HOLE);
        assert_eq!(task.done(errno(libc::EOPNOTSUPP)), Next::Again);
        let mut written = 0;
        loop {
            let len = match task.call() {
                Some(Call::Write { vectors, .. }) => {
                    vectors.iter().map(|vector| vector.iov_len).sum()
                }
                other => panic!("{other:?}"),
            };
            written += len;
            match task.done(Ok(len)) {
                Next::Again => {}
                end => {
                    assert_eq!(end, Next::Done(Status::Ok));
                    break;
                }
            }
        }
        assert_eq!(written, 512 + (3 << 20));
    }

    #[test]
    fn a_discard_that_the_host_cannot_do_is_no_failure() {
        let mut task = Task::discard(vec![range(0, 512)]);
        assert_eq!(task.done(errno(libc::EOPNOTSUPP)), Next::Done(Status::Ok));
        let mut task = Task::discard(vec![range(0, 512)]);
        assert_eq!(task.done(errno(libc::EIO)), Next::Done(Status::IoError));
        assert!(Task::discard(vec![range(0, 0)]).call().is_none());
    }
}
