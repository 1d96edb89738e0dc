// SPDX-License-Identifier: Apache-2.0

//! A guest in a few lines: FUSE requests in guest memory, answers out of it, over a real directory.

mod device;
mod files;
mod hostile;
mod unnamed;

use std::path::Path;

use caisson_protocol::vm::{CachePolicy, FsConfig};
use tempfile::TempDir;
use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_WRITE;
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::mock::MockSplitQueue;
use virtiofsd::fuse::{
    CreateIn, EntryOut, InHeader, InitInCompat, InitInExt, InitOut, Opcode, OpenIn, OpenOut,
    OutHeader, ReadIn, WriteIn,
};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use super::passthrough::Host;
use super::segments::Chain;
use super::server::Server;

/// Where a request is put, and where its answer.
const REQUEST: u64 = 0x10_0000;
const ANSWER: u64 = 0x30_0000;
const MEMORY: usize = 0x60_0000;
const ROOT: u64 = 1;
const WRITABLE: u16 = VRING_DESC_F_WRITE as u16;

/// An answer: the error number as the guest gets it (0 or negative) and what follows the header.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    error: i32,
    payload: Vec<u8>,
}

impl Answer {
    fn object<T: ByteValued + Default>(&self) -> T {
        assert_eq!(self.error, 0, "request failed");
        let mut value = T::default();
        value
            .as_mut_slice()
            .copy_from_slice(&self.payload[..size_of::<T>()]);
        value
    }
}

/// A mounted guest.
struct Guest {
    directory: TempDir,
    server: Server,
    memory: GuestMemoryMmap,
    uid: u32,
    gid: u32,
}

fn config(directory: &Path) -> FsConfig {
    FsConfig {
        tag: "share".to_owned(),
        directory: directory.to_owned(),
        queues: 2,
        cache: CachePolicy::Auto,
    }
}

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap()
}

/// INIT as Linux 6.12 sends it: everything that it can.
fn init_body() -> Vec<u8> {
    let mut body = InitInCompat {
        major: 7,
        minor: 41,
        max_readahead: 128 << 10,
        flags: u32::MAX,
    }
    .as_slice()
    .to_vec();
    body.extend_from_slice(
        InitInExt {
            flags2: u32::MAX,
            ..Default::default()
        }
        .as_slice(),
    );
    body
}

