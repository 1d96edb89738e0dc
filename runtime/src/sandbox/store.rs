// SPDX-License-Identifier: Apache-2.0

//! State on disk: one directory per container, `<root>/<id>`, mode 0700.
//!
//! ```text
//! <root>/<id>/record.json   Record, replaced by temp + fsync + rename
//!             plan.json     Plan, written once
//!             shared/       what virtio-fs serves: empty here, a tmpfs in the VMM's mount namespace
//!             vsock/        the VMM's vsock sockets
//!             control.sock  the VMM's control socket
//!             monitor.log   what the per-container process and the VMM had to say
//! ```
//!
//! Making the directory is what makes an id taken, so of concurrent creates exactly one wins. Changes are made
//! under a `flock` of the directory itself, held for moments only and never while waiting for a guest; a lock
//! gained on a directory that was deleted meanwhile is recognised and refused.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags, flock, fstat, open};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::id::ContainerId;
use super::state::{RECORD_VERSION, Record};

/// Largest file of ours that is read back, bytes.
const MAX_FILE: u64 = 16 << 20;

/// What goes wrong with state on disk.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The id is taken.
    #[error("container with id exists: {0}")]
    Exists(ContainerId),
    /// Its directory is there and its record is not.
    #[error(
        "container {0} has no record: it is being created or deleted, or that was interrupted \
         (delete --force removes it)"
    )]
    HalfMade(ContainerId),
    /// There is no such container. The text is runc's.
    #[error("container does not exist")]
    NotFound(ContainerId),
    /// A system call failed.
    #[error("failed to {operation} {path}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file of ours does not hold what it should.
    #[error("failed to parse {path}")]
    Parse {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: serde_json::Error,
    },
    /// A container of another version of Caisson.
    #[error("{path} is of version {found}, this is a caisson for version {RECORD_VERSION}")]
    Version {
        /// Which file.
        path: PathBuf,
        /// The version in it.
        found: u32,
    },
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io {
        operation,
        path,
        source,
    }
}

/// All containers below one root directory.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// The store at `root`, which need not exist yet.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The root directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Takes `id`: makes its directory and those in it.
    ///
    /// # Errors
    /// [`StoreError::Exists`] when it is taken; otherwise what the file system says, with nothing left behind.
    pub fn create(&self, id: &ContainerId) -> Result<StateDir, StoreError> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder
            .create(&self.root)
            .map_err(io_error("create directory", &self.root))?;
        let path = self.root.join(id);
        builder.recursive(false);
        builder
            .create(&path)
            .map_err(|source| match source.kind() {
                io::ErrorKind::AlreadyExists => StoreError::Exists(id.clone()),
                _ => io_error("create directory", &path)(source),
            })?;
        let state = StateDir::open(path.clone(), id.clone());
        let state = state.inspect_err(|_| fs::remove_dir(&path).unwrap_or_default())?;
        for name in ["shared", "vsock"] {
            let path = path.join(name);
            let made = builder.create(&path);
            made.map_err(io_error("create directory", &path))
                .inspect_err(|_| {
                    // By the lock, as somebody may have deleted it and taken the id by now.
                    let removed = state.lock().and_then(StateLock::remove);
                    removed.unwrap_or_default();
                })?;
        }
        Ok(state)
    }

    /// The directory of an existing container.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub fn open(&self, id: &ContainerId) -> Result<StateDir, StoreError> {
        StateDir::open(self.root.join(id), id.clone())
    }

    /// The ids of all containers, sorted; none when the root does not exist.
    ///
    /// # Errors
    /// When the root cannot be read.
    pub fn list(&self) -> Result<Vec<ContainerId>, StoreError> {
        let entries = match fs::read_dir(&self.root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(io_error("read directory", &self.root))?,
        };
        let mut ids = Vec::new();
        for entry in entries {
            let entry = entry.map_err(io_error("read directory", &self.root))?;
            let name = entry.file_name();
            ids.extend(name.to_str().and_then(|name| ContainerId::new(name).ok()));
        }
        ids.sort();
        Ok(ids)
    }
}

/// One container's directory.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    id: ContainerId,
    dir: OwnedFd,
}

