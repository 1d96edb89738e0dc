// SPDX-License-Identifier: Apache-2.0

//! The directories of the tree that layers are applied to.
//!
//! Finds the directory that an entry belongs in, makes it if it is missing, keeps trees from growing
//! deeper than they may, and gives directories their times when the layer is whole, since filling a
//! directory changes them.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Stat, Timespec, Timestamps, fstat, futimens};
use rustix::io::Errno;
use rustix::process::{getegid, geteuid};

use super::entry::printable;
use super::error::{EntryError, LayerError};
use super::whiteout::LayerRecord;
use crate::confined::{
    Attributes, ConfinedRoot, FileError, create_directory, failed, open_directory, set_attributes,
    stat_name,
};
use crate::limits::LimitError;

/// The directories of one tree.
#[derive(Debug)]
pub(super) struct Directories {
    root: ConfinedRoot,
    max_depth: u32,
    /// How deep each directory lies, by inode. All were made here.
    depths: HashMap<u64, u32>,
    /// Times that directories shall have at the end of the layer, by inode.
    times: HashMap<u64, LaterTimes>,
}

#[derive(Debug)]
struct LaterTimes {
    path: Vec<Vec<u8>>,
    times: Timestamps,
}

/// An open directory (for work on names in it) and its inode.
pub(super) struct Parent {
    pub(super) handle: OwnedFd,
    pub(super) inode: u64,
}

impl Parent {
    fn new(handle: OwnedFd) -> Result<Self, FileError> {
        Ok(Self {
            inode: inode_of(handle.as_fd())?,
            handle,
        })
    }
}

impl Directories {
    /// The tree of the empty directory at `path`.
    pub(super) fn new(path: &Path, max_depth: u32) -> io::Result<Self> {
        let root = ConfinedRoot::open(path)?;
        let inode = fstat(root.directory(&[])?)?.st_ino;
        Ok(Self {
            root,
            max_depth,
            depths: HashMap::from([(inode, 0)]),
            times: HashMap::new(),
        })
    }

    /// The directory at `path`, to look up names in.
    pub(super) fn handle(&self, path: &[&[u8]]) -> Result<OwnedFd, Errno> {
        self.root.directory(path)
    }

    /// The directory at `path`, to read or to change itself.
    pub(super) fn readable(&self, path: &[&[u8]]) -> Result<OwnedFd, FileError> {
        self.root
            .readable_directory(path)
            .map_err(failed("open the directory"))
    }

    /// The directory at `path` if there is one, to take something away from it.
    pub(super) fn existing(&mut self, path: &[&[u8]]) -> Result<Option<Parent>, EntryError> {
        match self.root.directory(path) {
            Ok(handle) => self.keep_times(Parent::new(handle)?, path).map(Some),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(source) => Err(FileError {
                operation: "open its directory",
                source,
            }
            .into()),
        }
    }

    /// The directory at `path`, to add something to it. What is missing of it is made, with the time
    /// of the entry that needs it, and goes on `layer`'s record.
    pub(super) fn open_or_make(
        &mut self,
        path: &[&[u8]],
        time: Timespec,
        layer: &mut LayerRecord,
    ) -> Result<Parent, EntryError> {
        match self.root.directory(path) {
            Ok(handle) => return self.keep_times(Parent::new(handle)?, path),
            Err(Errno::NOENT) => {}
            Err(source) => return Err(open_error(path, source)),
        }
        let mut above: Vec<&[u8]> = Vec::new();
        let mut parent = Parent::new(
            self.root
                .directory(&[])
                .map_err(|source| open_error(&[], source))?,
        )?;
        for name in path {
            let mut here = above.clone();
            here.push(name);
            parent = match self.root.directory(&here) {
                Ok(handle) => Parent::new(handle)?,
                Err(Errno::NOENT) => {
                    let parent = self.keep_times(parent, &above)?;
                    let made = self.make_implied(&parent, &here, name, time)?;
                    layer.add(parent.inode, name);
                    made
                }
                Err(source) => return Err(open_error(&here, source)),
            };
            above = here;
        }
        Ok(parent)
    }

