// SPDX-License-Identifier: Apache-2.0

//! What the guest does is on the host, as it did it.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};

use proptest::prelude::*;
use virtiofsd::fuse::{
    AttrOut, CopyfilerangeIn, FATTR_FH, FallocateIn, ForgetIn, FsyncIn, GetxattrIn, Kstatfs,
    LinkIn, LseekIn, LseekOut, MkdirIn, MknodIn, ReleaseIn, Rename2In, SetattrIn, SetxattrIn,
    WRITE_KILL_PRIV, WriteOut,
};

use super::*;

/// A listing of a directory as (name, node id) pairs.
fn list(guest: &Guest, node: u64, plus: bool, size: u32) -> Vec<(String, u64)> {
    let handle = guest
        .call(Opcode::Opendir, node, OpenIn::default().as_slice())
        .object::<OpenOut>()
        .fh;
    let opcode = if plus {
        Opcode::Readdirplus
    } else {
        Opcode::Readdir
    };
    let mut names = Vec::new();
    let mut offset = 0;
    loop {
        let args = ReadIn {
            fh: handle,
            offset,
            size,
            ..Default::default()
        };
        let answer = guest.call_with_room(opcode, node, args.as_slice(), size + 16);
        assert_eq!(answer.error, 0);
        if answer.payload.is_empty() {
            return names;
        }
        let mut rest = &answer.payload[..];
        while !rest.is_empty() {
            let mut node = 0;
            if plus {
                node = u64::from_le_bytes(rest[..8].try_into().unwrap());
                rest = &rest[size_of::<EntryOut>()..];
            }
            offset = u64::from_le_bytes(rest[8..16].try_into().unwrap());
            let len = u32::from_le_bytes(rest[16..20].try_into().unwrap()) as usize;
            names.push((
                String::from_utf8(rest[24..24 + len].to_vec()).unwrap(),
                node,
            ));
            rest = &rest[(24 + len).next_multiple_of(8)..];
        }
    }
}

#[test]
fn init_agrees_on_submounts_acls_and_nothing_the_server_lacks() {
    let guest = Guest::unmounted();
    let init: InitOut = guest.call(Opcode::Init, 0, &init_body()).object();
    let on = |bit: u32| init.flags & 1 << bit != 0;
    assert!(on(27), "submounts");
    assert!(on(20), "POSIX ACLs");
    assert!(on(28), "killpriv v2");
    assert!(!on(16), "writeback cache is off");
    assert!(!on(1) && !on(10), "locks stay in the guest");
    assert!(!on(4), "no lookups of dot and dot-dot");
    assert_eq!(init.max_write, 1 << 20);
    assert_eq!(init.map_alignment, 0, "no DAX");
    let old = InitInCompat {
        major: 7,
        minor: 26,
        ..Default::default()
    };
    assert_eq!(
        guest.call(Opcode::Init, 0, old.as_slice()).error,
        -libc::EPROTO
    );
}

#[test]
fn what_is_written_is_on_the_host_with_owner_and_mode() {
    let mut guest = Guest::new();
    std::fs::set_permissions(
        guest.directory.path(),
        std::fs::Permissions::from_mode(0o777),
    )
    .unwrap();
    (guest.uid, guest.gid) = (1234, 5678);
    let (entry, handle) = guest.create(ROOT, "file", 0o4640);
    let wrote: WriteOut = guest.write(entry.nodeid, handle, 3, b"content", 0).object();
    assert_eq!(wrote.size, 7);
    let metadata = std::fs::metadata(guest.path("file")).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (1234, 5678));
    assert_eq!(metadata.mode() & 0o7777, 0o4640);
    assert_eq!(std::fs::read(guest.path("file")).unwrap(), b"\0\0\0content");
    let read = guest.read(entry.nodeid, handle, 0, 100);
    assert_eq!(read.payload, b"\0\0\0content");
    guest.call(
        Opcode::Release,
        entry.nodeid,
        ReleaseIn {
            fh: handle,
            ..Default::default()
        }
        .as_slice(),
    );
    assert_eq!(guest.read(entry.nodeid, handle, 0, 1).error, -libc::EBADF);
    // The thread is itself again.
    assert!(rustix::process::geteuid().is_root() && rustix::process::getegid().is_root());
}