impl StateDir {
    fn open(path: PathBuf, id: ContainerId) -> Result<Self, StoreError> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        match open(&path, flags, Mode::empty()) {
            Ok(dir) => Ok(Self { path, id, dir }),
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => {
                Err(StoreError::NotFound(id))
            }
            Err(errno) => Err(io_error("open", &path)(errno.into())),
        }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whose it is.
    pub fn id(&self) -> &ContainerId {
        &self.id
    }

    /// A path to `name` in it that fits into a `sockaddr_un` however long the real one is. Good for this
    /// process only, as long as `self` lives.
    pub fn short_path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.dir.as_raw_fd()))
    }

    /// Locks it against every other process. Held for moments only.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when it was deleted meanwhile.
    pub fn lock(&self) -> Result<StateLock<'_>, StoreError> {
        // A descriptor of its own: flock belongs to the open file, and is given up when that is closed.
        let fresh = Self::open(self.path.clone(), self.id.clone())?;
        loop {
            match flock(&fresh.dir, FlockOperation::LockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(io_error("lock", &self.path)(errno.into())),
            }
        }
        let stat = |fd: &OwnedFd| {
            fstat(fd).map_err(|errno| io_error("stat", &self.path)(io::Error::from(errno)))
        };
        let (locked, ours) = (stat(&fresh.dir)?, stat(&self.dir)?);
        if locked.st_nlink == 0 || locked.st_ino != ours.st_ino || locked.st_dev != ours.st_dev {
            return Err(StoreError::NotFound(self.id.clone()));
        }
        Ok(StateLock {
            state: self,
            _locked: fresh.dir,
        })
    }

    /// The record as it is now. Not for the holder of the lock: that has [`StateLock::record`].
    ///
    /// # Errors
    /// When it is missing, damaged or of another version.
    pub fn record(&self) -> Result<Record, StoreError> {
        let record = self.read_record()?;
        if !record.abandoned() {
            return Ok(record);
        }
        // Its maker ended since, perhaps just after the per-container process wrote itself down: under the lock
        // it has, or never will.
        self.lock()?.record()
    }

    fn read_record(&self) -> Result<Record, StoreError> {
        let path = self.path.join("record.json");
        let value: serde_json::Value = match self.read_json("record.json") {
            Err(StoreError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(StoreError::HalfMade(self.id.clone()));
            }
            other => other?,
        };
        let found = value["version"].as_u64().unwrap_or(0);
        if found != u64::from(RECORD_VERSION) {
            let found = u32::try_from(found).unwrap_or(u32::MAX);
            return Err(StoreError::Version { path, found });
        }
        serde_json::from_value(value).map_err(|source| StoreError::Parse { path, source })
    }

    /// Reads a JSON file in it.
    ///
    /// # Errors
    /// When it is missing, larger than 16 MiB, or not such a document.
    pub fn read_json<T: DeserializeOwned>(&self, name: &str) -> Result<T, StoreError> {
        let path = self.path.join(name);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && !self.path.exists() => {
                return Err(StoreError::NotFound(self.id.clone()));
            }
            other => other.map_err(io_error("open", &path))?,
        };
        let mut text = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(file, MAX_FILE), &mut text)
            .map_err(io_error("read", &path))?;
        serde_json::from_slice(&text).map_err(|source| StoreError::Parse { path, source })
    }
}

/// A locked directory: what may be written.
#[derive(Debug)]
pub struct StateLock<'a> {
    state: &'a StateDir,
    _locked: OwnedFd,
}

