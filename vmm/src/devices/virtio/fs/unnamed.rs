// SPDX-License-Identifier: Apache-2.0

//! Unnamed files: what `O_TMPFILE` makes (FUSE_TMPFILE).
//!
//! The passthrough file system knows files by their names when it meets them, so it cannot take in one that has
//! none. These have a table of their own, and node ids from 2^63 on, which it never gives out. Given a name by
//! link(2), such a file is looked up by it and is a node of the passthrough file system from then on; the
//! unnamed node stays beside it until the guest forgets it.
//!
//! The table is not saved with the device: after a restore these nodes answer `EBADF`, as forged ones do.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{
    AtFlags, FallocateFlags, Gid, Mode, OFlags, SeekFrom, Timespec, Timestamps, UTIME_NOW,
    UTIME_OMIT, Uid, XattrFlags,
};
use virtiofsd::filesystem::{
    Context, Entry, FileSystem, GetxattrReply, SetattrValid, SetxattrFlags, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, SetattrIn};
use virtiofsd::oslib::ReadvFlags;
use virtiofsd::soft_idmap::{GuestGid, GuestUid, Id};

use super::names::{Name, XattrName};
use super::passthrough::Host;

/// The first node id of the table.
const FIRST: u64 = 1 << 63;
/// Most unnamed files at a time; the guest sees `ENFILE` beyond.
pub(super) const UNNAMED_MAX: usize = 1024;

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// Whether a node is one of the table's, if it exists.
pub(super) fn is_unnamed(node: u64) -> bool {
    node >= FIRST
}

/// The table.
#[derive(Debug, Default)]
pub(super) struct Unnamed {
    files: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    by_node: BTreeMap<u64, Arc<File>>,
    made: u64,
}

impl Unnamed {
    fn lock(&self) -> std::sync::MutexGuard<'_, Table> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file of `node`.
    ///
    /// # Errors
    /// `EBADF` when there is none.
    pub(super) fn get(&self, node: u64) -> io::Result<Arc<File>> {
        let file = self.lock().by_node.get(&node).cloned();
        file.ok_or_else(|| errno(libc::EBADF))
    }

    /// The guest forgets `node`. It was told of it once, so this is once for each.
    pub(super) fn forget(&self, node: u64) {
        self.lock().by_node.remove(&node);
    }

    /// The guest is gone.
    pub(super) fn clear(&self) {
        self.lock().by_node.clear();
    }

    /// Makes a file in `directory`, as the thread's present user and with its umask.
    ///
    /// # Errors
    /// `ENFILE` at the bound; otherwise as open(2).
    pub(super) fn create(&self, directory: &OwnedFd, flags: u32, mode: u32) -> io::Result<Entry> {
        if self.lock().by_node.len() >= UNNAMED_MAX {
            return Err(errno(libc::ENFILE));
        }
        let mut open = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        // Never to be linked.
        open.set(OFlags::EXCL, flags & libc::O_EXCL.cast_unsigned() != 0);
        let mode = Mode::from_raw_mode(mode & 0o7777);
        let file = File::from(rustix::fs::openat(directory, ".", open, mode)?);
        let (attr, attr_timeout) = attributes(&file)?;
        let mut table = self.lock();
        // Other threads may have filled it meanwhile.
        if table.by_node.len() >= UNNAMED_MAX {
            return Err(errno(libc::ENFILE));
        }
        let inode = FIRST + table.made;
        table.made += 1;
        table.by_node.insert(inode, Arc::new(file));
        Ok(Entry {
            inode,
            generation: 0,
            attr,
            attr_timeout,
            entry_timeout: Duration::ZERO,
        })
    }

    /// Gives the file `node` a name, under which it is looked up then.
    ///
    /// # Errors
    /// As linkat(2); `ENOENT` for one that was made with `O_EXCL`.
    pub(super) fn link(
        &self,
        host: &Host,
        context: Context,
        node: u64,
        parent: u64,
        name: Name<'_>,
    ) -> io::Result<Entry> {
        let file = self.get(node)?;
        let directory = host_directory(host, context, parent)?;
        let from = file.as_raw_fd().to_string();
        rustix::fs::linkat(
            host.descriptors(),
            from,
            &directory,
            name.as_c_str(),
            AtFlags::SYMLINK_FOLLOW,
        )?;
        host.fs.lookup(context, parent, name.as_c_str())
    }
}

