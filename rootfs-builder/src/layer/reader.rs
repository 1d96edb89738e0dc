// SPDX-License-Identifier: Apache-2.0

//! Reads a tar archive member by member.
//!
//! In: bytes, hostile ones. Out: [`Entry`] by entry, and the stored bytes of each. Old, ustar, GNU and
//! pax archives are read as Go's `archive/tar` reads them, since that is what container tools agree on
//! (two readers that see different files in one archive are a hole in themselves).
//!
//! The field layout is the `tar` crate's. Its iterator is not used: it reads extended headers of any
//! size into memory and cuts attributes apart at line ends.

use std::io::{self, Read};

use rustix::fs::Timespec;
use tar::{EntryType, Header};

use super::entry::{Entry, EntryKind, Segment, printable};
use super::numeric::numeric;
use super::pax::{PaxError, PaxRecords};
use super::sparse;

/// Size of a header, and what data is padded to, in bytes.
pub(super) const BLOCK: usize = 512;

/// Largest extended header or long name, in bytes (as Go's `archive/tar`).
const MAX_EXTENSION_BYTES: u64 = 1 << 20;

/// Why an archive could not be read on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TarError {
    /// The bytes could not be read (or not be decompressed).
    #[error("failed to read the archive")]
    Read(#[from] io::Error),
    /// The archive ends within a member.
    #[error("the archive ends in the middle of a member")]
    Truncated,
    /// Not a tar header.
    #[error("at byte {0} of the archive there is no tar header (its checksum is wrong)")]
    Checksum(u64),
    /// A field of a header is no number, or one out of range.
    #[error("the {field} of {name} is not a number in range")]
    Field {
        /// The member.
        name: String,
        /// The field.
        field: &'static str,
    },
    /// An extended header makes no sense.
    #[error("the extended header before {name} cannot be read")]
    Pax {
        /// The member.
        name: String,
        /// What is wrong with it.
        source: PaxError,
    },
    /// Extended headers that are too large, doubled, or followed by no member.
    #[error("an extended header is {0}")]
    Extension(&'static str),
    /// A sparse file whose map contradicts itself.
    #[error("the sparse file {0} has a map that does not fit its size or its data")]
    Sparse(String),
    /// A type of member that containers do not have.
    #[error("{name} is of type {kind:?}, which is not supported")]
    Kind {
        /// The member.
        name: String,
        /// Its type byte.
        kind: char,
    },
}

/// Reads members one after the other from `source`.
#[derive(Debug)]
pub struct TarReader<R> {
    source: R,
    /// Bytes read so far.
    offset: u64,
    /// Bytes of the current member not read yet.
    remaining: u64,
    /// Bytes of padding after them.
    padding: u64,
    done: bool,
}

/// What extended headers have said about the member to come.
#[derive(Default)]
struct Extensions {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    pax: Option<PaxRecords>,
    any: bool,
}

impl<R: Read> TarReader<R> {
    /// A reader at the first member.
    pub fn new(source: R) -> Self {
        Self {
            source,
            offset: 0,
            remaining: 0,
            padding: 0,
            done: false,
        }
    }

    /// Where the next byte comes from: right after [`Self::next_entry`], where the member's data begins.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The next member, or `None` at the end; what is unread of the one before is skipped.
    ///
    /// # Errors
    /// Any [`TarError`]; the reader is at its end then.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        if self.done {
            return Ok(None);
        }
        let result = self.read_entry();
        self.done = !matches!(result, Ok(Some(_)));
        result
    }

    /// Reads on in the current member's stored bytes; 0 at their end.
    ///
    /// # Errors
    /// When the archive cannot be read or ends early.
    pub fn read_data(&mut self, buffer: &mut [u8]) -> Result<usize, TarError> {
        let wanted = usize::try_from(self.remaining)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let Some(part) = buffer.get_mut(..wanted) else {
            return Ok(0);
        };
        if part.is_empty() {
            return Ok(0);
        }
        let read = read_some(&mut self.source, part)?;
        if read == 0 {
            return Err(TarError::Truncated);
        }
        self.offset += read as u64;
        self.remaining -= read as u64;
        Ok(read)
    }

    fn read_entry(&mut self) -> Result<Option<Entry>, TarError> {
        let mut extensions = Extensions::default();
        loop {
            self.skip_rest()?;
            let Some(header) = self.read_header()? else {
                if extensions.any {
                    return Err(TarError::Extension("followed by no member"));
                }
                return Ok(None);
            };
            let size = self.field("size", &header, &header.as_old().size)?;
            let size = u64::try_from(size).map_err(|_| field_error("size", &header))?;
            self.begin_data(size)?;
            match header.entry_type() {
                EntryType::XGlobalHeader => {
                    // Says what holds for the whole archive; container tools ignore it.
                    self.read_extension()?;
                    continue;
                }
                EntryType::XHeader => {
                    let bytes = self.read_extension()?;
                    let records = PaxRecords::parse(&bytes).map_err(|source| TarError::Pax {
                        name: printable(&header.path_bytes()),
                        source,
                    })?;
                    if extensions.pax.replace(records).is_some() {
                        return Err(TarError::Extension("doubled"));
                    }
                }
                EntryType::GNULongName => {
                    let name = until_nul(self.read_extension()?);
                    if extensions.name.replace(name).is_some() {
                        return Err(TarError::Extension("doubled"));
                    }
                }
                EntryType::GNULongLink => {
                    let link = until_nul(self.read_extension()?);
                    if extensions.link.replace(link).is_some() {
                        return Err(TarError::Extension("doubled"));
                    }
                }
                _ => return self.finish_entry(&header, extensions, size).map(Some),
            }
            extensions.any = true;
        }
    }

    /// Reads the next header; `None` at the end of the archive: two blocks of zeros, or no more bytes.
    fn read_header(&mut self) -> Result<Option<Header>, TarError> {
        let mut header = Header::new_old();
        for zeros in 0..2 {
            let at = self.offset;
            if !self.read_block(header.as_mut_bytes())? {
                return Ok(None);
            }
            if header.as_bytes().iter().any(|byte| *byte != 0) {
                if zeros > 0 || !checksum_fits(&header) {
                    return Err(TarError::Checksum(at));
                }
                return Ok(Some(header));
            }
        }
        Ok(None)
    }

    fn finish_entry(
        &mut self,
        header: &Header,
        extensions: Extensions,
        header_size: u64,
    ) -> Result<Entry, TarError> {
        let pax = extensions.pax.unwrap_or_default();
        let path = extensions
            .name
            .or(pax.path)
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let link = extensions.link.or(pax.link).unwrap_or_else(|| {
            header
                .link_name_bytes()
                .map(|link| link.into_owned())
                .unwrap_or_default()
        });
        let kind = self.kind_of(header, &path)?;
        let number = |field, bytes: &[u8]| -> Result<i64, TarError> {
            numeric(bytes).ok_or_else(|| TarError::Field {
                name: printable(&path),
                field,
            })
        };
        let old = header.as_old();
        let identity =
            |field: &'static str, over: Option<u64>, bytes: &[u8]| -> Result<u32, TarError> {
                let value = match over {
                    Some(value) => Some(value),
                    None => u64::try_from(number(field, bytes)?).ok(),
                };
                // The last one means "no change" to chown(2).
                value
                    .and_then(|value| u32::try_from(value).ok())
                    .filter(|value| *value != u32::MAX)
                    .ok_or_else(|| TarError::Field {
                        name: printable(&path),
                        field,
                    })
            };
        let mut entry = Entry {
            uid: identity("uid", pax.uid, &old.uid)?,
            gid: identity("gid", pax.gid, &old.gid)?,
            // The upper bits repeat the type in some archives.
            mode: u32::try_from(number("mode", &old.mode)? & 0o7777)
                .map_err(|_| field_error("mode", header))?,
            modified: match pax.modified {
                Some(time) => time,
                None => Timespec {
                    tv_sec: number("mtime", &old.mtime)?,
                    tv_nsec: 0,
                },
            },
            accessed: pax.accessed,
            xattrs: pax.xattrs,
            name: path,
            link,
            kind,
            size: 0,
            stored: 0,
            segments: None,
        };
        // What is not a file has no data, whatever its header says.
        let stored = if kind == EntryKind::File {
            pax.size.unwrap_or(header_size)
        } else {
            0
        };
        self.begin_data(stored)?;
        entry.size = stored;
        if header.entry_type() == EntryType::GNUSparse {
            let (segments, size) = self.read_old_sparse(header, &entry.name)?;
            entry.segments = Some(segments);
            entry.size = size;
        } else if kind == EntryKind::File && pax.sparse.version.is_some() {
            let bad = || TarError::Sparse(printable(&entry.name));
            entry.segments = Some(match pax.sparse.version {
                Some((1, 0)) => self.read_sparse_map(&entry.name)?,
                _ => pax.sparse.map.ok_or_else(bad)?,
            });
            entry.size = pax.sparse.size.ok_or_else(bad)?;
        }
        entry.stored = self.remaining;
        if let Some(segments) = &entry.segments
            && !sparse::is_sound(segments, entry.size, entry.stored)
        {
            return Err(TarError::Sparse(printable(&entry.name)));
        }
        Ok(entry)
    }

    fn kind_of(&self, header: &Header, name: &[u8]) -> Result<EntryKind, TarError> {
        let device = |bytes: &[u8]| {
            numeric(bytes)
                .and_then(|number| u32::try_from(number).ok())
                .ok_or_else(|| TarError::Field {
                    name: printable(name),
                    field: "device number",
                })
        };
        // ustar and GNU keep these in the same place.
        let numbers = || -> Result<(u32, u32), TarError> {
            match (header.as_ustar(), header.as_gnu()) {
                (Some(ustar), _) => Ok((device(&ustar.dev_major)?, device(&ustar.dev_minor)?)),
                (None, Some(gnu)) => Ok((device(&gnu.dev_major)?, device(&gnu.dev_minor)?)),
                (None, None) => Ok((0, 0)),
            }
        };
        Ok(match header.entry_type() {
            // Before there was a type for directories they were files with a slash at their end.
            EntryType::Regular if header.as_old().linkflag == [0] && name.ends_with(b"/") => {
                EntryKind::Directory
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => EntryKind::File,
            EntryType::Link => EntryKind::HardLink,
            EntryType::Symlink => EntryKind::Symlink,
            EntryType::Directory => EntryKind::Directory,
            EntryType::Fifo => EntryKind::Fifo,
            EntryType::Char => {
                let (major, minor) = numbers()?;
                EntryKind::CharacterDevice { major, minor }
            }
            EntryType::Block => {
                let (major, minor) = numbers()?;
                EntryKind::BlockDevice { major, minor }
            }
            other => {
                return Err(TarError::Kind {
                    name: printable(name),
                    kind: char::from(other.as_byte()),
                });
            }
        })
    }

    /// The map of GNU's old sparse files: four stretches in the header, 21 in each block after it.
    fn read_old_sparse(
        &mut self,
        header: &Header,
        name: &[u8],
    ) -> Result<(Vec<Segment>, u64), TarError> {
        let bad = || TarError::Sparse(printable(name));
        let gnu = header.as_gnu().ok_or_else(bad)?;
        let size = numeric(&gnu.realsize)
            .and_then(|size| u64::try_from(size).ok())
            .ok_or_else(bad)?;
        let mut segments = Vec::new();
        sparse::push_old(&mut segments, &gnu.sparse).ok_or_else(bad)?;
        let mut more = gnu.isextended[0] != 0;
        while more {
            let mut block = tar::GnuExtSparseHeader::new();
            if !self.read_block(block.as_mut_bytes())? {
                return Err(TarError::Truncated);
            }
            sparse::push_old(&mut segments, &block.sparse).ok_or_else(bad)?;
            more = block.isextended[0] != 0;
        }
        Ok((segments, size))
    }

    /// The map of format 1.0, which is text before the data, padded to a block.
    fn read_sparse_map(&mut self, name: &[u8]) -> Result<Vec<Segment>, TarError> {
        let mut map = sparse::MapParser::default();
        loop {
            let mut block = [0; BLOCK];
            if self.remaining < BLOCK as u64 {
                return Err(TarError::Sparse(printable(name)));
            }
            let mut filled = 0;
            while let Some(rest) = block.get_mut(filled..).filter(|rest| !rest.is_empty()) {
                filled += self.read_data(rest)?;
            }
            let finished = map
                .feed(&block)
                .ok_or_else(|| TarError::Sparse(printable(name)))?;
            if let Some(segments) = finished {
                return Ok(segments);
            }
        }
    }

    fn field(&self, field: &'static str, header: &Header, bytes: &[u8]) -> Result<i64, TarError> {
        numeric(bytes).ok_or_else(|| field_error(field, header))
    }

    fn begin_data(&mut self, size: u64) -> Result<(), TarError> {
        let block = BLOCK as u64;
        if size.checked_next_multiple_of(block).is_none() {
            return Err(TarError::Truncated);
        }
        self.remaining = size;
        self.padding = (block - size % block) % block;
        Ok(())
    }

    fn read_extension(&mut self) -> Result<Vec<u8>, TarError> {
        if self.remaining > MAX_EXTENSION_BYTES {
            return Err(TarError::Extension("larger than 1 MiB"));
        }
        let mut bytes = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            let read = self.read_data(&mut buffer)?;
            match buffer.get(..read) {
                None | Some([]) => return Ok(bytes),
                Some(part) => bytes.extend_from_slice(part),
            }
        }
    }

    /// Passes over what is left of the current member, with its padding.
    fn skip_rest(&mut self) -> Result<(), TarError> {
        let mut buffer = [0; 16_384];
        while self.read_data(&mut buffer)? > 0 {}
        let padding = std::mem::take(&mut self.padding);
        let mut left = usize::try_from(padding).unwrap_or(0);
        while let Some(part) = buffer.get_mut(..left).filter(|part| !part.is_empty()) {
            let read = read_some(&mut self.source, part)?;
            // Some archives end without the last member's padding.
            if read == 0 {
                break;
            }
            self.offset += read as u64;
            left -= read;
        }
        Ok(())
    }

    /// Fills `block`, or says that there are no more bytes.
    fn read_block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool, TarError> {
        let mut filled = 0;
        while let Some(rest) = block.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let read = read_some(&mut self.source, rest)?;
            if read == 0 {
                return if filled == 0 {
                    Ok(false)
                } else {
                    Err(TarError::Truncated)
                };
            }
            self.offset += read as u64;
            filled += read;
        }
        Ok(true)
    }
}

fn read_some(source: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match source.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

fn field_error(field: &'static str, header: &Header) -> TarError {
    TarError::Field {
        name: printable(&header.path_bytes()),
        field,
    }
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    bytes
}

/// The sum of the header's bytes, its own field taken as spaces; old programs summed signed bytes.
fn checksum_fits(header: &Header) -> bool {
    let bytes = header.as_bytes().iter().enumerate();
    let (mut unsigned, mut signed) = (0i64, 0i64);
    for (index, byte) in bytes {
        let byte = if (148..156).contains(&index) {
            b' '
        } else {
            *byte
        };
        unsigned += i64::from(byte);
        signed += i64::from(byte.cast_signed());
    }
    numeric(&header.as_old().cksum).is_some_and(|sum| sum == unsigned || sum == signed)
}

#[cfg(test)]
#[path = "reader_tests.rs"]
mod tests;
