// SPDX-License-Identifier: Apache-2.0

//! Files without a name.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use virtiofsd::fuse::{
    AttrOut, BatchForgetIn, CopyfilerangeIn, FallocateIn, ForgetIn, ForgetOne, GetxattrIn, LinkIn,
    LseekIn, LseekOut, SetattrIn, SetxattrIn, WRITE_KILL_PRIV, WriteOut,
};

use super::*;
use crate::devices::virtio::fs::unnamed::UNNAMED_MAX;

const FIRST: u64 = 1 << 63;
const FATTR_MODE: u32 = 1;
const FATTR_SIZE: u32 = 8;

impl Guest {
    fn tmpfile(&self, parent: u64, flags: i32, mode: u32) -> Result<EntryOut, i32> {
        let args = CreateIn {
            flags: (flags | libc::O_RDWR | libc::O_TMPFILE).cast_unsigned(),
            mode: libc::S_IFREG | mode,
            umask: 0o022,
            ..Default::default()
        };
        // Linux sends this for a name.
        let answer = self.call(Opcode::TmpFile, parent, &with_name(args.as_slice(), "/"));
        match answer.error {
            0 => Ok(answer.object()),
            error => Err(error),
        }
    }

    fn link(&self, node: u64, name: &str) -> Answer {
        let link = LinkIn { oldnodeid: node };
        self.call(Opcode::Link, ROOT, &with_name(link.as_slice(), name))
    }

    fn set(&self, node: u64, attr: SetattrIn) -> AttrOut {
        self.call(Opcode::Setattr, node, attr.as_slice()).object()
    }

    fn open_to_all() -> Self {
        let guest = Self::new();
        let mode = std::fs::Permissions::from_mode(0o777);
        std::fs::set_permissions(guest.directory.path(), mode).unwrap();
        guest
    }
}

#[test]
fn it_is_the_users_has_no_name_and_holds_what_is_written() {
    let mut guest = Guest::open_to_all();
    (guest.uid, guest.gid) = (1234, 5678);
    let file = guest.tmpfile(ROOT, 0, 0o4666).unwrap();
    assert!(file.nodeid >= FIRST);
    let attr = file.attr;
    assert_eq!((attr.nlink, attr.mode), (0, libc::S_IFREG | 0o4644));
    assert_eq!((attr.uid, attr.gid), (1234.into(), 5678.into()));
    assert_eq!(
        std::fs::read_dir(guest.directory.path()).unwrap().count(),
        0
    );

    let node = file.nodeid;
    let wrote: WriteOut = guest.write(node, node, 3, b"content", 0).object();
    assert_eq!(wrote.size, 7);
    assert_eq!(guest.read(node, node, 0, 100).payload, b"\0\0\0content");
    guest.write(node, node, 0, b"x", WRITE_KILL_PRIV);
    let attr: AttrOut = guest.call(Opcode::Getattr, node, &[0; 16]).object();
    assert_eq!((attr.attr.size, attr.attr.mode & 0o7777), (10, 0o644));

    let handle = guest.open(node, libc::O_RDWR | libc::O_TRUNC).unwrap();
    assert_eq!(guest.read(node, handle, 0, 100).payload, b"");
}

#[test]
fn a_link_makes_it_a_file_like_any_other_unless_it_was_excluded() {
    let guest = Guest::open_to_all();
    let node = guest.tmpfile(ROOT, 0, 0o600).unwrap().nodeid;
    guest.write(node, node, 0, b"whole", 0);
    let named: EntryOut = guest.link(node, "named").object();
    assert!(named.nodeid < FIRST);
    assert_eq!(named.attr.nlink, 1);
    assert_eq!(std::fs::read(guest.path("named")).unwrap(), b"whole");
    guest.write(node, node, 5, b"!", 0);
    assert_eq!(std::fs::read(guest.path("named")).unwrap(), b"whole!");
    assert_eq!(guest.link(node, "named").error, -libc::EEXIST);
    assert_eq!(guest.link(node, "..").error, -libc::EINVAL);

    let excluded = guest.tmpfile(ROOT, libc::O_EXCL, 0o600).unwrap().nodeid;
    assert_eq!(guest.link(excluded, "other").error, -libc::ENOENT);
    assert!(!guest.path("other").exists());
}

#[test]
fn attributes_space_and_copies() {
    let guest = Guest::open_to_all();
    let node = guest.tmpfile(ROOT, 0, 0o600).unwrap().nodeid;
    let attr = SetattrIn {
        valid: FATTR_MODE | FATTR_SIZE,
        mode: 0o640,
        size: 100,
        ..Default::default()
    };
    let attr = guest.set(node, attr).attr;
    assert_eq!((attr.mode & 0o7777, attr.size), (0o640, 100));
    let allocate = FallocateIn {
        fh: node,
        length: 1 << 16,
        ..Default::default()
    };
    let answer = guest.call(Opcode::Fallocate, node, allocate.as_slice());
    assert_eq!(answer.error, 0);
    let seek = LseekIn {
        fh: node,
        whence: libc::SEEK_HOLE.cast_unsigned(),
        ..Default::default()
    };
    let end: LseekOut = guest.call(Opcode::Lseek, node, seek.as_slice()).object();
    assert!(end.offset <= 1 << 16);

    guest.write(node, node, 0, b"to be copied", 0);
    let (target, handle) = guest.create(ROOT, "target", 0o600);
    for (from, to) in [
        ((node, node), (target.nodeid, handle)),
        ((target.nodeid, handle), (node, node)),
    ] {
        let copy = CopyfilerangeIn {
            fh_in: from.1,
            nodeid_out: to.0,
            fh_out: to.1,
            len: 12,
            ..Default::default()
        };
        let copied: WriteOut = guest
            .call(Opcode::CopyFileRange, from.0, copy.as_slice())
            .object();
        assert_eq!(copied.size, 12);
        assert_eq!(guest.read(to.0, to.1, 0, 12).payload, b"to be copied");
    }
    let forged = CopyfilerangeIn {
        fh_in: 12345,
        nodeid_out: node,
        len: 12,
        ..Default::default()
    };
    let answer = guest.call(Opcode::CopyFileRange, target.nodeid, forged.as_slice());
    assert_eq!(answer.error, -libc::EBADF);
}

