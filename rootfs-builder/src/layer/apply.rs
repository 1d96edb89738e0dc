// SPDX-License-Identifier: Apache-2.0

//! Makes files of a layer's entries.
//!
//! A [`LayerApplier`] starts with an empty directory and lays layer over layer. It never opens what is
//! there already: a name that is taken is removed first (a directory stays if the entry is one, too),
//! then made anew, so no link, fifo or device of the image is ever written through. Parents that are
//! links are followed inside the tree, as overlay and every container tool do; missing ones are made.
//!
//! Where entries go, and when directories get their times, is the part of `directories`.

use std::fs::File;
use std::io::{self, Read, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Stat, linkat, makedev};
use rustix::io::Errno;

use super::directories::{Directories, Parent};
use super::entry::{Entry, EntryKind, printable, split_path};
use super::error::{EntryError, LayerError};
use super::reader::{TarError, TarReader};
use super::whiteout::{LayerRecord, NameMeaning, is_reserved, is_whiteout, meaning_of};
use crate::confined::{
    Attributes, FileError, create_file, create_special, create_symlink, open_directory,
    remove_tree, set_attributes, set_attributes_by_name, stat_name, type_of,
};
use crate::limits::{Budget, MAX_PATH_BYTES};

/// Bytes copied at a time.
const COPY_BYTES: usize = 128 << 10;

/// Attributes that overlayfs keeps its own records in; from an image they could only mislead it.
const OVERLAY_XATTRS: [&[u8]; 2] = [b"trusted.overlay.", b"user.overlay."];

/// Largest device numbers of Linux (12 and 20 bits).
const MAX_MAJOR: u32 = (1 << 12) - 1;
const MAX_MINOR: u32 = (1 << 20) - 1;

/// Lays layers over one another in a directory.
#[derive(Debug)]
pub struct LayerApplier {
    directories: Directories,
    budget: Budget,
    layer: LayerRecord,
    buffer: Vec<u8>,
}

