// SPDX-License-Identifier: Apache-2.0

//! Operations on files without a name: see [`super::unnamed`].

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::Mode;
use rustix::process::umask;
use virtiofsd::filesystem::{Context, Entry, OpenOptions, ZeroCopyReader, ZeroCopyWriter};
use virtiofsd::fuse::{CopyfilerangeIn, CreateIn, InHeader, Kstatfs, WRITE_KILL_PRIV};
use virtiofsd::soft_idmap::{GuestGid, Id};
use vm_memory::ByteValued;

use super::operations::{COPY_MAX, check_user};
use super::reply::Reply;
use super::request::{Operation, XATTR_SIZE_MAX};
use super::segments::Segments;
use super::server::Server;
use super::sys::Identity;
use super::transfer::{FileToGuest, GuestToFile};
use super::unnamed::{self, host_directory, host_file, is_unnamed};

impl Operation<'_> {
    /// Whether this, asked of `node`, is about an unnamed file.
    pub(super) fn is_on_unnamed(&self, node: u64) -> bool {
        match self {
            Operation::Tmpfile { .. } => true,
            Operation::Link { node: linked, .. } => is_unnamed(*linked),
            Operation::CopyFileRange(args) => is_unnamed(node) || is_unnamed(args.nodeid_out),
            _ => is_unnamed(node),
        }
    }
}

impl Server {
    /// Does what was asked of an unnamed file and answers.
    pub(super) fn answer_unnamed(
        &self,
        header: &InHeader,
        operation: Operation<'_>,
        data: &Segments<'_>,
        reply: Reply<'_>,
    ) -> u32 {
        let context = Context::from(*header);
        let node = header.nodeid;
        match operation {
            Operation::Tmpfile { args, groups } => {
                let made = self.make_unnamed(header, &args, &groups);
                return self.created(reply, made);
            }
            Operation::Link { node: linked, name } => {
                let linked = self.unnamed.link(&self.host, context, linked, node, name);
                return self.entry(reply, linked);
            }
            Operation::CopyFileRange(args) => return self.copy_unnamed(header, &args, reply),
            _ => {}
        }
        match self.unnamed.get(node) {
            Ok(file) => self.answer_file_of(&file, node, operation, data, reply),
            Err(error) => self.failed(reply, &error),
        }
    }

    fn answer_file_of(
        &self,
        file: &File,
        node: u64,
        operation: Operation<'_>,
        data: &Segments<'_>,
        reply: Reply<'_>,
    ) -> u32 {
        match operation {
            Operation::Getattr(_) => self.attr(reply, unnamed::attributes(file)),
            Operation::Setattr { attr, valid, .. } => {
                self.attr(reply, unnamed::set_attributes(file, &attr, valid))
            }
            // Through /proc of the guest: one open file of ours serves all of the guest's.
            Operation::Open { flags, .. } => {
                let truncated = match flags & libc::O_TRUNC.cast_unsigned() {
                    0 => Ok(()),
                    _ => rustix::fs::ftruncate(file, 0).map_err(io::Error::from),
                };
                self.opened(
                    reply,
                    truncated.map(|()| (Some(node), OpenOptions::empty())),
                )
            }
            Operation::Read(args) => self.answer_read(reply, args.size, |payload| {
                FileToGuest(payload).read_from_file_at(file, args.size as usize, args.offset, None)
            }),
            Operation::Write(args) => self.answer_write(reply, args.size, data, |data| {
                let size = args.size as usize;
                let len = GuestToFile(data).write_to_file_at(file, size, args.offset, None)?;
                if args.write_flags & WRITE_KILL_PRIV != 0 {
                    unnamed::drop_privileges(file)?;
                }
                Ok(len)
            }),
            // They are closed when they are forgotten.
            Operation::Release(_) | Operation::Flush(_) => self.done(reply, Ok(())),
            Operation::Fsync { data_only, .. } => {
                let synced = match data_only {
                    true => file.sync_data(),
                    false => file.sync_all(),
                };
                self.done(reply, synced)
            }
            Operation::Fallocate(args) => {
                let (offset, length) = (args.offset, args.length);
                self.done(reply, unnamed::allocate(file, args.mode, offset, length))
            }
            Operation::Lseek(args) => {
                self.found(reply, unnamed::seek(file, args.offset, args.whence))
            }
            Operation::Statfs => self.statistics_of(file, reply),
            Operation::Setxattr { .. }
            | Operation::Getxattr { .. }
            | Operation::Listxattr(_)
            | Operation::Removexattr(_) => self.xattr_of(file, operation, reply),
            // Not ENOSYS: the guest would never ask it again, of any file.
            _ => self.fail(reply, libc::EBADF),
        }
    }

