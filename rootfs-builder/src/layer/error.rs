// SPDX-License-Identifier: Apache-2.0

//! What can go wrong while a layer is applied.

use super::entry::PathError;
use super::reader::TarError;
use crate::confined::FileError;
use crate::limits::LimitError;

/// Why a layer could not be applied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// The archive could not be read.
    #[error(transparent)]
    Archive(#[from] TarError),
    /// An entry could not be made.
    #[error("failed to apply entry {name}")]
    Entry {
        /// The entry's path as the archive has it.
        name: String,
        /// Why.
        source: EntryError,
    },
    /// The times of directories could not be set at the end.
    #[error("failed to finish directory {name}")]
    Finish {
        /// The directory.
        name: String,
        /// Why.
        source: FileError,
    },
}

/// Why an entry could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EntryError {
    /// Its path is none.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The path that a hard link names is none.
    #[error("the hard link leads to {target}")]
    LinkPath {
        /// Where it leads.
        target: String,
        /// What is wrong with that.
        source: PathError,
    },
    /// There is nothing that the hard link could be a name of.
    #[error("the hard link leads to {0}, which is not in the image")]
    LinkTarget(String),
    /// Directories cannot have two names.
    #[error("the hard link leads to {0}, which is a directory")]
    LinkToDirectory(String),
    /// A symbolic link to nothing.
    #[error("the symbolic link has no target or one that is too long")]
    SymlinkTarget,
    /// The root can only be a directory.
    #[error("the root of the image is not a directory in this layer")]
    RootNotDirectory,
    /// Whiteouts are files, of names.
    #[error("the path has a whiteout (.wh.) where none can be")]
    Whiteout,
    /// A device that Linux does not have.
    #[error("there is no device {major}:{minor}")]
    DeviceNumber {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A parent exists and is no directory.
    #[error("{0} is not a directory (or a link that leads nowhere)")]
    ParentNotDirectory(String),
    /// More than the image may have.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// The file's content could not be read.
    #[error(transparent)]
    Archive(#[from] TarError),
    /// The file's content could not be written.
    #[error("failed to write its content")]
    Write(#[source] std::io::Error),
    /// The system refused.
    #[error(transparent)]
    File(#[from] FileError),
}
