// SPDX-License-Identifier: Apache-2.0

//! The host side: virtiofsd's passthrough file system over the served directory, configured.
//!
//! Every inode that the guest knows is an O_PATH descriptor, every file it has open another one. (File
//! handles would need CAP_DAC_READ_SEARCH on the host.) So their number is bounded by RLIMIT_NOFILE, whose
//! soft limit is raised to the hard one; at the bound the guest sees `ENFILE` and goes on with what it has.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use caisson_protocol::vm::{CachePolicy, FsConfig};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use virtiofsd::passthrough::{
    CachePolicy as GuestCache, Config, InodeFileHandlesMode, NegotiationMode, PassthroughFs,
};

use super::{FsDeviceError, sys};

/// Most descriptors this process asks for.
const DESCRIPTORS_MAX: u64 = 1 << 20;
/// Descriptors that a guest never gets: those of the VMM itself.
const DESCRIPTORS_RESERVED: u64 = 256;
/// Fewest descriptors with which serving makes sense.
const DESCRIPTORS_MIN: u64 = 64;
/// How long "for ever" is.
const FOREVER: Duration = Duration::from_secs(86_400);

/// The served directory, open, and the file system over it.
///
/// The passthrough file system finds its root anew at each mount by the guest, by a path. That path is `.`: each
/// thread that serves has the directory as its working directory. So it does not matter what the process's root
/// and mounts become later, nor whether `/proc` is still there.
pub(super) struct Host {
    pub(super) fs: PassthroughFs,
    directory: OwnedFd,
    descriptors: OwnedFd,
}

impl Host {
    /// Opens the directory of `config`.
    ///
    /// # Errors
    /// When it is no directory, or the process may open too few files.
    pub(super) fn open(config: &FsConfig) -> Result<Self, FsDeviceError> {
        let limit = raise_descriptor_limit()?;
        Self::open_limited(config, limit)
    }

    /// As [`Self::open`], with `limit` descriptors for the guest.
    pub(super) fn open_limited(config: &FsConfig, limit: u64) -> Result<Self, FsDeviceError> {
        let failed = |path: &Path, source: io::Error| FsDeviceError::Directory {
            path: path.to_owned(),
            source,
        };
        let open = |path: &Path| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::open(path, flags, Mode::empty()).map_err(|error| failed(path, error.into()))
        };
        let directory = open(&config.directory)?;
        let descriptors = open(Path::new("/proc/self/fd"))?;
        let fs = on_thread(&directory, &descriptors, || {
            let copy = descriptors.try_clone()?;
            PassthroughFs::new(settings(config.cache, limit, copy.into()))
        })
        .flatten()
        .map_err(|source| failed(&config.directory, source))?;
        Ok(Self {
            fs,
            directory,
            descriptors,
        })
    }

    /// The process's open files, `/proc/self/fd`.
    pub(super) fn descriptors(&self) -> BorrowedFd<'_> {
        self.descriptors.as_fd()
    }

    /// Makes the calling thread, which must serve nothing else, fit to call the file system.
    ///
    /// # Errors
    /// As [`sys::prepare_thread`].
    pub(super) fn prepare_thread(&self) -> io::Result<()> {
        sys::prepare_thread(self.directory.as_fd(), self.descriptors.as_fd())
    }

    /// Calls `work` on a thread that is fit to, and waits for it.
    ///
    /// # Errors
    /// When there is no such thread to be had.
    pub(super) fn on_thread<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        on_thread(&self.directory, &self.descriptors, work)
    }
}

fn on_thread<T: Send>(
    directory: &OwnedFd,
    descriptors: &OwnedFd,
    work: impl FnOnce() -> T + Send,
) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("fs-setup".to_owned())
            .spawn_scoped(scope, || {
                sys::prepare_thread(directory.as_fd(), descriptors.as_fd())?;
                Ok(work())
            })?;
        thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    })
}

