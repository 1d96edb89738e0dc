// SPDX-License-Identifier: Apache-2.0

//! Extended headers of tar (POSIX `pax`): records of `LENGTH KEY=VALUE\n` before a member.
//!
//! In: the bytes of one such header. Out: a `PaxRecords`, with what layers use: paths, size, owner,
//! times, extended attributes and GNU's maps of sparse files. No I/O here; fuzzed by its callers' tests.
//! Values are bytes: an attribute may hold line ends and NULs, which is why records are cut by their
//! lengths and never by lines.
//!
//! Format: <https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html>,
//! <https://www.gnu.org/software/tar/manual/html_section/Sparse-Formats.html>.

use rustix::fs::Timespec;

use super::entry::{Segment, Xattr};

/// Most stretches of data in one sparse file.
pub(super) const MAX_SEGMENTS: usize = 262_144;

/// Prefix of an extended attribute, as GNU tar, Go and libarchive write it.
const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

/// Why an extended header makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PaxError {
    /// A record's length, `=` or line end is missing or wrong.
    #[error("an extended header is not made of LENGTH KEY=VALUE records")]
    Malformed,
    /// A value is not what its key asks for.
    #[error("the value of {0} in an extended header cannot be read")]
    BadValue(String),
    /// The map of a sparse file has too many stretches.
    #[error("a sparse file has more than {MAX_SEGMENTS} stretches of data")]
    TooManySegments,
}

/// What an extended header says; absent where it says nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct PaxRecords {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) modified: Option<Timespec>,
    pub(super) accessed: Option<Timespec>,
    pub(super) xattrs: Vec<Xattr>,
    pub(super) sparse: PaxSparse,
}

/// What GNU's keys say about a sparse file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct PaxSparse {
    /// Version of the format: (1, 0) keeps its map before the data, older ones keep it here.
    pub(super) version: Option<(u64, u64)>,
    /// Size of the file with its holes.
    pub(super) size: Option<u64>,
    /// The map of formats 0.0 and 0.1.
    pub(super) map: Option<Vec<Segment>>,
    /// Offset of format 0.0 that waits for its length.
    pending_offset: Option<u64>,
    major: Option<u64>,
    minor: Option<u64>,
}

impl PaxRecords {
    /// Reads the records in `bytes`; of two with the same key the later counts.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, PaxError> {
        let mut records = Self::default();
        let mut rest = bytes;
        while !rest.is_empty() {
            let (key, value, after) = split_record(rest)?;
            records.take(key, value)?;
            rest = after;
        }
        if records.sparse.pending_offset.is_some() {
            return Err(PaxError::BadValue("GNU.sparse.offset".to_owned()));
        }
        records.sparse.version = match (records.sparse.major, records.sparse.minor) {
            (Some(major), Some(minor)) => Some((major, minor)),
            (None, None) if records.sparse.map.is_some() => Some((0, 0)),
            (None, None) => None,
            (Some(_), None) | (None, Some(_)) => {
                return Err(PaxError::BadValue("GNU.sparse.major".to_owned()));
            }
        };
        Ok(records)
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), PaxError> {
        if let Some(name) = key.strip_prefix(XATTR_PREFIX) {
            self.xattrs.retain(|(known, _)| known != name);
            self.xattrs.push((name.to_vec(), value.to_vec()));
            return Ok(());
        }
        let bad = || PaxError::BadValue(String::from_utf8_lossy(key).into_owned());
        let number = || decimal(value).ok_or_else(bad);
        // An empty value means that the record says nothing.
        match key {
            b"path" if !value.is_empty() => self.path = Some(value.to_vec()),
            // The real name of a sparse file, whose `path` is made up.
            b"GNU.sparse.name" if !value.is_empty() => self.path = Some(value.to_vec()),
            b"linkpath" if !value.is_empty() => self.link = Some(value.to_vec()),
            b"size" if !value.is_empty() => self.size = Some(number()?),
            b"uid" if !value.is_empty() => self.uid = Some(number()?),
            b"gid" if !value.is_empty() => self.gid = Some(number()?),
            b"mtime" if !value.is_empty() => self.modified = Some(time(value).ok_or_else(bad)?),
            b"atime" if !value.is_empty() => self.accessed = Some(time(value).ok_or_else(bad)?),
            b"GNU.sparse.major" => self.sparse.major = Some(number()?),
            b"GNU.sparse.minor" => self.sparse.minor = Some(number()?),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse.size = Some(number()?),
            b"GNU.sparse.offset" => {
                let unused = self.sparse.pending_offset.replace(number()?);
                unused.map_or(Ok(()), |_| Err(bad()))?;
            }
            b"GNU.sparse.numbytes" => {
                let offset = self.sparse.pending_offset.take().ok_or_else(bad)?;
                self.sparse.push(Segment {
                    offset,
                    length: number()?,
                })?;
            }
            b"GNU.sparse.map" => {
                self.sparse.map = Some(Vec::new());
                let mut numbers = value.split(|byte| *byte == b',');
                while let Some(offset) = numbers.next() {
                    let length = numbers.next().ok_or_else(bad)?;
                    let offset = decimal(offset).ok_or_else(bad)?;
                    let length = decimal(length).ok_or_else(bad)?;
                    self.sparse.push(Segment { offset, length })?;
                }
            }
            // Names of owners, comments, other programs' extensions: nothing that we use.
            _ => {}
        }
        Ok(())
    }
}