impl LayerApplier {
    /// An applier for the empty directory at `path`.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn new(path: &Path, budget: Budget) -> io::Result<Self> {
        Ok(Self {
            directories: Directories::new(path, budget.limits().max_depth)?,
            budget,
            layer: LayerRecord::default(),
            buffer: vec![0; COPY_BYTES],
        })
    }

    /// What the image has used up so far.
    pub fn budget_mut(&mut self) -> &mut Budget {
        &mut self.budget
    }

    /// Lays the layer in `archive` (a tar, decompressed) over those applied before.
    ///
    /// # Errors
    /// Any [`LayerError`]; the directory is then of no use.
    pub fn apply(&mut self, archive: impl Read) -> Result<(), LayerError> {
        self.layer = LayerRecord::default();
        let mut reader = TarReader::new(archive);
        while let Some(entry) = reader.next_entry()? {
            self.apply_entry(&entry, &mut reader)
                .map_err(|source| LayerError::Entry {
                    name: printable(&entry.name),
                    source,
                })?;
        }
        self.directories.finish_layer()
    }

    fn apply_entry(
        &mut self,
        entry: &Entry,
        reader: &mut TarReader<impl Read>,
    ) -> Result<(), EntryError> {
        self.budget.add_entry()?;
        let path = split_path(&entry.name)?;
        if path
            .iter()
            .any(|part| is_reserved(part) && meaning_of(part) == NameMeaning::Ignored)
        {
            return Ok(());
        }
        let Some((name, parents)) = path.split_last() else {
            return self.apply_root(entry);
        };
        if parents.iter().any(|part| is_whiteout(part)) {
            return Err(EntryError::Whiteout);
        }
        match meaning_of(name) {
            NameMeaning::Ignored => Ok(()),
            NameMeaning::Invalid => Err(EntryError::Whiteout),
            NameMeaning::Whiteout(target) => {
                if let Some(parent) = self.directories.existing(parents)? {
                    self.layer.delete(parent.handle.as_fd(), target)?;
                }
                Ok(())
            }
            NameMeaning::Opaque => {
                if self.directories.existing(parents)?.is_some() {
                    let directory = self.directories.readable(parents)?;
                    self.layer.empty(directory.as_fd())?;
                }
                Ok(())
            }
            NameMeaning::File => {
                let parent =
                    self.directories
                        .open_or_make(parents, entry.modified, &mut self.layer)?;
                self.make(entry, &path, &parent, name, reader)?;
                self.layer.add(parent.inode, name);
                Ok(())
            }
        }
    }

    fn apply_root(&mut self, entry: &Entry) -> Result<(), EntryError> {
        if entry.kind != EntryKind::Directory {
            return Err(EntryError::RootNotDirectory);
        }
        let root = self.directories.readable(&[])?;
        let attributes = attributes_of(entry);
        set_attributes(root.as_fd(), &attributes)?;
        self.directories
            .set_times_later(root.as_fd(), &[], attributes.times())?;
        Ok(())
    }

    fn make(
        &mut self,
        entry: &Entry,
        path: &[&[u8]],
        parent: &Parent,
        name: &[u8],
        reader: &mut TarReader<impl Read>,
    ) -> Result<(), EntryError> {
        let directory = parent.handle.as_fd();
        let attributes = attributes_of(entry);
        let existing = stat_name(directory, name)?;
        if entry.kind == EntryKind::HardLink {
            return self.make_hard_link(entry, directory, name, existing);
        }
        if entry.kind == EntryKind::Directory {
            return self.make_directory(path, parent, name, existing, &attributes);
        }
        if existing.is_some() {
            remove_tree(directory, name)?;
        }
        let special = |kind: FileType, device: u64| {
            create_special(directory, name, kind, device)?;
            set_attributes_by_name(directory, name, kind, &attributes)
        };
        match entry.kind {
            EntryKind::File => {
                self.budget.add_file_bytes(entry.size)?;
                let file = create_file(directory, name)?;
                self.write_content(entry, &file, reader)?;
                set_attributes(file.as_fd(), &attributes)?;
            }
            EntryKind::Symlink => {
                if entry.link.is_empty()
                    || entry.link.len() > MAX_PATH_BYTES
                    || entry.link.contains(&0)
                {
                    return Err(EntryError::SymlinkTarget);
                }
                create_symlink(directory, name, &entry.link)?;
                set_attributes_by_name(directory, name, FileType::Symlink, &attributes)?;
            }
            EntryKind::Fifo => special(FileType::Fifo, 0)?,
            EntryKind::CharacterDevice { major, minor } => {
                special(FileType::CharacterDevice, self.device_number(major, minor)?)?;
            }
            EntryKind::BlockDevice { major, minor } => {
                special(FileType::BlockDevice, self.device_number(major, minor)?)?;
            }
            // Both were dealt with above.
            EntryKind::HardLink | EntryKind::Directory => {}
        }
        Ok(())
    }

    fn device_number(&mut self, major: u32, minor: u32) -> Result<u64, EntryError> {
        if major > MAX_MAJOR || minor > MAX_MINOR {
            return Err(EntryError::DeviceNumber { major, minor });
        }
        self.budget.add_device()?;
        Ok(makedev(major, minor))
    }

    fn make_directory(
        &mut self,
        path: &[&[u8]],
        parent: &Parent,
        name: &[u8],
        existing: Option<Stat>,
        attributes: &Attributes,
    ) -> Result<(), EntryError> {
        let directory = parent.handle.as_fd();
        let stays = existing.is_some_and(|stat| type_of(&stat) == FileType::Directory);
        if !stays {
            if existing.is_some() {
                remove_tree(directory, name)?;
            }
            self.directories.make(parent, name)?;
        }
        let made = open_directory(directory, name)?;
        set_attributes(made.as_fd(), attributes)?;
        self.directories
            .set_times_later(made.as_fd(), path, attributes.times())?;
        Ok(())
    }

    fn make_hard_link(
        &mut self,
        entry: &Entry,
        directory: BorrowedFd<'_>,
        name: &[u8],
        existing: Option<Stat>,
    ) -> Result<(), EntryError> {
        let shown = || printable(&entry.link);
        let target = split_path(&entry.link).map_err(|source| EntryError::LinkPath {
            target: shown(),
            source,
        })?;
        let Some((target_name, target_parents)) = target.split_last() else {
            return Err(EntryError::LinkToDirectory(shown()));
        };
        let target_directory = self
            .directories
            .handle(target_parents)
            .map_err(|_| EntryError::LinkTarget(shown()))?;
        let Some(stat) = stat_name(target_directory.as_fd(), target_name)? else {
            return Err(EntryError::LinkTarget(shown()));
        };
        if type_of(&stat) == FileType::Directory {
            return Err(EntryError::LinkToDirectory(shown()));
        }
        if let Some(existing) = existing {
            // Both are names of one file already; removing this one might remove the file.
            if existing.st_ino == stat.st_ino {
                return Ok(());
            }
            remove_tree(directory, name)?;
        }
        linkat(
            &target_directory,
            *target_name,
            directory,
            name,
            AtFlags::empty(),
        )
        .map_err(|source| match source {
            // It lay in the directory that this link took the place of.
            Errno::NOENT => EntryError::LinkTarget(shown()),
            _ => FileError {
                operation: "create the hard link",
                source,
            }
            .into(),
        })
    }

    fn write_content(
        &mut self,
        entry: &Entry,
        file: &File,
        reader: &mut TarReader<impl Read>,
    ) -> Result<(), EntryError> {
        let Some(segments) = &entry.segments else {
            let mut file = file;
            loop {
                let read = reader.read_data(&mut self.buffer)?;
                match self.buffer.get(..read) {
                    None | Some([]) => return Ok(()),
                    Some(part) => file.write_all(part).map_err(EntryError::Write)?,
                }
            }
        };
        file.set_len(entry.size).map_err(EntryError::Write)?;
        for segment in segments {
            let mut done = 0;
            while done < segment.length {
                let left = usize::try_from(segment.length - done).unwrap_or(usize::MAX);
                let wanted = left.min(self.buffer.len());
                let Some(buffer) = self.buffer.get_mut(..wanted) else {
                    break;
                };
                let read = reader.read_data(buffer)?;
                let Some(part) = buffer.get(..read).filter(|part| !part.is_empty()) else {
                    return Err(TarError::Truncated.into());
                };
                file.write_all_at(part, segment.offset + done)
                    .map_err(EntryError::Write)?;
                done += read as u64;
            }
        }
        Ok(())
    }
}

fn attributes_of(entry: &Entry) -> Attributes {
    let of_overlay = |name: &[u8]| OVERLAY_XATTRS.iter().any(|prefix| name.starts_with(prefix));
    Attributes {
        uid: entry.uid,
        gid: entry.gid,
        mode: entry.mode,
        accessed: entry.accessed.unwrap_or(entry.modified),
        modified: entry.modified,
        xattrs: entry
            .xattrs
            .iter()
            .filter(|(name, _)| !of_overlay(name))
            .cloned()
            .collect(),
    }
}

#[cfg(test)]
#[path = "apply_tests.rs"]
mod tests;
