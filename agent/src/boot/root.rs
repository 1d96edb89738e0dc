// SPDX-License-Identifier: Apache-2.0

//! Turns the initramfs into a root that containers can leave.
//!
//! The kernel's first root, rootfs, is the one mount that pivot_root(2) refuses to leave. So the root
//! becomes a bind mount of it, moved on top: the same files, not copied, in a mount of their own. That mount
//! is read-only: nobody who gets at the agent's program through `/proc/<pid>/exe` of a helper can write to
//! it (CVE-2019-5736), since the helpers are executed from here.

use std::io;
use std::path::Path;

use rustix::mount::{MountFlags, mount_bind, mount_move, mount_remount};

/// Directories that must exist before the root is read-only.
const DIRECTORIES: [&str; 5] = ["/proc", "/sys", "/dev", "/run", "/tmp"];
/// Where the bind mount is made before it is moved.
const STAGE: &str = "/root";

/// A step that failed.
#[derive(Debug, thiserror::Error)]
#[error("failed to {step}")]
pub(crate) struct RootError {
    step: &'static str,
    source: io::Error,
}

/// Does it. Only for PID 1 of a guest.
///
/// # Errors
/// On the first step that fails.
pub(crate) fn enter() -> Result<(), RootError> {
    let failed = |step| {
        move |errno: rustix::io::Errno| RootError {
            step,
            source: errno.into(),
        }
    };
    for directory in DIRECTORIES.into_iter().chain([STAGE]) {
        if !Path::new(directory).is_dir() {
            std::fs::create_dir(directory).map_err(|source| RootError {
                step: "make the directories of the root",
                source,
            })?;
        }
    }
    mount_bind("/", STAGE).map_err(failed("bind the root"))?;
    rustix::process::chdir(STAGE).map_err(failed("change to the new root"))?;
    mount_move(".", "/").map_err(failed("move the new root"))?;
    rustix::process::chroot(".").map_err(failed("enter the new root"))?;
    rustix::process::chdir("/").map_err(failed("change to the root's directory"))?;
    let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NODEV;
    mount_remount("/", flags, c"").map_err(failed("make the root read-only"))
}
