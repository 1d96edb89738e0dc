// SPDX-License-Identifier: Apache-2.0

//! How much an image may ask for.
//!
//! An image is somebody else's data: a few kilobytes of it can unpack to terabytes. Every count is bounded by
//! [`Limits`], over the whole image and not layer by layer; [`Budget`] keeps the count.

/// Longest path in an archive, in bytes (`PATH_MAX` of Linux, less its NUL).
pub const MAX_PATH_BYTES: usize = 4_095;

/// Longest component of a path, in bytes (`NAME_MAX` of Linux).
pub const MAX_NAME_BYTES: usize = 255;

/// What one image may use up. The defaults hold every ordinary image with room to spare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Layers of the image.
    pub max_layers: usize,
    /// Entries of all layers together (whiteouts count).
    pub max_entries: u64,
    /// Bytes of all layers together once decompressed, and again of all files together as they are on
    /// disk (holes count, so that a sparse file of an exabyte is refused).
    pub max_unpacked_bytes: u64,
    /// Directories above a file, in the real tree.
    pub max_depth: u32,
    /// Device nodes of all layers together.
    pub max_devices: u64,
    /// Bytes of one JSON document (index, manifest, configuration).
    pub max_json_bytes: u64,
    /// Members of an archive that holds an image.
    pub max_archive_members: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_layers: 512,
            max_entries: 4_000_000,
            max_unpacked_bytes: 64 << 30,
            max_depth: 256,
            max_devices: 4_096,
            max_json_bytes: 8 << 20,
            max_archive_members: 100_000,
        }
    }
}

/// An image that wants more than it may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LimitError {
    /// Too many layers.
    #[error("the image has {found} layers, and at most {limit} are accepted")]
    Layers {
        /// What it has.
        found: usize,
        /// What it may have.
        limit: usize,
    },
    /// Too many entries.
    #[error("the image has more than {0} entries (raise by --max-entries)")]
    Entries(u64),
    /// Too many bytes.
    #[error("the image unpacks to more than {0} bytes (raise by --max-size)")]
    Bytes(u64),
    /// Too deep.
    #[error("a path is more than {0} directories deep")]
    Depth(u32),
    /// Too many device nodes.
    #[error("the image has more than {0} device nodes")]
    Devices(u64),
}

/// What an image has used up so far.
#[derive(Debug, Clone)]
pub struct Budget {
    limits: Limits,
    entries: u64,
    stream_bytes: u64,
    file_bytes: u64,
    devices: u64,
}

impl Budget {
    /// Nothing used yet.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            entries: 0,
            stream_bytes: 0,
            file_bytes: 0,
            devices: 0,
        }
    }

    /// The limits that it keeps to.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Bytes that the rest of the image may decompress to.
    #[must_use]
    pub fn stream_bytes_left(&self) -> u64 {
        self.limits
            .max_unpacked_bytes
            .saturating_sub(self.stream_bytes)
    }

    /// Counts decompressed bytes.
    pub fn add_stream_bytes(&mut self, bytes: u64) {
        self.stream_bytes = self.stream_bytes.saturating_add(bytes);
    }

    /// Counts one entry.
    ///
    /// # Errors
    /// When it is one too many.
    pub fn add_entry(&mut self) -> Result<(), LimitError> {
        self.entries = self.entries.saturating_add(1);
        if self.entries > self.limits.max_entries {
            return Err(LimitError::Entries(self.limits.max_entries));
        }
        Ok(())
    }

    /// Counts a file of `bytes` (its holes included).
    ///
    /// # Errors
    /// When the image has no room for it.
    pub fn add_file_bytes(&mut self, bytes: u64) -> Result<(), LimitError> {
        self.file_bytes = self.file_bytes.saturating_add(bytes);
        if self.file_bytes > self.limits.max_unpacked_bytes {
            return Err(LimitError::Bytes(self.limits.max_unpacked_bytes));
        }
        Ok(())
    }

    /// Counts one device node.
    ///
    /// # Errors
    /// When it is one too many.
    pub fn add_device(&mut self) -> Result<(), LimitError> {
        self.devices = self.devices.saturating_add(1);
        if self.devices > self.limits.max_devices {
            return Err(LimitError::Devices(self.limits.max_devices));
        }
        Ok(())
    }
}
