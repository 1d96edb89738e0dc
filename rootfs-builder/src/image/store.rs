// SPDX-License-Identifier: Apache-2.0

//! Opens the files of an image by name, in a directory or in a tar archive.
//!
//! Names come from the image and are not to be trusted. In a directory they are resolved inside it; in
//! an archive they are looked up in its list of members, and links among those (docker-archives of old have
//! them for layers that they share) are followed there. A compressed archive is decompressed to an
//! unnamed temporary file first, since members are read out of order.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::BlobIdentity;
use super::compression::{decompress, is_compressed};
use super::digest::{HashingReader, Sha256Hex};
use crate::confined::ConfinedRoot;
use crate::layer::entry::{Entry, EntryKind, printable, split_path};
use crate::layer::reader::{TarError, TarReader};
use crate::limits::Limits;

/// Links from member to member that are followed.
const MAX_LINKS: u32 = 16;

/// Why a file of the image could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The image itself could not be opened.
    #[error("failed to open {path}")]
    Open {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The archive could not be read.
    #[error("failed to read the archive {path}")]
    Archive {
        /// The archive.
        path: PathBuf,
        /// Why.
        source: TarError,
    },
    /// The archive has too many members.
    #[error("the archive {path} has more than {limit} members")]
    TooManyMembers {
        /// The archive.
        path: PathBuf,
        /// What it may have.
        limit: usize,
    },
    /// There is no such file, or it cannot be read.
    #[error("failed to read {name} of the image")]
    File {
        /// Its name in the image.
        name: String,
        /// What the system said.
        source: io::Error,
    },
    /// The file is too large to be what it should be.
    #[error("{name} of the image is larger than {limit} bytes")]
    TooLarge {
        /// Its name in the image.
        name: String,
        /// What it may have.
        limit: u64,
    },
    /// The file is not what its digest or size says.
    #[error("{name} of the image is not what it should be: expected {expected}, found {found}")]
    Mismatch {
        /// Its name in the image.
        name: String,
        /// The digest or size wanted.
        expected: String,
        /// The digest or size found.
        found: String,
    },
}

/// An opened image.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    files: Files,
}

#[derive(Debug)]
enum Files {
    Directory(ConfinedRoot),
    Archive {
        file: File,
        members: HashMap<Vec<u8>, Member>,
    },
}

/// A member of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Member {
    /// Its bytes, in the archive.
    Data { offset: u64, length: u64 },
    /// Another member, by its path.
    Link(Vec<u8>),
}

impl Store {
    /// Opens the directory or archive at `path`.
    ///
    /// # Errors
    /// When it cannot be read or is neither.
    pub fn open(path: &Path, limits: &Limits) -> Result<Self, StoreError> {
        let open_error = |source| StoreError::Open {
            path: path.to_path_buf(),
            source,
        };
        let file = File::open(path).map_err(open_error)?;
        let kind = file.metadata().map_err(open_error)?.file_type();
        let files = if kind.is_dir() {
            Files::Directory(ConfinedRoot::open(path).map_err(open_error)?)
        } else if kind.is_file() {
            let file = plain_archive(file, limits).map_err(open_error)?;
            let members = list_members(&file, path, limits)?;
            Files::Archive { file, members }
        } else {
            let kind = "it is neither a directory nor a regular file";
            return Err(open_error(io::Error::new(
                io::ErrorKind::InvalidInput,
                kind,
            )));
        };
        Ok(Self {
            path: path.to_path_buf(),
            files,
        })
    }

    /// Where the image is, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Is there a file of this name?
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.open_file(name).is_ok()
    }

    /// Opens the file `name` of the image.
    ///
    /// # Errors
    /// When there is none, or its name leads out of the image.
    pub fn open_file(&self, name: &str) -> Result<Box<dyn Read + '_>, StoreError> {
        let file_error = |source| StoreError::File {
            name: name.to_owned(),
            source,
        };
        let path = split_path(name.as_bytes())
            .map_err(|error| file_error(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
        match &self.files {
            Files::Directory(root) => Ok(Box::new(root.open_file(&path).map_err(file_error)?)),
            Files::Archive { file, members } => {
                let (offset, length) =
                    find_member(members, &path.join(&b'/')).ok_or_else(|| {
                        file_error(io::Error::new(io::ErrorKind::NotFound, "no such member"))
                    })?;
                Ok(Box::new(Range {
                    file,
                    offset,
                    length,
                }))
            }
        }
    }

    /// The whole of a small file, checked against what it must be.
    ///
    /// # Errors
    /// When it cannot be read, is larger than `limit` bytes, or is something else.
    pub fn read_small(
        &self,
        name: &str,
        limit: u64,
        identity: Option<&BlobIdentity>,
    ) -> Result<Vec<u8>, StoreError> {
        let mut bytes = Vec::new();
        self.open_file(name)?
            .take(limit.saturating_add(1))
            .read_to_end(&mut bytes)
            .map_err(|source| StoreError::File {
                name: name.to_owned(),
                source,
            })?;
        if bytes.len() as u64 > limit {
            return Err(StoreError::TooLarge {
                name: name.to_owned(),
                limit,
            });
        }
        if let Some(identity) = identity {
            check_identity(name, identity, bytes.len() as u64, &Sha256Hex::of(&bytes))?;
        }
        Ok(bytes)
    }
}

