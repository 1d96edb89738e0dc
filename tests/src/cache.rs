// SPDX-License-Identifier: Apache-2.0

//! What is made once per machine and kept outside the tree: `<cache>/KIND/KEY/`.
//!
//! An entry's key is a hash of all that went into it, so an entry never changes. It is made under another name
//! and renamed, so one that is there is whole; a lock file lets one process make it while others wait.

use std::error::Error;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::{env, io};

use sha2::{Digest, Sha256};

/// Why the cache is of no help.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// Neither `CAISSON_CACHE` nor `XDG_CACHE_HOME` nor `HOME` is set.
    #[error("no place for the cache: set CAISSON_CACHE")]
    NoPlace,
    /// A file operation failed.
    #[error("failed to {0} {1}")]
    File(&'static str, PathBuf, #[source] io::Error),
    /// The entry could not be made.
    #[error("failed to make {0}")]
    Make(PathBuf, #[source] Box<dyn Error + Send + Sync>),
}

/// `$CAISSON_CACHE`, or `$XDG_CACHE_HOME/caisson`, or `~/.cache/caisson`.
///
/// # Errors
/// If none of the three is set.
pub fn dir() -> Result<PathBuf, CacheError> {
    let set = |name| {
        env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    set("CAISSON_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|dir| dir.join("caisson")))
        .or_else(|| set("HOME").map(|dir| dir.join(".cache/caisson")))
        .ok_or(CacheError::NoPlace)
}

/// A key: the hash of the inputs, each with its length in front so that no two lists have one key.
pub fn key(inputs: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for input in inputs {
        hash.update((input.len() as u64).to_le_bytes());
        hash.update(input);
    }
    hex::encode(hash.finalize()).chars().take(16).collect()
}

/// The directory of entry `kind`/`key` under `cache`, which `make` fills if it is not there yet.
///
/// `make` gets an empty directory; half of one that an earlier attempt left behind is removed first.
///
/// # Errors
/// If `make` fails, or a file operation does.
pub fn entry<E: Into<Box<dyn Error + Send + Sync>>>(
    cache: &Path,
    kind: &str,
    key: &str,
    make: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<PathBuf, CacheError> {
    fn failed<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> CacheError + 'a {
        move |error| CacheError::File(what, path.to_owned(), error)
    }
    let dir = cache.join(kind);
    let done = dir.join(key);
    if done.is_dir() {
        return Ok(done);
    }
    fs::create_dir_all(&dir).map_err(failed("make", &dir))?;
    let lock_path = dir.join(format!(".{key}.lock"));
    let lock = File::create(&lock_path).map_err(failed("open", &lock_path))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            crate::say(&format!(
                "waiting for another process that is making {}",
                done.display()
            ));
            lock.lock().map_err(failed("lock", &lock_path))?;
        }
        Err(TryLockError::Error(error)) => return Err(failed("lock", &lock_path)(error)),
    }
    if done.is_dir() {
        return Ok(done);
    }
    let new = dir.join(format!(".{key}.new"));
    if new.exists() {
        fs::remove_dir_all(&new).map_err(failed("remove", &new))?;
    }
    fs::create_dir(&new).map_err(failed("make", &new))?;
    make(&new).map_err(|error| CacheError::Make(done.clone(), error.into()))?;
    fs::rename(&new, &done).map_err(failed("rename", &new))?;
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn an_entry_is_made_once_by_however_many_at_once() {
        let cache = tempfile::tempdir().unwrap();
        let made = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let dir = entry(cache.path(), "kind", "key", |dir| {
                        made.fetch_add(1, Ordering::SeqCst);
                        fs::write(dir.join("file"), "whole")
                    })
                    .unwrap();
                    assert_eq!(fs::read_to_string(dir.join("file")).unwrap(), "whole");
                });
            }
        });
        assert_eq!(made.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_failed_attempt_leaves_no_entry_and_the_next_starts_afresh() {
        let cache = tempfile::tempdir().unwrap();
        let failed = entry(cache.path(), "kind", "key", |dir| {
            fs::write(dir.join("half"), "")?;
            Err(io::Error::other("no space"))
        });
        assert!(matches!(failed, Err(CacheError::Make(..))));
        assert!(!cache.path().join("kind/key").exists());
        let dir = entry(cache.path(), "kind", "key", |dir| {
            fs::write(dir.join("file"), "")
        })
        .unwrap();
        assert!(!dir.join("half").exists() && dir.join("file").exists());
    }

    #[test]
    fn keys_differ_where_the_bytes_are_the_same_but_the_inputs_are_not() {
        assert_ne!(key(&[b"ab", b"c"]), key(&[b"a", b"bc"]));
        assert_eq!(key(&[b"ab"]), key(&[b"ab"]));
        assert_eq!(key(&[]).len(), 16);
    }
}