#[test]
fn extended_attributes_go_with_it() {
    let guest = Guest::open_to_all();
    let node = guest.tmpfile(ROOT, 0, 0o600).unwrap().nodeid;
    let mut body = SetxattrIn {
        size: 5,
        ..Default::default()
    }
    .as_slice()
    .to_vec();
    body.extend_from_slice(b"user.a\0value");
    let answer = guest.call(Opcode::Setxattr, node, &body);
    if answer.error == -libc::EOPNOTSUPP {
        // A tmpfs of an older kernel has no user attributes.
        return;
    }
    assert_eq!(answer.error, 0);
    let size = |size| GetxattrIn {
        size,
        ..Default::default()
    };
    let get = with_name(size(100).as_slice(), "user.a");
    assert_eq!(guest.call(Opcode::Getxattr, node, &get).payload, b"value");
    let list = guest.call(Opcode::Listxattr, node, size(100).as_slice());
    assert_eq!(list.payload, b"user.a\0");
    let remove = with_name(&[], "user.a");
    assert_eq!(guest.call(Opcode::Removexattr, node, &remove).error, 0);
    assert_eq!(
        guest.call(Opcode::Getxattr, node, &get).error,
        -libc::ENODATA
    );
}

#[test]
fn a_directory_that_the_user_may_not_write_and_what_is_no_directory_are_refused() {
    let mut guest = Guest::new();
    let (file, _) = guest.create(ROOT, "file", 0o666);
    assert_eq!(
        guest.tmpfile(file.nodeid, 0, 0o600).unwrap_err(),
        -libc::ENOTDIR
    );
    assert_eq!(guest.tmpfile(99, 0, 0o600).unwrap_err(), -libc::EBADF);
    let mode = std::fs::Permissions::from_mode(0o733);
    std::fs::set_permissions(guest.directory.path(), mode).unwrap();
    (guest.uid, guest.gid) = (1234, 5678);
    assert!(
        guest.tmpfile(ROOT, 0, 0o600).is_ok(),
        "it need not be listed"
    );
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(guest.directory.path(), mode).unwrap();
    assert_eq!(guest.tmpfile(ROOT, 0, 0o600).unwrap_err(), -libc::EACCES);
    guest.uid = u32::MAX;
    assert_eq!(guest.tmpfile(ROOT, 0, 0o600).unwrap_err(), -libc::EINVAL);
    // The server is itself again after each.
    (guest.uid, guest.gid) = (0, 0);
    guest.create(ROOT, "after", 0o600);
    let after = std::fs::metadata(guest.path("after")).unwrap();
    assert_eq!((after.uid(), after.gid()), (0, 0));
}

#[test]
fn the_number_is_bounded_and_forgotten_ones_are_gone() {
    let guest = Guest::open_to_all();
    let nodes: Vec<u64> = (0..UNNAMED_MAX)
        .map(|_| guest.tmpfile(ROOT, 0, 0o600).unwrap().nodeid)
        .collect();
    assert_eq!(guest.tmpfile(ROOT, 0, 0o600).unwrap_err(), -libc::ENFILE);
    guest.tell(Opcode::Forget, nodes[0], ForgetIn { nlookup: 1 }.as_slice());
    let gone = |node| guest.call(Opcode::Getattr, node, &[0; 16]).error == -libc::EBADF;
    assert!(gone(nodes[0]) && !gone(nodes[1]));
    let mut batch = BatchForgetIn { count: 2, dummy: 0 }.as_slice().to_vec();
    for nodeid in [nodes[1], nodes[2]] {
        batch.extend_from_slice(ForgetOne { nodeid, nlookup: 1 }.as_slice());
    }
    guest.tell(Opcode::BatchForget, 0, &batch);
    assert!(gone(nodes[1]) && gone(nodes[2]) && !gone(nodes[3]));
    let again = guest.tmpfile(ROOT, 0, 0o600).unwrap().nodeid;
    assert!(!nodes.contains(&again), "a node id is never used twice");
    guest.call(Opcode::Destroy, 0, &[]);
    assert!(gone(again) && gone(nodes[9]));
}

#[test]
fn operations_that_make_no_sense_are_refused_one_by_one() {
    let guest = Guest::open_to_all();
    let node = guest.tmpfile(ROOT, 0, 0o600).unwrap().nodeid;
    for (opcode, body) in [
        (Opcode::Lookup, with_name(&[], "x")),
        (Opcode::Unlink, with_name(&[], "x")),
        (Opcode::Readlink, Vec::new()),
        (Opcode::Opendir, OpenIn::default().as_slice().to_vec()),
        (Opcode::Readdir, ReadIn::default().as_slice().to_vec()),
    ] {
        assert_eq!(guest.call(opcode, node, &body).error, -libc::EBADF);
        assert_eq!(guest.call(opcode, node + 1, &body).error, -libc::EBADF);
    }
    assert_eq!(guest.read(node, node, u64::MAX, 10).error, -libc::EINVAL);
    let short = Answer {
        error: -libc::EINVAL,
        payload: Vec::new(),
    };
    let args = ReadIn {
        size: 4096,
        ..Default::default()
    };
    assert_eq!(
        guest.call_with_room(Opcode::Read, node, args.as_slice(), 100),
        short
    );
}
