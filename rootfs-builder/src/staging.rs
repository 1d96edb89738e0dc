// SPDX-License-Identifier: Apache-2.0

//! Output that is either whole or absent.
//!
//! Everything is built in a temporary sibling of the place where it shall be and renamed there as the
//! last step. On any error the sibling is removed, and what stood at the place before still stands.

use std::fs::{self, File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use tempfile::{NamedTempFile, TempDir};

/// Prefix of temporary siblings; what is left of a killed run is recognised by it.
const PREFIX: &str = ".caisson-partial-";

/// Why output could not be staged or put in place.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StagingError {
    /// The path ends in `..` or is `/`.
    #[error("output path {0} does not name a file or directory to create")]
    NoName(PathBuf),
    /// No temporary file or directory could be made beside the output.
    #[error("failed to create a temporary sibling of output {path} (does {} exist and may it be written?)", parent_of(path).display())]
    Create {
        /// The output.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Writing the temporary file failed.
    #[error("failed to write output {path}")]
    Write {
        /// The output.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Something else is already there.
    #[error(
        "output {0} already exists and is not empty; remove it, name another, or replace it by --replace if it is a bundle"
    )]
    Exists(PathBuf),
    /// `--replace` was given for a directory that is no bundle.
    #[error(
        "output {0} exists and holds no config.json, so it is no bundle and will not be replaced"
    )]
    NotABundle(PathBuf),
    /// The finished output could not be renamed into place.
    #[error("failed to move the finished output to {path}")]
    Publish {
        /// The output.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The replaced directory could not be removed; the new one is in place.
    #[error("the new {path} is in place, but the replaced one could not be removed")]
    RemoveReplaced {
        /// The output.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

fn parent_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        Some(_) | None => PathBuf::from("."),
    }
}

/// A file that appears at its path only when [`StagedFile::publish`] succeeds.
#[derive(Debug)]
pub struct StagedFile {
    destination: PathBuf,
    temporary: NamedTempFile,
}

impl StagedFile {
    /// Opens a temporary sibling of `destination`.
    ///
    /// # Errors
    /// When `destination` has no file name or its directory cannot be written.
    pub fn create(destination: &Path) -> Result<Self, StagingError> {
        if destination.file_name().is_none() {
            return Err(StagingError::NoName(destination.to_path_buf()));
        }
        let temporary = tempfile::Builder::new()
            .prefix(PREFIX)
            .permissions(Permissions::from_mode(0o600))
            .tempfile_in(parent_of(destination))
            .map_err(|source| StagingError::Create {
                path: destination.to_path_buf(),
                source,
            })?;
        Ok(Self {
            destination: destination.to_path_buf(),
            temporary,
        })
    }

    /// The open file, to write to.
    pub fn file_mut(&mut self) -> &mut File {
        self.temporary.as_file_mut()
    }

    /// Writes the data out and renames the file into place (replacing a file there) with `mode`.
    ///
    /// # Errors
    /// When the data cannot be written out or the rename fails; nothing is left behind then.
    pub fn publish(mut self, mode: u32) -> Result<(), StagingError> {
        let destination = self.destination;
        let file = self.temporary.as_file_mut();
        file.flush()
            .and_then(|()| file.set_permissions(Permissions::from_mode(mode)))
            .and_then(|()| file.sync_all())
            .map_err(|source| StagingError::Write {
                path: destination.clone(),
                source,
            })?;
        self.temporary
            .persist(&destination)
            .map_err(|error| StagingError::Publish {
                path: destination,
                source: error.error,
            })?;
        Ok(())
    }
}

/// A directory that appears at its path only when [`StagedDirectory::publish`] succeeds.
#[derive(Debug)]
pub struct StagedDirectory {
    destination: PathBuf,
    replace: bool,
    temporary: TempDir,
}

impl StagedDirectory {
    /// Makes a temporary sibling of `destination`, for its owner alone (mode 0700).
    ///
    /// An empty directory at `destination` counts as absent. With `replace`, a bundle there (a
    /// directory with a `config.json`) is exchanged for the new one at the end.
    ///
    /// # Errors
    /// When `destination` has no name, stands already, or its parent cannot be written.
    pub fn create(destination: &Path, replace: bool) -> Result<Self, StagingError> {
        // "DIR/" and "DIR/." mean DIR.
        let destination: PathBuf = destination.components().collect();
        if destination.file_name().is_none() {
            return Err(StagingError::NoName(destination));
        }
        check_replaceable(&destination, replace)?;
        let temporary = tempfile::Builder::new()
            .prefix(PREFIX)
            .permissions(Permissions::from_mode(0o700))
            .tempdir_in(parent_of(&destination))
            .map_err(|source| StagingError::Create {
                path: destination.clone(),
                source,
            })?;
        Ok(Self {
            destination,
            replace,
            temporary,
        })
    }