    /// Makes the directory `name` in `parent`, unless it would lie too deep.
    pub(super) fn make(&mut self, parent: &Parent, name: &[u8]) -> Result<(), EntryError> {
        let depth = self
            .depths
            .get(&parent.inode)
            .copied()
            .unwrap_or(0)
            .saturating_add(1);
        if depth > self.max_depth {
            return Err(LimitError::Depth(self.max_depth).into());
        }
        create_directory(parent.handle.as_fd(), name)?;
        if let Some(stat) = stat_name(parent.handle.as_fd(), name)? {
            self.depths.insert(stat.st_ino, depth);
        }
        Ok(())
    }

    /// Takes note of the times that the directory at `path` shall have in the end.
    pub(super) fn set_times_later(
        &mut self,
        directory: BorrowedFd<'_>,
        path: &[&[u8]],
        times: Timestamps,
    ) -> Result<(), EntryError> {
        self.times.insert(
            inode_of(directory)?,
            LaterTimes {
                path: owned(path),
                times,
            },
        );
        Ok(())
    }

    /// Gives directories the times noted for them.
    pub(super) fn finish_layer(&mut self) -> Result<(), LayerError> {
        for (inode, directory) in std::mem::take(&mut self.times) {
            let path: Vec<&[u8]> = directory.path.iter().map(Vec::as_slice).collect();
            self.set_times(inode, &path, &directory.times)
                .map_err(|source| LayerError::Finish {
                    name: printable(&path.join(&b'/')),
                    source,
                })?;
        }
        Ok(())
    }

    fn set_times(&self, inode: u64, path: &[&[u8]], times: &Timestamps) -> Result<(), FileError> {
        let handle = match self.root.readable_directory(path) {
            Ok(handle) => handle,
            // The layer has removed it since.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(()),
            Err(source) => {
                return Err(FileError {
                    operation: "open the directory",
                    source,
                });
            }
        };
        if inode_of(handle.as_fd())? == inode {
            futimens(&handle, times).map_err(failed("set its times"))?;
        }
        Ok(())
    }

    fn make_implied(
        &mut self,
        parent: &Parent,
        path: &[&[u8]],
        name: &[u8],
        time: Timespec,
    ) -> Result<Parent, EntryError> {
        match self.make(parent, name) {
            // The name is there and yet leads nowhere.
            Err(EntryError::File(FileError {
                source: Errno::EXIST,
                ..
            })) => {
                return Err(open_error(path, Errno::NOTDIR));
            }
            result => result?,
        }
        let made = open_directory(parent.handle.as_fd(), name)?;
        let attributes = Attributes {
            uid: geteuid().as_raw(),
            gid: getegid().as_raw(),
            mode: 0o755,
            accessed: time,
            modified: time,
            xattrs: Vec::new(),
        };
        set_attributes(made.as_fd(), &attributes)?;
        self.set_times_later(made.as_fd(), path, attributes.times())?;
        Ok(Parent::new(made)?)
    }

    /// Before a directory is changed: notes its times as they are, unless the layer has given it others.
    fn keep_times(&mut self, parent: Parent, path: &[&[u8]]) -> Result<Parent, EntryError> {
        if let Entry::Vacant(vacant) = self.times.entry(parent.inode) {
            let stat = fstat(&parent.handle).map_err(failed("look at its directory"))?;
            vacant.insert(LaterTimes {
                path: owned(path),
                times: times_of(&stat),
            });
        }
        Ok(parent)
    }
}

fn owned(path: &[&[u8]]) -> Vec<Vec<u8>> {
    path.iter().map(|part| part.to_vec()).collect()
}

fn open_error(path: &[&[u8]], source: Errno) -> EntryError {
    match source {
        Errno::NOTDIR | Errno::LOOP => EntryError::ParentNotDirectory(printable(&path.join(&b'/'))),
        _ => FileError {
            operation: "open its directory",
            source,
        }
        .into(),
    }
}

fn inode_of(file: BorrowedFd<'_>) -> Result<u64, FileError> {
    Ok(fstat(file).map_err(failed("look at it"))?.st_ino)
}

fn times_of(stat: &Stat) -> Timestamps {
    Timestamps {
        last_access: Timespec {
            tv_sec: stat.st_atime,
            tv_nsec: stat.st_atime_nsec.cast_signed(),
        },
        last_modification: Timespec {
            tv_sec: stat.st_mtime,
            tv_nsec: stat.st_mtime_nsec.cast_signed(),
        },
    }
}