impl PaxSparse {
    fn push(&mut self, segment: Segment) -> Result<(), PaxError> {
        let map = self.map.get_or_insert_default();
        if map.len() >= MAX_SEGMENTS {
            return Err(PaxError::TooManySegments);
        }
        map.push(segment);
        Ok(())
    }
}

/// A key, its value, and the bytes after the record.
type Record<'a> = (&'a [u8], &'a [u8], &'a [u8]);

/// Cuts the first record off `bytes`.
fn split_record(bytes: &[u8]) -> Result<Record<'_>, PaxError> {
    let space = bytes
        .iter()
        .take(20)
        .position(|byte| *byte == b' ')
        .ok_or(PaxError::Malformed)?;
    let (digits, _) = bytes.split_at(space);
    let length = decimal(digits)
        .and_then(|length| usize::try_from(length).ok())
        .filter(|length| *length <= bytes.len())
        .ok_or(PaxError::Malformed)?;
    let (record, rest) = bytes.split_at(length);
    let body = record
        .get(space + 1..)
        .and_then(|body| body.strip_suffix(b"\n"))
        .ok_or(PaxError::Malformed)?;
    let equals = body
        .iter()
        .position(|byte| *byte == b'=')
        .ok_or(PaxError::Malformed)?;
    let (key, value) = body.split_at(equals);
    if key.is_empty() || key.contains(&0) {
        return Err(PaxError::Malformed);
    }
    Ok((key, value.get(1..).unwrap_or_default(), rest))
}

