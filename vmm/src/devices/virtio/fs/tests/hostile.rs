// SPDX-License-Identifier: Apache-2.0

//! A guest that lies.

use std::os::unix::fs::PermissionsExt;

use proptest::prelude::*;
use virtiofsd::fuse::{GetxattrIn, LinkIn, MkdirIn, MknodIn, RenameIn, SetxattrIn};

use super::*;

/// Names that lead elsewhere.
const BAD_NAMES: &[&str] = &[
    "", ".", "..", "/", "/etc", "../x", "a/b", "a/../b", "dir/", "./x",
];

#[test]
fn no_name_leads_out_of_its_directory() {
    let guest = Guest::new();
    let outside = tempfile::tempdir().unwrap();
    std::fs::create_dir(guest.path("dir")).unwrap();
    let (file, _) = guest.create(ROOT, "file", 0o600);
    let absolute = outside.path().join("new");
    let absolute = absolute.to_str().unwrap();
    for name in BAD_NAMES.iter().chain(&[absolute]) {
        let mkdir = with_name(MkdirIn::default().as_slice(), name);
        let mknod = MknodIn {
            mode: libc::S_IFREG | 0o600,
            ..Default::default()
        };
        let mut symlink = with_name(&[], name);
        symlink.extend_from_slice(b"target\0");
        let link = LinkIn {
            oldnodeid: file.nodeid,
        };
        let rename = RenameIn { newdir: ROOT };
        let requests = [
            (Opcode::Lookup, with_name(&[], name)),
            (Opcode::Unlink, with_name(&[], name)),
            (Opcode::Rmdir, with_name(&[], name)),
            (Opcode::Mkdir, mkdir),
            (Opcode::Mknod, with_name(mknod.as_slice(), name)),
            (Opcode::Symlink, symlink),
            (
                Opcode::Create,
                with_name(CreateIn::default().as_slice(), name),
            ),
            (Opcode::Link, with_name(link.as_slice(), name)),
            (
                Opcode::Rename,
                with_name(&with_name(rename.as_slice(), "file"), name),
            ),
            (
                Opcode::Rename,
                with_name(&with_name(rename.as_slice(), name), "new"),
            ),
        ];
        for (opcode, body) in requests {
            let answer = guest.call(opcode, ROOT, &body);
            assert_eq!(answer.error, -libc::EINVAL, "{opcode:?} of {name:?}");
        }
    }
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    assert_eq!(
        std::fs::read_dir(guest.directory.path()).unwrap().count(),
        2
    );
}

#[test]
fn device_nodes_and_fifos_of_the_host_are_never_opened() {
    let guest = Guest::new();
    let path = |name: &str| guest.path(name);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        path("null"),
        rustix::fs::FileType::CharacterDevice,
        rustix::fs::Mode::from_raw_mode(0o666),
        rustix::fs::makedev(1, 3),
    )
    .unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        path("fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o666),
        0,
    )
    .unwrap();
    for name in ["null", "fifo"] {
        let node = guest.lookup(ROOT, name).unwrap().nodeid;
        for flags in [
            libc::O_RDONLY,
            libc::O_RDWR,
            libc::O_WRONLY | libc::O_NONBLOCK,
            libc::O_PATH,
        ] {
            assert_eq!(guest.open(node, flags), Err(-libc::EBADF), "{name}");
        }
        // CREATE of what exists falls back to opening it.
        let create = with_name(CreateIn::default().as_slice(), name);
        assert_eq!(
            guest.call(Opcode::Create, ROOT, &create).error,
            -libc::EBADF
        );
        let truncate = virtiofsd::fuse::SetattrIn {
            valid: 8,
            ..Default::default()
        };
        assert_eq!(
            guest.call(Opcode::Setattr, node, truncate.as_slice()).error,
            -libc::EBADF
        );
        // Their attributes can still be changed.
        let mode = virtiofsd::fuse::SetattrIn {
            valid: 1,
            mode: 0o640,
            ..Default::default()
        };
        assert_eq!(guest.call(Opcode::Setattr, node, mode.as_slice()).error, 0);
        let metadata = std::fs::symlink_metadata(path(name)).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o777, 0o640);
        let get = GetxattrIn {
            size: 10,
            padding: 0,
        };
        assert_eq!(
            guest
                .call(
                    Opcode::Getxattr,
                    node,
                    &with_name(get.as_slice(), "trusted.x")
                )
                .error,
            -libc::ENODATA
        );
    }
}

