// SPDX-License-Identifier: Apache-2.0

//! A root file system that is a directory of the host: copied as it is.
//!
//! Kept are owners, modes, times, extended attributes (with them ACLs and capabilities), hard links among
//! the files copied, holes, symbolic links, fifos, sockets and devices. Other file systems mounted
//! below the directory are not entered (their mount points are copied, empty).
//!
//! Source and target are both reached by handles below their roots, and no link is followed in either, so that
//! a directory that somebody else may change does not lead the copy astray.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, SeekFrom as Extent, Stat, Timespec, fstat,
    linkat, openat2, readlinkat,
};
use rustix::io::Errno;
use walkdir::{DirEntry, WalkDir};

use crate::confined::{
    Attributes, ConfinedRoot, FileError, components_of, create_directory, create_file,
    create_special, create_symlink, failed, open_directory, set_attributes, set_attributes_by_name,
    type_of,
};
use crate::layer::entry::Xattr;

/// Bytes copied at a time.
const COPY_BYTES: u64 = 1 << 20;

/// Largest extended attribute of Linux (`XATTR_SIZE_MAX`), and largest list of names, in bytes.
const XATTR_BYTES: usize = 64 << 10;

/// Why a directory could not be copied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CopyError {
    /// The directory could not be opened, or is none.
    #[error("failed to open directory {path}")]
    Open {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The copy would copy itself.
    #[error("the bundle {target} would lie inside {source_path}, which it is a copy of")]
    TargetInside {
        /// The directory to copy.
        source_path: PathBuf,
        /// Where to.
        target: PathBuf,
    },
    /// The directory could not be listed.
    #[error("failed to list {path}")]
    Walk {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file could not be copied.
    #[error("failed to copy {path}")]
    Copy {
        /// The file.
        path: PathBuf,
        /// Why.
        source: FileError,
    },
}

struct Copier {
    source: OwnedFd,
    target: ConfinedRoot,
    /// First path of each file that has more than one.
    linked: HashMap<(u64, u64), PathBuf>,
}

/// Copies all that is in `source` to the empty directory `target`.
///
/// # Errors
/// Any [`CopyError`]; `target` is then of no use.
pub fn copy(source: &Path, target: &Path) -> Result<(), CopyError> {
    let open = |path: &Path| {
        let open_error = |error| CopyError::Open {
            path: path.to_path_buf(),
            source: error,
        };
        ConfinedRoot::open(path).map_err(open_error)
    };
    let root = open(source)?;
    let real = |path: &Path| {
        path.canonicalize().map_err(|error| CopyError::Open {
            path: path.to_path_buf(),
            source: error,
        })
    };
    let (real_source, real_target) = (real(source)?, real(target)?);
    if real_target.starts_with(&real_source) {
        return Err(CopyError::TargetInside {
            source_path: source.to_path_buf(),
            target: target.to_path_buf(),
        });
    }
    let mut copier = Copier {
        source: root.into_handle(),
        target: open(target)?,
        linked: HashMap::new(),
    };
    // Directories come twice: first to be made, and after their content to be finished.
    let mut unfinished: Vec<PathBuf> = Vec::new();
    let walk = WalkDir::new(&real_source)
        .same_file_system(true)
        .sort_by_file_name();
    for entry in walk {
        let entry = entry.map_err(|error| CopyError::Walk {
            path: error.path().unwrap_or(source).to_path_buf(),
            source: error.into(),
        })?;
        let path = entry
            .path()
            .strip_prefix(&real_source)
            .unwrap_or(Path::new(""))
            .to_path_buf();
        while unfinished.len() > entry.depth() {
            if let Some(directory) = unfinished.pop() {
                copier.run(source, &directory, Copier::finish_directory)?;
            }
        }
        copier.run(source, &path, |copier, path| copier.copy_one(path, &entry))?;
        if entry.file_type().is_dir() {
            unfinished.push(path);
        }
    }
    while let Some(directory) = unfinished.pop() {
        copier.run(source, &directory, Copier::finish_directory)?;
    }
    Ok(())
}

impl Copier {
    fn run(
        &mut self,
        source: &Path,
        path: &Path,
        work: impl FnOnce(&mut Self, &Path) -> Result<(), FileError>,
    ) -> Result<(), CopyError> {
        work(self, path).map_err(|error| CopyError::Copy {
            path: source.join(path),
            source: error,
        })
    }

    /// A handle on the source's file at `path`, which no link leads to.
    fn open_source(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, FileError> {
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH;
        openat2(
            &self.source,
            path,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
            resolve,
        )
        .map_err(failed("open it"))
    }

    fn copy_one(&mut self, path: &Path, entry: &DirEntry) -> Result<(), FileError> {
        let components = components_of(path);
        let Some((name, parents)) = components.split_last() else {
            return Ok(());
        };
        let parent = self
            .target
            .directory(parents)
            .map_err(failed("open its directory"))?;
        let handle = self.open_source(path, OFlags::PATH | OFlags::NOFOLLOW)?;
        let stat = fstat(&handle).map_err(failed("look at it"))?;
        let kind = type_of(&stat);
        if kind == FileType::Directory {
            return if entry.file_type().is_dir() {
                create_directory(parent.as_fd(), name)
            } else {
                Err(FileError {
                    operation: "copy what was replaced meanwhile",
                    source: Errno::STALE,
                })
            };
        }
        if stat.st_nlink > 1 {
            if let Some(first) = self.linked.get(&(stat.st_dev, stat.st_ino)) {
                let first = components_of(first);
                let Some((first_name, first_parents)) = first.split_last() else {
                    return Ok(());
                };
                let directory = self
                    .target
                    .directory(first_parents)
                    .map_err(failed("open its directory"))?;
                return linkat(&directory, *first_name, &parent, *name, AtFlags::empty())
                    .map_err(failed("create the hard link"));
            }
            self.linked
                .insert((stat.st_dev, stat.st_ino), path.to_path_buf());
        }
        let attributes = attributes_of(&handle, &stat)?;
        match kind {
            FileType::RegularFile => {
                let file = File::from(
                    self.open_source(path, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK)?,
                );
                let copy = create_file(parent.as_fd(), name)?;
                copy_content(file, &copy).map_err(|error| FileError {
                    operation: "copy its content",
                    source: Errno::from_io_error(&error).unwrap_or(Errno::IO),
                })?;
                set_attributes(copy.as_fd(), &attributes)
            }
            FileType::Symlink => {
                let target =
                    readlinkat(&handle, c"", Vec::new()).map_err(failed("read the link"))?;
                create_symlink(parent.as_fd(), name, target.as_bytes())?;
                set_attributes_by_name(parent.as_fd(), name, kind, &attributes)
            }
            _ => {
                create_special(parent.as_fd(), name, kind, stat.st_rdev)?;
                set_attributes_by_name(parent.as_fd(), name, kind, &attributes)
            }
        }
    }

    fn finish_directory(&mut self, path: &Path) -> Result<(), FileError> {
        let handle = self.open_source(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let stat = fstat(&handle).map_err(failed("look at it"))?;
        let attributes = attributes_of(&handle, &stat)?;
        let components = components_of(path);
        let copy = match components.split_last() {
            Some((name, parents)) => {
                let parent = self
                    .target
                    .directory(parents)
                    .map_err(failed("open its directory"))?;
                open_directory(parent.as_fd(), name)?
            }
            None => self
                .target
                .readable_directory(&[])
                .map_err(failed("open the directory"))?,
        };
        set_attributes(copy.as_fd(), &attributes)
    }
}

/// Copies the stretches of `source` that hold data, and leaves holes as they are.
fn copy_content(mut source: File, target: &File) -> io::Result<()> {
    let length = source.metadata()?.len();
    target.set_len(length)?;
    let mut buffer = vec![0; usize::try_from(COPY_BYTES.min(length.max(1))).unwrap_or(1)];
    let mut at = 0;
    while at < length {
        let start = match rustix::fs::seek(&source, Extent::Data(at)) {
            Ok(start) => start,
            // Nothing but a hole is left.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(&source, Extent::Hole(start)).map_err(io::Error::from)?;
        source.seek(SeekFrom::Start(start))?;
        let mut position = start;
        while position < end {
            let wanted = usize::try_from(end - position)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            let Some(part) = buffer.get_mut(..wanted) else {
                break;
            };
            let read = source.read(part)?;
            let Some(part) = part.get(..read).filter(|part| !part.is_empty()) else {
                // It was cut short meanwhile.
                return target.set_len(position);
            };
            target.write_all_at(part, position)?;
            position += read as u64;
        }
        at = end;
    }
    Ok(())
}

fn attributes_of(file: &OwnedFd, stat: &Stat) -> Result<Attributes, FileError> {
    Ok(Attributes {
        uid: stat.st_uid,
        gid: stat.st_gid,
        mode: stat.st_mode & 0o7777,
        accessed: Timespec {
            tv_sec: stat.st_atime,
            tv_nsec: stat.st_atime_nsec.cast_signed(),
        },
        modified: Timespec {
            tv_sec: stat.st_mtime,
            tv_nsec: stat.st_mtime_nsec.cast_signed(),
        },
        xattrs: read_xattrs(file)?,
    })
}

/// All extended attributes of an open file, also of one that is open as a handle only.
fn read_xattrs(file: &OwnedFd) -> Result<Vec<Xattr>, FileError> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let mut names = vec![0; XATTR_BYTES];
    let length = match rustix::fs::listxattr(path.as_str(), names.as_mut_slice()) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Err(source) => {
            return Err(FileError {
                operation: "list its extended attributes",
                source,
            });
        }
    };
    names.truncate(length);
    let mut xattrs = Vec::new();
    for name in names
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        let mut value = vec![0; XATTR_BYTES];
        match rustix::fs::getxattr(path.as_str(), name, value.as_mut_slice()) {
            Ok(length) => value.truncate(length),
            // Removed meanwhile.
            Err(Errno::NODATA) => continue,
            Err(source) => {
                return Err(FileError {
                    operation: "read its extended attribute",
                    source,
                });
            }
        }
        xattrs.push((name.to_vec(), value));
    }
    Ok(xattrs)
}

#[cfg(test)]
#[path = "directory_tests.rs"]
mod tests;
