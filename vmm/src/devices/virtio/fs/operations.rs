// SPDX-License-Identifier: Apache-2.0

//! What each FUSE operation does on the host's file system.
//!
//! Node ids and handles are looked up by the passthrough file system, which answers `EBADF` to forged ones.
//! Flags of open(2) are masked here, kinds of special files chosen.

use std::io;

use virtiofsd::filesystem::{
    Context, DirEntry, DirectoryIterator, Entry, Extensions, FileSystem, ListxattrReply,
};
use virtiofsd::fuse::{
    Attr, CopyfilerangeIn, CreateIn, InHeader, Kstatfs, LseekIn, MknodIn, OPEN_KILL_SUIDGID,
    ReadIn, WRITE_CACHE, WRITE_KILL_PRIV, WriteIn,
};
use virtiofsd::soft_idmap::{GuestGid, GuestUid};
use vm_memory::ByteValued;

use super::reply::{Listing, Reply};
use super::request::{MAX_DATA, NewEntry, Operation, XATTR_SIZE_MAX};
use super::segments::Segments;
use super::server::Server;
use super::sys;
use super::transfer::{FileToGuest, GuestToFile};

/// Flags of open(2) that a guest may set. Not among them: O_PATH, O_TMPFILE, O_CREAT, O_CLOEXEC and O_ASYNC,
/// which are the server's business.
const OPEN_FLAGS: i32 = libc::O_ACCMODE
    | libc::O_APPEND
    | libc::O_TRUNC
    | libc::O_EXCL
    | libc::O_NONBLOCK
    | libc::O_DSYNC
    | libc::O_SYNC
    | libc::O_DIRECT
    | libc::O_LARGEFILE
    | libc::O_DIRECTORY
    | libc::O_NOFOLLOW
    | libc::O_NOATIME;

/// Most bytes that one COPY_FILE_RANGE moves: the thread is busy for as long. The guest asks for the rest.
pub(super) const COPY_MAX: u64 = 16 << 20;

/// Longest list of directory entries of one answer, bytes.
const LISTING_MAX: usize = MAX_DATA as usize;

impl Server {
    /// Does what was asked and answers.
    pub(super) fn answer(
        &self,
        header: &InHeader,
        operation: Operation<'_>,
        data: &Segments<'_>,
        reply: Reply<'_>,
    ) -> u32 {
        let context = Context::from(*header);
        let node = header.nodeid;
        let fs = &self.host.fs;
        if operation.is_on_unnamed(node) {
            return self.answer_unnamed(header, operation, data, reply);
        }
        match operation {
            Operation::Lookup(name) => self.entry(reply, fs.lookup(context, node, name.as_c_str())),
            Operation::Getattr(handle) => self.attr(reply, fs.getattr(context, node, handle)),
            Operation::Setattr {
                attr,
                handle,
                valid,
            } => self.attr(reply, fs.setattr(context, node, *attr, handle, valid)),
            Operation::Readlink => match fs.readlink(context, node) {
                Ok(target) => reply.ok(&[&target]),
                Err(error) => self.failed(reply, &error),
            },
            Operation::Unlink(name) => self.done(reply, fs.unlink(context, node, name.as_c_str())),
            Operation::Rmdir(name) => self.done(reply, fs.rmdir(context, node, name.as_c_str())),
            Operation::Rename {
                from,
                new_parent,
                to,
                flags,
            } => {
                let (from, to) = (from.as_c_str(), to.as_c_str());
                self.done(reply, fs.rename(context, node, from, new_parent, to, flags))
            }
            Operation::Link { node: linked, name } => {
                self.entry(reply, fs.link(context, linked, node, name.as_c_str()))
            }
            Operation::Symlink { .. }
            | Operation::Mknod { .. }
            | Operation::Mkdir { .. }
            | Operation::Create { .. } => self.answer_create(header, operation, reply),
            Operation::Setxattr { .. }
            | Operation::Getxattr { .. }
            | Operation::Listxattr(_)
            | Operation::Removexattr(_) => self.answer_xattr(header, operation, reply),
            Operation::Read(args) => self.read(header, args, reply),
            Operation::Write(args) => self.write(header, args, data, reply),
            Operation::Readdir(args) => self.list(header, args, reply, false),
            Operation::Readdirplus(args) => self.list(header, args, reply, true),
            other => self.answer_file(header, other, reply),
        }
    }

