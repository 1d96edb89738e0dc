// SPDX-License-Identifier: Apache-2.0

//! The host side: virtiofsd's passthrough file system over the served directory, configured.
//!
//! Every inode that the guest knows is an O_PATH descriptor, every file it has open another one. (File
//! handles would need CAP_DAC_READ_SEARCH on the host.) So their number is bounded by RLIMIT_NOFILE, whose
//! soft limit is raised to the hard one; at the bound the guest sees `ENFILE` and goes on with what it has.

use std::path::Path;
use std::time::Duration;

use caisson_protocol::vm::{CachePolicy, FsConfig};
use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit, umask};
use virtiofsd::passthrough::{
    CachePolicy as GuestCache, Config, InodeFileHandlesMode, NegotiationMode, PassthroughFs,
};

use super::FsDeviceError;

/// Most descriptors this process asks for.
const DESCRIPTORS_MAX: u64 = 1 << 20;
/// Descriptors that a guest never gets: those of the VMM itself.
const DESCRIPTORS_RESERVED: u64 = 256;
/// Fewest descriptors with which serving makes sense.
const DESCRIPTORS_MIN: u64 = 64;
/// How long "for ever" is.
const FOREVER: Duration = Duration::from_secs(86_400);

/// Makes the file system for `config`.
///
/// # Errors
/// When the directory is not one, or the process may open too few files.
pub(super) fn open(config: &FsConfig) -> Result<PassthroughFs, FsDeviceError> {
    let directory = &config.directory;
    let failed = |source| FsDeviceError::Directory {
        path: directory.clone(),
        source,
    };
    let metadata = std::fs::metadata(directory).map_err(failed)?;
    if !metadata.is_dir() {
        return Err(failed(std::io::Error::from_raw_os_error(libc::ENOTDIR)));
    }
    let root = root_string(directory)?;
    let limit = raise_descriptor_limit()?;
    // `PassthroughFs::new` clears the umask of the process; ours is per thread (see `sys`).
    let before = umask(Mode::empty());
    let fs = PassthroughFs::new(settings(root, config.cache, limit));
    umask(before);
    fs.map_err(failed)
}

fn root_string(directory: &Path) -> Result<String, FsDeviceError> {
    directory
        .to_str()
        .filter(|_| directory.is_absolute())
        .map(str::to_owned)
        .ok_or_else(|| FsDeviceError::DirectoryName {
            path: directory.to_owned(),
        })
}

fn settings(root_dir: String, cache: CachePolicy, guest_fd_limit: u64) -> Config {
    let (cache_policy, timeout) = match cache {
        CachePolicy::Never => (GuestCache::Never, Duration::ZERO),
        CachePolicy::Auto => (GuestCache::Auto, Duration::from_secs(1)),
        CachePolicy::Always => (GuestCache::Always, FOREVER),
    };
    Config {
        entry_timeout: timeout,
        attr_timeout: timeout,
        cache_policy,
        root_dir,
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
        let settings = |cache| settings("/x".to_owned(), cache, 1000);
        assert_eq!(settings(CachePolicy::Never).attr_timeout, Duration::ZERO);
        assert_eq!(settings(CachePolicy::Auto).entry_timeout.as_secs(), 1);
        assert_eq!(settings(CachePolicy::Always).entry_timeout, FOREVER);
        assert!(!settings(CachePolicy::Always).writeback);
        assert!(settings(CachePolicy::Never).allow_mmap);
    }

    #[test]
    fn the_served_directory_must_be_an_absolute_directory() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, b"").unwrap();
        let config = |directory: &Path| FsConfig {
            tag: "t".to_owned(),
            directory: directory.to_owned(),
            queues: 1,
            cache: CachePolicy::Auto,
        };
        assert!(open(&config(directory.path())).is_ok());
        assert!(matches!(
            open(&config(&file)),
            Err(FsDeviceError::Directory { .. })
        ));
        assert!(matches!(
            open(&config(&directory.path().join("missing"))),
            Err(FsDeviceError::Directory { .. })
        ));
        assert!(matches!(
            open(&config(Path::new("."))),
            Err(FsDeviceError::DirectoryName { .. })
        ));
    }
}
