// SPDX-License-Identifier: Apache-2.0

//! The FUSE server: one chain in, its answer out, on whichever thread it came.
//!
//! It stands where virtiofsd has its own `Server`. That one reads descriptor chains of guest memory of another
//! type than ours, reads headers in place, hands on names unseen, and gives up the process on an answer without
//! room for its header and on offsets beyond 2^63, all of which a guest can send. The file system behind it is
//! virtiofsd's.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use virtiofsd::filesystem::{Context, FileSystem, FsOptions};
use virtiofsd::fuse::{
    InHeader, InitInCompat, InitOut, KERNEL_MINOR_VERSION, KERNEL_VERSION,
    MIN_KERNEL_MINOR_VERSION, Opcode, WriteIn,
};
use vm_memory::ByteValued;

use super::passthrough::Host;
use super::reply::Reply;
use super::request::{Dialect, MAX_DATA, MAX_REQUEST, Operation, RequestError, has_reply};
use super::segments::{Chain, Segments};
use super::unnamed::{Unnamed, is_unnamed};

/// Pages of [`MAX_DATA`] bytes.
const MAX_PAGES: u16 = 256;

/// Requests since the device was made.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// All of them.
    pub(super) requests: AtomicU64,
    /// Answered with an error, which for most is everyday life (`ENOENT`).
    pub(super) errors: AtomicU64,
    /// Broken ones.
    pub(super) malformed: AtomicU64,
    /// Bytes of file data read.
    pub(super) read_bytes: AtomicU64,
    /// Bytes of file data written.
    pub(super) written_bytes: AtomicU64,
}

/// A file system and what was agreed on about it. Shared by the device's threads.
pub(super) struct Server {
    pub(super) host: Host,
    pub(super) unnamed: Unnamed,
    negotiated: AtomicU64,
    pub(super) counters: Counters,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("negotiated", &self.options())
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

impl Server {
    /// A server of `host`; nothing is agreed on yet.
    pub(super) fn new(host: Host) -> Self {
        Self {
            host,
            unnamed: Unnamed::default(),
            negotiated: AtomicU64::new(0),
            counters: Counters::default(),
        }
    }

    /// Serves one chain; returns how many bytes of it were written, for the used ring.
    pub(super) fn handle(&self, chain: Chain<'_>, scratch: &mut Vec<u8>) -> u32 {
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        let Chain {
            mut readable,
            writable,
            ..
        } = chain;
        let readable_len = readable.len();
        let Some((header, body)) = take_header(&mut readable) else {
            return self.drop_malformed("it has no header");
        };
        let reply = if has_reply(header.opcode) {
            let Some(reply) = Reply::new(header.unique, writable) else {
                return self.drop_malformed("its answer has no room");
            };
            Some(reply)
        } else {
            None
        };
        if header.len as usize != readable_len {
            return self.refuse(reply, RequestError::Range("len"));
        }
        let mut body = body;
        let data = match take_body(&header, &mut body, scratch) {
            Ok(data) => data,
            Err(error) => return self.refuse(reply, error),
        };
        match Operation::parse(&header, scratch, self.dialect()) {
            Ok(operation) => match reply {
                Some(reply) => self.answer(&header, operation, &data, reply),
                None => self.forget(&header, operation),
            },
            Err(error) => self.refuse(reply, error),
        }
    }

    /// Forgets all inodes, handles and what was agreed on: the guest unmounted, or is gone.
    pub(super) fn destroy(&self) {
        self.host.fs.destroy();
        self.unnamed.clear();
        self.negotiated.store(0, Ordering::Relaxed);
    }

    /// What INIT agreed on, as FUSE_INIT's flags.
    pub(super) fn options(&self) -> FsOptions {
        FsOptions::from_bits_truncate(self.negotiated.load(Ordering::Relaxed))
    }

    /// Sets what INIT agreed on before the VM was saved.
    pub(super) fn restore_options(&self, bits: u64) {
        self.negotiated.store(bits, Ordering::Relaxed);
    }