    /// The temporary directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// Renames the directory into place.
    ///
    /// # Errors
    /// When something has appeared at the destination meanwhile, or the rename fails.
    pub fn publish(self) -> Result<(), StagingError> {
        let destination = self.destination;
        let state = check_replaceable(&destination, self.replace)?;
        let publish_error = |source| StagingError::Publish {
            path: destination.clone(),
            source,
        };
        match state {
            Existing::Absent => {
                rename(self.temporary.path(), &destination, RenameFlags::NOREPLACE)
                    .map_err(publish_error)?;
            }
            Existing::Empty => {
                rename(self.temporary.path(), &destination, RenameFlags::empty())
                    .map_err(publish_error)?;
            }
            Existing::Bundle => {
                rename(self.temporary.path(), &destination, RenameFlags::EXCHANGE)
                    .map_err(publish_error)?;
                return self
                    .temporary
                    .close()
                    .map_err(|source| StagingError::RemoveReplaced {
                        path: destination,
                        source,
                    });
            }
        }
        // The directory now lives under its final name; nothing is left to remove.
        let _moved = self.temporary.keep();
        Ok(())
    }
}

/// What stands at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Existing {
    Absent,
    Empty,
    Bundle,
}

fn check_replaceable(destination: &Path, replace: bool) -> Result<Existing, StagingError> {
    let metadata = match fs::symlink_metadata(destination) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Existing::Absent),
        Err(source) => {
            return Err(StagingError::Create {
                path: destination.to_path_buf(),
                source,
            });
        }
    };
    if !metadata.is_dir() {
        return Err(StagingError::Exists(destination.to_path_buf()));
    }
    let mut entries = fs::read_dir(destination).map_err(|source| StagingError::Create {
        path: destination.to_path_buf(),
        source,
    })?;
    if entries.next().is_none() {
        return Ok(Existing::Empty);
    }
    if !replace {
        return Err(StagingError::Exists(destination.to_path_buf()));
    }
    if !destination.join("config.json").is_file() {
        return Err(StagingError::NotABundle(destination.to_path_buf()));
    }
    Ok(Existing::Bundle)
}

fn rename(from: &Path, to: &Path, flags: RenameFlags) -> io::Result<()> {
    renameat_with(CWD, from, CWD, to, flags).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn dropped_file_leaves_nothing_and_keeps_the_old_one() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("image");
        fs::write(&path, "old").unwrap();
        let mut staged = StagedFile::create(&path).unwrap();
        staged.file_mut().write_all(b"new").unwrap();
        drop(staged);
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        assert_eq!(names(place.path()), ["image"]);
    }

    #[test]
    fn published_file_has_its_mode_and_replaces_the_old_one() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("image");
        fs::write(&path, "old").unwrap();
        let mut staged = StagedFile::create(&path).unwrap();
        staged.file_mut().write_all(b"new").unwrap();
        staged.publish(0o644).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o7777,
            0o644
        );
        assert_eq!(names(place.path()), ["image"]);
    }

    #[test]
    fn dropped_directory_leaves_nothing() {
        let place = tempfile::tempdir().unwrap();
        let staged = StagedDirectory::create(&place.path().join("bundle"), false).unwrap();
        fs::write(staged.path().join("half"), "made").unwrap();
        drop(staged);
        assert!(names(place.path()).is_empty());
    }

    #[test]
    fn occupied_directory_is_refused_before_any_work() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("bundle");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("precious"), "").unwrap();
        let error = StagedDirectory::create(&path, false).unwrap_err();
        assert!(matches!(error, StagingError::Exists(_)));
        // --replace is for bundles, not for somebody's home directory.
        let error = StagedDirectory::create(&path, true).unwrap_err();
        assert!(matches!(error, StagingError::NotABundle(_)));
        assert_eq!(names(place.path()), ["bundle"]);
    }

    #[test]
    fn directory_that_fills_up_meanwhile_is_not_overwritten() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("bundle");
        let staged = StagedDirectory::create(&path, false).unwrap();
        fs::create_dir(&path).unwrap();
        fs::write(path.join("precious"), "").unwrap();
        assert!(staged.publish().is_err());
        assert_eq!(names(&path), ["precious"]);
    }

    #[test]
    fn bundle_is_replaced_on_request_and_the_old_one_is_gone() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("bundle");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("config.json"), "old").unwrap();
        let staged = StagedDirectory::create(&path, true).unwrap();
        fs::write(staged.path().join("config.json"), "new").unwrap();
        staged.publish().unwrap();
        assert_eq!(fs::read_to_string(path.join("config.json")).unwrap(), "new");
        assert_eq!(names(place.path()), ["bundle"]);
    }

    #[test]
    fn slash_at_the_end_of_the_output_is_accepted() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("bundle/");
        StagedDirectory::create(&path, false)
            .unwrap()
            .publish()
            .unwrap();
        assert_eq!(names(place.path()), ["bundle"]);
    }
}