impl StateLock<'_> {
    /// The record, which nobody else changes now.
    ///
    /// # Errors
    /// As [`StateDir::record`].
    pub fn record(&self) -> Result<Record, StoreError> {
        self.state.read_record()
    }

    /// Replaces the record.
    ///
    /// # Errors
    /// When the file system refuses (full, read-only, …); the old record is then still there.
    pub fn write_record(&self, record: &Record) -> Result<(), StoreError> {
        self.write_json("record.json", record)
    }

    /// Changes the record by `change`, and gives it back.
    ///
    /// # Errors
    /// When it cannot be read or written.
    pub fn update(&self, change: impl FnOnce(&mut Record)) -> Result<Record, StoreError> {
        let mut record = self.record()?;
        change(&mut record);
        self.write_record(&record)?;
        Ok(record)
    }

    /// Writes a JSON file: whole or not at all, and durably.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn write_json<T: Serialize>(&self, name: &str, value: &T) -> Result<(), StoreError> {
        let path = self.state.path.join(name);
        let text = serde_json::to_vec(value).map_err(|source| StoreError::Parse {
            path: path.clone(),
            source,
        })?;
        write_atomically(&path, &text).map_err(io_error("write", &path))
    }

    /// Removes the directory and all in it. The id is free afterwards.
    ///
    /// # Errors
    /// When the file system refuses, and when `shared/` is not empty: nothing but this library ever makes
    /// anything in it, and never in the host's mount namespace.
    pub fn remove(self) -> Result<(), StoreError> {
        remove_tree(&self.state.path).map_err(io_error("remove", &self.state.path))
    }
}

/// Removes a state directory. `shared` is only ever removed when it is empty: were a file system mounted on it,
/// a recursive removal would destroy what belongs to somebody else.
fn remove_tree(path: &Path) -> io::Result<()> {
    let ignore_missing = |result: io::Result<()>| match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    ignore_missing(fs::remove_dir(path.join("shared")))?;
    // A process that is being started for a container that is being deleted may still put its log here, once.
    for _ in 0..16 {
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
            other => return ignore_missing(other),
        }
    }
    ignore_missing(fs::remove_dir_all(path))
}

/// Replaces the file at `path` by one that holds `text`, mode 0600: a temporary one beside it, synced, renamed.
///
/// # Errors
/// What the file system says; the temporary file is gone then.
pub fn write_atomically(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let write = || {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(text)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().inspect_err(|_| fs::remove_file(&temporary).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::super::state::tests::record;
    use super::*;

    fn id(id: &str) -> ContainerId {
        ContainerId::new(id).unwrap()
    }

    #[test]
    fn of_concurrent_creates_exactly_one_wins() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path().join("deep/root"));
        let winners: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..16)
                .map(|_| scope.spawn(|| store.create(&id("x")).is_ok()))
                .collect();
            threads
                .into_iter()
                .map(|t| usize::from(t.join().unwrap()))
                .sum()
        });
        assert_eq!(winners, 1);
        let error = store.create(&id("x")).unwrap_err();
        assert_eq!(error.to_string(), "container with id exists: x");
    }

    #[test]
    fn what_was_written_is_read_back_and_other_versions_are_refused() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path());
        let state = store.create(&id("x")).unwrap();
        let mut written = record("x");
        state.lock().unwrap().write_record(&written).unwrap();
        assert_eq!(store.open(&id("x")).unwrap().record().unwrap(), written);
        written.version = 7;
        state.lock().unwrap().write_record(&written).unwrap();
        assert!(matches!(
            state.record(),
            Err(StoreError::Version { found: 7, .. })
        ));
        assert_eq!(store.list().unwrap(), vec![id("x")]);
    }

    #[test]
    fn a_lock_on_a_deleted_and_remade_container_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path());
        let old = store.create(&id("x")).unwrap();
        old.lock().unwrap().remove().unwrap();
        assert!(matches!(old.lock(), Err(StoreError::NotFound(_))));
        let new = store.create(&id("x")).unwrap();
        assert!(matches!(old.lock(), Err(StoreError::NotFound(_))));
        assert!(new.lock().is_ok());
    }

    #[test]
    fn removal_never_goes_into_the_shared_directory() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path());
        let state = store.create(&id("x")).unwrap();
        let precious = state.path().join("shared/precious");
        fs::write(&precious, "data").unwrap();
        assert!(state.lock().unwrap().remove().is_err());
        assert!(precious.exists());
        fs::remove_file(&precious).unwrap();
        state.lock().unwrap().remove().unwrap();
        assert!(!state.path().exists());
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_temporary_one() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("f");
        write_atomically(&path, b"one").unwrap();
        assert!(write_atomically(&root.path().join("missing/f"), b"two").is_err());
        fs::create_dir(root.path().join("d")).unwrap();
        fs::write(root.path().join("d/x"), "").unwrap();
        assert!(write_atomically(&root.path().join("d"), b"two").is_err());
        assert_eq!(fs::read(&path).unwrap(), b"one");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 2);
    }
}
