// SPDX-License-Identifier: Apache-2.0

//! Container ids, by runc's rule: one or more of `[A-Za-z0-9_+.-]`, not `.` or `..`.
//!
//! An id becomes a directory's name, so it is also at most 255 bytes (runc allows 1024 and then fails in
//! `mkdir`).

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Longest id, bytes.
const MAX_LEN: usize = 255;

/// Why an id was refused. The texts are runc's.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IdError {
    /// No id.
    #[error("container id cannot be empty")]
    Empty,
    /// Characters that it may not have, or `.`, `..`, or longer than 255 bytes.
    #[error("invalid container ID format: {0:?}")]
    Invalid(String),
}

/// A checked container id.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContainerId(String);

impl ContainerId {
    /// Checks `id`.
    ///
    /// # Errors
    /// When it is empty or not of the form that the module describes.
    pub fn new(id: &str) -> Result<Self, IdError> {
        if id.is_empty() {
            return Err(IdError::Empty);
        }
        let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'+' | b'-' | b'.');
        if id.len() > MAX_LEN || matches!(id, "." | "..") || !id.bytes().all(good) {
            return Err(IdError::Invalid(id.chars().take(64).collect()));
        }
        Ok(Self(id.to_owned()))
    }

    /// The id.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// A name for the VM: what [`caisson_protocol::vm::VmConfig::id`] may be, from the id's beginning.
    pub fn vm_name(&self) -> String {
        self.0
            .chars()
            .take(64)
            .map(|c| if c == '+' { '_' } else { c })
            .collect()
    }
}

impl TryFrom<String> for ContainerId {
    type Error = IdError;

    fn try_from(id: String) -> Result<Self, IdError> {
        Self::new(&id)
    }
}

impl From<ContainerId> for String {
    fn from(id: ContainerId) -> Self {
        id.0
    }
}

impl AsRef<Path> for ContainerId {
    fn as_ref(&self) -> &Path {
        Path::new(&self.0)
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_runc_takes_is_taken_and_paths_are_not() {
        for good in ["a", "A-b_c.d+e", "...", &"x".repeat(255)] {
            assert!(ContainerId::new(good).is_ok(), "{good}");
        }
        assert_eq!(ContainerId::new(""), Err(IdError::Empty));
        for bad in [".", "..", "a/b", "/", "a b", "ä", "a\0", &"x".repeat(256)] {
            assert!(
                matches!(ContainerId::new(bad), Err(IdError::Invalid(_))),
                "{bad}"
            );
        }
    }

    proptest! {
        #[test]
        fn an_accepted_id_is_exactly_one_path_component(id in "\\PC{0,20}") {
            if let Ok(id) = ContainerId::new(&id) {
                let joined = Path::new("/r").join(&id);
                prop_assert_eq!(joined.parent(), Some(Path::new("/r")));
                prop_assert!(joined.components().count() == 3);
            }
        }
    }
}
