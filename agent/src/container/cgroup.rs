// SPDX-License-Identifier: Apache-2.0

//! One container's cgroup, by its interface files (Documentation/admin-guide/cgroup-v2.rst).
//!
//! Its name is a number of ours. Containers may make cgroups of their own below it; what is read from there
//! is bounded.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::Interest;

use crate::boot::cgroup::CONTAINERS;
use crate::boot::mounts::CGROUP_ROOT;

/// Longest time that the kernel is given to freeze, thaw or empty a cgroup.
const SETTLE: Duration = Duration::from_secs(30);
/// Most bytes of one file in an answer.
const MAX_FILE: usize = 16 << 10;
/// Most processes listed.
const MAX_PIDS: usize = 1 << 14;
/// Most cgroups visited below a container's.
const MAX_CGROUPS: usize = 4096;

/// Files that go into an answer, where the kernel has them.
const STATISTICS: [&str; 30] = [
    "cgroup.stat",
    "cpu.stat",
    "cpu.pressure",
    "cpu.max",
    "cpu.weight",
    "cpuset.cpus.effective",
    "memory.current",
    "memory.peak",
    "memory.max",
    "memory.high",
    "memory.low",
    "memory.stat",
    "memory.events",
    "memory.pressure",
    "memory.swap.current",
    "memory.swap.peak",
    "memory.swap.max",
    "memory.swap.events",
    "io.stat",
    "io.pressure",
    "pids.current",
    "pids.peak",
    "pids.max",
    "pids.events",
    "hugetlb.2MB.current",
    "hugetlb.2MB.max",
    "hugetlb.2MB.events",
    "hugetlb.1GB.current",
    "hugetlb.1GB.max",
    "hugetlb.1GB.events",
];

/// A file that could not be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    /// Reading or writing.
    #[error("failed to use the cgroup file {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel took too long.
    #[error("the cgroup did not become {0} within {SETTLE:?}")]
    Unsettled(&'static str),
}

