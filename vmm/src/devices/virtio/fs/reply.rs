// SPDX-License-Identifier: Apache-2.0

//! FUSE answers, written into the writable part of a chain.

use virtiofsd::filesystem::{DirEntry, Entry};
use virtiofsd::fuse::{Dirent, EntryOut, OutHeader};
use vm_memory::ByteValued;

use super::segments::Segments;

/// Length of the header of every answer, bytes.
pub(super) const HEADER_LEN: usize = size_of::<OutHeader>();

/// The answer to one request; at least [`HEADER_LEN`] bytes of guest memory.
pub(super) struct Reply<'a> {
    unique: u64,
    out: Segments<'a>,
}

impl<'a> Reply<'a> {
    /// The answer to the request called `unique`; `None` when there is no room for any.
    pub(super) fn new(unique: u64, out: Segments<'a>) -> Option<Self> {
        (out.len() >= HEADER_LEN).then_some(Self { unique, out })
    }

    /// Bytes of room after the header.
    pub(super) fn room(&self) -> usize {
        self.out.len() - HEADER_LEN
    }

    /// The guest memory after the header, for data that is read straight into it.
    pub(super) fn payload(&self) -> Option<Segments<'a>> {
        self.out.clone().split_off(HEADER_LEN)
    }

    /// Success, with `parts` one after another. What has no room is answered by `ERANGE` instead.
    pub(super) fn ok(self, parts: &[&[u8]]) -> u32 {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        if len > self.room() {
            return self.error(libc::ERANGE);
        }
        let mut bytes = Vec::with_capacity(HEADER_LEN + len);
        bytes.extend_from_slice(self.header(len, 0).as_slice());
        for part in parts {
            bytes.extend_from_slice(part);
        }
        self.write(&bytes)
    }

    /// Success, of which `len` bytes were read into [`Self::payload`] before.
    pub(super) fn ok_in_place(self, len: usize) -> u32 {
        let len = len.min(self.room());
        self.out.copy_from(self.header(len, 0).as_slice());
        total(len)
    }

    /// Failure with a positive `errno`.
    pub(super) fn error(self, errno: i32) -> u32 {
        let header = self.header(0, errno);
        self.write(header.as_slice())
    }

    fn header(&self, len: usize, errno: i32) -> OutHeader {
        OutHeader {
            len: total(len),
            error: -errno,
            unique: self.unique,
        }
    }

    fn write(&self, bytes: &[u8]) -> u32 {
        u32::try_from(self.out.copy_from(bytes)).unwrap_or(u32::MAX)
    }
}

/// Length of an answer with `len` bytes after its header; chains are shorter than 2^32 bytes.
fn total(len: usize) -> u32 {
    u32::try_from(HEADER_LEN + len).unwrap_or(u32::MAX)
}

/// A list of directory entries of bounded size.
pub(super) struct Listing {
    bytes: Vec<u8>,
    max: usize,
}

impl Listing {
    /// An empty list of at most `max` bytes.
    pub(super) fn new(max: usize) -> Self {
        Self {
            bytes: Vec::new(),
            max,
        }
    }

    /// Whether an entry called `name` has room, with its attributes before it when `plus`.
    pub(super) fn has_room(&self, name: &[u8], plus: bool) -> bool {
        let attributes = if plus { size_of::<EntryOut>() } else { 0 };
        let len = (attributes + size_of::<Dirent>() + name.len()).next_multiple_of(8);
        self.bytes.len() + len <= self.max
    }

    /// Appends `entry`, with its attributes for READDIRPLUS. For the caller to ask [`Self::has_room`] first.
    pub(super) fn push(&mut self, entry: &DirEntry<'_>, plus: Option<Entry>) {
        let name = entry.name.to_bytes();
        let dirent = Dirent {
            ino: entry.ino,
            off: entry.offset,
            namelen: u32::try_from(name.len()).unwrap_or(0),
            type_: entry.type_,
        };
        if let Some(attributes) = plus {
            self.bytes
                .extend_from_slice(EntryOut::from(attributes).as_slice());
        }
        self.bytes.extend_from_slice(dirent.as_slice());
        self.bytes.extend_from_slice(name);
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
    }

    /// The list as the guest reads it.
    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_never_grows_beyond_its_bound() {
        for max in [0, 24, 32, 100, 300] {
            let mut listing = Listing::new(max);
            let name = c"12345";
            while listing.has_room(name.to_bytes(), false) {
                let entry = DirEntry {
                    ino: 1,
                    offset: 2,
                    type_: 8,
                    name,
                };
                listing.push(&entry, None);
            }
            assert!(listing.as_bytes().len() <= max);
            assert_eq!(listing.as_bytes().len(), max / 32 * 32);
        }
    }

    #[test]
    fn an_answer_needs_room_for_its_header() {
        assert!(Reply::new(1, Segments::default()).is_none());
    }
}
