// SPDX-License-Identifier: Apache-2.0

//! Queues in the making: what the driver wrote of them, and the check at activation.

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap};

use crate::devices::virtio::device::{QueueSnapshot, SnapshotError};

/// Which of a queue's three addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Descriptor table.
    Descriptors,
    /// Available ring.
    Available,
    /// Used ring.
    Used,
}

/// A queue that cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum QueueError {
    /// Size or alignment.
    #[error("queue {0} has a size or an address that is not allowed")]
    Shape(usize),
    /// A part of it is not wholly in memory.
    #[error("queue {0} is not in guest memory")]
    NotInMemory(usize),
    /// Its parts overlap.
    #[error("the parts of queue {0} overlap")]
    Overlap(usize),
}

/// All queues of a device before activation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueSetup {
    queues: Vec<QueueSnapshot>,
}

impl QueueSetup {
    /// Queues after a reset, of these largest sizes.
    pub fn new(sizes: &[u16]) -> Self {
        let queues = sizes.iter().map(|size| QueueSnapshot {
            max_size: *size,
            size: *size,
            ready: false,
            desc_table: 0,
            avail_ring: 0,
            used_ring: 0,
            next_avail: 0,
            next_used: 0,
            event_idx: false,
        });
        Self {
            queues: queues.collect(),
        }
    }

    /// These queues, going on at `positions` where there is one.
    ///
    /// # Errors
    /// When a position is of another queue.
    pub fn at(&self, positions: &[Option<QueueSnapshot>]) -> Result<Self, SnapshotError> {
        let mut setup = self.clone();
        for (index, position) in positions.iter().enumerate() {
            let Some(position) = position else { continue };
            let queue = setup.queues.get_mut(index).filter(|queue| {
                let place = |queue: &QueueSnapshot| {
                    (
                        queue.ready,
                        queue.size,
                        queue.desc_table,
                        queue.avail_ring,
                        queue.used_ring,
                    )
                };
                place(queue) == place(position)
            });
            let Some(queue) = queue else {
                let text = format!("the position of queue {index} is of another queue");
                return Err(SnapshotError::BadState(text));
            };
            (queue.next_avail, queue.next_used) = (position.next_avail, position.next_used);
        }
        Ok(setup)
    }

    /// What was written of the queues.
    pub fn snapshots(&self) -> &[QueueSnapshot] {
        &self.queues
    }

    /// The queue that the driver selected; none when it selected one that does not exist.
    pub fn get(&self, select: u32) -> Option<&QueueSnapshot> {
        self.queues.get(usize::try_from(select).ok()?)
    }

    fn get_mut(&mut self, select: u32) -> Option<&mut QueueSnapshot> {
        self.queues.get_mut(usize::try_from(select).ok()?)
    }

    /// QueueNum. A size that is not allowed is not taken.
    pub fn set_size(&mut self, select: u32, size: u32) {
        let Some(queue) = self.get_mut(select).filter(|queue| !queue.ready) else {
            return;
        };
        match u16::try_from(size) {
            Ok(size) if size.is_power_of_two() && size <= queue.max_size => queue.size = size,
            Ok(_) | Err(_) => log::debug!("driver asked for a queue of {size} entries"),
        }
    }

    /// QueueReady.
    pub fn set_ready(&mut self, select: u32, ready: bool) {
        if let Some(queue) = self.get_mut(select) {
            queue.ready = ready;
        }
    }

    /// One half of an address. A queue that is ready is not changed.
    pub fn set_address(&mut self, select: u32, part: Part, high: bool, half: u32) {
        let Some(queue) = self.get_mut(select).filter(|queue| !queue.ready) else {
            return;
        };
        let address = match part {
            Part::Descriptors => &mut queue.desc_table,
            Part::Available => &mut queue.avail_ring,
            Part::Used => &mut queue.used_ring,
        };
        let half = u64::from(half);
        *address = if high {
            (*address & 0xffff_ffff) | (half << 32)
        } else {
            (*address & !0xffff_ffff) | half
        };
    }

    /// The queues that the driver made ready, checked against memory; `None` for the others.
    ///
    /// # Errors
    /// Names the first queue that is wrong.
    pub fn activate(
        &self,
        memory: &GuestMemoryMmap,
        event_idx: bool,
    ) -> Result<Vec<Option<Queue>>, QueueError> {
        let check = |(index, snapshot): (usize, &QueueSnapshot)| {
            if !snapshot.ready {
                return Ok(None);
            }
            check_place(index, snapshot, memory)?;
            let mut queue = Queue::try_from(snapshot).map_err(|_| QueueError::Shape(index))?;
            queue.set_event_idx(event_idx);
            if !queue.is_valid(memory) {
                return Err(QueueError::NotInMemory(index));
            }
            Ok(Some(queue))
        };
        self.queues.iter().enumerate().map(check).collect()
    }
}

