// SPDX-License-Identifier: Apache-2.0

//! The files of an image, by path, before they are written.
//!
//! A [`Tree`] is sorted, every entry has its directory, and nothing is in it twice. Files from the host
//! are read whole, once, so what is hashed is what is written.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};

use walkdir::WalkDir;

/// Largest total of file contents, in bytes: an initramfs lives in the guest's memory.
const MAX_CONTENT_BYTES: u64 = 1 << 30;

/// Largest number of entries.
const MAX_ENTRIES: usize = 100_000;

/// Why a file cannot be part of the image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TreeError {
    /// The destination is relative, has `..` in it, or is the root.
    #[error("destination {0} is not an absolute path below / without \"..\"")]
    Destination(PathBuf),
    /// Two sources for one path.
    #[error("{0} is in the image twice")]
    Duplicate(PathBuf),
    /// A path goes through something that is not a directory.
    #[error("{path} cannot be in the image, since {parent} is not a directory there")]
    ParentNotDirectory {
        /// The path.
        path: PathBuf,
        /// What stands in its way.
        parent: PathBuf,
    },
    /// The host's file could not be read.
    #[error("failed to read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A fifo, socket or device.
    #[error("{0} is neither a regular file nor a directory nor a symbolic link")]
    Unsupported(PathBuf),
    /// Too much for an initramfs.
    #[error(
        "the image would hold more than {MAX_CONTENT_BYTES} bytes or {MAX_ENTRIES} entries at {0}"
    )]
    TooLarge(PathBuf),
}

/// One entry of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Node {
    /// A directory with its permission bits.
    Directory { mode: u32 },
    /// A character device.
    Device { mode: u32, major: u32, minor: u32 },
    /// A regular file.
    Bytes { executable: bool, data: Vec<u8> },
    /// A symbolic link.
    Symlink { target: Vec<u8> },
}

/// All entries but the root, by their path relative to it.
#[derive(Debug, Default)]
pub(super) struct Tree {
    nodes: BTreeMap<Vec<u8>, Node>,
    content_bytes: u64,
}

impl Tree {
    /// A tree without entries.
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// Number of entries.
    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// The entries, parents first.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&[u8], &Node)> {
        self.nodes
            .iter()
            .map(|(path, node)| (path.as_slice(), node))
    }

    /// Puts `node` at `path` (with or without a leading `/`), making the directories above it.
    /// A directory that is there already stays as it is.
    pub(super) fn insert(&mut self, path: &Path, node: Node) -> Result<(), TreeError> {
        let parts = parts_of(path)?;
        let Some((name, parents)) = parts.split_last() else {
            return Err(TreeError::Destination(path.to_path_buf()));
        };
        let mut key = Vec::new();
        for parent in parents {
            push_component(&mut key, parent);
            let directory = self
                .nodes
                .entry(key.clone())
                .or_insert(Node::Directory { mode: 0o755 });
            if !matches!(directory, Node::Directory { .. }) {
                return Err(TreeError::ParentNotDirectory {
                    path: path.to_path_buf(),
                    parent: PathBuf::from(OsString::from_vec(key)),
                });
            }
        }
        push_component(&mut key, name);
        if let Node::Bytes { data, .. } = &node {
            self.content_bytes = self.content_bytes.saturating_add(data.len() as u64);
        }
        if self.content_bytes > MAX_CONTENT_BYTES || self.nodes.len() >= MAX_ENTRIES {
            return Err(TreeError::TooLarge(path.to_path_buf()));
        }
        match (self.nodes.get(&key), &node) {
            (Some(Node::Directory { .. }), Node::Directory { .. }) => Ok(()),
            (Some(_), _) => Err(TreeError::Duplicate(Path::new("/").join(path))),
            (None, _) => {
                self.nodes.insert(key, node);
                Ok(())
            }
        }
    }

    /// Takes in the file, link or directory (with all it holds) at `source`, as `destination`.
    pub(super) fn add_from_host(
        &mut self,
        source: &Path,
        destination: &Path,
    ) -> Result<(), TreeError> {
        if !destination.is_absolute() {
            return Err(TreeError::Destination(destination.to_path_buf()));
        }
        for entry in WalkDir::new(source)
            .follow_root_links(false)
            .sort_by_file_name()
        {
            let entry = entry.map_err(|error| TreeError::Read {
                path: error.path().unwrap_or(source).to_path_buf(),
                source: error.into(),
            })?;
            let relative = entry.path().strip_prefix(source).unwrap_or(Path::new(""));
            let node = self.read_node(entry.path())?;
            // `join("")` would add a slash.
            let path = if relative.as_os_str().is_empty() {
                destination.to_path_buf()
            } else {
                destination.join(relative)
            };
            self.insert(&path, node)?;
        }
        Ok(())
    }

    fn read_node(&self, path: &Path) -> Result<Node, TreeError> {
        let read_error = |source| TreeError::Read {
            path: path.to_path_buf(),
            source,
        };
        let metadata = fs::symlink_metadata(path).map_err(read_error)?;
        let kind = metadata.file_type();
        if kind.is_dir() {
            Ok(Node::Directory { mode: 0o755 })
        } else if kind.is_symlink() {
            let target = fs::read_link(path).map_err(read_error)?;
            Ok(Node::Symlink {
                target: target.into_os_string().into_vec(),
            })
        } else if kind.is_file() {
            let room = MAX_CONTENT_BYTES.saturating_sub(self.content_bytes);
            let mut data = Vec::new();
            File::open(path)
                .and_then(|file| file.take(room.saturating_add(1)).read_to_end(&mut data))
                .map_err(read_error)?;
            let executable = metadata.permissions().mode() & 0o111 != 0;
            Ok(Node::Bytes { executable, data })
        } else {
            Err(TreeError::Unsupported(path.to_path_buf()))
        }
    }
}

