// SPDX-License-Identifier: Apache-2.0

//! File data between the host's files and guest memory, without a copy in between.

use std::fs::File;
use std::io;

use virtiofsd::filesystem::{ZeroCopyReader, ZeroCopyWriter};
use virtiofsd::oslib::{ReadvFlags, WritevFlags};

use super::segments::Segments;
use super::sys;

/// Reads a file straight into guest memory.
pub(super) struct FileToGuest<'a>(pub(super) Segments<'a>);

impl ZeroCopyWriter for FileToGuest<'_> {
    fn read_from_file_at(
        &mut self,
        file: &File,
        count: usize,
        offset: u64,
        _flags: Option<ReadvFlags>,
    ) -> io::Result<usize> {
        transfer(&mut self.0, count, offset, |left, offset| {
            sys::read_at(file, left.slices(), offset)
        })
    }
}

/// Writes guest memory straight into a file.
pub(super) struct GuestToFile<'a>(pub(super) Segments<'a>);

impl ZeroCopyReader for GuestToFile<'_> {
    fn write_to_file_at(
        &mut self,
        file: &File,
        count: usize,
        offset: u64,
        flags: Option<WritevFlags>,
    ) -> io::Result<usize> {
        let flags = flags.map_or(0, |flags| flags.bits());
        transfer(&mut self.0, count, offset, |left, offset| {
            sys::write_at(file, left.slices(), offset, flags)
        })
    }
}

/// Calls `step` until `count` bytes are moved or nothing moves any more. What was moved before an error counts.
fn transfer<'a>(
    segments: &mut Segments<'a>,
    count: usize,
    mut offset: u64,
    mut step: impl FnMut(&Segments<'a>, u64) -> io::Result<usize>,
) -> io::Result<usize> {
    let mut left = std::mem::take(segments);
    let count = count.min(left.len());
    left.split_off(count);
    let mut done = 0;
    while done < count {
        match step(&left, offset) {
            Ok(0) => break,
            Ok(moved) => {
                done += moved;
                let Some(rest) = left.split_off(moved) else {
                    break;
                };
                left = rest;
                let moved = moved as u64;
                offset = offset
                    .checked_add(moved)
                    .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) if done > 0 => break,
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}
