// SPDX-License-Identifier: Apache-2.0

//! A descriptor chain as lists of guest memory slices, every address and length checked, before anything is
//! read (virtio 1.2, 2.7).
//!
//! What is decided upon is copied out once with [`Segments::copy_to`]; bulk data goes between files and guest
//! memory without a copy (`sys`). Nothing here looks at the same guest byte twice.

use std::ops::Deref;

use virtio_queue::DescriptorChain;
use vm_memory::{Address, GuestAddress, GuestMemory as _, GuestMemoryMmap, VolatileSlice};

/// Most slices of one chain, both directions together: what one preadv(2) takes (IOV_MAX).
pub(crate) const MAX_SEGMENTS: usize = 1024;

/// A chain that cannot be served. It fails that request alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ChainError {
    /// A descriptor points outside guest memory.
    #[error("descriptor of {len} bytes at {address:#x} is outside guest memory")]
    OutsideMemory {
        /// Guest physical address.
        address: u64,
        /// Length in bytes.
        len: u32,
    },
    /// A device-readable descriptor after a device-writable one (virtio 1.2, 2.7.4.2).
    #[error("a readable descriptor follows a writable one")]
    OutOfOrder,
    /// More than [`MAX_SEGMENTS`].
    #[error("the chain has more than {MAX_SEGMENTS} segments")]
    TooLong,
}

/// Slices of guest memory, one after another.
#[derive(Debug, Clone, Default)]
pub(crate) struct Segments<'a> {
    slices: Vec<VolatileSlice<'a>>,
    len: usize,
}

impl<'a> Segments<'a> {
    /// Total length in bytes; below 2^32, as virtio-queue ends a longer chain.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The slices, for vectored I/O. None is empty.
    pub(crate) fn slices(&self) -> &[VolatileSlice<'a>] {
        &self.slices
    }

    /// Cuts at `at`: `self` keeps what is before, the rest is returned. `None` when there are fewer bytes.
    pub(crate) fn split_off(&mut self, at: usize) -> Option<Self> {
        if at > self.len {
            return None;
        }
        let mut before = 0;
        let mut index = 0;
        for slice in &self.slices {
            if before + slice.len() > at {
                break;
            }
            before += slice.len();
            index += 1;
        }
        let mut rest = self.slices.split_off(index);
        let into = at - before;
        if into > 0 {
            let first = rest.first_mut()?;
            let (head, tail) = (first.subslice(0, into).ok()?, first.offset(into).ok()?);
            self.slices.push(head);
            *first = tail;
        }
        let rest = Self {
            slices: rest,
            len: self.len - at,
        };
        self.len = at;
        Some(rest)
    }

    /// Copies the first bytes out; returns how many: the smaller of both lengths.
    pub(crate) fn copy_to(&self, buffer: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            let Some(left) = buffer.get_mut(done..).filter(|left| !left.is_empty()) else {
                break;
            };
            done += slice.copy_to(left);
        }
        done
    }

    /// Copies `data` in from the beginning; returns how many bytes: the smaller of both lengths.
    pub(crate) fn copy_from(&self, data: &[u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            let Some(left) = data.get(done..).filter(|left| !left.is_empty()) else {
                break;
            };
            slice.copy_from(left);
            done += left.len().min(slice.len());
        }
        done
    }

    fn push(&mut self, slice: VolatileSlice<'a>) {
        self.len += slice.len();
        self.slices.push(slice);
    }
}

/// A whole chain: what the device reads and what it writes.
#[derive(Debug, Default)]
pub(crate) struct Chain<'a> {
    /// Device-readable part.
    pub(crate) readable: Segments<'a>,
    /// Device-writable part.
    pub(crate) writable: Segments<'a>,
    /// Guest physical address of its last byte, where some devices put a status.
    pub(crate) last_writable: Option<GuestAddress>,
}