/// The cgroup.
#[derive(Debug, Clone)]
pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// The cgroup of container `number`, whether it exists yet or not.
    pub(crate) fn of(number: u64) -> Self {
        let path = Path::new(CGROUP_ROOT).join(CONTAINERS);
        Self {
            path: path.join(number.to_string()),
        }
    }

    /// Its path below the mount point, absolute.
    pub(crate) fn name(number: u64) -> PathBuf {
        Path::new("/").join(CONTAINERS).join(number.to_string())
    }

    /// Below the mount point: where the process `pid` of the container is.
    ///
    /// # Errors
    /// When the process is gone.
    pub(crate) fn name_of_process(pid: i32) -> io::Result<PathBuf> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("0::"));
        line.map(PathBuf::from)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn file_error(&self, file: &str) -> impl FnOnce(io::Error) -> CgroupError {
        let path = self.path.join(file);
        |source| CgroupError::File { path, source }
    }

    fn write(&self, file: &str, text: &str) -> Result<(), CgroupError> {
        fs::write(self.path.join(file), text).map_err(self.file_error(file))
    }

    /// Kills every process in it, now and by one call (fork bombs included).
    ///
    /// # Errors
    /// When there is no such cgroup.
    pub(crate) fn kill(&self) -> Result<(), CgroupError> {
        self.write("cgroup.kill", "1")
    }

    /// Sends `signal` to every process in it, which is frozen meanwhile so that none escapes.
    ///
    /// # Errors
    /// When the cgroup cannot be used.
    pub(crate) async fn signal(&self, signal: i32, frozen: bool) -> Result<(), CgroupError> {
        if !frozen {
            self.freeze(true).await?;
        }
        for pid in self.pids() {
            // Who is gone needs none.
            let _ = crate::sys::send_signal(pid, signal);
        }
        if !frozen {
            self.freeze(false).await?;
        }
        Ok(())
    }

    /// Freezes or thaws it, and waits until that is so.
    ///
    /// # Errors
    /// When the cgroup cannot be used or does not freeze in half a minute.
    pub(crate) async fn freeze(&self, frozen: bool) -> Result<(), CgroupError> {
        let (value, name) = if frozen {
            ("1", "frozen")
        } else {
            ("0", "thawed")
        };
        self.write("cgroup.freeze", value)?;
        self.settle(&format!("frozen {value}"), name).await
    }

    /// Waits until `cgroup.events` has the line `wanted`.
    async fn settle(&self, wanted: &str, name: &'static str) -> Result<(), CgroupError> {
        const FILE: &str = "cgroup.events";
        let path = self.path.join(FILE);
        let seen = watch_file(&path, |text| text.lines().any(|line| line == wanted));
        match tokio::time::timeout(SETTLE, seen).await {
            Ok(result) => result.map_err(self.file_error(FILE)),
            Err(_) => Err(CgroupError::Unsettled(name)),
        }
    }

    /// Processes in it and below.
    pub(crate) fn pids(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        for directory in self.directories() {
            let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
            if pids.len() >= MAX_PIDS {
                break;
            }
        }
        pids.truncate(MAX_PIDS);
        pids
    }

    /// The cgroup and those below it, parents first.
    fn directories(&self) -> Vec<PathBuf> {
        let mut found = vec![self.path.clone()];
        let mut next = 0;
        while let Some(directory) = found.get(next) {
            next += 1;
            let entries = fs::read_dir(directory).into_iter().flatten().flatten();
            let below: Vec<PathBuf> = entries
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| entry.path())
                .take(MAX_CGROUPS.saturating_sub(found.len()))
                .collect();
            found.extend(below);
        }
        found
    }

    /// How many of its processes an OOM killer has ended.
    pub(crate) fn oom_kills(&self) -> u64 {
        let text = fs::read_to_string(self.path.join("memory.events"));
        oom_kills_in(&text.unwrap_or_default())
    }

    /// Calls `on_kill` each time that an OOM killer has ended processes of it; for ever.
    pub(crate) async fn watch_oom(&self, mut on_kill: impl FnMut()) -> io::Result<()> {
        let mut seen = 0;
        watch_file(&self.path.join("memory.events"), |text| {
            let kills = oom_kills_in(text);
            if kills > seen {
                seen = kills;
                on_kill();
            }
            false
        })
        .await
    }

    /// The statistics files that exist, each at most 16 KiB.
    pub(crate) fn statistics(&self) -> HashMap<String, String> {
        let read = |name: &str| -> io::Result<String> {
            let mut bytes = Vec::new();
            let file = File::open(self.path.join(name))?;
            file.take(MAX_FILE as u64).read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let files = STATISTICS.iter();
        files
            .filter_map(|name| Some(((*name).to_owned(), read(name).ok()?)))
            .collect()
    }

    /// Kills everything in it and removes it with what is below. One that does not exist is removed.
    ///
    /// # Errors
    /// When it does not become empty or a directory stays.
    pub(crate) async fn remove(&self) -> Result<(), CgroupError> {
        if !self.path.is_dir() {
            return Ok(());
        }
        self.kill()?;
        self.settle("populated 0", "empty").await?;
        for directory in self.directories().iter().rev() {
            match fs::remove_dir(directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(CgroupError::File {
                        path: directory.clone(),
                        source: error,
                    });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn oom_kills_in(text: &str) -> u64 {
    let count = { text.lines() }.find_map(|line| line.strip_prefix("oom_kill "));
    count.and_then(|count| count.parse().ok()).unwrap_or(0)
}

/// Reads the cgroup file at `path` now and after each change that the kernel announces, until `done`.
async fn watch_file(path: &Path, mut done: impl FnMut(&str) -> bool) -> io::Result<()> {
    let file = OwnedFd::from(File::open(path)?);
    let file = crate::sys::watch(file, Interest::PRIORITY)?;
    loop {
        let mut bytes = [0; 4096];
        // Reading, from the start, is what arms the next announcement.
        let count = rustix::io::pread(&file, &mut bytes, 0)?;
        if done(&String::from_utf8_lossy(
            bytes.get(..count).unwrap_or_default(),
        )) {
            return Ok(());
        }
        file.ready(Interest::PRIORITY).await?.clear_ready();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_of_oom_kills_is_that_of_its_own_line() {
        let text = "low 0\nhigh 0\nmax 20\noom 3\noom_kill 2\noom_group_kill 0\n";
        assert_eq!(oom_kills_in(text), 2);
        assert_eq!(oom_kills_in("oom_kill x\n"), 0);
        assert_eq!(oom_kills_in(""), 0);
    }

    #[test]
    fn nested_cgroups_are_found_parents_first_and_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let cgroup = Cgroup {
            path: directory.path().to_owned(),
        };
        fs::create_dir_all(directory.path().join("a/b")).unwrap();
        fs::write(directory.path().join("cgroup.procs"), "1\n").unwrap();
        fs::write(directory.path().join("a/b/cgroup.procs"), "2\n3\n").unwrap();
        assert_eq!(cgroup.pids(), [1, 2, 3]);
        let found = cgroup.directories();
        assert_eq!(found.len(), 3);
        assert!(found[2].ends_with("a/b"));
    }

    #[tokio::test]
    async fn removing_what_does_not_exist_succeeds() {
        let path = "/nonexistent/cgroup".into();
        assert!(Cgroup { path }.remove().await.is_ok());
    }
}