    /// Makes a file as the user who asks, so that the host decides as it would for them.
    fn make_unnamed(
        &self,
        header: &InHeader,
        args: &CreateIn,
        groups: &[GuestGid],
    ) -> io::Result<(Entry, Option<u64>, OpenOptions)> {
        let context = Context::from(*header);
        check_user(&context)?;
        // As the server: who may make files in a directory need not be allowed to list it.
        let directory = host_directory(&self.host, context, header.nodeid)?;
        let identity = Identity::current();
        let (user, group) = (context.uid.into_inner(), context.gid.into_inner());
        let groups: Vec<u32> = groups.iter().map(|group| group.into_inner()).collect();
        // The kernel decides between it and a default ACL of the directory. The thread's own is 0.
        umask(Mode::from_raw_mode(args.umask & 0o777));
        let made = Identity::assume(user, group, &groups)
            .and_then(|()| self.unnamed.create(&directory, args.flags, args.mode));
        identity.restore(!groups.is_empty());
        umask(Mode::empty());
        let entry = made?;
        let handle = entry.inode;
        Ok((entry, Some(handle), OpenOptions::empty()))
    }

    fn statistics_of(&self, file: &File, reply: Reply<'_>) -> u32 {
        match rustix::fs::fstatvfs(file) {
            Ok(found) => {
                let short = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
                let out = Kstatfs {
                    blocks: found.f_blocks,
                    bfree: found.f_bfree,
                    bavail: found.f_bavail,
                    files: found.f_files,
                    ffree: found.f_ffree,
                    bsize: short(found.f_bsize),
                    namelen: short(found.f_namemax),
                    frsize: short(found.f_frsize),
                    ..Default::default()
                };
                reply.ok(&[out.as_slice()])
            }
            Err(error) => self.failed(reply, &error.into()),
        }
    }

    fn xattr_of(&self, file: &File, operation: Operation<'_>, reply: Reply<'_>) -> u32 {
        match operation {
            Operation::Setxattr {
                name,
                value,
                flags,
                extra,
            } => self.done(reply, unnamed::set_xattr(file, name, value, flags, extra)),
            Operation::Getxattr { name, size } => {
                self.xattr(reply, unnamed::xattr(file, name, size))
            }
            Operation::Listxattr(size) => {
                self.xattr_names(reply, size, unnamed::xattrs(file, XATTR_SIZE_MAX))
            }
            Operation::Removexattr(name) => {
                let removed = rustix::fs::fremovexattr(file, name.as_c_str());
                self.done(reply, removed.map_err(io::Error::from))
            }
            _ => self.fail(reply, libc::EBADF),
        }
    }

    fn copy_unnamed(&self, header: &InHeader, args: &CopyfilerangeIn, reply: Reply<'_>) -> u32 {
        let context = Context::from(*header);
        let file = |node, handle| -> io::Result<OwnedFd> {
            match is_unnamed(node) {
                true => Ok(self.unnamed.get(node)?.try_clone()?.into()),
                false => host_file(&self.host, context, node, handle),
            }
        };
        let copy = || {
            let from = file(header.nodeid, args.fh_in)?;
            let to = file(args.nodeid_out, args.fh_out)?;
            let (mut offset_in, mut offset_out) = (args.off_in, args.off_out);
            // Bounded as a copy between named files is.
            let length = usize::try_from(args.len.min(COPY_MAX)).unwrap_or(0);
            let offsets = (Some(&mut offset_in), Some(&mut offset_out));
            let copied = rustix::fs::copy_file_range(&from, offsets.0, &to, offsets.1, length)?;
            io::Result::Ok(copied)
        };
        self.written(reply, copy())
    }
}