/// The host's open file behind a handle of the passthrough file system, which shows it to nobody but a reader.
///
/// # Errors
/// `EBADF` for a forged handle; when there are no descriptors left.
pub(super) fn host_file(
    host: &Host,
    context: Context,
    node: u64,
    handle: u64,
) -> io::Result<OwnedFd> {
    let mut seen = None;
    let read = host
        .fs
        .read(context, node, handle, Look(&mut seen), 0, 0, None, 0);
    read.and(seen.unwrap_or_else(|| Err(errno(libc::EBADF))))
}

/// A reader that only looks at the file.
struct Look<'a>(&'a mut Option<io::Result<OwnedFd>>);

impl ZeroCopyWriter for Look<'_> {
    fn read_from_file_at(
        &mut self,
        file: &File,
        _count: usize,
        _offset: u64,
        _flags: Option<ReadvFlags>,
    ) -> io::Result<usize> {
        *self.0 = Some(file.as_fd().try_clone_to_owned());
        Ok(0)
    }
}

/// The host's directory of a node.
///
/// # Errors
/// When it is none, or there are no descriptors left.
pub(super) fn host_directory(host: &Host, context: Context, node: u64) -> io::Result<OwnedFd> {
    let flags = libc::O_DIRECTORY.cast_unsigned();
    let (handle, _) = host.fs.opendir(context, node, flags)?;
    let handle = handle.ok_or_else(|| errno(libc::EBADF))?;
    let directory = host_file(host, context, node, handle);
    host.fs.releasedir(context, node, flags, handle)?;
    directory
}

/// Attributes as the guest gets them, and how long they hold: not at all, as a name makes this file another node's,
/// too.
pub(super) fn attributes(file: &File) -> io::Result<(Attr, Duration)> {
    let stat = rustix::fs::fstat(file)?;
    let number = |value: i64| u64::try_from(value).unwrap_or(0);
    let part = |value: u64| u32::try_from(value).unwrap_or(0);
    let attr = Attr {
        ino: stat.st_ino,
        size: number(stat.st_size),
        blocks: number(stat.st_blocks),
        atime: number(stat.st_atime),
        mtime: number(stat.st_mtime),
        ctime: number(stat.st_ctime),
        atimensec: part(stat.st_atime_nsec),
        mtimensec: part(stat.st_mtime_nsec),
        ctimensec: part(stat.st_ctime_nsec),
        mode: stat.st_mode,
        nlink: part(stat.st_nlink),
        uid: GuestUid::from(stat.st_uid),
        gid: GuestGid::from(stat.st_gid),
        rdev: 0,
        blksize: part(number(stat.st_blksize)),
        flags: 0,
    };
    Ok((attr, Duration::ZERO))
}

/// SETATTR.
///
/// # Errors
/// As fchmod(2), fchown(2), ftruncate(2) and futimens(2).
pub(super) fn set_attributes(
    file: &File,
    attr: &SetattrIn,
    valid: SetattrValid,
) -> io::Result<(Attr, Duration)> {
    if valid.contains(SetattrValid::MODE) {
        rustix::fs::fchmod(file, Mode::from_raw_mode(attr.mode & 0o7777))?;
    }
    // u32::MAX stands for "leave it" and is nobody's.
    let [user, group] = [
        (SetattrValid::UID, attr.uid.into_inner()),
        (SetattrValid::GID, attr.gid.into_inner()),
    ]
    .map(|(bit, id)| Some(id).filter(|id| valid.contains(bit) && *id != u32::MAX));
    if user.is_some() || group.is_some() {
        rustix::fs::fchown(file, user.map(Uid::from_raw), group.map(Gid::from_raw))?;
    }
    if valid.contains(SetattrValid::SIZE) {
        rustix::fs::ftruncate(file, attr.size)?;
        if valid.contains(SetattrValid::KILL_SUIDGID) {
            drop_privileges(file)?;
        }
    }
    if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
        let time = |set, now, seconds: u64, nanoseconds: u32| Timespec {
            tv_sec: i64::try_from(seconds).unwrap_or(i64::MAX),
            tv_nsec: match (valid.contains(now), valid.contains(set)) {
                (true, _) => UTIME_NOW,
                (false, true) => nanoseconds.into(),
                (false, false) => UTIME_OMIT,
            },
        };
        use SetattrValid as Set;
        let times = Timestamps {
            last_access: time(Set::ATIME, Set::ATIME_NOW, attr.atime, attr.atimensec),
            last_modification: time(Set::MTIME, Set::MTIME_NOW, attr.mtime, attr.mtimensec),
        };
        rustix::fs::futimens(file, &times)?;
    }
    attributes(file)
}

