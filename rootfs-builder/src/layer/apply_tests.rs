// SPDX-License-Identifier: Apache-2.0

//! Tests of applying layers: what they must make, and what they must never do.
//!
//! Devices, other owners and `trusted.` attributes need root; those tests say so and pass over without it.

use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::PathBuf;

use super::super::entry::PathError;
use super::super::test_tar::{TIME, TestTar};
use super::*;
use crate::limits::{LimitError, Limits};

/// A tree with a file beside it that no layer may touch.
struct Place {
    directory: tempfile::TempDir,
    applier: LayerApplier,
}

impl Place {
    fn new() -> Self {
        Self::with(Limits::default())
    }

    fn with(limits: Limits) -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("root")).unwrap();
        fs::create_dir(directory.path().join("outside")).unwrap();
        fs::write(directory.path().join("outside/file"), "untouched").unwrap();
        let applier =
            LayerApplier::new(&directory.path().join("root"), Budget::new(limits)).unwrap();
        Self { directory, applier }
    }

    fn layer(&mut self, tar: TestTar) -> Result<(), LayerError> {
        let result = self.applier.apply(tar.finish().as_slice());
        // Whatever happened, it happened inside.
        let outside: Vec<_> = fs::read_dir(self.directory.path().join("outside"))
            .unwrap()
            .collect();
        assert_eq!(outside.len(), 1);
        let file = fs::read_to_string(self.directory.path().join("outside/file")).unwrap();
        assert_eq!(file, "untouched");
        assert_eq!(fs::read_dir(self.directory.path()).unwrap().count(), 2);
        result
    }

    /// Applies each layer, all of which must be sound.
    fn layers(layers: Vec<TestTar>) -> Self {
        let mut place = Self::new();
        for layer in layers {
            place.layer(layer).unwrap();
        }
        place
    }

    fn path(&self, path: &str) -> PathBuf {
        self.directory.path().join("root").join(path)
    }

    fn stat(&self, path: &str) -> Metadata {
        fs::symlink_metadata(self.path(path)).unwrap()
    }

    fn exists(&self, path: &str) -> bool {
        fs::symlink_metadata(self.path(path)).is_ok()
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap()
    }
}

fn cause(result: Result<(), LayerError>) -> EntryError {
    match result {
        Err(LayerError::Entry { source, .. }) => source,
        other => panic!("expected an entry to be refused: {other:?}"),
    }
}

fn without_root(what: &str) -> bool {
    let missing = !rustix::process::geteuid().is_root();
    if missing {
        eprintln!("skipped: {what} needs root");
    }
    missing
}

#[test]
fn files_links_and_directories_are_made_with_modes_and_times() {
    let place = Place::layers(vec![
        TestTar::new()
            .member(b'5', b"etc/", b"", b"", |header| header.set_mode(0o2750))
            .member(b'0', b"etc/suid", b"", b"#!", |header| {
                header.set_mode(0o4755)
            })
            .pax(&[("mtime", b"1234.5"), ("atime", b"99.25")])
            .file("etc/timed", "t")
            .symlink("etc/link", "../../../../outside/file")
            .hard_link("etc/again", "etc/suid")
            .fifo("pipe"),
    ]);
    assert_eq!(place.stat("etc").mode() & 0o7777, 0o2750);
    assert_eq!(place.stat("etc").mtime(), TIME as i64);
    assert_eq!(place.stat("etc/suid").mode() & 0o7777, 0o4755);
    assert_eq!(place.stat("etc/suid").nlink(), 2);
    assert_eq!(place.stat("etc/suid").ino(), place.stat("etc/again").ino());
    let timed = place.stat("etc/timed");
    assert_eq!((timed.mtime(), timed.mtime_nsec()), (1234, 500_000_000));
    assert_eq!((timed.atime(), timed.atime_nsec()), (99, 250_000_000));
    let target = fs::read_link(place.path("etc/link")).unwrap();
    assert_eq!(target.to_str().unwrap(), "../../../../outside/file");
    assert_eq!(place.stat("etc/link").mtime(), TIME as i64);
    assert!(place.stat("pipe").file_type().is_fifo());
    assert_eq!(place.stat("pipe").mode() & 0o7777, 0o644);
}

