// SPDX-License-Identifier: Apache-2.0

//! The pod's cgroup on the host (cgroup v2): it holds the per-container process and the VMM, so that both can be
//! killed at once and for certain by `cgroup.kill`, and what they use can be accounted.
//!
//! Limits of the container itself are applied in the guest. Where cgroup v2 is not mounted or not writable there
//! is no cgroup, and processes are found by the state directory instead.
//! <https://docs.kernel.org/admin-guide/cgroup-v2.html>

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Where cgroup v2 is mounted.
pub const CGROUP_ROOT: &str = "/sys/fs/cgroup";
/// Parent of the cgroups of pods whose spec names none.
const DEFAULT_PARENT: &str = "caisson";

/// What goes wrong with a cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A `linux.cgroupsPath` that names no place for a pod.
    #[error("bad linux.cgroupsPath {0:?}")]
    BadPath(String),
    /// Somebody else's processes are in it.
    #[error("cgroup {0} is not empty")]
    NotEmpty(PathBuf),
    /// Not all processes in it ended in time.
    #[error("processes in cgroup {0} did not end")]
    StillPopulated(PathBuf),
    /// A system call failed.
    #[error("failed to {operation} {path}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::Io {
        operation,
        path,
        source,
    }
}

/// The cgroup's path below the mount point, from `linux.cgroupsPath`: a path, or `slice:prefix:name` as the
/// systemd driver has it; `/caisson/<id>` when there is none. Always absolute, at least one component.
///
/// # Errors
/// When a component is `..`, or nothing is left.
pub fn path_from_spec(spec: Option<&Path>, id: &str) -> Result<PathBuf, CgroupError> {
    let Some(path) = spec.filter(|path| !path.as_os_str().is_empty()) else {
        return Ok(Path::new("/").join(DEFAULT_PARENT).join(id));
    };
    let bad = || CgroupError::BadPath(path.display().to_string());
    let text = path.to_str().ok_or_else(bad)?;
    let parts: Vec<_> = text.split(':').collect();
    let path = match parts.as_slice() {
        [slice, prefix, name] if !text.contains('/') && !name.is_empty() => {
            systemd_path(slice, prefix, name)
        }
        _ => path.to_owned(),
    };
    let mut clean = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return Err(bad()),
        }
    }
    if clean == Path::new("/") {
        return Err(bad());
    }
    Ok(clean)
}

/// `a-b.slice:prefix:name` → `a.slice/a-b.slice/prefix-name.scope`, as systemd lays slices out.
fn systemd_path(slice: &str, prefix: &str, name: &str) -> PathBuf {
    let slice = if slice.is_empty() {
        "system.slice"
    } else {
        slice
    };
    let stem = slice.strip_suffix(".slice").unwrap_or(slice);
    let mut path = PathBuf::new();
    if stem != "-" {
        let mut so_far = String::new();
        for part in stem.split('-') {
            if !so_far.is_empty() {
                so_far.push('-');
            }
            so_far.push_str(part);
            path.push(format!("{so_far}.slice"));
        }
    }
    let unit = if prefix.is_empty() {
        name.to_owned()
    } else {
        format!("{prefix}-{name}")
    };
    path.push(if name.ends_with(".slice") {
        name.to_owned()
    } else {
        format!("{unit}.scope")
    });
    path
}

