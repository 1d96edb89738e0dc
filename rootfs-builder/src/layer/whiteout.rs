// SPDX-License-Identifier: Apache-2.0

//! What a layer takes away from the layers below it.
//!
//! `.wh.NAME` deletes NAME, `.wh..wh..opq` everything in its directory. Both mean the lower layers
//! alone: what the same layer adds stays, whichever comes first in the archive. So each name that the
//! layer adds is on record ([`LayerRecord`]), and deleting leaves those out.

use std::collections::HashSet;
use std::os::fd::{AsFd as _, BorrowedFd};

use rustix::fs::{AtFlags, FileType, fstat, unlinkat};
use rustix::io::Errno;

use crate::confined::{FileError, failed, names_in, open_directory, stat_name, type_of};

const PREFIX: &[u8] = b".wh.";
const RESERVED_PREFIX: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// What a file name in a layer means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NameMeaning<'a> {
    /// A file.
    File,
    /// Deletes this name.
    Whiteout(&'a [u8]),
    /// Deletes everything in its directory.
    Opaque,
    /// Bookkeeping of another file system (AUFS), without meaning here.
    Ignored,
    /// A whiteout of nothing, of `.` or of `..`.
    Invalid,
}

/// What `name`, the last component of a path, means.
pub(super) fn meaning_of(name: &[u8]) -> NameMeaning<'_> {
    if name == OPAQUE {
        return NameMeaning::Opaque;
    }
    if is_reserved(name) {
        return NameMeaning::Ignored;
    }
    match name.strip_prefix(PREFIX) {
        None => NameMeaning::File,
        Some(b"" | b"." | b"..") => NameMeaning::Invalid,
        Some(target) => NameMeaning::Whiteout(target),
    }
}

/// Is `name` one of those set aside for bookkeeping?
pub(super) fn is_reserved(name: &[u8]) -> bool {
    name.starts_with(RESERVED_PREFIX)
}

/// Is `name` any kind of whiteout (which no directory may be called)?
pub(super) fn is_whiteout(name: &[u8]) -> bool {
    name.starts_with(PREFIX)
}

/// What the layer being applied has added and deleted so far.
///
/// A name is known by its directory's inode, so that links in paths make no difference. An inode number
/// can be used again only after its directory was deleted, and then by a directory of this layer.
#[derive(Debug, Default)]
pub(super) struct LayerRecord {
    added: HashSet<(u64, Vec<u8>)>,
    deleted: HashSet<(u64, Vec<u8>)>,
    emptied: HashSet<u64>,
}

impl LayerRecord {
    /// The layer has added `name` in the directory with this inode.
    pub(super) fn add(&mut self, directory_inode: u64, name: &[u8]) {
        self.added.insert((directory_inode, name.to_vec()));
    }

    /// Deletes `name` from `directory`, as far as it comes from lower layers.
    pub(super) fn delete(
        &mut self,
        directory: BorrowedFd<'_>,
        name: &[u8],
    ) -> Result<(), FileError> {
        let inode = fstat(directory).map_err(failed("look at it"))?.st_ino;
        // Once is enough; a layer that asks a million times gets it once.
        if self.deleted.insert((inode, name.to_vec())) {
            self.delete_lower(directory, inode, name)?;
        }
        Ok(())
    }

    /// Deletes everything in `directory` that comes from lower layers.
    pub(super) fn empty(&mut self, directory: BorrowedFd<'_>) -> Result<(), FileError> {
        let inode = fstat(directory).map_err(failed("look at it"))?.st_ino;
        if self.emptied.insert(inode) {
            for name in names_in(directory)? {
                self.delete_lower(directory, inode, &name)?;
            }
        }
        Ok(())
    }

    /// As deep as the tree; see `Limits::max_depth`.
    fn delete_lower(
        &self,
        parent: BorrowedFd<'_>,
        parent_inode: u64,
        name: &[u8],
    ) -> Result<(), FileError> {
        let Some(stat) = stat_name(parent, name)? else {
            return Ok(());
        };
        let added = self.added.contains(&(parent_inode, name.to_vec()));
        if type_of(&stat) != FileType::Directory {
            if !added {
                unlinkat(parent, name, AtFlags::empty()).map_err(failed("remove it"))?;
            }
            return Ok(());
        }
        let directory = open_directory(parent, name)?;
        for child in names_in(directory.as_fd())? {
            self.delete_lower(directory.as_fd(), stat.st_ino, &child)?;
        }
        if added {
            return Ok(());
        }
        match unlinkat(parent, name, AtFlags::REMOVEDIR) {
            // What this layer has put in it keeps it.
            Ok(()) | Err(Errno::NOTEMPTY) => Ok(()),
            Err(source) => Err(FileError {
                operation: "remove the directory",
                source,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_mean_what_the_specification_says() {
        for (name, meaning) in [
            (&b"file"[..], NameMeaning::File),
            (b".whatever", NameMeaning::File),
            (b"a.wh.b", NameMeaning::File),
            (b".wh.file", NameMeaning::Whiteout(b"file")),
            (b".wh..hidden", NameMeaning::Whiteout(b".hidden")),
            (b".wh..wh..opq", NameMeaning::Opaque),
            (b".wh..wh.plnk", NameMeaning::Ignored),
            (b".wh..wh.aufs", NameMeaning::Ignored),
            (b".wh.", NameMeaning::Invalid),
            (b".wh..", NameMeaning::Invalid),
            (b".wh...", NameMeaning::Invalid),
        ] {
            assert_eq!(meaning_of(name), meaning, "{}", name.escape_ascii());
        }
    }
}