#[test]
fn root_entry_sets_the_root_itself() {
    let place = Place::layers(vec![
        TestTar::new()
            .member(b'5', b"./", b"", b"", |header| {
                header.set_mode(0o711);
                header.set_mtime(77);
            })
            .file("./a", ""),
    ]);
    assert_eq!(
        (place.stat("").mode() & 0o7777, place.stat("").mtime()),
        (0o711, 77)
    );
    let mut place = Place::new();
    let error = cause(place.layer(TestTar::new().file("/", "x")));
    assert!(matches!(error, EntryError::RootNotDirectory));
}

#[test]
fn missing_parents_are_made_with_a_time_that_does_not_change() {
    let place = Place::layers(vec![TestTar::new().file("a/b/c", "x")]);
    for path in ["a", "a/b"] {
        assert_eq!(place.stat(path).mode() & 0o7777, 0o755);
        assert_eq!(place.stat(path).mtime(), TIME as i64);
    }
}

#[test]
fn directory_keeps_its_time_when_a_later_layer_changes_what_is_in_it() {
    let place = Place::layers(vec![
        TestTar::new().directory("d/").file("d/gone", ""),
        TestTar::new().file("d/new", "").file("d/.wh.gone", ""),
    ]);
    assert_eq!(place.stat("d").mtime(), TIME as i64);
    assert!(place.exists("d/new") && !place.exists("d/gone"));
}

#[test]
fn owners_devices_and_attributes_are_kept() {
    if without_root("setting owners, devices and attributes") {
        return;
    }
    let capability = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\n";
    let place = Place::layers(vec![
        TestTar::new()
            .pax(&[
                ("SCHILY.xattr.security.capability", capability),
                ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
                ("uid", b"3000000000"),
            ])
            .member(b'0', b"ping", b"", b"x", |header| header.set_gid(12))
            .pax(&[("SCHILY.xattr.trusted.on-link", b"yes")])
            .member(b'2', b"link", b"nowhere", b"", |header| header.set_uid(13))
            .pax(&[("SCHILY.xattr.trusted.on-device", b"yes")])
            .device(b'3', "null", 1, 3)
            .device(b'4', "disk", 8, 17)
            .member(b'5', b"home", b"", b"", |header| header.set_uid(1000)),
    ]);
    assert_eq!(
        (place.stat("ping").uid(), place.stat("ping").gid()),
        (3_000_000_000, 12)
    );
    let attribute = |path: &str, name: &str| {
        let mut value = vec![0; 64];
        let length = rustix::fs::lgetxattr(place.path(path), name, value.as_mut_slice())?;
        value.truncate(length);
        Ok::<_, Errno>(value)
    };
    assert_eq!(
        attribute("ping", "security.capability").unwrap(),
        capability
    );
    assert_eq!(
        attribute("ping", "trusted.overlay.redirect"),
        Err(Errno::NODATA)
    );
    assert_eq!(attribute("link", "trusted.on-link").unwrap(), b"yes");
    assert_eq!(attribute("null", "trusted.on-device").unwrap(), b"yes");
    assert_eq!(place.stat("link").uid(), 13);
    assert_eq!(place.stat("home").uid(), 1000);
    assert!(place.stat("null").file_type().is_char_device());
    assert_eq!(place.stat("null").rdev(), makedev(1, 3));
    assert!(place.stat("disk").file_type().is_block_device());
    assert_eq!(place.stat("disk").rdev(), makedev(8, 17));
}

#[test]
fn sparse_file_has_its_holes_and_content() {
    let place = Place::layers(vec![
        TestTar::new()
            .pax(&[
                ("GNU.sparse.map", b"0,3,1048576,4"),
                ("GNU.sparse.size", b"8388608"),
                ("GNU.sparse.name", b"sparse"),
            ])
            .member(b'0', b"GNUSparseFile.1/sparse", b"", b"abcdefg", |_| {}),
    ]);
    let content = fs::read(place.path("sparse")).unwrap();
    assert_eq!(content.len(), 8 << 20);
    assert_eq!(
        (&content[..4], &content[1 << 20..(1 << 20) + 5]),
        (&b"abc\0"[..], &b"defg\0"[..])
    );
    assert!(
        place.stat("sparse").blocks() * 512 < 1 << 20,
        "the holes were written"
    );
}

