// SPDX-License-Identifier: Apache-2.0

//! What operations come to, as answers.

use std::io;
use std::sync::atomic::Ordering;

use virtiofsd::filesystem::{Entry, GetxattrReply, OpenOptions};
use virtiofsd::fuse::{Attr, AttrOut, EntryOut, GetxattrOut, LseekOut, OpenOut, WriteOut};
use vm_memory::ByteValued;

use super::names::XattrName;
use super::reply::Reply;
use super::segments::Segments;
use super::server::Server;

impl Server {
    pub(super) fn entry(&self, reply: Reply<'_>, entry: io::Result<Entry>) -> u32 {
        match entry {
            Ok(entry) => reply.ok(&[EntryOut::from(entry).as_slice()]),
            Err(error) => self.failed(reply, &error),
        }
    }

    pub(super) fn attr(
        &self,
        reply: Reply<'_>,
        attr: io::Result<(Attr, std::time::Duration)>,
    ) -> u32 {
        match attr {
            Ok((attr, timeout)) => {
                let out = AttrOut {
                    attr_valid: timeout.as_secs(),
                    attr_valid_nsec: timeout.subsec_nanos(),
                    dummy: 0,
                    attr,
                };
                reply.ok(&[out.as_slice()])
            }
            Err(error) => self.failed(reply, &error),
        }
    }

    pub(super) fn opened(
        &self,
        reply: Reply<'_>,
        opened: io::Result<(Option<u64>, OpenOptions)>,
    ) -> u32 {
        match opened {
            Ok((handle, options)) => reply.ok(&[open_out(handle, options).as_slice()]),
            Err(error) => self.failed(reply, &error),
        }
    }

    /// READ: `read` puts up to `size` bytes into the payload it is given and says how many.
    pub(super) fn answer_read<'a>(
        &self,
        reply: Reply<'a>,
        size: u32,
        read: impl FnOnce(Segments<'a>) -> io::Result<usize>,
    ) -> u32 {
        let Some(payload) = reply.payload().filter(|room| room.len() >= size as usize) else {
            return self.fail(reply, libc::EINVAL);
        };
        match read(payload) {
            Ok(len) => {
                let counter = &self.counters.read_bytes;
                counter.fetch_add(len as u64, Ordering::Relaxed);
                reply.ok_in_place(len)
            }
            Err(error) => self.failed(reply, &error),
        }
    }

    /// WRITE: `write` writes the data, which must be `size` bytes, and says how many it has.
    pub(super) fn answer_write<'a>(
        &self,
        reply: Reply<'_>,
        size: u32,
        data: &Segments<'a>,
        write: impl FnOnce(Segments<'a>) -> io::Result<usize>,
    ) -> u32 {
        if data.len() != size as usize {
            return self.fail(reply, libc::EINVAL);
        }
        let written = write(data.clone());
        if let Ok(len) = written {
            let counter = &self.counters.written_bytes;
            counter.fetch_add(len as u64, Ordering::Relaxed);
        }
        self.written(reply, written)
    }

    pub(super) fn written(&self, reply: Reply<'_>, written: io::Result<usize>) -> u32 {
        match written {
            Ok(len) => {
                let out = WriteOut {
                    size: u32::try_from(len).unwrap_or(u32::MAX),
                    padding: 0,
                };
                reply.ok(&[out.as_slice()])
            }
            Err(error) => self.failed(reply, &error),
        }
    }

    /// LSEEK.
    pub(super) fn found(&self, reply: Reply<'_>, found: io::Result<u64>) -> u32 {
        match found {
            Ok(offset) => reply.ok(&[LseekOut { offset }.as_slice()]),
            Err(error) => self.failed(reply, &error),
        }
    }

    /// GETXATTR.
    pub(super) fn xattr(&self, reply: Reply<'_>, xattr: io::Result<GetxattrReply>) -> u32 {
        match xattr {
            Ok(GetxattrReply::Value(value)) => reply.ok(&[&value]),
            Ok(GetxattrReply::Count(size)) => reply.ok(&[xattr_size(size).as_slice()]),
            Err(error) => self.failed(reply, &error),
        }
    }

    pub(super) fn done(&self, reply: Reply<'_>, done: io::Result<()>) -> u32 {
        match done {
            Ok(()) => reply.ok(&[]),
            Err(error) => self.failed(reply, &error),
        }
    }

    /// The guest gets the error number and nothing else.
    pub(super) fn failed(&self, reply: Reply<'_>, error: &io::Error) -> u32 {
        self.fail(reply, error.raw_os_error().unwrap_or(libc::EIO))
    }

    pub(super) fn created(
        &self,
        reply: Reply<'_>,
        made: io::Result<(Entry, Option<u64>, OpenOptions)>,
    ) -> u32 {
        match made {
            Ok((entry, handle, options)) => {
                let opened = open_out(handle, options);
                reply.ok(&[EntryOut::from(entry).as_slice(), opened.as_slice()])
            }
            Err(error) => self.failed(reply, &error),
        }
    }

    /// The names of attributes that the guest may see, or how long they are when it asks with `size` 0.
    pub(super) fn xattr_names(
        &self,
        reply: Reply<'_>,
        size: u32,
        names: io::Result<Vec<u8>>,
    ) -> u32 {
        let names = names.map(|names| {
            let allowed = names
                .split_inclusive(|byte| *byte == 0)
                .filter(|name| name.strip_suffix(&[0]).is_some_and(XattrName::is_allowed));
            allowed.flatten().copied().collect::<Vec<u8>>()
        });
        match names {
            Ok(names) if size == 0 => {
                let len = u32::try_from(names.len()).unwrap_or(u32::MAX);
                reply.ok(&[xattr_size(len).as_slice()])
            }
            Ok(names) if names.len() > size as usize => self.fail(reply, libc::ERANGE),
            Ok(names) => reply.ok(&[&names]),
            Err(error) => self.failed(reply, &error),
        }
    }
}

fn open_out(handle: Option<u64>, options: OpenOptions) -> OpenOut {
    OpenOut {
        fh: handle.unwrap_or(0),
        open_flags: options.bits(),
        padding: 0,
    }
}

fn xattr_size(size: u32) -> GetxattrOut {
    GetxattrOut { size, padding: 0 }
}
