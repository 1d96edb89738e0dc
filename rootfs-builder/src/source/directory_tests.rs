// SPDX-License-Identifier: Apache-2.0

//! Tests of copying a directory. What needs root is passed over without it, saying so.

use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};

use rustix::fs::{CWD, XattrFlags, makedev, mknodat, utimensat};

use super::*;

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        fs::create_dir(place.path().join("from")).unwrap();
        fs::create_dir(place.path().join("to")).unwrap();
        Self(place)
    }

    fn from(&self, path: &str) -> PathBuf {
        self.0.path().join("from").join(path)
    }

    fn to(&self, path: &str) -> PathBuf {
        self.0.path().join("to").join(path)
    }

    fn copy(&self) -> Result<(), CopyError> {
        copy(&self.from(""), &self.to(""))
    }

    fn copied(&self, path: &str) -> Metadata {
        fs::symlink_metadata(self.to(path)).unwrap()
    }
}

fn set_time(path: &Path, seconds: i64) {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: 5,
    };
    let times = rustix::fs::Timestamps {
        last_access: time,
        last_modification: time,
    };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

#[test]
fn modes_times_links_and_special_files_are_kept() {
    let place = Place::new();
    fs::create_dir_all(place.from("a/b")).unwrap();
    fs::write(place.from("a/b/file"), "content").unwrap();
    fs::set_permissions(place.from("a/b/file"), fs::Permissions::from_mode(0o4711)).unwrap();
    fs::hard_link(place.from("a/b/file"), place.from("other")).unwrap();
    symlink("/etc/passwd", place.from("link")).unwrap();
    mknodat(
        CWD,
        place.from("pipe"),
        FileType::Fifo,
        Mode::from_raw_mode(0o640),
        0,
    )
    .unwrap();
    mknodat(
        CWD,
        place.from("socket"),
        FileType::Socket,
        Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    fs::set_permissions(place.from("a"), fs::Permissions::from_mode(0o1770)).unwrap();
    for (path, time) in [
        ("a/b/file", 10),
        ("link", 20),
        ("a/b", 30),
        ("a", 40),
        ("", 50),
    ] {
        set_time(&place.from(path), time);
    }
    place.copy().unwrap();
    for (path, time) in [
        ("a/b/file", 10),
        ("link", 20),
        ("a/b", 30),
        ("a", 40),
        ("", 50),
    ] {
        assert_eq!(
            (place.copied(path).mtime(), place.copied(path).mtime_nsec()),
            (time, 5),
            "{path}"
        );
    }
    assert_eq!(fs::read_to_string(place.to("other")).unwrap(), "content");
    assert_eq!(place.copied("a/b/file").mode() & 0o7777, 0o4711);
    assert_eq!(place.copied("a").mode() & 0o7777, 0o1770);
    assert_eq!(place.copied("a/b/file").ino(), place.copied("other").ino());
    assert_ne!(
        place.copied("other").ino(),
        fs::metadata(place.from("other")).unwrap().ino()
    );
    assert_eq!(
        fs::read_link(place.to("link")).unwrap(),
        Path::new("/etc/passwd")
    );
    assert!(place.copied("pipe").file_type().is_fifo());
    assert!(place.copied("socket").file_type().is_socket());
}

#[test]
fn holes_stay_holes() {
    let place = Place::new();
    let file = File::create(place.from("sparse")).unwrap();
    file.write_all_at(b"island", 3 << 20).unwrap();
    file.set_len(8 << 20).unwrap();
    place.copy().unwrap();
    assert!(fs::read(place.from("sparse")).unwrap() == fs::read(place.to("sparse")).unwrap());
    if fs::metadata(place.from("sparse")).unwrap().blocks() * 512 < 1 << 20 {
        assert!(
            place.copied("sparse").blocks() * 512 < 1 << 20,
            "the holes were written"
        );
    }
}

#[test]
fn owners_devices_and_attributes_are_kept() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: setting owners, devices and attributes needs root");
        return;
    }
    let place = Place::new();
    fs::write(place.from("file"), "").unwrap();
    fs::create_dir(place.from("directory")).unwrap();
    symlink("x", place.from("link")).unwrap();
    let set = |path: &str, name: &str, value: &[u8]| {
        rustix::fs::lsetxattr(place.from(path), name, value, XattrFlags::empty()).unwrap();
    };
    let device = makedev(8, 17);
    mknodat(
        CWD,
        place.from("disk"),
        FileType::BlockDevice,
        Mode::RUSR,
        device,
    )
    .unwrap();
    std::os::unix::fs::lchown(place.from("file"), Some(1), Some(2)).unwrap();
    std::os::unix::fs::lchown(place.from("link"), Some(3), Some(4)).unwrap();
    set(
        "file",
        "security.capability",
        b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
    );
    set("directory", "trusted.a", b"1\n2\0");
    set("link", "trusted.b", b"");
    set("disk", "trusted.c", b"c");
    place.copy().unwrap();
    for path in ["file", "directory", "link", "disk"] {
        let xattrs = |path: PathBuf| {
            let flags = OFlags::PATH | OFlags::NOFOLLOW;
            read_xattrs(&rustix::fs::open(path, flags, Mode::empty()).unwrap()).unwrap()
        };
        assert_eq!(xattrs(place.to(path)), xattrs(place.from(path)), "{path}");
        assert_eq!(xattrs(place.to(path)).len(), 1, "{path}");
    }
    assert_eq!(
        (place.copied("file").uid(), place.copied("file").gid()),
        (1, 2)
    );
    assert_eq!(
        (place.copied("link").uid(), place.copied("link").gid()),
        (3, 4)
    );
    assert_eq!(place.copied("disk").rdev(), device);
}

#[test]
fn copy_into_itself_is_refused() {
    let place = Place::new();
    fs::create_dir(place.from("inside")).unwrap();
    let error = copy(&place.from(""), &place.from("inside")).unwrap_err();
    assert!(matches!(error, CopyError::TargetInside { .. }));
}

#[test]
fn missing_directory_and_plain_file_are_refused_by_name() {
    let place = Place::new();
    let error = copy(&place.from("missing"), &place.to("")).unwrap_err();
    assert!(error.to_string().contains("missing"));
    fs::write(place.from("file"), "").unwrap();
    assert!(matches!(
        copy(&place.from("file"), &place.to("")),
        Err(CopyError::Open { .. })
    ));
}