#[test]
fn climbing_names_are_refused_absolute_ones_stay_inside() {
    for name in ["../outside/x", "a/../../outside/x", ".."] {
        let error = cause(Place::new().layer(TestTar::new().file(name, "x")));
        assert!(
            matches!(error, EntryError::Path(PathError::ParentComponent)),
            "{name}"
        );
    }
    let place = Place::layers(vec![TestTar::new().file("/outside/file", "mine")]);
    assert_eq!(place.read("outside/file"), "mine");
}

#[test]
fn linked_parents_lead_back_into_the_tree_or_nowhere() {
    let mut place = Place::new();
    let outside = place.directory.path().join("outside");
    let outside = outside.to_str().unwrap();
    // The link's own target exists on the host, and not in the image.
    for target in [
        outside,
        "../outside",
        "../../../../../../..",
        "/proc/self/cwd",
    ] {
        let tar = TestTar::new()
            .symlink("escape", target)
            .file("escape/file", "changed");
        match place.layer(tar) {
            // Enough ".." end at the root of the tree.
            Ok(()) => assert_eq!(place.read("file"), "changed"),
            Err(error) => assert!(
                matches!(
                    &error,
                    LayerError::Entry { source: EntryError::ParentNotDirectory(path), .. }
                        if path == "escape"
                ),
                "{error:?}"
            ),
        }
    }
}

#[test]
fn linked_parent_inside_the_tree_is_followed() {
    let place = Place::layers(vec![
        TestTar::new()
            .directory("usr/lib/")
            .symlink("lib", "/usr/lib")
            .symlink("bin", "usr/bin"),
        TestTar::new().file("lib/libc.so", "c"),
    ]);
    assert_eq!(place.read("usr/lib/libc.so"), "c");
    assert!(place.stat("lib").is_symlink());
}

#[test]
fn parent_that_is_a_file_is_refused() {
    let error = cause(Place::new().layer(TestTar::new().file("a", "").file("a/b", "")));
    assert!(matches!(error, EntryError::ParentNotDirectory(path) if path == "a"));
}

#[test]
fn link_device_or_fifo_is_replaced_and_never_written_through() {
    let mut place = Place::new();
    let outside = place.directory.path().join("outside/file");
    place
        .layer(
            TestTar::new()
                .symlink("a", outside.to_str().unwrap())
                .fifo("b"),
        )
        .unwrap();
    // Writing through the fifo would block for ever.
    place
        .layer(TestTar::new().file("a", "mine").file("b", "mine"))
        .unwrap();
    assert_eq!(
        (place.read("a"), place.read("b")),
        ("mine".into(), "mine".into())
    );
    if without_root("making a device") {
        return;
    }
    // Writing through this one (/dev/full) would fail.
    place.layer(TestTar::new().device(b'3', "c", 1, 7)).unwrap();
    place.layer(TestTar::new().file("c", "mine")).unwrap();
    assert_eq!(place.read("c"), "mine");
}

#[test]
fn directory_entry_replaces_a_link_to_a_directory() {
    let place = Place::layers(vec![
        TestTar::new()
            .directory("real/")
            .file("real/kept", "")
            .symlink("d", "real"),
        TestTar::new().directory("d/").file("d/new", ""),
    ]);
    assert!(place.stat("d").is_dir());
    assert!(place.exists("real/kept") && !place.exists("real/new"));
}

#[test]
fn file_replaces_a_directory_and_all_it_holds() {
    let place = Place::layers(vec![
        TestTar::new()
            .directory("d/sub/")
            .file("d/sub/x", "")
            .file("d/y", ""),
        TestTar::new().file("d", "now a file"),
    ]);
    assert_eq!(place.read("d"), "now a file");
}

#[test]
fn hard_links_lead_inside_or_are_refused() {
    let outside = "../outside/file";
    let error = cause(Place::new().layer(TestTar::new().hard_link("a", outside)));
    assert!(matches!(error, EntryError::LinkPath { .. }));
    let mut place = Place::new();
    let host = place.directory.path().join("outside/file");
    let error = cause(place.layer(TestTar::new().hard_link("a", host.to_str().unwrap())));
    assert!(matches!(error, EntryError::LinkTarget(_)));
    // Through a link that points out.
    let directory = place.directory.path().join("outside");
    let tar = TestTar::new()
        .symlink("way", directory.to_str().unwrap())
        .hard_link("a", "way/file");
    assert!(matches!(cause(place.layer(tar)), EntryError::LinkTarget(_)));
    // To a link that points out: a second name of the link, not of what it leads to.
    let tar = TestTar::new()
        .symlink("l", host.to_str().unwrap())
        .hard_link("b", "l");
    place.layer(tar).unwrap();
    assert!(place.stat("b").is_symlink());
    let error = cause(place.layer(TestTar::new().directory("d").hard_link("e", "d")));
    assert!(matches!(error, EntryError::LinkToDirectory(_)));
    let error = cause(place.layer(TestTar::new().hard_link("e", "/")));
    assert!(matches!(error, EntryError::LinkToDirectory(_)));
}