#[test]
fn what_the_host_writes_is_seen() {
    let guest = Guest::new();
    std::fs::write(guest.path("file"), b"one").unwrap();
    let node = guest.lookup(ROOT, "file").unwrap().nodeid;
    let handle = guest.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(node, handle, 0, 10).payload, b"one");
    std::fs::write(guest.path("file"), b"longer").unwrap();
    assert_eq!(guest.read(node, handle, 0, 10).payload, b"longer");
    assert_eq!(guest.lookup(ROOT, "missing").unwrap_err(), -libc::ENOENT);
}

#[test]
fn directories_links_and_renames() {
    let guest = Guest::new();
    let args = MkdirIn {
        mode: 0o750,
        umask: 0,
    };
    let made: EntryOut = guest
        .call(Opcode::Mkdir, ROOT, &with_name(args.as_slice(), "dir"))
        .object();
    let (file, _) = guest.create(made.nodeid, "file", 0o600);
    let link = LinkIn {
        oldnodeid: file.nodeid,
    };
    let linked: EntryOut = guest
        .call(Opcode::Link, ROOT, &with_name(link.as_slice(), "hard"))
        .object();
    assert_eq!(linked.nodeid, file.nodeid);
    assert_eq!(linked.attr.nlink, 2);
    let mut body = with_name(&[], "soft");
    body.extend_from_slice(b"/etc/passwd\0");
    let soft: EntryOut = guest.call(Opcode::Symlink, ROOT, &body).object();
    assert_eq!(
        guest.call(Opcode::Readlink, soft.nodeid, &[]).payload,
        b"/etc/passwd"
    );
    let rename = |from: &str, to: &str, flags| {
        let args = Rename2In {
            newdir: ROOT,
            flags,
            padding: 0,
        };
        let body = with_name(&with_name(args.as_slice(), from), to);
        guest.call(Opcode::Rename2, ROOT, &body).error
    };
    assert_eq!(
        rename("hard", "soft", libc::RENAME_NOREPLACE),
        -libc::EEXIST
    );
    assert_eq!(rename("hard", "soft", libc::RENAME_EXCHANGE), 0);
    assert!(guest.path("hard").is_symlink() && !guest.path("soft").is_symlink());
    assert_eq!(rename("soft", "hard", 0), 0);
    assert!(!guest.path("soft").exists());
    let busy = guest.call(Opcode::Rmdir, ROOT, &with_name(&[], "dir"));
    assert_eq!(busy.error, -libc::ENOTEMPTY);
    let gone = guest.call(Opcode::Unlink, made.nodeid, &with_name(&[], "file"));
    assert_eq!(gone.error, 0);
    let gone = guest.call(Opcode::Rmdir, ROOT, &with_name(&[], "dir"));
    assert_eq!(gone.error, 0);
    assert!(!guest.path("dir").exists());
}

#[test]
fn listings_hold_every_entry_once_whatever_their_size() {
    let guest = Guest::new();
    let mut expected: Vec<String> = (0..100).map(|n| format!("file-{n}")).collect();
    for name in &expected {
        std::fs::write(guest.path(name), b"").unwrap();
    }
    expected.extend([".".to_owned(), "..".to_owned()]);
    expected.sort();
    for (plus, size) in [(false, 4096), (false, 300), (true, 4096), (true, 600)] {
        let mut listed = list(&guest, ROOT, plus, size);
        listed.sort();
        for (name, node) in &listed {
            assert_eq!(*node > ROOT, plus && !name.starts_with('.'), "{name}");
        }
        let names: Vec<String> = listed.into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, expected, "plus {plus}, size {size}");
    }
}

