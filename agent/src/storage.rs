// SPDX-License-Identifier: Apache-2.0

//! File systems that the host asks for: virtio-fs, block devices, tmpfs. Mounted below the guest's own
//! directory only, with no symbolic link followed on the way: what lies there may have been written by
//! containers.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use caisson_protocol::agent::agent::Storage;
use caisson_protocol::error::ErrorCode;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// The only place for mount points.
const BASE: &str = "/run/caisson";
/// Most in one request.
pub(crate) const MAX_STORAGES: usize = 256;
const MAX_TEXT: usize = 4096;
const KINDS: [&str; 5] = ["virtiofs", "tmpfs", "ext4", "xfs", "erofs"];

/// Why a file system was not mounted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StorageError {
    /// Not one of those the agent mounts.
    #[error("file system type {0:?} is not supported")]
    Kind(String),
    /// Outside of the guest's directory, or not normalised.
    #[error("{0:?} is not a path below {BASE}")]
    MountPoint(String),
    /// Too long, or with zero bytes.
    #[error("the {0} of a file system is too long or holds a zero byte")]
    Text(&'static str),
    /// More than there may be.
    #[error("more than {MAX_STORAGES} file systems in one request")]
    TooMany,
    /// The kernel refused.
    #[error("failed to {step} {mount_point}")]
    System {
        /// What was tried.
        step: &'static str,
        /// Where.
        mount_point: String,
        /// Why.
        source: io::Error,
    },
}

impl StorageError {
    /// The code for programs.
    pub(crate) fn code(&self) -> ErrorCode {
        match self {
            Self::Kind(_) => ErrorCode::Unsupported,
            Self::MountPoint(_) | Self::Text(_) => ErrorCode::InvalidArgument,
            Self::TooMany => ErrorCode::ResourceExhausted,
            Self::System { .. } => ErrorCode::Internal,
        }
    }
}

/// A storage that was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StorageRequest {
    kind: &'static str,
    source: CString,
    mount_point: PathBuf,
    flags: MountFlags,
    data: CString,
}

impl StorageRequest {
    /// Checks all of a request's.
    ///
    /// # Errors
    /// With the first that is wrong.
    pub(crate) fn parse_all(storages: &[Storage]) -> Result<Vec<Self>, StorageError> {
        if storages.len() > MAX_STORAGES {
            return Err(StorageError::TooMany);
        }
        storages.iter().map(Self::parse).collect()
    }

    fn parse(storage: &Storage) -> Result<Self, StorageError> {
        let kind = KINDS.into_iter().find(|kind| *kind == storage.fstype);
        let kind = kind.ok_or_else(|| StorageError::Kind(storage.fstype.clone()))?;
        let outside = || StorageError::MountPoint(storage.mount_point.clone());
        let mount_point = PathBuf::from(&storage.mount_point);
        let below = mount_point.strip_prefix(BASE).map_err(|_| outside())?;
        let normal = |part: Component<'_>| matches!(part, Component::Normal(_));
        if below.as_os_str().is_empty()
            || storage.mount_point.len() > MAX_TEXT
            || storage.mount_point.contains('\0')
            || !below.components().all(normal)
        {
            return Err(outside());
        }
        let (flags, data) = parse_options(&storage.options);
        Ok(Self {
            kind,
            source: bounded("source", &storage.source)?,
            mount_point,
            flags,
            data: bounded("options", &data)?,
        })
    }

    fn mount(&self) -> Result<(), StorageError> {
        let failed = |step| {
            move |errno: Errno| StorageError::System {
                step,
                mount_point: self.mount_point.display().to_string(),
                source: errno.into(),
            }
        };
        let directory = open_directory(&self.mount_point).map_err(failed("open"))?;
        let target = format!("/proc/self/fd/{}", directory.as_raw_fd());
        mount(
            self.source.as_c_str(),
            target.as_str(),
            self.kind,
            self.flags,
            self.data.as_c_str(),
        )
        .map_err(failed("mount"))
    }
}

fn bounded(what: &'static str, text: &str) -> Result<CString, StorageError> {
    if text.len() > MAX_TEXT {
        return Err(StorageError::Text(what));
    }
    CString::new(text).map_err(|_| StorageError::Text(what))
}

