// SPDX-License-Identifier: Apache-2.0

//! Writes a [`Tree`] as a `newc` cpio archive, the format that Linux unpacks into its first root.
//!
//! Format: `Documentation/driver-api/early-userspace/buffer-format.rst` of the kernel. A header is the
//! magic and 13 numbers of eight hexadecimal digits; name and data are each padded to four bytes.

use std::io::{self, Write};

use super::tree::{Node, Tree};

const MAGIC: &str = "070701";
const TRAILER: &[u8] = b"TRAILER!!!";

/// The whole archive is padded to this, as cpio(1) does.
const BLOCK_BYTES: u64 = 512;

const TYPE_DIRECTORY: u32 = 0o040_000;
const TYPE_CHARACTER_DEVICE: u32 = 0o020_000;
const TYPE_REGULAR: u32 = 0o100_000;
const TYPE_SYMLINK: u32 = 0o120_000;

/// Why an archive could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CpioError {
    /// The output refused the bytes.
    #[error("failed to write to the output")]
    Write(#[source] io::Error),
    /// A number does not fit in the format's 32 bits.
    #[error("entry {0} is too large for the cpio format")]
    TooLarge(String),
}

/// One entry's header fields; the rest is the same in every entry.
struct Entry<'a> {
    name: &'a [u8],
    inode: u32,
    mode: u32,
    links: u32,
    device: (u32, u32),
    data: &'a [u8],
}

/// Writes every entry of `tree`, the root directory first, then the trailer and the padding.
pub(super) fn write_archive(tree: &Tree, output: &mut impl Write) -> Result<(), CpioError> {
    let mut writer = ArchiveWriter { output, offset: 0 };
    writer.entry(&Entry {
        name: b".",
        inode: 1,
        mode: TYPE_DIRECTORY | 0o755,
        links: 2,
        device: (0, 0),
        data: b"",
    })?;
    let mut inode = 1u32;
    for (name, node) in tree.iter() {
        inode = inode.checked_add(1).ok_or_else(|| too_large(name))?;
        let (mode, links, device, data): (u32, u32, (u32, u32), &[u8]) = match node {
            Node::Directory { mode } => (TYPE_DIRECTORY | mode, 2, (0, 0), b""),
            Node::Device { mode, major, minor } => {
                (TYPE_CHARACTER_DEVICE | mode, 1, (*major, *minor), b"")
            }
            Node::Bytes {
                executable: true,
                data,
            } => (TYPE_REGULAR | 0o755, 1, (0, 0), data),
            Node::Bytes {
                executable: false,
                data,
            } => (TYPE_REGULAR | 0o644, 1, (0, 0), data),
            Node::Symlink { target } => (TYPE_SYMLINK | 0o777, 1, (0, 0), target),
        };
        writer.entry(&Entry {
            name,
            inode,
            mode,
            links,
            device,
            data,
        })?;
    }
    writer.entry(&Entry {
        name: TRAILER,
        inode: 0,
        mode: 0,
        links: 1,
        device: (0, 0),
        data: b"",
    })?;
    writer.pad_to(BLOCK_BYTES)
}

struct ArchiveWriter<'a, W: Write> {
    output: &'a mut W,
    offset: u64,
}

impl<W: Write> ArchiveWriter<'_, W> {
    fn entry(&mut self, entry: &Entry<'_>) -> Result<(), CpioError> {
        let size = u32::try_from(entry.data.len()).map_err(|_| too_large(entry.name))?;
        // The terminating NUL counts.
        let name_size = u32::try_from(entry.name.len() + 1).map_err(|_| too_large(entry.name))?;
        let (device_major, device_minor) = entry.device;
        let numbers = [
            entry.inode,
            entry.mode,
            0, // uid
            0, // gid
            entry.links,
            0, // mtime
            size,
            0, // major and minor of the file system
            0,
            device_major,
            device_minor,
            name_size,
            0, // checksum, unused in this variant
        ];
        let mut header = String::from(MAGIC);
        for number in numbers {
            header.push_str(&format!("{number:08x}"));
        }
        self.put(header.as_bytes())?;
        self.put(entry.name)?;
        self.put(b"\0")?;
        self.pad_to(4)?;
        self.put(entry.data)?;
        self.pad_to(4)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), CpioError> {
        self.output.write_all(bytes).map_err(CpioError::Write)?;
        self.offset += bytes.len() as u64;
        Ok(())
    }

    fn pad_to(&mut self, alignment: u64) -> Result<(), CpioError> {
        while !self.offset.is_multiple_of(alignment) {
            self.put(b"\0")?;
        }
        Ok(())
    }
}