/// Is a blob of this size and digest what `identity` says?
///
/// # Errors
/// [`StoreError::Mismatch`] if it is not.
pub fn check_identity(
    name: &str,
    identity: &BlobIdentity,
    size: u64,
    digest: &Sha256Hex,
) -> Result<(), StoreError> {
    let mismatch = |expected: String, found: String| {
        Err(StoreError::Mismatch {
            name: name.to_owned(),
            expected,
            found,
        })
    };
    if let Some(expected) = identity.size.filter(|expected| *expected != size) {
        return mismatch(format!("{expected} bytes"), format!("{size} bytes"));
    }
    if identity.digest != *digest {
        return mismatch(identity.digest.to_string(), digest.to_string());
    }
    Ok(())
}

/// The archive itself, or what it decompresses to.
fn plain_archive(file: File, limits: &Limits) -> io::Result<File> {
    let mut start = [0; 4];
    let mut filled = 0;
    while let Some(rest) = start.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, filled as u64)? {
            0 => break,
            read => filled += read,
        }
    }
    if !is_compressed(&start) {
        return Ok(file);
    }
    let mut plain = tempfile::tempfile()?;
    let decoder = decompress(BufReader::new(file))?;
    io::copy(
        &mut HashingReader::new(decoder, limits.max_unpacked_bytes),
        &mut plain,
    )?;
    plain.rewind()?;
    Ok(plain)
}

fn list_members(
    file: &File,
    path: &Path,
    limits: &Limits,
) -> Result<HashMap<Vec<u8>, Member>, StoreError> {
    let archive_error = |source| StoreError::Archive {
        path: path.to_path_buf(),
        source,
    };
    let length = file
        .metadata()
        .map_err(|error| archive_error(error.into()))?
        .len();
    let mut reader = TarReader::new(Range {
        file,
        offset: 0,
        length,
    });
    let mut members = HashMap::new();
    while let Some(entry) = reader.next_entry().map_err(archive_error)? {
        if members.len() >= limits.max_archive_members {
            let limit = limits.max_archive_members;
            return Err(StoreError::TooManyMembers {
                path: path.to_path_buf(),
                limit,
            });
        }
        let Ok(parts) = split_path(&entry.name) else {
            let name = printable(&entry.name);
            return Err(StoreError::File {
                name,
                source: io::Error::new(io::ErrorKind::InvalidData, "its name leads elsewhere"),
            });
        };
        let name = parts.join(&b'/');
        let member = match entry.kind {
            EntryKind::File if entry.segments.is_none() => Some(Member::Data {
                offset: reader.offset(),
                length: entry.stored,
            }),
            EntryKind::HardLink => Some(Member::Link(entry.link.clone())),
            EntryKind::Symlink => Some(Member::Link(link_target(&name, &entry))),
            _ => None,
        };
        if let Some(member) = member {
            members.insert(name, member);
        }
    }
    Ok(members)
}

/// The path that a symbolic link in the archive leads to, as a path of the archive.
fn link_target(name: &[u8], entry: &Entry) -> Vec<u8> {
    let mut parts: Vec<&[u8]> = name.split(|byte| *byte == b'/').collect();
    parts.pop();
    if entry.link.starts_with(b"/") {
        parts.clear();
    }
    for part in entry.link.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            // The archive has nothing above it.
            b".." => drop(parts.pop()),
            _ => parts.push(part),
        }
    }
    parts.join(&b'/')
}

fn find_member(members: &HashMap<Vec<u8>, Member>, name: &[u8]) -> Option<(u64, u64)> {
    let mut name = name.to_vec();
    for _ in 0..MAX_LINKS {
        match members.get(&name)? {
            Member::Data { offset, length } => return Some((*offset, *length)),
            Member::Link(target) => name = split_path(target).ok()?.join(&b'/'),
        }
    }
    None
}

/// Part of a file, read without moving the file's own position.
struct Range<'a> {
    file: &'a File,
    offset: u64,
    length: u64,
}

impl Read for Range<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.length)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let Some(part) = buffer.get_mut(..wanted) else {
            return Ok(0);
        };
        let read = self.file.read_at(part, self.offset)?;
        self.offset += read as u64;
        self.length -= read as u64;
        Ok(read)
    }
}
