// SPDX-License-Identifier: Apache-2.0

//! The system calls that no crate here wraps: the only `unsafe` of this library.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use tokio::io::unix::AsyncFd;

/// What a mount allows, as `mount_setattr(2)` has it: `MOUNT_ATTR_*` of linux/mount.h.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct MountAttributes {
    /// Attributes to set.
    pub set: u64,
    /// Attributes to clear.
    pub clear: u64,
    /// Makes the mounts private: no later mount event goes in or out.
    pub private: bool,
}

/// Changes the mount that `tree` is (and, if `recursive`, every mount below it).
///
/// # Errors
/// Those of `mount_setattr(2)`; `ENOSYS` before Linux 5.12.
pub(crate) fn mount_setattr(
    tree: BorrowedFd<'_>,
    recursive: bool,
    attributes: MountAttributes,
) -> io::Result<()> {
    let attr = libc::mount_attr {
        attr_set: attributes.set,
        attr_clr: attributes.clear,
        propagation: if attributes.private {
            libc::MS_PRIVATE
        } else {
            0
        },
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: `tree` is open for the call, the path is a NUL-terminated constant, and `attr` is a live
    // `struct mount_attr` whose true size is passed; the kernel only reads both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Gives up the controlling terminal `tty` (`TIOCNOTTY`), so that this process's end does not hang it up and
/// throw away what its other side has not read yet.
///
/// # Errors
/// `ENOTTY` when `tty` is not the controlling terminal.
pub(crate) fn release_controlling_terminal(tty: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: TIOCNOTTY takes no argument, and `tty` is open for the call.
    let result = unsafe { libc::ioctl(tty.as_raw_fd(), libc::TIOCNOTTY) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Marks every open descriptor but the standard three close-on-exec: what our caller forgot to close is not for
/// the processes that we start.
///
/// # Errors
/// `ENOSYS` and `EINVAL` before Linux 5.11.
pub(crate) fn close_all_on_exec() -> io::Result<()> {
    // SAFETY: with CLOSE_RANGE_CLOEXEC no descriptor is closed and no memory touched; only flags change, to what
    // everything in this program sets anyway.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Waits for events on `fd`, without blocking, in the running event loop.
///
/// # Errors
/// When epoll does not take it.
pub(crate) fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` names the same open descriptor for as long as it lives, and it lives in the `AsyncFd`,
    // which gives no mutable access to it here.
    let registered = unsafe { AsyncFd::register(fd) };
    Ok(registered?)
}

/// Takes over a descriptor that this process inherited by its number, and marks it close-on-exec.
///
/// # Errors
/// When `fd` is one of the standard three, or not open.
pub(crate) fn take_inherited_fd(fd: i32) -> io::Result<OwnedFd> {
    if fd <= 2 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: fcntl on a number that may or may not be an open descriptor reads and writes no memory.
    let result = unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` is open (above). The number was handed to this process by its parent for this one purpose, so
    // nothing else in it owns the descriptor; it is called once, before anything else opens files.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