fn too_large(name: &[u8]) -> CpioError {
    CpioError::TooLarge(String::from_utf8_lossy(name).into_owned())
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::Path;

    use super::*;

    /// An entry as read back.
    #[derive(Debug, PartialEq, Eq)]
    pub(crate) struct Parsed {
        pub(crate) name: String,
        pub(crate) inode: u32,
        pub(crate) mode: u32,
        pub(crate) rdev: (u32, u32),
        pub(crate) data: Vec<u8>,
    }

    /// Reads an archive as the kernel does (init/initramfs.c), up to its trailer.
    pub(crate) fn parse(archive: &[u8]) -> Vec<Parsed> {
        let mut entries = Vec::new();
        let mut at = 0;
        loop {
            assert_eq!(&archive[at..at + 6], b"070701");
            let number = |index: usize| {
                let start = at + 6 + 8 * index;
                let digits = std::str::from_utf8(&archive[start..start + 8]).unwrap();
                u32::from_str_radix(digits, 16).unwrap()
            };
            assert_eq!(
                (number(2), number(3), number(5)),
                (0, 0, 0),
                "owner and time must be 0"
            );
            let (size, name_size) = (number(6) as usize, number(11) as usize);
            let name = &archive[at + 110..at + 110 + name_size];
            assert_eq!(name.last(), Some(&0));
            let name = String::from_utf8(name[..name_size - 1].to_vec()).unwrap();
            let data_at = (at + 110 + name_size).next_multiple_of(4);
            if name.as_bytes() == TRAILER {
                return entries;
            }
            entries.push(Parsed {
                name,
                inode: number(0),
                mode: number(1),
                rdev: (number(9), number(10)),
                data: archive[data_at..data_at + size].to_vec(),
            });
            at = (data_at + size).next_multiple_of(4);
        }
    }

    fn archive_of(nodes: &[(&str, Node)]) -> Vec<u8> {
        let mut tree = Tree::new();
        for (path, node) in nodes {
            tree.insert(Path::new(path), node.clone()).unwrap();
        }
        let mut bytes = Vec::new();
        write_archive(&tree, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn every_name_and_data_length_is_padded_so_that_it_reads_back() {
        for length in 0..9 {
            let name = "n".repeat(length + 1);
            let data = vec![b'd'; length];
            let bytes = archive_of(&[(
                &name,
                Node::Bytes {
                    executable: false,
                    data: data.clone(),
                },
            )]);
            assert_eq!(bytes.len() % 512, 0);
            let entries = parse(&bytes);
            assert_eq!(entries[1].name, name);
            assert_eq!(entries[1].data, data);
        }
    }

    #[test]
    fn inode_numbers_are_unique_and_count_up() {
        let bytes = archive_of(&[
            (
                "b",
                Node::Symlink {
                    target: b"a".to_vec(),
                },
            ),
            (
                "a",
                Node::Bytes {
                    executable: true,
                    data: b"x".to_vec(),
                },
            ),
            (
                "d/e",
                Node::Device {
                    mode: 0o600,
                    major: 5,
                    minor: 1,
                },
            ),
        ]);
        let inodes: Vec<u32> = parse(&bytes).iter().map(|entry| entry.inode).collect();
        assert_eq!(inodes, [1, 2, 3, 4, 5]);
    }
}
