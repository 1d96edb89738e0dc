// SPDX-License-Identifier: Apache-2.0

//! What the host may set in the guest as a whole: name, clock, entropy, kernel parameters, /dev/shm; and its
//! end.

use std::fs::File;
use std::io;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use rustix::mount::{MountFlags, mount_remount};

use crate::sys;

pub(crate) use crate::sys::MAX_ENTROPY;

/// Most kernel parameters in one request.
pub(crate) const MAX_SYSCTLS: usize = 256;
const MAX_HOSTNAME: usize = 64;
const MAX_SYSCTL_VALUE: usize = 4096;

/// Why something was not set.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    /// An argument that can never be right.
    #[error("bad {0}")]
    Argument(String),
    /// The kernel refused.
    #[error("failed to {0}")]
    System(String, #[source] io::Error),
}

fn system(what: &str) -> impl FnOnce(Errno) -> MachineError {
    let what = what.to_owned();
    |errno| MachineError::System(what, errno.into())
}

/// Sets the name of the guest.
///
/// # Errors
/// When it is longer than 64 bytes or the kernel refuses.
pub(crate) fn set_hostname(name: &str) -> Result<(), MachineError> {
    if name.len() > MAX_HOSTNAME || name.contains('\0') {
        return Err(MachineError::Argument("hostname".into()));
    }
    nix::unistd::sethostname(name).map_err(system("set the hostname"))
}

/// Sets the wall clock, nanoseconds since the epoch.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn set_time(time_ns: u64) -> Result<(), MachineError> {
    let time = TimeSpec::from_duration(Duration::from_nanos(time_ns));
    clock_settime(ClockId::CLOCK_REALTIME, time).map_err(system("set the clock"))
}

/// Adds 1 to 512 bytes of entropy.
///
/// # Errors
/// For any other number, or when the kernel refuses.
pub(crate) fn add_entropy(bytes: &[u8]) -> Result<(), MachineError> {
    if bytes.is_empty() || bytes.len() > MAX_ENTROPY {
        return Err(MachineError::Argument(format!(
            "entropy of {} bytes",
            bytes.len()
        )));
    }
    let random = File::open("/dev/urandom")
        .map_err(|error| MachineError::System("open /dev/urandom".into(), error))?;
    sys::add_entropy(&random, bytes).map_err(system("add entropy"))
}

/// Sets a kernel parameter by its dotted name (or with slashes, where a part has a dot).
///
/// # Errors
/// For a name that is none, or when the kernel refuses.
pub(crate) fn set_sysctl(name: &str, value: &str) -> Result<(), MachineError> {
    let path = sysctl_path(name)
        .filter(|_| value.len() <= MAX_SYSCTL_VALUE)
        .ok_or_else(|| MachineError::Argument(format!("kernel parameter {name:?}")))?;
    std::fs::write(path, value)
        .map_err(|error| MachineError::System(format!("set the kernel parameter {name}"), error))
}

fn sysctl_path(name: &str) -> Option<String> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"_-./:@".contains(&byte);
    if name.is_empty() || name.len() > 255 || !name.bytes().all(good) {
        return None;
    }
    // As sysctl(8): the first separator says which one separates.
    let slashes = name.find(['.', '/']).map(|at| name.as_bytes().get(at)) == Some(Some(&b'/'));
    let path = if slashes {
        name.to_owned()
    } else {
        name.replace('/', "\0").replace('.', "/").replace('\0', ".")
    };
    let parts_are_names = path.split('/').all(|part| !matches!(part, "" | "." | ".."));
    parts_are_names.then(|| format!("/proc/sys/{path}"))
}

/// Sets the size of the shared /dev/shm, bytes.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn set_shm_size(bytes: u64) -> Result<(), MachineError> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    let data = std::ffi::CString::new(format!("size={bytes}"))
        .map_err(|_| MachineError::Argument("size of /dev/shm".into()))?;
    mount_remount("/dev/shm", flags, data.as_c_str())
        .map_err(|errno| MachineError::System("set the size of /dev/shm".into(), errno.into()))
}

/// Writes everything back and ends the machine: the guest has no ACPI to power off with, and to the VMM a
/// reset is the orderly end. Returns only when the kernel refuses.
pub(crate) fn power_off() {
    nix::unistd::sync();
    let Err(errno) = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_AUTOBOOT);
    log::error!("failed to end the machine: {errno}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dotted_and_slashed_names_are_paths_below_proc_sys() {
        let path = |name| sysctl_path(name);
        let ip = path("net.ipv4.ip_forward");
        assert_eq!(ip.as_deref(), Some("/proc/sys/net/ipv4/ip_forward"));
        let vlan = path("net.ipv4.conf.eth0/1.forwarding");
        assert_eq!(
            vlan.as_deref(),
            Some("/proc/sys/net/ipv4/conf/eth0.1/forwarding")
        );
        let slashed = path("net/ipv4/conf/eth0.1/forwarding");
        assert_eq!(
            slashed.as_deref(),
            Some("/proc/sys/net/ipv4/conf/eth0.1/forwarding")
        );
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in [
            "",
            ".",
            "..",
            "a/../b",
            "/etc/passwd",
            "a//b",
            "a\0b",
            "a b",
            "a..b",
        ] {
            assert_eq!(sysctl_path(name), None, "{name:?}");
        }
    }

    #[test]
    fn entropy_is_bounded_both_ways() {
        assert!(add_entropy(&[]).is_err());
        assert!(add_entropy(&[0; MAX_ENTROPY + 1]).is_err());
    }
}