    /// Operations on open files, and on the whole file system.
    fn answer_file(&self, header: &InHeader, operation: Operation<'_>, reply: Reply<'_>) -> u32 {
        let context = Context::from(*header);
        let node = header.nodeid;
        let fs = &self.host.fs;
        match operation {
            Operation::Open { flags, kill_priv } => {
                self.opened(reply, fs.open(context, node, kill_priv, open_flags(flags)))
            }
            Operation::Opendir(flags) => {
                self.opened(reply, fs.opendir(context, node, open_flags(flags)))
            }
            Operation::Release(args) => self.done(
                reply,
                fs.release(context, node, args.flags, args.fh, false, false, None),
            ),
            Operation::Releasedir(args) => {
                self.done(reply, fs.releasedir(context, node, args.flags, args.fh))
            }
            Operation::Fsync { handle, data_only } => {
                self.done(reply, fs.fsync(context, node, data_only, handle))
            }
            Operation::Flush(args) => {
                self.done(reply, fs.flush(context, node, args.fh, args.lock_owner))
            }
            Operation::Fallocate(args) => {
                let (offset, length) = (args.offset, args.length);
                self.done(
                    reply,
                    fs.fallocate(context, node, args.fh, args.mode, offset, length),
                )
            }
            Operation::Lseek(args) => self.seek(header, args, reply),
            Operation::CopyFileRange(args) => self.copy(header, args, reply),
            Operation::Statfs => match fs.statfs(context, node) {
                Ok(statistics) => reply.ok(&[Kstatfs::from(statistics).as_slice()]),
                Err(error) => self.failed(reply, &error),
            },
            Operation::Syncfs => self.done(reply, fs.syncfs(context, node)),
            Operation::Access(mask) => self.done(reply, fs.access(context, node, mask)),
            Operation::Init { args, flags } => match self.init(args, flags) {
                Ok(out) => reply.ok(&[out.as_slice()]),
                Err(error) => self.failed(reply, &error),
            },
            Operation::Destroy => {
                self.destroy();
                reply.ok(&[])
            }
            _ => self.fail(reply, libc::ENOSYS),
        }
    }

    /// Operations that make directory entries, as the user who asked.
    fn answer_create(&self, header: &InHeader, operation: Operation<'_>, reply: Reply<'_>) -> u32 {
        let context = Context::from(*header);
        let node = header.nodeid;
        let fs = &self.host.fs;
        match operation {
            Operation::Symlink { entry, target } => {
                let made = as_user(&context, entry, |name, groups| {
                    fs.symlink(context, target.0, node, name, groups)
                });
                self.entry(reply, made)
            }
            Operation::Mkdir { entry, args } => {
                let made = as_user(&context, entry, |name, groups| {
                    fs.mkdir(context, node, name, args.mode, args.umask, groups)
                });
                self.entry(reply, made)
            }
            Operation::Mknod { entry, args } => {
                let made = special_file(&args).and_then(|()| {
                    as_user(&context, entry, |name, groups| {
                        let MknodIn {
                            mode, rdev, umask, ..
                        } = args;
                        fs.mknod(context, node, name, mode, rdev, umask, groups)
                    })
                });
                self.entry(reply, made)
            }
            Operation::Create { entry, args } => {
                let made = as_user(&context, entry, |name, groups| {
                    let CreateIn {
                        flags, mode, umask, ..
                    } = args;
                    let kill_priv = args.open_flags & OPEN_KILL_SUIDGID != 0;
                    let flags = open_flags(flags);
                    fs.create(context, node, name, mode, kill_priv, flags, umask, groups)
                });
                self.created(reply, made)
            }
            _ => self.fail(reply, libc::ENOSYS),
        }
    }

    /// Extended attributes.
    fn answer_xattr(&self, header: &InHeader, operation: Operation<'_>, reply: Reply<'_>) -> u32 {
        let context = Context::from(*header);
        let node = header.nodeid;
        let fs = &self.host.fs;
        match operation {
            Operation::Setxattr {
                name,
                value,
                flags,
                extra,
            } => {
                let name = name.as_c_str();
                self.done(reply, fs.setxattr(context, node, name, value, flags, extra))
            }
            Operation::Removexattr(name) => {
                self.done(reply, fs.removexattr(context, node, name.as_c_str()))
            }
            Operation::Getxattr { name, size } => {
                self.xattr(reply, fs.getxattr(context, node, name.as_c_str(), size))
            }
            Operation::Listxattr(size) => {
                self.xattr_names(reply, size, self.list_xattrs(context, node))
            }
            _ => self.fail(reply, libc::ENOSYS),
        }
    }

    /// All names of attributes, each with its NUL.
    fn list_xattrs(&self, context: Context, node: u64) -> io::Result<Vec<u8>> {
        match self.host.fs.listxattr(context, node, XATTR_SIZE_MAX)? {
            ListxattrReply::Names(names) => Ok(names),
            ListxattrReply::Count(_) => Ok(Vec::new()),
        }
    }

    fn read(&self, header: &InHeader, args: ReadIn, reply: Reply<'_>) -> u32 {
        self.answer_read(reply, args.size, |payload| {
            self.host.fs.read(
                Context::from(*header),
                header.nodeid,
                args.fh,
                FileToGuest(payload),
                args.size,
                args.offset,
                None,
                args.flags,
            )
        })
    }

