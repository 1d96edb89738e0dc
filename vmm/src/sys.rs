// SPDX-License-Identifier: Apache-2.0

//! Descriptors: those that came by inheritance, and room for more.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, RawFd};

/// How many descriptors there is room for from the start; the kernel's table grows in powers of two.
const DESCRIPTORS: i32 = 1024;

/// Makes the kernel's table of this process's descriptors large. To be called while the process has one thread: a
/// table that several share grows only after a grace period of RCU (`expand_files` in the kernel's fs/file.c), which
/// whoever opens the next file would wait for.
pub fn reserve_descriptors() {
    // Dropped at once, and the table stays. Where fewer are allowed it is as large as it will be.
    match rustix::io::fcntl_dupfd_cloexec(io::stderr(), DESCRIPTORS - 1) {
        Ok(_) => {}
        Err(error) => log::debug!("no room for {DESCRIPTORS} descriptors in advance: {error}"),
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_descriptors_has_room_and_none_is_used() {
        let open = || std::fs::read_dir("/proc/self/fd").unwrap();
        reserve_descriptors();
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let size = status
            .lines()
            .find_map(|line| line.strip_prefix("FDSize:"))
            .unwrap();
        assert!(size.trim().parse::<i32>().unwrap() >= DESCRIPTORS);
        let high = (DESCRIPTORS - 1).to_string();
        assert!(open().all(|entry| *entry.unwrap().file_name() != *high));
    }
}