/// mount(8)'s options as flags and what is left for the file system.
fn parse_options(options: &[String]) -> (MountFlags, String) {
    let (mut flags, mut data) = (MountFlags::empty(), Vec::new());
    for option in options.iter().flat_map(|option| option.split(',')) {
        match option {
            "" | "defaults" | "rw" | "suid" | "dev" | "exec" | "atime" | "async" => {}
            "ro" => flags |= MountFlags::RDONLY,
            "nosuid" => flags |= MountFlags::NOSUID,
            "nodev" => flags |= MountFlags::NODEV,
            "noexec" => flags |= MountFlags::NOEXEC,
            "noatime" => flags |= MountFlags::NOATIME,
            "nodiratime" => flags |= MountFlags::NODIRATIME,
            "relatime" => flags |= MountFlags::RELATIME,
            "sync" => flags |= MountFlags::SYNCHRONOUS,
            other => data.push(other),
        }
    }
    (flags, data.join(","))
}

/// Opens the directory `path`, below [`BASE`], making what is missing; never through a symbolic link.
fn open_directory(path: &Path) -> Result<OwnedFd, Errno> {
    match rustix::fs::mkdir(BASE, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno),
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut directory = rustix::fs::openat(CWD, BASE, flags, Mode::empty())?;
    let below = path.strip_prefix(BASE).map_err(|_| Errno::INVAL)?;
    for part in below.components() {
        let Component::Normal(name) = part else {
            return Err(Errno::INVAL);
        };
        match rustix::fs::mkdirat(&directory, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST | Errno::ROFS) => {}
            Err(errno) => return Err(errno),
        }
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        directory = openat2(&directory, name, flags, Mode::empty(), resolve)?;
    }
    Ok(directory)
}

/// File systems that are unmounted when this is dropped, the last first.
#[derive(Debug, Default)]
pub(crate) struct Mounted {
    mount_points: Vec<PathBuf>,
}

impl Mounted {
    /// Mounts all of them, or none.
    ///
    /// # Errors
    /// With the first that fails.
    pub(crate) fn mount_all(storages: &[StorageRequest]) -> Result<Self, StorageError> {
        let mut mounted = Self::default();
        for storage in storages {
            storage.mount()?;
            mounted.mount_points.push(storage.mount_point.clone());
        }
        Ok(mounted)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        for mount_point in self.mount_points.iter().rev() {
            let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
            if let Err(errno) = unmount(mount_point, flags) {
                log::warn!("failed to unmount {}: {errno}", mount_point.display());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storage(fstype: &str, mount_point: &str) -> Storage {
        Storage {
            fstype: fstype.into(),
            source: "tag".into(),
            mount_point: mount_point.into(),
            options: vec!["ro,nodev".into(), "size=1m".into(), "dax".into()],
            ..Default::default()
        }
    }

    #[test]
    fn options_are_flags_or_data() {
        let request = StorageRequest::parse(&storage("tmpfs", "/run/caisson/shared")).unwrap();
        assert_eq!(request.flags, MountFlags::RDONLY | MountFlags::NODEV);
        assert_eq!(request.data.to_str(), Ok("size=1m,dax"));
    }

    #[test]
    fn mount_points_elsewhere_are_refused() {
        for path in [
            "/run/caisson",
            "/run/caisson/",
            "/run/caisson/../x",
            "/run/caissonx/a",
            "/etc",
            "run/caisson/a",
            "",
        ] {
            let refused = StorageRequest::parse(&storage("tmpfs", path));
            assert!(
                matches!(refused, Err(StorageError::MountPoint(_))),
                "{path:?}"
            );
        }
    }

    #[test]
    fn unknown_file_systems_and_too_many_of_them_are_refused() {
        let refused = StorageRequest::parse(&storage("9p", "/run/caisson/a"));
        assert!(matches!(refused, Err(StorageError::Kind(kind)) if kind == "9p"));
        let many = vec![storage("tmpfs", "/run/caisson/a"); MAX_STORAGES + 1];
        assert!(StorageRequest::parse_all(&many).is_err());
    }
}
