// SPDX-License-Identifier: Apache-2.0

//! One member of a tar archive, with everything that its headers say about it.

use rustix::fs::Timespec;

use crate::limits::{MAX_NAME_BYTES, MAX_PATH_BYTES};

/// What a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file; its content follows.
    File,
    /// Another name for an earlier member.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
    /// A character device.
    CharacterDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
}

/// Name and value of an extended attribute.
pub type Xattr = (Vec<u8>, Vec<u8>);

/// A stretch of a sparse file that holds data; the rest of the file is holes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins in the file, in bytes.
    pub offset: u64,
    /// Its length, in bytes.
    pub length: u64,
}

/// A member. Names are bytes as the archive has them, not yet checked: see [`split_path`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its path.
    pub name: Vec<u8>,
    /// Target of a symbolic link, or path of the earlier member of a hard link.
    pub link: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits, including set-user-ID, set-group-ID and sticky (12 bits).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of the last change of its content.
    pub modified: Timespec,
    /// Time of the last access, where the archive has it.
    pub accessed: Option<Timespec>,
    /// Extended attributes.
    pub xattrs: Vec<Xattr>,
    /// Size of the file with its holes, in bytes; 0 for all but files.
    pub size: u64,
    /// Bytes of it in the archive.
    pub stored: u64,
    /// Where the stored bytes belong, if the file is sparse: in order, apart, within `size`, and together
    /// as long as `stored`.
    pub segments: Option<Vec<Segment>>,
}

/// A path in an archive that cannot be taken as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PathError {
    /// It climbs.
    #[error("the path has a \"..\" in it")]
    ParentComponent,
    /// It is beyond what Linux takes.
    #[error(
        "the path is longer than {MAX_PATH_BYTES} bytes, or a part of it longer than {MAX_NAME_BYTES}"
    )]
    TooLong,
    /// It has a byte in it that no path can have.
    #[error("the path has a NUL byte in it")]
    Nul,
}

/// The components of a path in an archive, relative to the root whether or not it begins with `/`;
/// none for the root itself.
///
/// # Errors
/// When the path has `..` in it (never needed, always suspicious), a NUL, or is too long.
pub fn split_path(path: &[u8]) -> Result<Vec<&[u8]>, PathError> {
    if path.len() > MAX_PATH_BYTES {
        return Err(PathError::TooLong);
    }
    if path.contains(&0) {
        return Err(PathError::Nul);
    }
    let mut parts = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err(PathError::ParentComponent),
            _ if part.len() > MAX_NAME_BYTES => return Err(PathError::TooLong),
            _ => parts.push(part),
        }
    }
    Ok(parts)
}

/// `bytes` made fit to print: text as it is, everything odd escaped.
#[must_use]
pub fn printable(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.chars().any(char::is_control) => text.to_owned(),
        Ok(_) | Err(_) => bytes.escape_ascii().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_relative_to_the_root_however_they_are_written() {
        let parts: Vec<&[u8]> = vec![b"a", b"b"];
        for path in ["a/b", "/a/b", "./a/b", "//a/./b/", "/./a//b/."] {
            assert_eq!(split_path(path.as_bytes()).unwrap(), parts, "{path}");
        }
        for root in ["", "/", ".", "./", "//."] {
            assert!(split_path(root.as_bytes()).unwrap().is_empty(), "{root:?}");
        }
    }

    #[test]
    fn climbing_nul_and_overlong_paths_are_refused() {
        for path in ["..", "../a", "a/../b", "a/..", "/.."] {
            assert_eq!(
                split_path(path.as_bytes()),
                Err(PathError::ParentComponent),
                "{path}"
            );
        }
        assert_eq!(split_path(b"a\0b"), Err(PathError::Nul));
        assert!(split_path(&[b'a'; 255]).is_ok());
        assert_eq!(split_path(&[b'a'; 256]), Err(PathError::TooLong));
        let long = b"a/".repeat(2_048);
        assert_eq!(split_path(&long), Err(PathError::TooLong));
        assert!(split_path(&long[..4_095]).is_ok());
        assert!(split_path(b"..a/b..").is_ok());
    }
}