#[test]
fn forged_nodes_and_handles_are_refused() {
    let guest = Guest::new();
    let (entry, handle) = guest.create(ROOT, "file", 0o600);
    for node in [0, 999, u64::MAX] {
        assert_eq!(guest.lookup(node, "file").unwrap_err(), -libc::EBADF);
        assert_eq!(guest.open(node, 0), Err(-libc::EBADF));
        // A handle is good for its own node alone.
        assert_eq!(guest.read(node, handle, 0, 1).error, -libc::EBADF);
    }
    for forged in [handle + 1, u64::MAX] {
        assert_eq!(guest.read(entry.nodeid, forged, 0, 1).error, -libc::EBADF);
        let written = guest.write(entry.nodeid, forged, 0, b"x", 0);
        assert_eq!(written.error, -libc::EBADF);
    }
}

#[test]
fn nothing_is_served_before_init() {
    let guest = Guest::unmounted();
    assert_eq!(guest.lookup(ROOT, "x").unwrap_err(), -libc::EBADF);
    assert_eq!(guest.open(ROOT, 0), Err(-libc::EBADF));
}

#[test]
fn sizes_and_offsets_over_their_whole_range() {
    let guest = Guest::new();
    let (entry, handle) = guest.create(ROOT, "file", 0o600);
    for offset in [1 << 63, u64::MAX, u64::MAX - 1] {
        assert!(guest.read(entry.nodeid, handle, offset, 16).error < 0);
        assert!(guest.write(entry.nodeid, handle, offset, b"x", 0).error < 0);
    }
    // More than there is room for, and more than a request may ask.
    for size in [1000, (1 << 20) + 1, u32::MAX] {
        let args = ReadIn {
            fh: handle,
            size,
            ..Default::default()
        };
        let answer = guest.call_with_room(Opcode::Read, entry.nodeid, args.as_slice(), 999);
        assert_eq!(answer.error, -libc::EINVAL);
    }
    // A write that claims more or less than it brings.
    for size in [0, 3, 5, u32::MAX] {
        let mut body = WriteIn {
            fh: handle,
            size,
            ..Default::default()
        }
        .as_slice()
        .to_vec();
        body.extend_from_slice(b"four");
        let answer = guest.call(Opcode::Write, entry.nodeid, &body);
        assert_eq!(answer.error, -libc::EINVAL, "{size}");
    }
    assert_eq!(std::fs::metadata(guest.path("file")).unwrap().len(), 0);
    // Room for more than was asked for is left alone.
    guest.write(entry.nodeid, handle, 0, b"0123456789", 0);
    let args = ReadIn {
        fh: handle,
        size: 4,
        ..Default::default()
    };
    let answer = guest.call_with_room(Opcode::Read, entry.nodeid, args.as_slice(), 500);
    assert_eq!(answer.payload, b"0123");
}

#[test]
fn the_headers_length_is_that_of_the_request() {
    let guest = Guest::new();
    let good = guest.request(Opcode::Lookup as u32, ROOT, b"name\0");
    for len in [0, 1, 39, 40, 44, 46, u32::MAX] {
        let mut bad = good.clone();
        bad[..4].copy_from_slice(&len.to_le_bytes());
        let (used, answer) = guest.raw(&bad, 200);
        assert_eq!(used, 16);
        assert_eq!(answer[4..8], (-libc::EINVAL).to_le_bytes());
    }
    // Without a header there is nobody to answer; without room no answer.
    for len in 0..40 {
        assert_eq!(guest.raw(&good[..len], 200).0, 0);
    }
    for room in 0..16 {
        assert_eq!(guest.raw(&good, room).0, 0);
    }
    assert_eq!(guest.raw(&vec![0; 100 << 10], 200).0, 16);
}

#[test]
fn an_unknown_operation_is_not_supported() {
    let guest = Guest::new();
    for opcode in [0, 7, 31, 33, 39, 48, 52, 4096, u32::MAX] {
        let (used, answer) = guest.raw(&guest.request(opcode, ROOT, &[0; 64]), 200);
        assert_eq!(used, 16);
        assert_eq!(answer[4..8], (-libc::ENOSYS).to_le_bytes(), "{opcode}");
    }
}