fn parts_of(path: &Path) -> Result<Vec<&[u8]>, TreeError> {
    let mut parts = Vec::new();
    for component in path.components() {
        match component {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(part) => parts.push(part.as_bytes()),
            Component::ParentDir | Component::Prefix(_) => {
                return Err(TreeError::Destination(path.to_path_buf()));
            }
        }
    }
    Ok(parts)
}

fn push_component(key: &mut Vec<u8>, component: &[u8]) {
    if !key.is_empty() {
        key.push(b'/');
    }
    key.extend_from_slice(component);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> Node {
        Node::Bytes {
            executable: false,
            data: b"x".to_vec(),
        }
    }

    #[test]
    fn directories_above_a_file_are_made_and_come_first() {
        let mut tree = Tree::new();
        tree.insert(Path::new("/a-b"), file()).unwrap();
        tree.insert(Path::new("/a/b/c"), file()).unwrap();
        let paths: Vec<_> = tree.iter().map(|(path, _)| path.to_vec()).collect();
        for (index, path) in paths.iter().enumerate() {
            if let Some(slash) = path.iter().rposition(|byte| *byte == b'/') {
                assert!(paths[..index].contains(&path[..slash].to_vec()));
            }
        }
        assert_eq!(paths.len(), 4);
    }

    #[test]
    fn two_files_at_one_path_are_refused_two_directories_are_one() {
        let mut tree = Tree::new();
        tree.insert(Path::new("/etc"), Node::Directory { mode: 0o700 })
            .unwrap();
        tree.insert(Path::new("/etc"), Node::Directory { mode: 0o755 })
            .unwrap();
        assert_eq!(tree.len(), 1);
        tree.insert(Path::new("/etc/x"), file()).unwrap();
        let error = tree.insert(Path::new("/etc/x"), file()).unwrap_err();
        assert!(matches!(error, TreeError::Duplicate(_)));
    }

    #[test]
    fn path_through_a_file_is_refused() {
        let mut tree = Tree::new();
        tree.insert(Path::new("/init"), file()).unwrap();
        let error = tree.insert(Path::new("/init/x"), file()).unwrap_err();
        assert!(matches!(error, TreeError::ParentNotDirectory { .. }));
    }

    #[test]
    fn destination_that_climbs_or_is_relative_is_refused() {
        let mut tree = Tree::new();
        for bad in ["/../x", "/a/../../x", "/", "x"] {
            let error = tree.add_from_host(Path::new("/dev/null"), Path::new(bad));
            assert!(error.is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn device_of_the_host_is_refused() {
        let mut tree = Tree::new();
        let error = tree
            .add_from_host(Path::new("/dev/null"), Path::new("/null"))
            .unwrap_err();
        assert!(matches!(error, TreeError::Unsupported(_)));
    }
}
