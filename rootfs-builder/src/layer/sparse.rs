// SPDX-License-Identifier: Apache-2.0

//! Maps of sparse files: which stretches of a file its stored bytes belong to.
//!
//! No I/O here: the reader feeds blocks, this makes [`Segment`]s of them and says whether they hold together.

use tar::GnuSparseHeader;

use super::entry::Segment;
use super::numeric::numeric;
use super::pax::{MAX_SEGMENTS, decimal};

/// Are `segments` in order, apart, within a file of `size` bytes, and together `stored` bytes long?
pub(super) fn is_sound(segments: &[Segment], size: u64, stored: u64) -> bool {
    let mut end = 0u64;
    let mut total = 0u64;
    for segment in segments {
        let Some(after) = segment.offset.checked_add(segment.length) else {
            return false;
        };
        if segment.offset < end || after > size {
            return false;
        }
        end = after;
        // Cannot overflow: the stretches are apart and within `size`.
        total += segment.length;
    }
    total == stored
}

/// Adds the stretches of one block of an old GNU map, up to the first empty one. `None` when a number
/// cannot be read or there are too many.
pub(super) fn push_old(segments: &mut Vec<Segment>, map: &[GnuSparseHeader]) -> Option<()> {
    for stretch in map {
        if stretch.offset[0] == 0 {
            break;
        }
        if segments.len() >= MAX_SEGMENTS {
            return None;
        }
        segments.push(Segment {
            offset: u64::try_from(numeric(&stretch.offset)?).ok()?,
            length: u64::try_from(numeric(&stretch.numbytes)?).ok()?,
        });
    }
    Some(())
}

/// Reads the map of format 1.0: decimal lines, first how many stretches, then offset and length of each.
#[derive(Debug, Default)]
pub(super) struct MapParser {
    line: Vec<u8>,
    count: Option<usize>,
    offset: Option<u64>,
    segments: Vec<Segment>,
}

impl MapParser {
    /// Takes the next block. `Some(Some(map))` when the map is whole (the rest of the block is padding),
    /// `Some(None)` when it goes on, `None` when it is no map.
    pub(super) fn feed(&mut self, block: &[u8]) -> Option<Option<Vec<Segment>>> {
        for byte in block {
            if *byte != b'\n' {
                // Twenty digits hold every 64-bit number.
                if self.line.len() >= 20 {
                    return None;
                }
                self.line.push(*byte);
                continue;
            }
            let number = decimal(&self.line)?;
            self.line.clear();
            match (self.count, self.offset.take()) {
                (None, _) => {
                    let count = usize::try_from(number).ok()?;
                    if count > MAX_SEGMENTS {
                        return None;
                    }
                    self.count = Some(count);
                }
                (Some(_), None) => self.offset = Some(number),
                (Some(_), Some(offset)) => self.segments.push(Segment {
                    offset,
                    length: number,
                }),
            }
            if self.offset.is_none() && self.count == Some(self.segments.len()) {
                return Some(Some(std::mem::take(&mut self.segments)));
            }
        }
        Some(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segments(pairs: &[(u64, u64)]) -> Vec<Segment> {
        pairs
            .iter()
            .map(|&(offset, length)| Segment { offset, length })
            .collect()
    }

    #[test]
    fn map_must_be_in_order_apart_inside_and_as_long_as_the_data() {
        assert!(is_sound(&segments(&[(0, 10), (10, 5), (100, 1)]), 101, 16));
        assert!(is_sound(&[], 1 << 40, 0));
        assert!(!is_sound(&segments(&[(0, 10), (9, 5)]), 100, 15));
        assert!(!is_sound(&segments(&[(50, 10), (0, 5)]), 100, 15));
        assert!(!is_sound(&segments(&[(95, 10)]), 100, 10));
        assert!(!is_sound(&segments(&[(u64::MAX, 10)]), u64::MAX, 10));
        assert!(!is_sound(&segments(&[(0, 10)]), 100, 11));
    }

    #[test]
    fn map_may_be_cut_anywhere_by_blocks() {
        let text = b"2\n0\n10\n1048576\n5\n";
        for cut in 0..text.len() {
            let mut parser = MapParser::default();
            assert_eq!(parser.feed(&text[..cut]), Some(None));
            let mut tail = text[cut..].to_vec();
            tail.extend([0; 40]);
            assert_eq!(
                parser.feed(&tail),
                Some(Some(segments(&[(0, 10), (1_048_576, 5)])))
            );
        }
        assert_eq!(MapParser::default().feed(b"0\n\0\0"), Some(Some(vec![])));
    }

    #[test]
    fn text_that_is_no_map_is_refused() {
        for bad in [
            &b"\n"[..],
            b"-1\n",
            b"999999999\n",
            b"x\n",
            b"1\n\n",
            b"111111111111111111111",
        ] {
            assert_eq!(
                MapParser::default().feed(bad),
                None,
                "{}",
                bad.escape_ascii()
            );
        }
    }
}