    fn write(
        &self,
        header: &InHeader,
        args: WriteIn,
        data: &Segments<'_>,
        reply: Reply<'_>,
    ) -> u32 {
        self.answer_write(reply, args.size, data, |data| {
            self.host.fs.write(
                Context::from(*header),
                header.nodeid,
                args.fh,
                GuestToFile(data),
                args.size,
                args.offset,
                None,
                args.write_flags & WRITE_CACHE != 0,
                args.write_flags & WRITE_KILL_PRIV != 0,
                args.flags,
            )
        })
    }

    fn seek(&self, header: &InHeader, args: LseekIn, reply: Reply<'_>) -> u32 {
        // Everything else the guest's kernel does itself.
        let holes = [libc::SEEK_DATA, libc::SEEK_HOLE];
        if !i32::try_from(args.whence).is_ok_and(|whence| holes.contains(&whence)) {
            return self.fail(reply, libc::EINVAL);
        }
        let context = Context::from(*header);
        let (node, offset) = (header.nodeid, args.offset);
        let fs = &self.host.fs;
        self.found(reply, fs.lseek(context, node, args.fh, offset, args.whence))
    }

    fn copy(&self, header: &InHeader, args: CopyfilerangeIn, reply: Reply<'_>) -> u32 {
        let copied = self.host.fs.copyfilerange(
            Context::from(*header),
            header.nodeid,
            args.fh_in,
            args.off_in,
            args.nodeid_out,
            args.fh_out,
            args.off_out,
            args.len.min(COPY_MAX),
            args.flags,
        );
        self.written(reply, copied)
    }

    /// READDIR and READDIRPLUS.
    fn list(&self, header: &InHeader, args: ReadIn, reply: Reply<'_>, plus: bool) -> u32 {
        let max = (args.size as usize).min(reply.room()).min(LISTING_MAX);
        let size = u32::try_from(max).unwrap_or(0);
        let context = Context::from(*header);
        let opened = self
            .host
            .fs
            .readdir(context, header.nodeid, args.fh, size, args.offset);
        let mut entries = match opened {
            Ok(entries) => entries,
            Err(error) => return self.failed(reply, &error),
        };
        let mut listing = Listing::new(max);
        while let Some(entry) = entries.next() {
            if !listing.has_room(entry.name.to_bytes(), plus) {
                break;
            }
            let attributes = plus.then(|| self.lookup_listed(header, &entry));
            listing.push(&entry, attributes);
        }
        reply.ok(&[listing.as_bytes()])
    }

    /// The attributes for READDIRPLUS. An entry that has gone meanwhile, or for which no descriptor is left, is
    /// listed without (node id 0), as `.` and `..` are.
    fn lookup_listed(&self, header: &InHeader, entry: &DirEntry<'_>) -> Entry {
        let name = entry.name.to_bytes();
        if name != b"." && name != b".." {
            let found = self
                .host
                .fs
                .lookup(Context::from(*header), header.nodeid, entry.name);
            if let Ok(found) = found {
                return found;
            }
        }
        Entry {
            inode: 0,
            generation: 0,
            attr: Attr {
                ino: entry.ino,
                mode: entry.type_ << 12,
                ..Default::default()
            },
            attr_timeout: std::time::Duration::ZERO,
            entry_timeout: std::time::Duration::ZERO,
        }
    }
}

fn open_flags(flags: u32) -> u32 {
    flags & OPEN_FLAGS.cast_unsigned()
}

/// Which special files a guest can make: what an unprivileged process can, and the character device 0:0,
/// overlayfs' whiteout.
fn special_file(args: &MknodIn) -> io::Result<()> {
    match args.mode & libc::S_IFMT {
        0 | libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK => Ok(()),
        libc::S_IFCHR if args.rdev == 0 => Ok(()),
        libc::S_IFCHR | libc::S_IFBLK => Err(io::Error::from_raw_os_error(libc::EPERM)),
        _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
    }
}

/// Runs `make`, which takes on the identity in `context` and puts it off again, and sees to it that it did:
/// the passthrough file system forgets to on some of its errors.
fn as_user<T>(
    context: &Context,
    entry: NewEntry<'_>,
    make: impl FnOnce(&std::ffi::CStr, Extensions) -> io::Result<T>,
) -> io::Result<T> {
    check_user(context)?;
    let identity = sys::Identity::current();
    let extensions = Extensions {
        secctx: None,
        sup_gids: entry.groups,
    };
    let had_groups = !extensions.sup_gids.is_empty();
    let made = make(entry.name.as_c_str(), extensions);
    if made.is_err() || had_groups {
        identity.restore(had_groups);
    }
    made
}

/// Whether requests of this user can be done as them.
///
/// # Errors
/// `EINVAL` when not.
pub(super) fn check_user(context: &Context) -> io::Result<()> {
    // For setresuid(2) this means "leave it as it is", which would be the server's own.
    if context.uid == GuestUid::from(u32::MAX) || context.gid == GuestGid::from(u32::MAX) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    Ok(())
}