/// A number of decimal digits and nothing else.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Seconds since 1970 with an optional sign and fraction (digits beyond nanoseconds are dropped).
fn time(text: &[u8]) -> Option<Timespec> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let mut halves = text.splitn(2, |byte| *byte == b'.');
    let seconds = i64::try_from(decimal(halves.next()?)?).ok()?;
    let mut nanoseconds = 0i64;
    if let Some(fraction) = halves.next() {
        if !fraction.iter().all(u8::is_ascii_digit) {
            return None;
        }
        let digits = fraction.iter().chain(std::iter::repeat(&b'0')).take(9);
        nanoseconds = digits.fold(0, |sum, digit| sum * 10 + i64::from(digit - b'0'));
    }
    Some(match (negative, nanoseconds) {
        (false, _) => Timespec {
            tv_sec: seconds,
            tv_nsec: nanoseconds,
        },
        (true, 0) => Timespec {
            tv_sec: -seconds,
            tv_nsec: 0,
        },
        // Nanoseconds count upwards also before 1970.
        (true, _) => Timespec {
            tv_sec: -seconds - 1,
            tv_nsec: 1_000_000_000 - nanoseconds,
        },
    })
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A record as tar writes it: the length counts its own digits.
    pub(crate) fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let body = key.len() + value.len() + 3;
        let mut length = body + 1;
        while length != body + length.to_string().len() {
            length = body + length.to_string().len();
        }
        let mut bytes = format!("{length} {key}=").into_bytes();
        bytes.extend(value);
        bytes.push(b'\n');
        assert_eq!(bytes.len(), length);
        bytes
    }

    #[test]
    fn binary_attributes_come_through_whole() {
        let value: Vec<u8> = (0..=255).chain(*b"\n9 path=x\n").collect();
        let mut bytes = record("SCHILY.xattr.security.capability", &value);
        bytes.extend(record("path", "später/ü".as_bytes()));
        let records = PaxRecords::parse(&bytes).unwrap();
        assert_eq!(records.xattrs, [(b"security.capability".to_vec(), value)]);
        assert_eq!(records.path.unwrap(), "später/ü".as_bytes());
    }

    #[test]
    fn later_record_wins_and_empty_one_says_nothing() {
        let mut bytes = record("path", b"one");
        bytes.extend(record("path", b"two"));
        bytes.extend(record("path", b""));
        bytes.extend(record("SCHILY.xattr.user.a", b"1"));
        bytes.extend(record("SCHILY.xattr.user.a", b"2"));
        let records = PaxRecords::parse(&bytes).unwrap();
        assert_eq!(records.path.unwrap(), b"two");
        assert_eq!(records.xattrs, [(b"user.a".to_vec(), b"2".to_vec())]);
    }

    #[test]
    fn times_have_fractions_and_signs() {
        let read = |text: &str| time(text.as_bytes()).map(|time| (time.tv_sec, time.tv_nsec));
        assert_eq!(read("12"), Some((12, 0)));
        assert_eq!(read("12.5"), Some((12, 500_000_000)));
        assert_eq!(read("12.1234567899"), Some((12, 123_456_789)));
        assert_eq!(read("-1.25"), Some((-2, 750_000_000)));
        assert_eq!(read("-1"), Some((-1, 0)));
        for bad in ["", "-", ".5", "1.x", "1e3", "+1", "99999999999999999999"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }

    #[test]
    fn sparse_maps_of_both_old_formats_are_read() {
        let mut bytes = record("GNU.sparse.offset", b"0");
        bytes.extend(record("GNU.sparse.numbytes", b"10"));
        bytes.extend(record("GNU.sparse.offset", b"100"));
        bytes.extend(record("GNU.sparse.numbytes", b"5"));
        let expected = vec![
            Segment {
                offset: 0,
                length: 10,
            },
            Segment {
                offset: 100,
                length: 5,
            },
        ];
        let sparse = PaxRecords::parse(&bytes).unwrap().sparse;
        assert_eq!(
            (sparse.map, sparse.version),
            (Some(expected.clone()), Some((0, 0)))
        );
        let sparse = PaxRecords::parse(&record("GNU.sparse.map", b"0,10,100,5"))
            .unwrap()
            .sparse;
        assert_eq!(sparse.map, Some(expected));
        for odd in ["0,10,100", "0", "a,b", ""] {
            assert!(
                PaxRecords::parse(&record("GNU.sparse.map", odd.as_bytes())).is_err(),
                "{odd}"
            );
        }
        assert!(PaxRecords::parse(&record("GNU.sparse.offset", b"1")).is_err());
        assert!(PaxRecords::parse(&record("GNU.sparse.numbytes", b"1")).is_err());
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        for bad in [
            "5 a=b\n",
            "7 a=b\n",
            "6 a=b ",
            "0 a=b\n",
            "x a=b\n",
            " 6 a=b\n",
            "6 a_b\n",
            "5 =b\n",
            "99999999999999999999999 a=b\n",
            "6",
            "",
        ] {
            let parsed = PaxRecords::parse(bad.as_bytes());
            assert_eq!(parsed.is_ok(), bad.is_empty(), "{bad:?}: {parsed:?}");
        }
        assert!(PaxRecords::parse(b"6 a=b\n").is_ok());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_fall(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = PaxRecords::parse(&bytes);
        }

        #[test]
        fn what_is_written_is_read(
            name in "[a-z.]{1,20}",
            value in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let bytes = record(&format!("SCHILY.xattr.{name}"), &value);
            let records = PaxRecords::parse(&bytes).unwrap();
            prop_assert_eq!(records.xattrs, vec![(name.into_bytes(), value)]);
        }
    }
}