#[test]
fn hard_link_to_itself_keeps_the_file_and_to_its_own_directory_is_refused() {
    let mut place = Place::new();
    place
        .layer(TestTar::new().file("a", "kept").hard_link("./a", "/a"))
        .unwrap();
    assert_eq!(place.read("a"), "kept");
    let error = cause(place.layer(TestTar::new().file("d/x", "").hard_link("d", "d/x")));
    assert!(matches!(error, EntryError::LinkTarget(_)));
}

#[test]
fn hard_link_crosses_layers() {
    let place = Place::layers(vec![
        TestTar::new().file("a", "one"),
        TestTar::new().hard_link("b", "a"),
        TestTar::new().file(".wh.a", ""),
    ]);
    assert!(!place.exists("a"));
    assert_eq!(place.read("b"), "one");
}

#[test]
fn whiteout_deletes_from_lower_layers_only_whatever_the_order() {
    for whiteout_first in [true, false] {
        let upper = if whiteout_first {
            TestTar::new()
                .file(".wh.f", "")
                .file("f", "new")
                .file("d/.wh.x", "")
        } else {
            TestTar::new()
                .file("f", "new")
                .file(".wh.f", "")
                .file("d/.wh.x", "")
        };
        let place = Place::layers(vec![
            TestTar::new()
                .file("f", "old")
                .file("d/x", "")
                .file("d/y", ""),
            upper,
        ]);
        assert_eq!(place.read("f"), "new", "whiteout first: {whiteout_first}");
        assert!(!place.exists("d/x") && place.exists("d/y"));
    }
}

#[test]
fn whiteout_of_a_directory_keeps_what_the_layer_puts_there() {
    for whiteout_first in [true, false] {
        let upper = if whiteout_first {
            TestTar::new().file(".wh.d", "").file("d/new", "")
        } else {
            TestTar::new().file("d/new", "").file(".wh.d", "")
        };
        let place = Place::layers(vec![
            TestTar::new().file("d/old", "").file("d/sub/old", ""),
            upper,
        ]);
        assert!(place.exists("d/new"), "whiteout first: {whiteout_first}");
        assert!(!place.exists("d/old") && !place.exists("d/sub"));
    }
}

#[test]
fn opaque_directory_hides_all_of_the_lower_layers_whatever_the_order() {
    for opaque_first in [true, false] {
        let upper = if opaque_first {
            TestTar::new()
                .directory("d/")
                .file("d/.wh..wh..opq", "")
                .file("d/sub/new", "")
        } else {
            TestTar::new()
                .directory("d/")
                .file("d/sub/new", "")
                .file("d/.wh..wh..opq", "")
        };
        let place = Place::layers(vec![
            TestTar::new()
                .file("d/old", "")
                .file("d/sub/old", "")
                .file("e", ""),
            upper,
        ]);
        assert!(place.exists("d/sub/new") && place.exists("e"));
        assert!(
            !place.exists("d/old") && !place.exists("d/sub/old"),
            "first: {opaque_first}"
        );
    }
}

#[test]
fn opaque_in_the_root_empties_the_image() {
    let place = Place::layers(vec![
        TestTar::new().file("a", "").file("d/b", ""),
        TestTar::new().file(".wh..wh..opq", "").file("c", ""),
    ]);
    assert!(!place.exists("a") && !place.exists("d") && place.exists("c"));
}

#[test]
fn whiteout_through_a_link_stays_inside() {
    let mut place = Place::new();
    let outside = place.directory.path().join("outside");
    place
        .layer(TestTar::new().symlink("way", outside.to_str().unwrap()))
        .unwrap();
    place
        .layer(
            TestTar::new()
                .file("way/.wh.file", "")
                .file("way/.wh..wh..opq", ""),
        )
        .unwrap();
}