impl Guest {
    /// A guest that has not said INIT yet.
    fn unmounted() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let host = Host::open(&config(directory.path())).unwrap();
        host.prepare_thread().unwrap();
        let server = Server::new(host);
        Self {
            directory,
            server,
            memory: memory(),
            uid: 0,
            gid: 0,
        }
    }

    fn new() -> Self {
        let guest = Self::unmounted();
        let init: InitOut = guest.call(Opcode::Init, 0, &init_body()).object();
        assert_eq!((init.major, init.minor), (7, 38));
        guest
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    fn request(&self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let header = InHeader {
            len: u32::try_from(size_of::<InHeader>() + body.len()).unwrap(),
            opcode,
            unique: 0x1234,
            nodeid: node,
            uid: self.uid.into(),
            gid: self.gid.into(),
            pid: 1,
            ..Default::default()
        };
        let mut bytes = header.as_slice().to_vec();
        bytes.extend_from_slice(body);
        bytes
    }

    /// Puts raw bytes through the ring's chain; returns the used length and the writable part.
    fn raw(&self, request: &[u8], room: u32) -> (u32, Vec<u8>) {
        self.memory
            .write_slice(request, GuestAddress(REQUEST))
            .unwrap();
        self.memory
            .write_slice(&vec![0xee; room as usize], GuestAddress(ANSWER))
            .unwrap();
        let queue = MockSplitQueue::new(&self.memory, 16);
        let mut descriptors = Vec::new();
        // In two pieces each, so that headers are split, too.
        let len = u32::try_from(request.len()).unwrap();
        for (base, len, flags) in [(REQUEST, len, 0), (ANSWER, room, WRITABLE)] {
            let first = len.min(13);
            for (at, len) in [(0, first), (first, len - first)] {
                if len > 0 {
                    let descriptor = Descriptor::new(base + u64::from(at), len, flags, 0);
                    descriptors.push(RawDescriptor::from(descriptor));
                }
            }
        }
        let chain = queue.build_desc_chain(&descriptors).unwrap();
        let chain = Chain::collect(&self.memory, chain).unwrap();
        let used = self.server.handle(chain, &mut Vec::new());
        assert!(used <= room, "used {used} of {room} bytes");
        let mut answer = vec![0; room as usize];
        self.memory
            .read_slice(&mut answer, GuestAddress(ANSWER))
            .unwrap();
        assert!(
            answer[used as usize..].iter().all(|byte| *byte == 0xee),
            "written beyond the used length"
        );
        (used, answer)
    }

    fn call_with_room(&self, opcode: Opcode, node: u64, body: &[u8], room: u32) -> Answer {
        let (used, bytes) = self.raw(&self.request(opcode as u32, node, body), room);
        let mut header = OutHeader::default();
        header.as_mut_slice().copy_from_slice(&bytes[..16]);
        assert_eq!(header.len, used, "length in the header and used length");
        assert_eq!(header.unique, 0x1234);
        Answer {
            error: header.error,
            payload: bytes[16..used as usize].to_vec(),
        }
    }

    fn call(&self, opcode: Opcode, node: u64, body: &[u8]) -> Answer {
        self.call_with_room(opcode, node, body, 0x2000)
    }

    /// A request without an answer.
    fn tell(&self, opcode: Opcode, node: u64, body: &[u8]) {
        let (used, _) = self.raw(&self.request(opcode as u32, node, body), 0);
        assert_eq!(used, 0);
    }

    fn lookup(&self, parent: u64, name: &str) -> Result<EntryOut, i32> {
        let answer = self.call(Opcode::Lookup, parent, &with_name(&[], name));
        match answer.error {
            0 => Ok(answer.object()),
            error => Err(error),
        }
    }

    fn create(&self, parent: u64, name: &str, mode: u32) -> (EntryOut, u64) {
        let args = CreateIn {
            flags: libc::O_RDWR.cast_unsigned(),
            mode: libc::S_IFREG | mode,
            ..Default::default()
        };
        let answer = self.call(Opcode::Create, parent, &with_name(args.as_slice(), name));
        let entry = answer.object();
        let opened = Answer {
            error: 0,
            payload: answer.payload[size_of::<EntryOut>()..].to_vec(),
        };
        (entry, opened.object::<OpenOut>().fh)
    }

    fn open(&self, node: u64, flags: i32) -> Result<u64, i32> {
        let args = OpenIn {
            flags: flags.cast_unsigned(),
            open_flags: 0,
        };
        let answer = self.call(Opcode::Open, node, args.as_slice());
        match answer.error {
            0 => Ok(answer.object::<OpenOut>().fh),
            error => Err(error),
        }
    }

    fn write(&self, node: u64, handle: u64, offset: u64, data: &[u8], write_flags: u32) -> Answer {
        let mut body = WriteIn {
            fh: handle,
            offset,
            size: u32::try_from(data.len()).unwrap(),
            write_flags,
            ..Default::default()
        }
        .as_slice()
        .to_vec();
        body.extend_from_slice(data);
        self.call(Opcode::Write, node, &body)
    }

    fn read(&self, node: u64, handle: u64, offset: u64, size: u32) -> Answer {
        let args = ReadIn {
            fh: handle,
            offset,
            size,
            ..Default::default()
        };
        self.call_with_room(Opcode::Read, node, args.as_slice(), size + 16)
    }
}

fn with_name(args: &[u8], name: &str) -> Vec<u8> {
    let mut body = args.to_vec();
    body.extend_from_slice(name.as_bytes());
    body.push(0);
    body
}
