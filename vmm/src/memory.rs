// SPDX-License-Identifier: Apache-2.0

//! Guest memory: private anonymous memory in one or two regions around the hole for devices.
//!
//! Private, so that a template's memory can later be mapped copy-on-write in its place. Nothing is touched here:
//! pages come as the guest (or the loader) uses them. Transparent huge pages are left as the host has them
//! (`/sys/kernel/mm/transparent_hugepage`): with `madvise` a pod costs the 4 KiB pages that it touched and
//! not 2 MiB for each; with `always` start-up takes fewer faults. The administrator's choice stands.

use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::arch::layout::{MMIO_HOLE_END, MMIO_HOLE_START};

/// Guest memory that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// mmap(2) failed.
    #[error("failed to map {bytes} bytes of guest memory")]
    Map {
        /// Size of all regions.
        bytes: u64,
        /// Why.
        #[source]
        source: vm_memory::mmap::FromRangesError,
    },
    /// Beyond what a process can address.
    #[error("{0} bytes of guest memory are more than this host can address")]
    TooLarge(u64),
}

/// The guest physical ranges (first address, bytes) that hold `bytes` of RAM.
pub fn ranges(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(MMIO_HOLE_START);
    let mut ranges = vec![(0, low)];
    if bytes > low {
        ranges.push((MMIO_HOLE_END, bytes - low));
    }
    ranges
}

/// Maps `bytes` (a multiple of the page size) of guest memory.
///
/// # Errors
/// When the host refuses.
pub fn allocate(bytes: u64) -> Result<GuestMemoryMmap, MemoryError> {
    let ranges = ranges(bytes)
        .into_iter()
        .map(|(start, size)| {
            let size = usize::try_from(size).map_err(|_| MemoryError::TooLarge(bytes))?;
            Ok((GuestAddress(start), size))
        })
        .collect::<Result<Vec<_>, MemoryError>>()?;
    GuestMemoryMmap::from_ranges(&ranges).map_err(|source| MemoryError::Map { bytes, source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemory};

    const GIB: u64 = 1 << 30;

    #[test]
    fn memory_up_to_the_hole_is_one_range() {
        assert_eq!(ranges(128 << 20), [(0, 128 << 20)]);
        assert_eq!(ranges(3 * GIB), [(0, 3 * GIB)]);
    }

    #[test]
    fn more_memory_goes_on_after_the_hole_and_none_is_lost() {
        for bytes in [3 * GIB + 4096, 4 * GIB, 100 * GIB] {
            let ranges = ranges(bytes);
            assert_eq!(ranges.len(), 2);
            assert_eq!(ranges[0], (0, 3 * GIB));
            assert_eq!(ranges[1].0, 4 * GIB);
            assert_eq!(ranges.iter().map(|range| range.1).sum::<u64>(), bytes);
        }
    }

    #[test]
    fn both_sides_of_the_hole_are_memory_and_the_hole_is_not() {
        let memory = allocate(3 * GIB + (1 << 20)).unwrap();
        memory.write_obj(7u64, GuestAddress(4 * GIB)).unwrap();
        assert!(memory.write_obj(7u64, GuestAddress(3 * GIB)).is_err());
        assert!(
            memory
                .write_obj(7u64, GuestAddress(4 * GIB + (1 << 20)))
                .is_err()
        );
        assert_eq!(memory.iter().count(), 2);
    }
}