#[test]
fn whiteout_deletes_a_link_and_not_what_it_leads_to() {
    let place = Place::layers(vec![
        TestTar::new().file("real/x", "").symlink("d", "real"),
        TestTar::new().file(".wh.d", ""),
    ]);
    assert!(!place.exists("d") && place.exists("real/x"));
}

#[test]
fn odd_whiteouts_are_refused_or_ignored() {
    for name in [".wh.", ".wh..", "d/.wh...", ".wh.d/x", ".wh..wh..opq/x"] {
        let error = cause(Place::new().layer(TestTar::new().file(name, "")));
        assert!(matches!(error, EntryError::Whiteout), "{name}: {error:?}");
    }
    let place = Place::layers(vec![
        TestTar::new()
            .directory(".wh..wh.plnk/")
            .file(".wh..wh.plnk/1.2", "")
            .file(".wh..wh.aufs", "")
            .file("gone/.wh.nothing", "")
            .file(".wh.nothing", ""),
    ]);
    assert_eq!(fs::read_dir(place.path("")).unwrap().count(), 0);
}

#[test]
fn limits_hold_over_all_layers_together() {
    let limits = Limits {
        max_entries: 3,
        ..Limits::default()
    };
    let mut place = Place::with(limits);
    place
        .layer(TestTar::new().file("a", "").file("b", ""))
        .unwrap();
    let error = cause(place.layer(TestTar::new().file("c", "").file("d", "")));
    assert!(matches!(error, EntryError::Limit(LimitError::Entries(3))));

    let limits = Limits {
        max_unpacked_bytes: 10,
        ..Limits::default()
    };
    let mut place = Place::with(limits);
    place.layer(TestTar::new().file("a", "123456")).unwrap();
    let error = cause(place.layer(TestTar::new().file("a", "12345")));
    assert!(matches!(error, EntryError::Limit(LimitError::Bytes(10))));
}

#[test]
fn sparse_bomb_is_refused() {
    let tar = TestTar::new()
        .pax(&[
            ("GNU.sparse.map", b"0,1"),
            ("GNU.sparse.size", b"9000000000000000000"),
        ])
        .member(b'0', b"bomb", b"", b"x", |_| {});
    let mut place = Place::new();
    assert!(matches!(
        cause(place.layer(tar)),
        EntryError::Limit(LimitError::Bytes(_))
    ));
    assert!(!place.exists("bomb"));
}

#[test]
fn tree_cannot_grow_deeper_than_its_limit_even_through_links() {
    let limits = Limits {
        max_depth: 8,
        ..Limits::default()
    };
    let mut place = Place::with(limits);
    place
        .layer(TestTar::new().directory("1/2/3/4/5/6/7/8"))
        .unwrap();
    let error = cause(Place::with(limits).layer(TestTar::new().directory("1/2/3/4/5/6/7/8/9")));
    assert!(matches!(error, EntryError::Limit(LimitError::Depth(8))));
    let tar = TestTar::new()
        .symlink("deep", "1/2/3/4/5/6/7/8")
        .directory("deep/9");
    assert!(matches!(
        cause(place.layer(tar)),
        EntryError::Limit(LimitError::Depth(8))
    ));
}

#[test]
fn device_bombs_are_refused() {
    if without_root("making devices") {
        return;
    }
    let mut place = Place::with(Limits {
        max_devices: 2,
        ..Limits::default()
    });
    let tar = TestTar::new()
        .device(b'3', "a", 1, 3)
        .device(b'4', "b", 7, 0)
        .device(b'3', "c", 1, 5);
    assert!(matches!(
        cause(place.layer(tar)),
        EntryError::Limit(LimitError::Devices(2))
    ));
    let tar = TestTar::new().device(b'3', "a", 0o7_777_777, 3);
    assert!(matches!(
        cause(place.layer(tar)),
        EntryError::DeviceNumber { .. }
    ));
}

#[test]
fn symlink_without_a_target_is_refused() {
    let error = cause(Place::new().layer(TestTar::new().symlink("a", "")));
    assert!(matches!(error, EntryError::SymlinkTarget));
    let tar = TestTar::new()
        .pax(&[("linkpath", &[b'x'; 5000])])
        .symlink("a", "b");
    assert!(matches!(
        cause(Place::new().layer(tar)),
        EntryError::SymlinkTarget
    ));
}
