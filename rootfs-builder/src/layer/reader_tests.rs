// SPDX-License-Identifier: Apache-2.0

//! Tests of the tar reader: what other programs write, and what nobody should.

use std::process::Command;

use proptest::prelude::*;

use super::super::test_tar::TestTar;
use super::*;

fn read_all(archive: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, TarError> {
    let mut reader = TarReader::new(archive);
    let mut entries = Vec::new();
    while let Some(entry) = reader.next_entry()? {
        let mut data = Vec::new();
        let mut buffer = [0; 100];
        loop {
            let read = reader.read_data(&mut buffer)?;
            if read == 0 {
                break;
            }
            data.extend(&buffer[..read]);
        }
        entries.push((entry, data));
    }
    Ok(entries)
}

fn names(archive: &[u8]) -> Result<Vec<String>, TarError> {
    Ok(read_all(archive)?
        .iter()
        .map(|(entry, _)| printable(&entry.name))
        .collect())
}

#[test]
fn members_and_their_data_come_in_order() {
    let archive = TestTar::new()
        .directory("d/")
        .file("d/a", "hello")
        .symlink("d/l", "a")
        .fifo("p")
        .finish();
    let entries = read_all(&archive).unwrap();
    let kinds: Vec<_> = entries.iter().map(|(entry, _)| entry.kind).collect();
    assert_eq!(
        kinds,
        [
            EntryKind::Directory,
            EntryKind::File,
            EntryKind::Symlink,
            EntryKind::Fifo
        ]
    );
    assert_eq!(entries[1].1, b"hello");
    assert_eq!(entries[2].0.link, b"a");
}

#[test]
fn unread_data_is_skipped() {
    let archive = TestTar::new()
        .file("a", &"x".repeat(2000))
        .file("b", "")
        .finish();
    let mut reader = TarReader::new(archive.as_slice());
    reader.next_entry().unwrap().unwrap();
    assert_eq!(reader.offset(), 512);
    assert_eq!(reader.next_entry().unwrap().unwrap().name, b"b");
}

#[test]
fn archive_ends_at_two_zero_blocks_or_at_the_end_of_the_bytes() {
    let tar = || TestTar::new().file("a", "x");
    assert_eq!(names(&tar().unfinished()).unwrap(), ["a"]);
    assert_eq!(names(&tar().data(&[0; 512]).unfinished()).unwrap(), ["a"]);
    assert_eq!(
        names(&tar().data(&[0; 1024]).file("b", "").unfinished()).unwrap(),
        ["a"]
    );
    // A lone block of zeros in the middle hides members from some readers.
    let hidden = tar().data(&[0; 512]).file("b", "").finish();
    assert!(matches!(names(&hidden), Err(TarError::Checksum(1536))));
}

#[test]
fn every_truncation_inside_a_member_is_noticed() {
    let archive = TestTar::new().file("a", &"x".repeat(600)).unfinished();
    for length in 1..512 + 600 {
        assert!(
            names(&archive[..length]).is_err(),
            "{length} bytes were accepted"
        );
    }
    // Only the padding is missing.
    assert_eq!(names(&archive[..512 + 600]).unwrap(), ["a"]);
}

#[test]
fn flipped_bit_in_a_header_is_noticed() {
    let archive = TestTar::new().file("name", "").finish();
    for byte in 0..148 {
        let mut broken = archive.clone();
        broken[byte] ^= 1;
        assert!(names(&broken).is_err(), "flip at {byte} was not noticed");
    }
}

#[test]
fn pax_size_overrides_the_header() {
    let data = b"x".repeat(700);
    let archive = TestTar::new()
        .pax(&[("size", b"700"), ("path", b"real")])
        .member(b'0', b"other", b"", &data, |header| header.set_size(0))
        .file("next", "")
        .finish();
    let entries = read_all(&archive).unwrap();
    assert_eq!(
        (entries[0].0.name.as_slice(), entries[0].1.len()),
        (&b"real"[..], 700)
    );
    assert_eq!(entries[1].0.name, b"next");
}

#[test]
fn size_of_a_member_without_data_is_ignored_as_go_does() {
    let archive = TestTar::new()
        .member(b'5', b"d", b"", b"", |header| header.set_size(512))
        .file("in-the-open", "")
        .finish();
    assert_eq!(names(&archive).unwrap(), ["d", "in-the-open"]);
}

#[test]
fn oversized_doubled_and_dangling_extensions_are_refused() {
    let big = vec![b'a'; (1 << 20) + 1];
    let archive = TestTar::new()
        .member(b'L', b"x", b"", &big, |_| {})
        .file("a", "")
        .finish();
    assert!(matches!(names(&archive), Err(TarError::Extension(_))));
    let archive = TestTar::new().pax(&[]).pax(&[]).file("a", "").finish();
    assert!(matches!(
        names(&archive),
        Err(TarError::Extension("doubled"))
    ));
    let archive = TestTar::new().pax(&[("path", b"x")]).finish();
    assert!(matches!(names(&archive), Err(TarError::Extension(_))));
}

#[test]
fn owner_beyond_32_bits_is_refused() {
    for uid in [&b"4294967295"[..], b"4294967296", b"99999999999"] {
        let archive = TestTar::new().pax(&[("uid", uid)]).file("a", "").finish();
        assert!(matches!(
            names(&archive),
            Err(TarError::Field { field: "uid", .. })
        ));
    }
    let archive = TestTar::new()
        .pax(&[("uid", b"4294967294")])
        .file("a", "")
        .finish();
    assert_eq!(read_all(&archive).unwrap()[0].0.uid, u32::MAX - 1);
}

#[test]
fn unknown_types_are_refused_by_name() {
    let archive = TestTar::new()
        .member(b'M', b"part", b"", b"", |_| {})
        .finish();
    let error = names(&archive).unwrap_err();
    assert!(
        matches!(&error, TarError::Kind { name, kind: 'M' } if name == "part"),
        "{error}"
    );
}

#[test]
fn sparse_map_that_lies_is_refused() {
    for (map, real, stored) in [
        ("0,10", "5", 10),
        ("0,10,5,10", "100", 20),
        ("0,10", "100", 9),
        ("90,20", "100", 20),
    ] {
        let archive = TestTar::new()
            .pax(&[
                ("GNU.sparse.map", map.as_bytes()),
                ("GNU.sparse.size", real.as_bytes()),
            ])
            .member(b'0', b"s", b"", &vec![b'x'; stored], |_| {})
            .finish();
        assert!(
            matches!(names(&archive), Err(TarError::Sparse(_))),
            "{map} was accepted"
        );
    }
}

/// What GNU tar writes in each of its formats reads back as it was.
#[test]
fn archives_of_gnu_tar_are_read_in_every_format() {
    let place = tempfile::tempdir().unwrap();
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(130));
    std::fs::create_dir(place.path().join("d".repeat(120))).unwrap();
    std::fs::write(place.path().join(&long), "long").unwrap();
    let sparse = std::fs::File::create(place.path().join("sparse")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"begin", 0).unwrap();
    for index in 1..40u64 {
        std::os::unix::fs::FileExt::write_all_at(&sparse, b"island", index << 20).unwrap();
    }
    sparse.set_len(100 << 20).unwrap();
    for options in [
        &["--format=gnu"][..],
        &["--format=gnu", "-S"],
        &["--format=posix"],
        &["--format=posix", "-S", "--sparse-version=0.0"],
        &["--format=posix", "-S", "--sparse-version=0.1"],
        &["--format=posix", "-S", "--sparse-version=1.0"],
    ] {
        let output = Command::new("tar")
            .args(options)
            .args(["-c", "-C"])
            .arg(place.path())
            .args([long.as_str(), "sparse"])
            .output()
            .unwrap();
        assert!(output.status.success(), "{options:?}");
        let entries = read_all(&output.stdout).unwrap();
        assert_eq!(entries[0].0.name, long.as_bytes(), "{options:?}");
        assert_eq!(entries[0].1, b"long");
        let (entry, data) = &entries[1];
        assert_eq!(
            (entry.name.as_slice(), entry.size),
            (&b"sparse"[..], 100 << 20),
            "{options:?}"
        );
        assert_eq!(
            entry.segments.is_some(),
            options.contains(&"-S"),
            "{options:?}"
        );
        if let Some(segments) = &entry.segments {
            let mut whole = vec![0; 100 << 20];
            let mut at = 0;
            for segment in segments {
                let (start, length) = (segment.offset as usize, segment.length as usize);
                whole[start..start + length].copy_from_slice(&data[at..at + length]);
                at += length;
            }
            assert!(
                whole == std::fs::read(place.path().join("sparse")).unwrap(),
                "{options:?}"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_bytes_make_it_fall(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
        let _ = read_all(&bytes);
    }

    /// A sound header with any field overwritten and the checksum made right again.
    #[test]
    fn no_header_makes_it_fall(
        kind in any::<u8>(),
        at in 0usize..500,
        patch in proptest::collection::vec(any::<u8>(), 1..13),
        data in proptest::collection::vec(any::<u8>(), 0..1500),
    ) {
        let archive = TestTar::new()
            .member(kind, b"name", b"link", &data, |header| {
                for (byte, value) in header.as_mut_bytes()[at..].iter_mut().zip(&patch) {
                    *byte = *value;
                }
            })
            .file("after", "x")
            .finish();
        let _ = read_all(&archive);
    }
}