#[test]
fn attributes_are_set_as_asked() {
    let guest = Guest::new();
    let (entry, handle) = guest.create(ROOT, "file", 0o600);
    let set = |attr: SetattrIn| -> AttrOut {
        guest
            .call(Opcode::Setattr, entry.nodeid, attr.as_slice())
            .object()
    };
    let changed = set(SetattrIn {
        valid: 1 | 2 | 4 | 8 | 16 | 32,
        mode: 0o755,
        uid: 11.into(),
        gid: 22.into(),
        size: 5000,
        atime: 1_000_000_000,
        atimensec: 7,
        mtime: 1_100_000_000,
        mtimensec: 9,
        ..Default::default()
    });
    assert_eq!(changed.attr.size, 5000);
    let metadata = std::fs::metadata(guest.path("file")).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (11, 22));
    assert_eq!(metadata.mode() & 0o7777, 0o755);
    assert_eq!(
        (metadata.atime(), metadata.atime_nsec()),
        (1_000_000_000, 7)
    );
    assert_eq!(
        (metadata.mtime(), metadata.mtime_nsec()),
        (1_100_000_000, 9)
    );
    let truncated = set(SetattrIn {
        valid: 8 | FATTR_FH,
        fh: handle,
        size: 10,
        ..Default::default()
    });
    assert_eq!(truncated.attr.size, 10);
}

#[test]
fn extended_attributes_go_through_and_the_hosts_own_do_not() {
    let guest = Guest::new();
    let (entry, _) = guest.create(ROOT, "file", 0o600);
    let set = |name: &str, value: &[u8]| {
        let args = SetxattrIn {
            size: u32::try_from(value.len()).unwrap(),
            ..Default::default()
        };
        let mut body = with_name(args.as_slice(), name);
        body.extend_from_slice(value);
        guest.call(Opcode::Setxattr, entry.nodeid, &body).error
    };
    let get = |name: &str, size: u32| {
        let args = GetxattrIn { size, padding: 0 };
        guest.call(
            Opcode::Getxattr,
            entry.nodeid,
            &with_name(args.as_slice(), name),
        )
    };
    assert_eq!(set("trusted.x", b"value"), 0);
    assert_eq!(get("trusted.x", 100).payload, b"value");
    assert_eq!(get("trusted.x", 0).payload[..4], 5u32.to_le_bytes());
    assert_eq!(get("trusted.x", 3).error, -libc::ERANGE);
    assert_eq!(get("trusted.y", 100).error, -libc::ENODATA);
    assert_eq!(set("security.selinux", b"x"), -libc::EOPNOTSUPP);
    assert_eq!(set("trusted.x\0", b"x"), -libc::EINVAL);
    // One that only the host set.
    let path = guest.path("file");
    rustix::fs::setxattr(
        &path,
        "security.hostlabel",
        b"x",
        rustix::fs::XattrFlags::empty(),
    )
    .unwrap();
    let args = GetxattrIn {
        size: 1000,
        padding: 0,
    };
    let listed = guest.call(Opcode::Listxattr, entry.nodeid, args.as_slice());
    assert_eq!(listed.payload, b"trusted.x\0");
    let removed = guest.call(
        Opcode::Removexattr,
        entry.nodeid,
        &with_name(&[], "trusted.x"),
    );
    assert_eq!(removed.error, 0);
    assert_eq!(get("trusted.x", 100).error, -libc::ENODATA);
}

#[test]
fn a_write_drops_file_capabilities_and_setuid() {
    let guest = Guest::new();
    let (entry, handle) = guest.create(ROOT, "file", 0o6755);
    // vfs_cap_data, revision 2, CAP_NET_RAW.
    let capability = [
        1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    let args = SetxattrIn {
        size: 20,
        ..Default::default()
    };
    let mut body = with_name(args.as_slice(), "security.capability");
    body.extend_from_slice(&capability);
    assert_eq!(guest.call(Opcode::Setxattr, entry.nodeid, &body).error, 0);
    assert_eq!(
        guest
            .write(entry.nodeid, handle, 0, b"x", WRITE_KILL_PRIV)
            .error,
        0
    );
    let path = guest.path("file");
    let mut buffer = [0; 64];
    assert_eq!(
        rustix::fs::getxattr(&path, "security.capability", &mut buffer),
        Err(rustix::io::Errno::NODATA)
    );
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o755);
}