fn settings(cache: CachePolicy, guest_fd_limit: u64, descriptors: File) -> Config {
    let (cache_policy, timeout) = match cache {
        CachePolicy::Never => (GuestCache::Never, Duration::ZERO),
        CachePolicy::Auto => (GuestCache::Auto, Duration::from_secs(1)),
        CachePolicy::Always => (GuestCache::Always, FOREVER),
    };
    Config {
        entry_timeout: timeout,
        attr_timeout: timeout,
        cache_policy,
        root_dir: ".".to_owned(),
        proc_sfd_rawfd: Some(descriptors),
        writeback: false,
        xattr: true,
        announce_submounts: true,
        inode_file_handles: InodeFileHandlesMode::Never,
        readdirplus: true,
        // O_DIRECT of the guest bypasses the guest's cache; the host keeps its own, as alignment is not the
        // guest's to know.
        allow_direct_io: false,
        killpriv_v2: true,
        posix_acl: NegotiationMode::Auto,
        // Without a guest cache, shared mappings would not exist otherwise.
        allow_mmap: matches!(cache, CachePolicy::Never),
        guest_fd_limit,
        ..Config::default()
    }
}

/// Raises the soft limit of open files and returns the guest's share: three quarters, so that one device
/// at its bound leaves the VMM able to work.
fn raise_descriptor_limit() -> Result<u64, FsDeviceError> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.unwrap_or(DESCRIPTORS_MAX).min(DESCRIPTORS_MAX);
    let soft = match current {
        Some(current) if current < wanted => {
            let raised = Rlimit {
                current: Some(wanted),
                maximum,
            };
            setrlimit(Resource::Nofile, raised)
                .map_err(|source| FsDeviceError::DescriptorLimit(source.into()))?;
            wanted
        }
        Some(current) => current,
        None => DESCRIPTORS_MAX,
    };
    let share = (soft / 4 * 3).min(soft.saturating_sub(DESCRIPTORS_RESERVED));
    if share < DESCRIPTORS_MIN {
        return Err(FsDeviceError::TooFewDescriptors { limit: soft });
    }
    Ok(share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_policies_are_those_of_virtiofsd() {
        let settings = |cache| settings(cache, 1000, File::open("/proc/self/fd").unwrap());
        assert_eq!(settings(CachePolicy::Never).attr_timeout, Duration::ZERO);
        assert_eq!(settings(CachePolicy::Auto).entry_timeout.as_secs(), 1);
        assert_eq!(settings(CachePolicy::Always).entry_timeout, FOREVER);
        assert!(!settings(CachePolicy::Always).writeback);
        assert!(settings(CachePolicy::Never).allow_mmap);
    }

    #[test]
    fn the_served_directory_must_be_a_directory() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, b"").unwrap();
        let config = |directory: &Path| FsConfig {
            tag: "t".to_owned(),
            directory: directory.to_owned(),
            queues: 1,
            cache: CachePolicy::Auto,
        };
        assert!(Host::open(&config(directory.path())).is_ok());
        for bad in [file, directory.path().join("missing")] {
            assert!(matches!(
                Host::open(&config(&bad)),
                Err(FsDeviceError::Directory { .. })
            ));
        }
    }

    #[test]
    fn the_process_keeps_its_umask_and_directory() {
        let directory = tempfile::tempdir().unwrap();
        let config = FsConfig {
            tag: "t".to_owned(),
            directory: directory.path().to_owned(),
            queues: 1,
            cache: CachePolicy::Auto,
        };
        let state = || {
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            let umask = status.lines().find(|line| line.starts_with("Umask:"));
            (umask.map(str::to_owned), std::env::current_dir().unwrap())
        };
        let before = state();
        let host = Host::open(&config).unwrap();
        let inside = host.on_thread(state).unwrap();
        assert_eq!(state(), before);
        assert_eq!(inside.0.as_deref(), Some("Umask:\t0000"));
        assert_eq!(inside.1, directory.path());
    }
}