#[test]
fn nobody_is_created_as_the_server() {
    let mut guest = Guest::new();
    guest.uid = u32::MAX;
    let mkdir = with_name(MkdirIn::default().as_slice(), "dir");
    assert_eq!(guest.call(Opcode::Mkdir, ROOT, &mkdir).error, -libc::EINVAL);
    // A user who may not write here is refused by the host, too, and the thread is itself afterwards.
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(guest.directory.path(), mode).unwrap();
    (guest.uid, guest.gid) = (4321, 4321);
    assert_eq!(guest.call(Opcode::Mkdir, ROOT, &mkdir).error, -libc::EACCES);
    assert!(rustix::process::geteuid().is_root() && rustix::process::getegid().is_root());
}

#[test]
fn supplementary_groups_count_for_their_request_alone() {
    let mut guest = Guest::new();
    let directory = guest.directory.path();
    std::os::unix::fs::chown(directory, Some(0), Some(777)).unwrap();
    std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o770)).unwrap();
    (guest.uid, guest.gid) = (1000, 1000);
    let plain = |name: &str| {
        with_name(
            MkdirIn {
                mode: 0o755,
                umask: 0,
            }
            .as_slice(),
            name,
        )
    };
    let mut grouped = plain("with");
    for word in [16u32, 32, 1, 777] {
        grouped.extend_from_slice(&word.to_le_bytes());
    }
    assert_eq!(guest.call(Opcode::Mkdir, ROOT, &grouped).error, 0);
    assert_eq!(
        guest.call(Opcode::Mkdir, ROOT, &plain("without")).error,
        -libc::EACCES
    );
    assert!(rustix::process::getgroups().unwrap().is_empty());
}

#[test]
fn the_number_of_open_files_is_bounded() {
    let directory = tempfile::tempdir().unwrap();
    for name in 0..50 {
        std::fs::write(directory.path().join(name.to_string()), b"").unwrap();
    }
    let host = Host::open_limited(&config(directory.path()), 10).unwrap();
    host.prepare_thread().unwrap();
    let guest = Guest {
        directory,
        server: Server::new(host),
        memory: memory(),
        uid: 0,
        gid: 0,
    };
    assert_eq!(guest.call(Opcode::Init, 0, &init_body()).error, 0);
    let nodes: Vec<_> = (0..50)
        .map(|name| guest.lookup(ROOT, &name.to_string()))
        .collect();
    assert_eq!(nodes.iter().filter(|node| node.is_ok()).count(), 9);
    assert_eq!(nodes[49].as_ref().unwrap_err(), &-libc::ENFILE);
    // What there is goes on, and forgetting makes room.
    let node = nodes[0].as_ref().unwrap().nodeid;
    assert_eq!(guest.call(Opcode::Getattr, node, &[0; 16]).error, 0);
    guest.tell(Opcode::Forget, node, &1u64.to_le_bytes());
    assert!(guest.lookup(ROOT, "49").is_ok());
}

#[test]
fn a_value_longer_than_the_host_takes_is_refused() {
    let guest = Guest::new();
    let (entry, _) = guest.create(ROOT, "file", 0o600);
    let value = vec![7; (64 << 10) + 1];
    let args = SetxattrIn {
        size: u32::try_from(value.len()).unwrap(),
        ..Default::default()
    };
    let mut body = with_name(args.as_slice(), "trusted.x");
    body.extend_from_slice(&value);
    let answer = guest.call(Opcode::Setxattr, entry.nodeid, &body);
    assert_eq!(answer.error, -libc::EINVAL);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn any_bytes_are_answered_within_their_room(
        opcode in 0u32..55,
        node in prop_oneof![Just(ROOT), 0u64..5, any::<u64>()],
        body in proptest::collection::vec(any::<u8>(), 0..150),
        room in 0u32..3000,
    ) {
        let guest = Guest::new();
        std::fs::create_dir(guest.path("dir")).unwrap();
        guest.create(ROOT, "file", 0o600);
        guest.raw(&guest.request(opcode, node, &body), room);
        // Raw bytes, with no header of ours.
        guest.raw(&body, room);
    }
}