/// Queues of a saved transport.
impl From<Vec<QueueSnapshot>> for QueueSetup {
    fn from(queues: Vec<QueueSnapshot>) -> Self {
        Self { queues }
    }
}

/// Every part wholly in one region of memory, and no part in another.
fn check_place(
    index: usize,
    queue: &QueueSnapshot,
    memory: &GuestMemoryMmap,
) -> Result<(), QueueError> {
    let size = u64::from(queue.size);
    // virtio 1.2, 2.7: sizes of the parts, with the event fields.
    let parts = [
        (queue.desc_table, 16 * size),
        (queue.avail_ring, 6 + 2 * size),
        (queue.used_ring, 6 + 8 * size),
    ];
    let mut ends = Vec::with_capacity(parts.len());
    for (start, length) in parts {
        let length_in_host = usize::try_from(length).map_err(|_| QueueError::Shape(index))?;
        if !memory.check_range(GuestAddress(start), length_in_host) {
            return Err(QueueError::NotInMemory(index));
        }
        // In memory, so it does not wrap.
        ends.push((start, start.saturating_add(length)));
    }
    ends.sort_unstable();
    let overlap = ends
        .iter()
        .zip(ends.iter().skip(1))
        .any(|(one, next)| one.1 > next.0);
    if overlap {
        return Err(QueueError::Overlap(index));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), 0x10000),
            (GuestAddress(0x20000), 0x10000),
        ])
        .unwrap()
    }

    fn setup(size: u32, desc: u64, avail: u64, used: u64) -> QueueSetup {
        let mut setup = QueueSetup::new(&[256]);
        setup.set_size(0, size);
        for (part, address) in [
            (Part::Descriptors, desc),
            (Part::Available, avail),
            (Part::Used, used),
        ] {
            setup.set_address(0, part, false, address as u32);
            setup.set_address(0, part, true, (address >> 32) as u32);
        }
        setup.set_ready(0, true);
        setup
    }

    #[test]
    fn a_right_queue_is_made_as_the_driver_said() {
        let queues = setup(128, 0x1000, 0x2000, 0x3000)
            .activate(&memory(), true)
            .unwrap();
        let queue = queues[0].as_ref().unwrap();
        assert_eq!(queue.size(), 128);
        assert_eq!(queue.desc_table(), 0x1000);
        assert!(queue.event_idx_enabled());
    }

    #[test]
    fn wrong_places_are_refused() {
        let refused = |desc, avail, used| {
            setup(16, desc, avail, used)
                .activate(&memory(), false)
                .unwrap_err()
        };
        // Not aligned.
        assert_eq!(refused(0x1008, 0x2000, 0x3000), QueueError::Shape(0));
        assert_eq!(refused(0x1000, 0x2001, 0x3000), QueueError::Shape(0));
        assert_eq!(refused(0x1000, 0x2000, 0x3002), QueueError::Shape(0));
        // Beyond the end, over a hole, and wrapping.
        assert_eq!(refused(0x40000, 0x2000, 0x3000), QueueError::NotInMemory(0));
        assert_eq!(refused(0xfff0, 0x2000, 0x3000), QueueError::NotInMemory(0));
        assert_eq!(
            refused(0x1000, u64::MAX - 1, 0x3000),
            QueueError::NotInMemory(0)
        );
        // In one another.
        assert_eq!(refused(0x1000, 0x1010, 0x3000), QueueError::Overlap(0));
    }

    #[test]
    fn a_ready_queue_does_not_change_and_one_that_is_not_there_has_no_effect() {
        let mut queues = setup(128, 0x1000, 0x2000, 0x3000);
        let before = queues.clone();
        queues.set_size(0, 64);
        queues.set_address(0, Part::Used, false, 0x5000);
        queues.set_size(1, 64);
        queues.set_ready(u32::MAX, true);
        assert_eq!(queues, before);
    }

    #[test]
    fn sizes_that_are_not_allowed_are_not_taken() {
        let mut queues = QueueSetup::new(&[256]);
        for size in [0, 3, 512, 0x10040, u32::MAX] {
            queues.set_size(0, size);
            assert_eq!(queues.get(0).unwrap().size, 256);
        }
    }

    proptest! {
        #[test]
        fn no_address_makes_it_panic_and_what_passes_is_in_memory(
            size in 0u32..=1024, desc: u64, avail in 0u64..0x40000, used in 0u64..0x40000,
        ) {
            let memory = memory();
            for desc in [desc, desc % 0x40000] {
                if let Ok(queues) = setup(size, desc, avail, used).activate(&memory, false) {
                    let queue = queues[0].as_ref().unwrap();
                    prop_assert!(memory.check_range(
                        GuestAddress(queue.desc_table()), 16 * usize::from(queue.size())));
                    prop_assert!(queue.is_valid(&memory));
                }
            }
        }
    }
}