/// A pod's cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// The cgroup at `relative` (as [`path_from_spec`] gives it), whether it exists or not.
    pub fn at(relative: &Path) -> Self {
        let below = relative.strip_prefix("/").unwrap_or(relative);
        Self {
            path: Path::new(CGROUP_ROOT).join(below),
        }
    }

    /// Whether this host has cgroup v2 at [`CGROUP_ROOT`].
    pub fn available() -> bool {
        Path::new(CGROUP_ROOT).join("cgroup.controllers").exists()
    }

    /// Makes it, with its parents.
    ///
    /// # Errors
    /// When it exists with processes in it, or the kernel refuses.
    pub fn create(&self) -> Result<(), CgroupError> {
        // A parent can be removed by another pod's end between two steps; that is no reason to fail.
        let mut attempts = 0;
        loop {
            match fs::create_dir_all(&self.path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound && attempts < 16 => {
                    attempts += 1;
                }
                other => break other.map_err(io_error("create cgroup", &self.path))?,
            }
        }
        if self.populated()? {
            return Err(CgroupError::NotEmpty(self.path.clone()));
        }
        Ok(())
    }

    /// Moves this process into it; what it starts afterwards is born there.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn enter(&self) -> Result<(), CgroupError> {
        let procs = self.path.join("cgroup.procs");
        fs::write(&procs, "0").map_err(io_error("write", &procs))
    }

    /// Kills everything in it and waits until it is gone, at most `limit`. Succeeds when there is no such cgroup.
    ///
    /// # Errors
    /// When the kernel refuses, or a process does not end in time.
    pub fn kill(&self, limit: Duration) -> Result<(), CgroupError> {
        let kill = self.path.join("cgroup.kill");
        match fs::write(&kill, "1") {
            Err(error) if gone(&error) => return Ok(()),
            other => other.map_err(io_error("write", &kill))?,
        }
        let deadline = Instant::now() + limit;
        let events = self.path.join("cgroup.events");
        let file = match fs::File::open(&events) {
            Err(error) if gone(&error) => return Ok(()),
            other => other.map_err(io_error("open", &events))?,
        };
        while self.populated()? {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(&file, PollFlags::PRI)];
            let timeout = Timespec::try_from(left).ok();
            match poll(&mut fds, timeout.as_ref()) {
                Ok(0) => return Err(CgroupError::StillPopulated(self.path.clone())),
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(io_error("poll", &events)(errno.into())),
            }
            // Reading is what re-arms the notification; `populated` reads through another descriptor.
            reread(file.as_fd());
        }
        Ok(())
    }

    /// Removes it and what was made for it alone. Succeeds when there is no such cgroup.
    ///
    /// # Errors
    /// When processes are still in it.
    pub fn remove(&self) -> Result<(), CgroupError> {
        remove_below(&self.path)?;
        self.remove_default_parent();
        Ok(())
    }

    /// Removes it if it is there and nothing is in it, neither processes nor cgroups: one that may be somebody
    /// else's is left alone then.
    pub fn remove_unused(&self) {
        fs::remove_dir(&self.path).unwrap_or_default();
        self.remove_default_parent();
    }

    fn remove_default_parent(&self) {
        let parent = Path::new(CGROUP_ROOT).join(DEFAULT_PARENT);
        if self.path.parent() == Some(&parent) {
            // Not empty while other pods live: then it stays.
            fs::remove_dir(&parent).unwrap_or_default();
        }
    }

    fn populated(&self) -> Result<bool, CgroupError> {
        let events = self.path.join("cgroup.events");
        match fs::read_to_string(&events) {
            Ok(text) => Ok(text.lines().any(|line| line == "populated 1")),
            Err(error) if gone(&error) => Ok(false),
            Err(error) => Err(io_error("read", &events)(error)),
        }
    }
}

fn reread(file: std::os::fd::BorrowedFd<'_>) {
    let mut text = [0_u8; 256];
    // Only the side effect is wanted; what it says is read afresh anyway.
    rustix::io::pread(file, &mut text, 0).unwrap_or_default();
}

/// ENOENT, or ENODEV as a removed cgroup's open files say.
fn gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

fn remove_below(path: &Path) -> Result<(), CgroupError> {
    let entries = match fs::read_dir(path) {
        Err(error) if gone(&error) => return Ok(()),
        other => other.map_err(io_error("read", path))?,
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_below(&entry.path())?;
        }
    }
    match fs::remove_dir(path) {
        Err(error) if gone(&error) => Ok(()),
        other => other.map_err(io_error("remove cgroup", path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(spec: &str) -> Result<String, String> {
        path_from_spec(Some(Path::new(spec)), "id")
            .map(|p| p.display().to_string())
            .map_err(|e| e.to_string())
    }

    #[test]
    fn both_notations_of_the_spec_name_a_place_below_the_root() {
        let default = path_from_spec(None, "id").unwrap();
        assert_eq!(default, Path::new("/caisson/id"));
        assert_eq!(path("").unwrap(), "/caisson/id");
        assert_eq!(path("/a/b").unwrap(), "/a/b");
        assert_eq!(path("a//./b").unwrap(), "/a/b");
        assert_eq!(
            path("machine.slice:libpod:1").unwrap(),
            "/machine.slice/libpod-1.scope"
        );
        assert_eq!(
            path("kubepods-besteffort.slice:cri:1").unwrap(),
            "/kubepods.slice/kubepods-besteffort.slice/cri-1.scope"
        );
        assert_eq!(path(":docker:1").unwrap(), "/system.slice/docker-1.scope");
        assert_eq!(path("-.slice::1").unwrap(), "/1.scope");
    }

    #[test]
    fn the_root_and_ways_out_are_refused() {
        for bad in ["/", ".", "..", "/a/../b", "a/.."] {
            assert!(path(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_an_empty_cgroup_counts_as_unused() {
        // The rule is that of rmdir, which ordinary directories share.
        let root = tempfile::tempdir().unwrap();
        let cgroup = Cgroup {
            path: root.path().join("pod"),
        };
        std::fs::create_dir_all(cgroup.path.join("somebody's")).unwrap();
        cgroup.remove_unused();
        assert!(cgroup.path.join("somebody's").exists());
        std::fs::remove_dir(cgroup.path.join("somebody's")).unwrap();
        cgroup.remove_unused();
        assert!(!cgroup.path.exists());
        cgroup.remove_unused();
    }

    #[test]
    fn a_cgroup_that_is_not_there_is_killed_and_removed_already() {
        let cgroup = Cgroup::at(Path::new("/caisson-test-that-is-not-there/x"));
        cgroup.kill(Duration::from_secs(1)).unwrap();
        cgroup.remove().unwrap();
    }
}