    /// INIT: a new mount by the guest.
    pub(super) fn init(&self, args: InitInCompat, flags: u64) -> io::Result<InitOut> {
        if args.major < KERNEL_VERSION
            || (args.major == KERNEL_VERSION && args.minor < MIN_KERNEL_MINOR_VERSION)
        {
            return Err(io::Error::from_raw_os_error(libc::EPROTO));
        }
        let mut out = InitOut {
            major: KERNEL_VERSION,
            minor: KERNEL_MINOR_VERSION,
            ..Default::default()
        };
        if args.major > KERNEL_VERSION {
            // The guest asks again with this version.
            return Ok(out);
        }
        let supported = FsOptions::ASYNC_READ
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::BIG_WRITES
            | FsOptions::AUTO_INVAL_DATA
            | FsOptions::ASYNC_DIO
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::MAX_PAGES
            | FsOptions::SUBMOUNTS
            | FsOptions::INIT_EXT
            | FsOptions::CREATE_SUPP_GROUP
            | FsOptions::ALLOW_IDMAP;
        let capable = FsOptions::from_bits_truncate(flags);
        let enabled = capable & (self.host.fs.init(capable)? | supported);
        self.negotiated.store(enabled.bits(), Ordering::Relaxed);
        let [low, high] = [enabled.bits(), enabled.bits() >> 32]
            .map(|half| u32::try_from(half & u64::from(u32::MAX)).unwrap_or(0));
        out.max_readahead = args.max_readahead;
        out.flags = low;
        out.flags2 = high;
        out.max_background = u16::MAX;
        out.congestion_threshold = u16::MAX / 4 * 3;
        out.max_write = MAX_DATA;
        out.time_gran = 1;
        out.max_pages = MAX_PAGES;
        Ok(out)
    }

    fn dialect(&self) -> Dialect {
        let options = self.options();
        Dialect {
            setxattr_ext: options.contains(FsOptions::SETXATTR_EXT),
            supplementary_groups: options.contains(FsOptions::CREATE_SUPP_GROUP),
        }
    }

    /// Requests without an answer.
    fn forget(&self, header: &InHeader, operation: Operation<'_>) -> u32 {
        let context = Context::from(*header);
        match operation {
            Operation::Forget(_) if is_unnamed(header.nodeid) => self.unnamed.forget(header.nodeid),
            Operation::Forget(count) => self.host.fs.forget(context, header.nodeid, count),
            Operation::BatchForget(nodes) => {
                let (unnamed, named): (Vec<_>, _) =
                    nodes.into_iter().partition(|(node, _)| is_unnamed(*node));
                self.host.fs.batch_forget(context, named);
                for (node, _) in unnamed {
                    self.unnamed.forget(node);
                }
            }
            // INTERRUPT: nothing here waits for ever.
            _ => {}
        }
        0
    }

    fn refuse(&self, reply: Option<Reply<'_>>, error: RequestError) -> u32 {
        match error {
            RequestError::Unsupported(_) => {}
            _ => {
                self.counters.malformed.fetch_add(1, Ordering::Relaxed);
                log::debug!("fs: request refused: {error}");
            }
        }
        reply.map_or(0, |reply| self.fail(reply, error.errno()))
    }

    pub(super) fn fail(&self, reply: Reply<'_>, errno: i32) -> u32 {
        self.counters.errors.fetch_add(1, Ordering::Relaxed);
        reply.error(errno)
    }

    fn drop_malformed(&self, why: &str) -> u32 {
        self.counters.malformed.fetch_add(1, Ordering::Relaxed);
        log::debug!("fs: request dropped: {why}");
        0
    }
}

/// Copies the header out; what follows it is the second part.
fn take_header<'a>(readable: &mut Segments<'a>) -> Option<(InHeader, Segments<'a>)> {
    let body = readable.split_off(size_of::<InHeader>())?;
    let mut header = InHeader::default();
    readable.copy_to(header.as_mut_slice());
    Some((header, body))
}

/// Copies the rest of the request to `scratch`, apart from the data of a WRITE, which is returned.
fn take_body<'a>(
    header: &InHeader,
    body: &mut Segments<'a>,
    scratch: &mut Vec<u8>,
) -> Result<Segments<'a>, RequestError> {
    let data = if header.opcode == Opcode::Write as u32 {
        body.split_off(size_of::<WriteIn>())
            .ok_or(RequestError::Short)?
    } else {
        Segments::default()
    };
    if body.len() > MAX_REQUEST {
        return Err(RequestError::Long);
    }
    scratch.clear();
    scratch.resize(body.len(), 0);
    body.copy_to(scratch);
    Ok(data)
}
