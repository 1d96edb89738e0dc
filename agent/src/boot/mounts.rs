// SPDX-License-Identifier: Apache-2.0

//! The file systems that every guest has.

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

/// Where cgroup2 is.
pub(crate) const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// A mount that failed.
#[derive(Debug, thiserror::Error)]
#[error("failed to mount {fstype} on {target}")]
pub(crate) struct MountError {
    fstype: &'static str,
    target: &'static str,
    source: std::io::Error,
}

struct Mount {
    fstype: &'static str,
    target: &'static str,
    flags: MountFlags,
    data: &'static str,
}

const SAFE: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);

const fn at(
    fstype: &'static str,
    target: &'static str,
    flags: MountFlags,
    data: &'static str,
) -> Mount {
    Mount {
        fstype,
        target,
        flags,
        data,
    }
}

const DEVICES: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC);
const SHARED: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);

/// In the order in which they are made.
const MOUNTS: [Mount; 9] = [
    at("devtmpfs", "/dev", MountFlags::NOSUID, "mode=0755"),
    at("proc", "/proc", SAFE, ""),
    at("sysfs", "/sys", SAFE, ""),
    at("tmpfs", "/run", SHARED, "mode=0755"),
    at("tmpfs", "/tmp", SHARED, "mode=1777"),
    at(
        "devpts",
        "/dev/pts",
        DEVICES,
        "gid=5,mode=0620,ptmxmode=0666",
    ),
    at("tmpfs", "/dev/shm", SHARED, "mode=1777"),
    at("mqueue", "/dev/mqueue", SAFE, ""),
    at(
        "cgroup2",
        CGROUP_ROOT,
        SAFE,
        "nsdelegate,memory_recursiveprot",
    ),
];

/// Makes them all.
///
/// # Errors
/// With the first that fails.
pub(crate) fn mount_all() -> Result<(), MountError> {
    MOUNTS.iter().try_for_each(|entry| {
        make(entry).map_err(|errno| MountError {
            fstype: entry.fstype,
            target: entry.target,
            source: errno.into(),
        })
    })
}

fn make(entry: &Mount) -> Result<(), Errno> {
    match rustix::fs::mkdir(entry.target, rustix::fs::Mode::from_raw_mode(0o755)) {
        // The mount says better than mkdir what is wrong with a directory of sysfs.
        Ok(()) | Err(Errno::EXIST | Errno::ROFS | Errno::PERM) => {}
        Err(errno) => return Err(errno),
    }
    let data = std::ffi::CString::new(entry.data).map_err(|_| Errno::INVAL)?;
    mount(
        entry.fstype,
        entry.target,
        entry.fstype,
        entry.flags,
        data.as_c_str(),
    )
}
