// SPDX-License-Identifier: Apache-2.0

//! Ids of containers and execs, as the host gives them.

use std::fmt;

/// Longest id, bytes.
const MAX_LENGTH: usize = 1024;

/// Why an id was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum IdError {
    /// Empty.
    #[error("an id must not be empty")]
    Empty,
    /// Longer than 1024 bytes.
    #[error("an id must not be longer than {MAX_LENGTH} bytes")]
    TooLong,
    /// A byte outside `[A-Za-z0-9_+.-]`.
    #[error("an id consists of [A-Za-z0-9_+.-]")]
    BadByte,
    /// `.` or `..`.
    #[error("an id must not be \".\" or \"..\"")]
    Dots,
}

/// An id that was checked. It names nothing in the guest's file systems: directories and cgroups of
/// containers are numbered.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Id(String);

impl Id {
    /// Checks `text`.
    ///
    /// # Errors
    /// When it is not 1 to 1024 bytes of `[A-Za-z0-9_+.-]`, or is `.` or `..`.
    pub(crate) fn parse(text: &str) -> Result<Self, IdError> {
        let good = |byte: u8| byte.is_ascii_alphanumeric() || b"_+.-".contains(&byte);
        match text {
            "" => Err(IdError::Empty),
            "." | ".." => Err(IdError::Dots),
            _ if text.len() > MAX_LENGTH => Err(IdError::TooLong),
            _ if !text.bytes().all(good) => Err(IdError::BadByte),
            _ => Ok(Self(text.to_owned())),
        }
    }

    /// The id as the host wrote it.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Id {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_the_runtimes_alphabet_are_taken() {
        for text in ["a", "0", "web-1", "a_b.c+d", "...", "-x", &"z".repeat(1024)] {
            assert_eq!(Id::parse(text).unwrap().as_str(), text);
        }
    }

    #[test]
    fn everything_else_is_refused() {
        assert_eq!(Id::parse(""), Err(IdError::Empty));
        assert_eq!(Id::parse("."), Err(IdError::Dots));
        assert_eq!(Id::parse(".."), Err(IdError::Dots));
        assert_eq!(Id::parse(&"z".repeat(1025)), Err(IdError::TooLong));
        for text in ["a/b", "a b", "a\0", "ä", "a\n", "../x"] {
            assert_eq!(Id::parse(text), Err(IdError::BadByte), "{text:?}");
        }
    }
}
