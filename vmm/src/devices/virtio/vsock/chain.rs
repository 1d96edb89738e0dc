// SPDX-License-Identifier: Apache-2.0

//! Descriptor chains as slices of guest memory: a header and a payload, however the guest cut them (virtio 1.2,
//! 2.7.4.1: no assumption on framing).
//!
//! Each descriptor is read once; every slice lies in guest memory; the payload is never longer than asked for.

use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemory as _, GuestMemoryMmap, VolatileSlice};

use super::packet::HEADER_SIZE;

/// Longest chain that is looked at, descriptors. The queues are shorter; only an indirect table could hold more.
const MAX_DESCRIPTORS: usize = 256;

/// A piece of guest memory.
pub(super) type Slice<'m> = VolatileSlice<'m>;

/// Which way the device uses a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// The device reads: a packet of the guest.
    Readable,
    /// The device writes: a buffer for a packet to the guest.
    Writable,
}

/// A chain that cannot be used. It goes back to the guest unused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum ChainFault {
    /// A descriptor of the other direction.
    #[error("a descriptor has the wrong direction")]
    Direction,
    /// A buffer outside of guest memory.
    #[error("a descriptor points outside of guest memory")]
    Address,
    /// No room for a header, or an rx buffer that is nothing but a header.
    #[error("the chain is too short")]
    Short,
    /// More descriptors than [`MAX_DESCRIPTORS`].
    #[error("the chain is too long")]
    Long,
}

/// A usable chain.
#[derive(Debug)]
pub(super) struct Chain<'m> {
    /// Where the header is: [`HEADER_SIZE`] bytes, nearly always in one piece.
    pub(super) header: Vec<Slice<'m>>,
    /// What follows.
    pub(super) payload: Vec<Slice<'m>>,
    /// Bytes of `payload`.
    pub(super) payload_len: usize,
}

impl<'m> Chain<'m> {
    /// Looks at a chain; of its payload at most the first `max_payload` bytes are kept.
    ///
    /// # Errors
    /// When it is not a header and, if writable, at least one byte more.
    pub(super) fn new(
        mem: &'m GuestMemoryMmap,
        descriptors: DescriptorChain<&'m GuestMemoryMmap>,
        direction: Direction,
        max_payload: usize,
    ) -> Result<Self, ChainFault> {
        let mut chain = Self {
            header: Vec::with_capacity(1),
            payload: Vec::with_capacity(1),
            payload_len: 0,
        };
        let mut header_left = HEADER_SIZE;
        for (index, descriptor) in descriptors.enumerate() {
            if index >= MAX_DESCRIPTORS {
                return Err(ChainFault::Long);
            }
            if descriptor.is_write_only() != (direction == Direction::Writable) {
                return Err(ChainFault::Direction);
            }
            let wanted = header_left + (max_payload - chain.payload_len);
            let len = usize::try_from(descriptor.len()).map_or(wanted, |len| len.min(wanted));
            if len == 0 {
                continue;
            }
            for slice in mem.get_slices(descriptor.addr(), len) {
                let slice = slice.map_err(|_| ChainFault::Address)?;
                header_left = chain.push(slice, header_left)?;
            }
        }
        let enough = match direction {
            Direction::Readable => header_left == 0,
            Direction::Writable => header_left == 0 && chain.payload_len > 0,
        };
        if enough {
            Ok(chain)
        } else {
            Err(ChainFault::Short)
        }
    }

    /// Adds a slice, the first `header_left` bytes of it to the header. Gives back how much header is missing then.
    fn push(&mut self, slice: Slice<'m>, header_left: usize) -> Result<usize, ChainFault> {
        let (head, rest) = slice
            .split_at(header_left.min(slice.len()))
            .map_err(|_| ChainFault::Address)?;
        let missing = header_left - head.len();
        if !head.is_empty() {
            self.header.push(head);
        }
        if !rest.is_empty() {
            self.payload_len += rest.len();
            self.payload.push(rest);
        }
        Ok(missing)
    }

    /// Copies the header out of guest memory, once.
    pub(super) fn read_header(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        let mut rest = &mut bytes[..];
        for slice in &self.header {
            let copied = slice.copy_to(rest);
            rest = rest.get_mut(copied..).unwrap_or_default();
        }
        bytes
    }

    /// Copies a header into guest memory.
    pub(super) fn write_header(&self, bytes: &[u8; HEADER_SIZE]) {
        let mut rest = &bytes[..];
        for slice in &self.header {
            slice.copy_from(rest);
            rest = rest.get(slice.len()..).unwrap_or_default();
        }
    }
}

/// The first `len` bytes of `slices`, which may have more.
pub(super) fn truncate<'m>(slices: &[Slice<'m>], len: usize) -> Vec<Slice<'m>> {
    let mut left = len;
    let mut kept = Vec::with_capacity(slices.len());
    for slice in slices {
        if left == 0 {
            break;
        }
        if let Ok(part) = slice.subslice(0, slice.len().min(left)) {
            left -= part.len();
            kept.push(part);
        }
    }
    kept
}