#[test]
fn holes_allocation_copies_and_sync() {
    let guest = Guest::new();
    let (from, from_handle) = guest.create(ROOT, "from", 0o600);
    let (to, to_handle) = guest.create(ROOT, "to", 0o600);
    let allocate = FallocateIn {
        fh: from_handle,
        length: 1 << 20,
        ..Default::default()
    };
    assert_eq!(
        guest
            .call(Opcode::Fallocate, from.nodeid, allocate.as_slice())
            .error,
        0
    );
    assert_eq!(
        std::fs::metadata(guest.path("from")).unwrap().len(),
        1 << 20
    );
    guest.write(from.nodeid, from_handle, 4096, b"data", 0);
    let seek = LseekIn {
        fh: from_handle,
        offset: 0,
        whence: libc::SEEK_HOLE.cast_unsigned(),
        padding: 0,
    };
    let hole: LseekOut = guest
        .call(Opcode::Lseek, from.nodeid, seek.as_slice())
        .object();
    assert!(hole.offset <= 1 << 20);
    let whole = LseekIn { whence: 0, ..seek };
    assert_eq!(
        guest
            .call(Opcode::Lseek, from.nodeid, whole.as_slice())
            .error,
        -libc::EINVAL
    );
    let copy = CopyfilerangeIn {
        fh_in: from_handle,
        off_in: 4096,
        nodeid_out: to.nodeid,
        fh_out: to_handle,
        off_out: 1,
        len: 4,
        flags: 0,
    };
    let copied: WriteOut = guest
        .call(Opcode::CopyFileRange, from.nodeid, copy.as_slice())
        .object();
    assert_eq!(copied.size, 4);
    assert_eq!(std::fs::read(guest.path("to")).unwrap(), b"\0data");
    let sync = FsyncIn {
        fh: to_handle,
        ..Default::default()
    };
    for opcode in [Opcode::Fsync, Opcode::Flush] {
        let mut body = sync.as_slice().to_vec();
        body.resize(24, 0);
        assert_eq!(guest.call(opcode, to.nodeid, &body).error, 0);
    }
    assert_eq!(guest.call(Opcode::Syncfs, ROOT, &[0; 8]).error, 0);
    let statistics: Kstatfs = guest.call(Opcode::Statfs, ROOT, &[]).object();
    assert!(statistics.blocks > 0 && statistics.namelen == 255);
}

#[test]
fn fifos_and_whiteouts_can_be_made_and_device_nodes_not() {
    let guest = Guest::new();
    let make = |name: &str, mode: u32, rdev: u32| {
        let args = MknodIn {
            mode,
            rdev,
            umask: 0,
            padding: 0,
        };
        guest
            .call(Opcode::Mknod, ROOT, &with_name(args.as_slice(), name))
            .error
    };
    assert_eq!(make("fifo", libc::S_IFIFO | 0o600, 0), 0);
    assert_eq!(make("socket", libc::S_IFSOCK | 0o600, 0), 0);
    assert_eq!(make("whiteout", libc::S_IFCHR, 0), 0);
    assert_eq!(make("null", libc::S_IFCHR | 0o666, 0x103), -libc::EPERM);
    assert_eq!(make("disk", libc::S_IFBLK | 0o666, 0x800), -libc::EPERM);
    assert_eq!(make("link", libc::S_IFLNK | 0o666, 0), -libc::EINVAL);
    let kind = |name: &str| std::fs::metadata(guest.path(name)).unwrap().file_type();
    assert!(kind("fifo").is_fifo() && kind("socket").is_socket());
    assert!(kind("whiteout").is_char_device());
    assert!(!guest.path("null").exists() && !guest.path("disk").exists());
}

