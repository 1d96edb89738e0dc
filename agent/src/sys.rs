// SPDX-License-Identifier: Apache-2.0

//! What the agent needs of the kernel or of tokio and no crate offers without `unsafe`.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::{ioctl_none, ioctl_write_ptr};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Most bytes of entropy in one [`add_entropy`].
pub(crate) const MAX_ENTROPY: usize = 512;

ioctl_write_ptr!(rnd_add_entropy, b'R', 0x03, [libc::c_int; 2]);
ioctl_none!(rnd_reseed, b'R', 0x07);

/// `struct rand_pool_info` of linux/random.h with its flexible array at our bound.
#[repr(C)]
struct RandPoolInfo {
    entropy_bits: libc::c_int,
    size: libc::c_int,
    bytes: [u8; MAX_ENTROPY],
}

/// Mixes `bytes` (at most [`MAX_ENTROPY`]) into the kernel's pool, credits them whole, and reseeds the
/// generator at once (random(4), `RNDADDENTROPY`, `RNDRESEEDCRNG`).
///
/// # Errors
/// With `EINVAL` when there are more bytes, or with what the kernel says.
pub(crate) fn add_entropy(random: &File, bytes: &[u8]) -> Result<(), Errno> {
    let mut info = RandPoolInfo {
        entropy_bits: 0,
        size: 0,
        bytes: [0; MAX_ENTROPY],
    };
    let room = info.bytes.get_mut(..bytes.len()).ok_or(Errno::EINVAL)?;
    room.copy_from_slice(bytes);
    info.size = libc::c_int::try_from(bytes.len()).map_err(|_| Errno::EINVAL)?;
    info.entropy_bits = info.size * 8;
    // SAFETY: `info` is laid out as the kernel reads it, lives across the call, and its `size` is no more
    // than the array that follows it.
    unsafe { rnd_add_entropy(random.as_raw_fd(), (&raw const info).cast()) }?;
    // SAFETY: this request takes no argument.
    unsafe { rnd_reseed(random.as_raw_fd()) }.map(drop)
}

/// Gives SIGPIPE its default action back: Rust's runtime ignores it, and what is ignored stays ignored
/// across execve(2).
///
/// # Errors
/// With what the kernel says.
pub(crate) fn default_sigpipe() -> Result<(), Errno> {
    let action = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: the default action runs no code of ours.
    unsafe { sigaction(Signal::SIGPIPE, &action) }.map(drop)
}

/// Sends `signal`, of any number, to the process `pid`, which must be positive.
///
/// # Errors
/// With what the kernel says.
pub(crate) fn send_signal(pid: i32, signal: i32) -> Result<(), Errno> {
    if pid <= 0 {
        return Err(Errno::EINVAL);
    }
    // SAFETY: the call touches no memory of ours.
    Errno::result(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// Watches the readiness of `fd`.
///
/// # Errors
/// When the file is of no kind that can be watched.
pub(crate) fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open, always gives the same number, and is closed by nobody else while the
    // result owns it.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_goes_to_one_process_only() {
        assert_eq!(send_signal(0, 0), Err(Errno::EINVAL));
        assert_eq!(send_signal(-1, 0), Err(Errno::EINVAL));
        assert_eq!(send_signal(1, 0), Ok(()));
    }

    #[test]
    fn more_entropy_than_the_bound_is_refused_before_the_kernel_sees_it() {
        let null = File::open("/dev/null").unwrap();
        assert_eq!(
            add_entropy(&null, &[0; MAX_ENTROPY + 1]),
            Err(Errno::EINVAL)
        );
        assert_eq!(add_entropy(&null, &[0; MAX_ENTROPY]), Err(Errno::ENOTTY));
    }
}
