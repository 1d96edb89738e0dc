// SPDX-License-Identifier: Apache-2.0

//! SHA-256 digests, and readers that take one of what passes through.

use std::fmt;
use std::io::{self, Read};

use oci_spec::image::{Digest, DigestAlgorithm};
use sha2::{Digest as _, Sha256};

/// A SHA-256 digest in lower-case hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sha256Hex(String);

/// A digest that cannot be checked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a sha256 digest (sha256: and 64 hexadecimal digits), the only kind supported"
)]
pub struct DigestError(pub String);

impl Sha256Hex {
    /// From 64 lower-case hexadecimal digits; `None` if it is anything else.
    #[must_use]
    pub fn from_hex(text: &str) -> Option<Self> {
        let digits = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        (text.len() == 64 && text.bytes().all(digits)).then(|| Self(text.to_owned()))
    }

    /// From `sha256:` and the digits.
    ///
    /// # Errors
    /// When it is anything else, also another algorithm.
    pub fn parse(text: &str) -> Result<Self, DigestError> {
        text.strip_prefix("sha256:")
            .and_then(Self::from_hex)
            .ok_or_else(|| DigestError(text.to_owned()))
    }

    /// From a descriptor's digest.
    ///
    /// # Errors
    /// When it is of another algorithm.
    pub fn from_digest(digest: &Digest) -> Result<Self, DigestError> {
        let hex = match digest.algorithm() {
            DigestAlgorithm::Sha256 => Self::from_hex(digest.digest()),
            _ => None,
        };
        hex.ok_or_else(|| DigestError(digest.to_string()))
    }

    /// Of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(hex::encode(Sha256::digest(bytes)))
    }

    /// The digits.
    #[must_use]
    pub fn hex(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Sha256Hex {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "sha256:{}", self.0)
    }
}

/// Passes bytes on, takes their digest, and stops after `limit` bytes: one more is an error.
#[derive(Debug)]
pub struct HashingReader<R> {
    source: R,
    hash: Sha256,
    bytes: u64,
    limit: u64,
    exceeded: bool,
}

impl<R: Read> HashingReader<R> {
    /// Reads from `source`, at most `limit` bytes.
    pub fn new(source: R, limit: u64) -> Self {
        Self {
            source,
            hash: Sha256::new(),
            bytes: 0,
            limit,
            exceeded: false,
        }
    }

    /// Bytes passed on so far.
    pub fn bytes_read(&self) -> u64 {
        self.bytes
    }

    /// Did the source have more than the limit?
    pub fn exceeded(&self) -> bool {
        self.exceeded
    }

    /// Reads to the end of the source.
    ///
    /// # Errors
    /// When the source cannot be read or is longer than the limit.
    pub fn drain(&mut self) -> io::Result<()> {
        io::copy(self, &mut io::sink()).map(|_| ())
    }

    /// The digest of all that has passed.
    pub fn digest(self) -> Sha256Hex {
        Sha256Hex(hex::encode(self.hash.finalize()))
    }
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.source.read(buffer)?;
        if read as u64 > self.limit.saturating_sub(self.bytes) {
            self.exceeded = true;
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("there are more than {} bytes", self.limit),
            ));
        }
        if let Some(part) = buffer.get(..read) {
            self.hash.update(part);
        }
        self.bytes += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn only_whole_lower_case_sha256_is_a_digest() {
        assert_eq!(
            Sha256Hex::parse(&format!("sha256:{ABC}")).unwrap().hex(),
            ABC
        );
        for bad in [
            ABC.to_owned(),
            format!("sha512:{ABC}"),
            format!("sha256:{}", ABC.to_uppercase()),
            format!("sha256:{}", &ABC[1..]),
            format!("sha256:../{}", &ABC[3..]),
        ] {
            assert!(Sha256Hex::parse(&bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn reader_hashes_what_passes_and_stops_at_its_limit() {
        let mut reader = HashingReader::new(&b"abc"[..], 3);
        reader.drain().unwrap();
        assert_eq!((reader.bytes_read(), reader.exceeded()), (3, false));
        assert_eq!(reader.digest().hex(), ABC);
        let mut reader = HashingReader::new(&b"abcd"[..], 3);
        assert!(reader.drain().is_err());
        assert!(reader.exceeded());
    }
}
