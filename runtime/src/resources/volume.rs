// SPDX-License-Identifier: Apache-2.0

//! Host file systems for the guest, as mounts that never appear in the host's mount table.
//!
//! A root file system or bind source is cloned as a *detached* mount (`open_tree(2)`), given its attributes
//! while nobody can see it (`mount_setattr(2)`: read-only is enforced here, on the host), and moved
//! (`move_mount(2)`) below the directory that virtio-fs serves, inside the VMM's private mount namespace. It
//! lives exactly as long as that namespace.
//!
//! ```text
//! <state>/shared            a small tmpfs, read-only for whoever serves it
//!    └ <container id>/rootfs, m0, m1, …      the moved mounts
//! ```
//!
//! [`attach_in_new_namespace`] is for a VMM that is about to start, [`enter_namespace_of`] followed by
//! [`attach`] for a container that joins a running one. All of it must run in a single-threaded process: the
//! short-lived helper of [`crate::vm::launch`].

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, mkdirat, open, openat};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, mount, mount_change,
    move_mount, open_tree,
};
use serde::{Deserialize, Serialize};

use crate::sandbox::process::ProcessRef;
use crate::sys::{self, MountAttributes};

/// What goes wrong with mounts.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// A system call on a path failed.
    #[error("failed to {operation} {path}")]
    Path {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A mount namespace could not be made or entered.
    #[error("failed to {operation} a mount namespace")]
    Namespace {
        /// `make` or `enter`.
        operation: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The VMM whose namespace was to be entered has ended.
    #[error("the VMM has ended")]
    VmmGone,
}

fn path_error<E: Into<io::Error>>(
    operation: &'static str,
    path: &Path,
) -> impl FnOnce(E) -> VolumeError {
    let path = path.to_owned();
    move |source| VolumeError::Path {
        operation,
        path,
        source: source.into(),
    }
}

/// A host directory or file to be shown to the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountPlan {
    /// On the host. Symbolic links in it are followed, as `mount --bind` does.
    pub source: PathBuf,
    /// The container's directory below the shared one.
    pub container: String,
    /// Name in there.
    pub name: String,
    /// With all mounts below it (`rbind`).
    pub recursive: bool,
    /// `MOUNT_ATTR_*` set on the mount itself.
    pub attributes: u64,
    /// `MOUNT_ATTR_*` set on it and every mount below it.
    pub recursive_attributes: u64,
}

/// A cloned mount that is in no namespace yet.
#[derive(Debug)]
pub struct DetachedMount {
    tree: OwnedFd,
    is_directory: bool,
    plan: MountPlan,
}

/// Clones what `plan` names, in the caller's mount namespace, and gives it its attributes.
///
/// # Errors
/// When the source is not there, or the kernel refuses.
pub fn open_detached(plan: &MountPlan) -> Result<DetachedMount, VolumeError> {
    let source = &plan.source;
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if plan.recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = open_tree(CWD, source, flags).map_err(path_error("clone mount", source))?;
    let private = MountAttributes {
        set: plan.recursive_attributes,
        clear: 0,
        private: true,
    };
    sys::mount_setattr(tree.as_fd(), true, private)
        .map_err(path_error("set mount attributes of", source))?;
    if plan.attributes != 0 {
        let own = MountAttributes {
            set: plan.attributes,
            ..MountAttributes::default()
        };
        sys::mount_setattr(tree.as_fd(), false, own)
            .map_err(path_error("set mount attributes of", source))?;
    }
    let stat = fstat(&tree).map_err(path_error("stat", source))?;
    Ok(DetachedMount {
        tree,
        is_directory: FileType::from_raw_mode(stat.st_mode) == FileType::Directory,
        plan: plan.clone(),
    })
}

/// Makes a mount namespace for this process in which `shared` is a small tmpfs, and attaches `mounts` there.
/// Mounts of the host still come in, nothing goes out.
///
/// # Errors
/// When the kernel refuses. The namespace goes away with this process.
pub fn attach_in_new_namespace(
    shared: &Path,
    mounts: Vec<DetachedMount>,
) -> Result<(), VolumeError> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(|errno| VolumeError::Namespace {
        operation: "make",
        source: errno.into(),
    })?;
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", slave).map_err(path_error("make slave", Path::new("/")))?;
    // What the guest could reach of this tmpfs itself is bounded, and read-only (see `attach`).
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let options = c"mode=0755,size=1m,nr_inodes=8192";
    mount("caisson", shared, "tmpfs", flags, options)
        .map_err(path_error("mount a tmpfs on", shared))?;
    attach(shared, mounts)
}

/// Takes this process into the mount namespace of a running VMM.
///
/// # Errors
/// When the VMM has ended, or the kernel refuses.
pub fn enter_namespace_of(vmm: ProcessRef) -> Result<(), VolumeError> {
    let pidfd = vmm.pidfd().ok_or(VolumeError::VmmGone)?;
    setns(&pidfd, CloneFlags::CLONE_NEWNS).map_err(|errno| VolumeError::Namespace {
        operation: "enter",
        source: errno.into(),
    })
}

/// Moves `mounts` below `shared`, which must be the tmpfs made by [`attach_in_new_namespace`].
///
/// # Errors
/// When the kernel refuses.
pub fn attach(shared: &Path, mounts: Vec<DetachedMount>) -> Result<(), VolumeError> {
    let root = open_directory(shared)?;
    let writable = MountAttributes {
        clear: libc::MOUNT_ATTR_RDONLY,
        ..MountAttributes::default()
    };
    sys::mount_setattr(root.as_fd(), false, writable)
        .map_err(path_error("make writable", shared))?;
    for mount in mounts {
        place(&root, shared, mount)?;
    }
    let read_only = MountAttributes {
        set: libc::MOUNT_ATTR_RDONLY,
        ..MountAttributes::default()
    };
    sys::mount_setattr(root.as_fd(), false, read_only).map_err(path_error("make read-only", shared))
}

/// Makes a mount below `shared` (and all below it) read-only from now on.
///
/// # Errors
/// When the kernel refuses: `EBUSY` while a file in it is open for writing.
pub fn seal(shared: &Path, container: &str, name: &str) -> Result<(), VolumeError> {
    let path = shared.join(container).join(name);
    let root = open_directory(&path)?;
    let read_only = MountAttributes {
        set: libc::MOUNT_ATTR_RDONLY,
        ..MountAttributes::default()
    };
    sys::mount_setattr(root.as_fd(), true, read_only).map_err(path_error("make read-only", &path))
}

fn open_directory(path: &Path) -> Result<OwnedFd, VolumeError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    open(path, flags, Mode::empty()).map_err(path_error("open", path))
}

fn place(root: &OwnedFd, shared: &Path, mount: DetachedMount) -> Result<(), VolumeError> {
    let plan = &mount.plan;
    let directory = shared.join(&plan.container);
    let target = directory.join(&plan.name);
    match mkdirat(root, &plan.container, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => {}
        Err(errno) => return Err(path_error("create directory", &directory)(errno)),
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let parent = openat(root, &plan.container, flags, Mode::empty())
        .map_err(path_error("open", &directory))?;
    if mount.is_directory {
        mkdirat(&parent, &plan.name, Mode::from_raw_mode(0o755))
            .map_err(path_error("create directory", &target))?;
    } else {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let file = openat(&parent, &plan.name, flags, Mode::from_raw_mode(0o644))
            .map_err(path_error("create", &target))?;
        drop(File::from(file));
    }
    move_mount(
        &mount.tree,
        "",
        &parent,
        &plan.name,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .map_err(path_error("attach a mount at", &target))
}