/// Takes setuid, and setgid of a program, as a write by somebody unprivileged does.
///
/// # Errors
/// As fchmod(2).
pub(super) fn drop_privileges(file: &File) -> io::Result<()> {
    let mode = Mode::from_raw_mode(rustix::fs::fstat(file)?.st_mode & 0o7777);
    let mut without = mode - Mode::SUID;
    if mode.contains(Mode::XGRP) {
        without -= Mode::SGID;
    }
    if without != mode {
        rustix::fs::fchmod(file, without)?;
    }
    Ok(())
}

/// FALLOCATE.
///
/// # Errors
/// As fallocate(2); `EOPNOTSUPP` for bits of the mode that it does not have.
pub(super) fn allocate(file: &File, mode: u32, offset: u64, length: u64) -> io::Result<()> {
    let flags = FallocateFlags::from_bits(mode).ok_or_else(|| errno(libc::EOPNOTSUPP))?;
    Ok(rustix::fs::fallocate(file, flags, offset, length)?)
}

/// LSEEK, of which only the search for data and holes comes here.
///
/// # Errors
/// As lseek(2).
pub(super) fn seek(file: &File, offset: u64, whence: u32) -> io::Result<u64> {
    let from = match i32::try_from(whence) {
        Ok(libc::SEEK_DATA) => SeekFrom::Data(offset),
        Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
        _ => return Err(errno(libc::EINVAL)),
    };
    Ok(rustix::fs::seek(file, from)?)
}

/// SETXATTR.
///
/// # Errors
/// As fsetxattr(2).
pub(super) fn set_xattr(
    file: &File,
    name: XattrName<'_>,
    value: &[u8],
    flags: u32,
    extra: SetxattrFlags,
) -> io::Result<()> {
    let flags = XattrFlags::from_bits(flags).ok_or_else(|| errno(libc::EINVAL))?;
    rustix::fs::fsetxattr(file, name.as_c_str(), value, flags)?;
    if extra.contains(SetxattrFlags::SETXATTR_ACL_KILL_SGID) {
        let mode = Mode::from_raw_mode(rustix::fs::fstat(file)?.st_mode & 0o7777);
        rustix::fs::fchmod(file, mode - Mode::SGID)?;
    }
    Ok(())
}

/// GETXATTR: the value, or only its length when `size` is 0.
///
/// # Errors
/// As fgetxattr(2).
pub(super) fn xattr(file: &File, name: XattrName<'_>, size: u32) -> io::Result<GetxattrReply> {
    let mut value = vec![0; size as usize];
    let length = rustix::fs::fgetxattr(file, name.as_c_str(), value.as_mut_slice())?;
    if size == 0 {
        let size = u32::try_from(length).unwrap_or(u32::MAX);
        return Ok(GetxattrReply::Count(size));
    }
    value.truncate(length);
    Ok(GetxattrReply::Value(value))
}

/// All names of attributes, each with its NUL.
///
/// # Errors
/// As flistxattr(2).
pub(super) fn xattrs(file: &File, size: u32) -> io::Result<Vec<u8>> {
    let mut names = vec![0; size as usize];
    let length = rustix::fs::flistxattr(file, names.as_mut_slice())?;
    names.truncate(length);
    Ok(names)
}
