// SPDX-License-Identifier: Apache-2.0

//! System calls between files and guest memory, and what makes a thread fit to serve a file system.
//!
//! The only `unsafe` of the virtio-fs device is here.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::Mode;
use rustix::process::{fchdir, umask};
use rustix::thread::{UnshareFlags, set_thread_groups, unshare_unsafe};
use vm_memory::VolatileSlice;

/// As preadv(2): reads at `offset` into the slices, one after another; returns how many bytes.
///
/// # Errors
/// As preadv(2); `EINVAL` for an offset or a number of slices beyond its range.
pub(super) fn read_at(file: &File, slices: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
    let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let vectors: Vec<libc::iovec> = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast(),
            iov_len: guard.len(),
        })
        .collect();
    let (count, offset) = ranges(vectors.len(), offset)?;
    // SAFETY: every vector is a slice of mapped guest memory that `guards` keeps mapped during the call, and
    // `count` is their number. Guest memory is volatile for Rust: no reference to it exists.
    let done = unsafe { libc::preadv64(file.as_raw_fd(), vectors.as_ptr(), count, offset) };
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}

/// As pwritev2(2) with `flags` of `RWF_*`: writes the slices at `offset`; returns how many bytes.
///
/// # Errors
/// As pwritev2(2); `EINVAL` for an offset or a number of slices beyond its range.
pub(super) fn write_at(
    file: &File,
    slices: &[VolatileSlice<'_>],
    offset: u64,
    flags: i32,
) -> io::Result<usize> {
    let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard).collect();
    let vectors: Vec<libc::iovec> = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast_mut().cast(),
            iov_len: guard.len(),
        })
        .collect();
    let (count, offset) = ranges(vectors.len(), offset)?;
    // SAFETY: as in `read_at`; the kernel only reads from the vectors.
    let done = unsafe { libc::pwritev2(file.as_raw_fd(), vectors.as_ptr(), count, offset, flags) };
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}

fn ranges(count: usize, offset: u64) -> io::Result<(i32, i64)> {
    let invalid = |_| io::Error::from_raw_os_error(libc::EINVAL);
    Ok((
        i32::try_from(count).map_err(invalid)?,
        i64::try_from(offset).map_err(invalid)?,
    ))
}

/// Makes the calling thread fit to serve `directory`: a working directory (that one) and umask of its own, as the
/// passthrough file system changes both; umask 0; no supplementary groups (CVE-2022-0358).
///
/// # Errors
/// When the thread cannot be separated, or cannot go to `descriptors` (`/proc/self/fd`) and back, without which
/// special files have no extended attributes, and the passthrough file system gives up the process.
pub(super) fn prepare_thread(
    directory: BorrowedFd<'_>,
    descriptors: BorrowedFd<'_>,
) -> io::Result<()> {
    // SAFETY: CLONE_FS separates working directory, root and umask of this thread from the others'; no
    // descriptor or memory is touched.
    unsafe { unshare_unsafe(UnshareFlags::FS) }?;
    umask(Mode::empty());
    if let Err(error) = set_thread_groups(&[]) {
        // Without CAP_SETGID the thread cannot take on other groups either, and keeps its own.
        log::debug!("fs: supplementary groups stay: {error}");
    }
    fchdir(descriptors)?;
    fchdir(directory)?;
    Ok(())
}

/// Effective user and group of a thread.
#[derive(Debug, Clone, Copy)]
pub(super) struct Identity {
    user: rustix::process::Uid,
    group: rustix::process::Gid,
}

impl Identity {
    /// The calling thread's.
    pub(super) fn current() -> Self {
        Self {
            user: rustix::process::geteuid(),
            group: rustix::process::getegid(),
        }
    }

    /// Takes on `user` and `group`, and the supplementary `groups`: with them the capabilities of root go.
    ///
    /// # Errors
    /// When the kernel refuses; then [`Self::restore`] undoes what was done.
    pub(super) fn assume(user: u32, group: u32, groups: &[u32]) -> io::Result<()> {
        use rustix::process::{Gid, Uid};
        use rustix::thread::{set_thread_res_gid, set_thread_res_uid};
        if !groups.is_empty() {
            let groups: Vec<Gid> = groups.iter().map(|group| Gid::from_raw(*group)).collect();
            set_thread_groups(&groups)?;
        }
        set_thread_res_gid(None, Gid::from_raw(group), None)?;
        Ok(set_thread_res_uid(None, Uid::from_raw(user), None)?)
    }

    /// Takes it on again where it was left, and leaves all supplementary groups when `groups`.
    pub(super) fn restore(self, groups: bool) {
        use rustix::thread::{set_thread_res_gid, set_thread_res_uid};
        let now = Self::current();
        if now.user != self.user
            && let Err(error) = set_thread_res_uid(None, self.user, None)
        {
            log::error!("fs: failed to become user {} again: {error}", self.user);
        }
        if now.group != self.group
            && let Err(error) = set_thread_res_gid(None, self.group, None)
        {
            log::error!("fs: failed to become group {} again: {error}", self.group);
        }
        if groups && let Err(error) = set_thread_groups(&[]) {
            log::error!("fs: failed to leave supplementary groups: {error}");
        }
    }
}