#[test]
fn a_forgotten_node_is_gone() {
    let guest = Guest::new();
    let (entry, _) = guest.create(ROOT, "file", 0o600);
    guest.lookup(ROOT, "file").unwrap();
    let forget = |count: u64| {
        guest.tell(
            Opcode::Forget,
            entry.nodeid,
            ForgetIn { nlookup: count }.as_slice(),
        );
    };
    let getattr = || guest.call(Opcode::Getattr, entry.nodeid, &[0; 16]).error;
    forget(1);
    assert_eq!(getattr(), 0);
    forget(1);
    assert_eq!(getattr(), -libc::EBADF);
    forget(u64::MAX);
    let mut batch = vec![1, 0, 0, 0, 0, 0, 0, 0];
    batch.extend_from_slice(&guest.lookup(ROOT, "file").unwrap().nodeid.to_le_bytes());
    batch.extend_from_slice(&1u64.to_le_bytes());
    guest.tell(Opcode::BatchForget, 0, &batch);
}

/// A mount of the host that goes with the test.
struct Mount(std::path::PathBuf);

impl Mount {
    fn tmpfs(at: &Path) -> rustix::io::Result<Self> {
        use rustix::mount::{MountFlags, mount};
        mount("tmpfs", at, "tmpfs", MountFlags::empty(), None)?;
        Ok(Self(at.to_owned()))
    }

    fn read_only(&self) {
        use rustix::mount::{MountFlags, mount_remount};
        mount_remount(&self.0, MountFlags::RDONLY, "").unwrap();
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn a_later_mount_is_seen_announced_and_kept_read_only() {
    // SAFETY: gives this test's thread a mount namespace of its own; nothing else changes.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.unwrap();
    rustix::mount::mount_change(
        "/",
        rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC,
    )
    .unwrap();
    let guest = Guest::new();
    std::fs::create_dir(guest.path("rootfs")).unwrap();
    std::fs::write(guest.path("rootfs/below"), b"").unwrap();
    let before = guest.lookup(ROOT, "rootfs").unwrap();
    assert_eq!(before.attr.flags & 1, 0);
    let mount = Mount::tmpfs(&guest.path("rootfs")).unwrap();
    let after = guest.lookup(ROOT, "rootfs").unwrap();
    assert_ne!(after.nodeid, before.nodeid);
    assert_eq!(after.attr.flags & 1, 1, "announced as a submount");
    assert_eq!(
        guest.lookup(after.nodeid, "below").unwrap_err(),
        -libc::ENOENT
    );
    std::fs::write(guest.path("rootfs/file"), b"").unwrap();
    mount.read_only();
    let args = CreateIn::default();
    let refused = guest.call(
        Opcode::Create,
        after.nodeid,
        &with_name(args.as_slice(), "other"),
    );
    assert_eq!(refused.error, -libc::EROFS);
    let node = guest.lookup(after.nodeid, "file").unwrap().nodeid;
    assert_eq!(guest.open(node, libc::O_RDWR), Err(-libc::EROFS));
}

#[test]
fn symbolic_links_of_the_host_are_not_followed() {
    let guest = Guest::new();
    symlink("/", guest.path("out")).unwrap();
    let node = guest.lookup(ROOT, "out").unwrap();
    assert_eq!(node.attr.mode & libc::S_IFMT, libc::S_IFLNK);
    assert_eq!(
        guest.lookup(node.nodeid, "etc").unwrap_err(),
        -libc::ENOTDIR
    );
    assert_eq!(guest.open(node.nodeid, libc::O_RDONLY), Err(-libc::EBADF));
    let target = guest.call(Opcode::Readlink, node.nodeid, &[]).payload;
    assert_eq!(std::ffi::OsStr::from_bytes(&target), "/");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_file_holds_what_was_written_last(
        writes in proptest::collection::vec(
            (0u64..5000, proptest::collection::vec(any::<u8>(), 1..3000)),
            1..20,
        ),
    ) {
        let guest = Guest::new();
        let (entry, handle) = guest.create(ROOT, "file", 0o600);
        let mut model = Vec::new();
        for (offset, data) in &writes {
            let end = *offset as usize + data.len();
            model.resize(model.len().max(end), 0);
            model[*offset as usize..end].copy_from_slice(data);
            prop_assert_eq!(guest.write(entry.nodeid, handle, *offset, data, 0).error, 0);
        }
        prop_assert_eq!(&std::fs::read(guest.path("file")).unwrap(), &model);
        prop_assert_eq!(guest.read(entry.nodeid, handle, 0, 9000).payload, model);
    }
}
