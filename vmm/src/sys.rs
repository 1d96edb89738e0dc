// SPDX-License-Identifier: Apache-2.0

//! Descriptors that came by inheritance.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, RawFd};

/// Takes over the inherited descriptor `fd`, and keeps it from being inherited further.
///
/// # Errors
/// When it is not open, or one of the standard streams.
pub fn inherited_file(fd: RawFd) -> io::Result<File> {
    if fd <= libc::STDERR_FILENO {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    // SAFETY: fcntl with F_SETFD takes any descriptor number and reads no memory.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, as fcntl said, and nothing else in this process has it: this is called before
    // anything is opened here, once for each number (`Arguments` refuses the same number twice).
    Ok(unsafe { File::from_raw_fd(fd) })
}