impl<'a> Chain<'a> {
    /// Walks the chain and checks every descriptor against guest memory.
    ///
    /// # Errors
    /// On the first descriptor that cannot be served.
    pub(crate) fn collect<M>(
        memory: &'a GuestMemoryMmap,
        chain: DescriptorChain<M>,
    ) -> Result<Self, ChainError>
    where
        M: Deref<Target = GuestMemoryMmap>,
    {
        let mut collected = Self::default();
        for descriptor in chain {
            let writable = descriptor.is_write_only();
            if !writable && collected.writable.len() > 0 {
                return Err(ChainError::OutOfOrder);
            }
            for slice in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
                let slice = slice.map_err(|_| ChainError::OutsideMemory {
                    address: descriptor.addr().0,
                    len: descriptor.len(),
                })?;
                let total = collected.readable.slices.len() + collected.writable.slices.len();
                if total == MAX_SEGMENTS {
                    return Err(ChainError::TooLong);
                }
                let side = if writable {
                    &mut collected.writable
                } else {
                    &mut collected.readable
                };
                side.push(slice);
            }
            if writable && descriptor.len() > 0 {
                let last = u64::from(descriptor.len() - 1);
                collected.last_writable = descriptor.addr().checked_add(last);
            }
        }
        Ok(collected)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::Bytes;

    const WRITE: u16 = VRING_DESC_F_WRITE as u16;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), 0x10000),
            (GuestAddress(0x10000), 0x10000),
        ])
        .unwrap()
    }

    fn descriptor(address: u64, len: u32, flags: u16) -> RawDescriptor {
        RawDescriptor::from(Descriptor::new(address, len, flags, 0))
    }

    fn collect<'a>(
        memory: &'a GuestMemoryMmap,
        descriptors: &[RawDescriptor],
    ) -> Result<Chain<'a>, ChainError> {
        let queue = MockSplitQueue::new(memory, 16);
        Chain::collect(memory, queue.build_desc_chain(descriptors).unwrap())
    }

    #[test]
    fn bytes_come_out_as_they_went_in_over_any_split() {
        let memory = memory();
        memory
            .write_slice(b"abcdefghij", GuestAddress(0x4000))
            .unwrap();
        let parts = [
            descriptor(0x4000, 3, 0),
            descriptor(0x4003, 0, 0),
            descriptor(0x4003, 7, 0),
        ];
        for at in 0..=10 {
            let mut first = collect(&memory, &parts).unwrap().readable;
            let rest = first.split_off(at).unwrap();
            assert_eq!((first.len(), rest.len()), (at, 10 - at));
            let mut bytes = [0; 10];
            assert_eq!(first.copy_to(&mut bytes[..at]), at);
            assert_eq!(rest.copy_to(&mut bytes[at..]), 10 - at);
            assert_eq!(&bytes, b"abcdefghij");
        }
        assert!(
            collect(&memory, &parts)
                .unwrap()
                .readable
                .split_off(11)
                .is_none()
        );
    }

    #[test]
    fn a_descriptor_may_cross_regions_but_not_leave_memory() {
        let memory = memory();
        let chain = collect(&memory, &[descriptor(0xfff0, 0x20, WRITE)]).unwrap();
        assert_eq!(chain.writable.slices().len(), 2);
        assert_eq!(chain.last_writable, Some(GuestAddress(0x1000f)));
        assert_eq!(chain.writable.copy_from(&[7; 0x20]), 0x20);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x1000f)).unwrap(), 7);
        for (address, len) in [(0x1fff0, 0x11), (0x20000, 1), (u64::MAX, 1), (0, u32::MAX)] {
            assert!(matches!(
                collect(&memory, &[descriptor(address, len, 0)]),
                Err(ChainError::OutsideMemory { .. })
            ));
        }
    }

    #[test]
    fn readable_after_writable_is_refused() {
        let memory = memory();
        let parts = [descriptor(0x4000, 8, WRITE), descriptor(0x5000, 8, 0)];
        assert_eq!(
            collect(&memory, &parts).unwrap_err(),
            ChainError::OutOfOrder
        );
    }

    #[test]
    fn a_looped_chain_ends_at_the_queue_size() {
        let memory = memory();
        let queue = MockSplitQueue::new(&memory, 16);
        let looped = RawDescriptor::from(Descriptor::new(0x4000, 4, VRING_DESC_F_NEXT as u16, 0));
        let chain = queue.build_multiple_desc_chains(&[looped]);
        // Without a last descriptor the mock announces no chain; announce it by hand.
        drop(chain);
        queue.desc_table().store(0, looped).unwrap();
        queue.avail().ring().ref_at(0).unwrap().store(0);
        queue.avail().idx().store(1);
        let mut ring: virtio_queue::Queue = queue.create_queue().unwrap();
        let chain = virtio_queue::QueueOwnedT::iter(&mut ring, &memory)
            .unwrap()
            .next()
            .unwrap();
        let chain = Chain::collect(&memory, chain).unwrap();
        assert_eq!(chain.readable.len(), 16 * 4);
    }
}
