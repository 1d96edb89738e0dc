// SPDX-License-Identifier: Apache-2.0

//! Tar archives for tests, byte by byte, so that hostile ones can be made, too.

use tar::Header;

use super::pax::tests::record;

/// Time of every member that is given no other.
pub(crate) const TIME: u64 = 1_600_000_000;

/// An archive in the making.
#[derive(Debug, Default)]
pub(crate) struct TestTar(Vec<u8>);

impl TestTar {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// A member with any type, names and header.
    pub(crate) fn member(
        mut self,
        kind: u8,
        name: &[u8],
        link: &[u8],
        data: &[u8],
        change: impl FnOnce(&mut Header),
    ) -> Self {
        let mut header = Header::new_ustar();
        header.as_old_mut().linkflag = [kind];
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
        header.set_mode(if kind == b'5' { 0o755 } else { 0o644 });
        header.set_uid(rustix::process::geteuid().as_raw().into());
        header.set_gid(rustix::process::getegid().as_raw().into());
        header.set_size(data.len() as u64);
        header.set_mtime(TIME);
        change(&mut header);
        header.set_cksum();
        self.0.extend(header.as_bytes());
        self.data(data)
    }

    /// Bytes padded to a block.
    pub(crate) fn data(mut self, data: &[u8]) -> Self {
        self.0.extend(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    /// An extended header for the next member.
    pub(crate) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let bytes: Vec<u8> = records
            .iter()
            .flat_map(|(key, value)| record(key, value))
            .collect();
        self.member(b'x', b"PaxHeaders/x", b"", &bytes, |_| {})
    }

    pub(crate) fn file(self, name: &str, data: &str) -> Self {
        self.member(b'0', name.as_bytes(), b"", data.as_bytes(), |_| {})
    }

    pub(crate) fn directory(self, name: &str) -> Self {
        self.member(b'5', name.as_bytes(), b"", b"", |_| {})
    }

    pub(crate) fn symlink(self, name: &str, target: &str) -> Self {
        self.member(b'2', name.as_bytes(), target.as_bytes(), b"", |_| {})
    }

    pub(crate) fn hard_link(self, name: &str, target: &str) -> Self {
        self.member(b'1', name.as_bytes(), target.as_bytes(), b"", |_| {})
    }

    pub(crate) fn fifo(self, name: &str) -> Self {
        self.member(b'6', name.as_bytes(), b"", b"", |_| {})
    }

    pub(crate) fn device(self, kind: u8, name: &str, major: u32, minor: u32) -> Self {
        self.member(kind, name.as_bytes(), b"", b"", |header| {
            header.set_device_major(major).unwrap();
            header.set_device_minor(minor).unwrap();
        })
    }

    /// The archive so far, without an end.
    pub(crate) fn unfinished(self) -> Vec<u8> {
        self.0
    }

    /// The archive with the two blocks of zeros that end it.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }
}
