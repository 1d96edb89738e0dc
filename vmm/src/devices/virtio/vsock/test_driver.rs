// SPDX-License-Identifier: Apache-2.0

//! A virtio driver for the tests: one ring in guest memory, with real notifications.

use std::collections::HashMap;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::virtio::device::ActiveQueue;

const NEXT: u16 = 1;
const INDIRECT: u16 = 4;

/// The driver's side of a ring.
#[derive(Debug)]
pub(super) struct Driver {
    base: u64,
    size: u16,
    buffers: u64,
    stride: u64,
    avail: u16,
    told: u16,
    seen: u16,
    event_idx: bool,
    pub(super) free: Vec<u16>,
    held: HashMap<u16, Vec<u16>>,
    kick: EventFd,
}

impl Driver {
    pub(super) fn new(base: u64, size: u16, buffers: u64, stride: u64, event_idx: bool) -> Self {
        Self {
            base,
            size,
            buffers,
            stride,
            avail: 0,
            told: 0,
            seen: 0,
            event_idx,
            free: (0..size).rev().collect(),
            held: HashMap::new(),
            kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
        }
    }

    fn avail_ring(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    fn used_ring(&self) -> u64 {
        (self.avail_ring() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    pub(super) fn active(&self) -> ActiveQueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_desc_table_address(Some(self.base as u32), None);
        queue.set_avail_ring_address(Some(self.avail_ring() as u32), None);
        queue.set_used_ring_address(Some(self.used_ring() as u32), None);
        queue.set_ready(true);
        ActiveQueue {
            queue,
            kick: self.kick.try_clone().unwrap(),
        }
    }

    pub(super) fn buffer(&self, index: u16) -> u64 {
        self.buffers + u64::from(index) * self.stride
    }

    pub(super) fn free(&self) -> usize {
        self.free.len()
    }

    fn descriptor(mem: &GuestMemoryMmap, table: u64, at: u16, what: (u64, u32, u16), next: u16) {
        let at = table + 16 * u64::from(at);
        mem.write_obj(what.0, GuestAddress(at)).unwrap();
        mem.write_obj(what.1, GuestAddress(at + 8)).unwrap();
        mem.write_obj(what.2, GuestAddress(at + 12)).unwrap();
        mem.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Makes a chain of `(address, length, flags)` available. No notification yet.
    pub(super) fn add(&mut self, mem: &GuestMemoryMmap, pieces: &[(u64, u32, u16)]) -> u16 {
        let indices: Vec<u16> = pieces.iter().map(|_| self.free.pop().unwrap()).collect();
        for (at, piece) in pieces.iter().enumerate() {
            let next = indices.get(at + 1).copied();
            let flags = piece.2 | if next.is_some() { NEXT } else { 0 };
            let what = (piece.0, piece.1, flags);
            Self::descriptor(mem, self.base, indices[at], what, next.unwrap_or(0));
        }
        let head = indices[0];
        self.held.insert(head, indices);
        self.publish(mem, head);
        head
    }

    /// As `add`, by way of an indirect table at `table`.
    pub(super) fn add_indirect(
        &mut self,
        mem: &GuestMemoryMmap,
        table: u64,
        pieces: &[(u64, u32, u16)],
    ) {
        for (at, piece) in pieces.iter().enumerate() {
            let last = at + 1 == pieces.len();
            let flags = piece.2 | if last { 0 } else { NEXT };
            let at = u16::try_from(at).unwrap();
            Self::descriptor(mem, table, at, (piece.0, piece.1, flags), at + 1);
        }
        let len = u32::try_from(pieces.len() * 16).unwrap();
        self.add(mem, &[(table, len, INDIRECT)]);
    }

    pub(super) fn publish(&mut self, mem: &GuestMemoryMmap, head: u16) {
        let slot = self.avail_ring() + 4 + 2 * u64::from(self.avail % self.size);
        mem.write_obj(head, GuestAddress(slot)).unwrap();
        self.avail = self.avail.wrapping_add(1);
        self.set_avail(mem, self.avail);
    }

    pub(super) fn set_avail(&self, mem: &GuestMemoryMmap, index: u16) {
        fence(Ordering::SeqCst);
        let at = GuestAddress(self.avail_ring() + 2);
        mem.store(index, at, Ordering::Release).unwrap();
        fence(Ordering::SeqCst);
    }

    /// Notifies the device, if it asked for that.
    pub(super) fn notify(&mut self, mem: &GuestMemoryMmap) {
        let wanted = if self.event_idx {
            let at = self.used_ring() + 4 + 8 * u64::from(self.size);
            let event: u16 = mem.read_obj(GuestAddress(at)).unwrap();
            let new = self.avail;
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(self.told)
        } else {
            let flags: u16 = mem.read_obj(GuestAddress(self.used_ring())).unwrap();
            flags & 1 == 0
        };
        self.told = self.avail;
        if wanted {
            self.kick.write(1).unwrap();
        }
    }

    pub(super) fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// The next used chain: its head and length.
    pub(super) fn used(&mut self, mem: &GuestMemoryMmap) -> Option<(u16, u32)> {
        let at = GuestAddress(self.used_ring() + 2);
        let index: u16 = mem.load(at, Ordering::Acquire).unwrap();
        if index == self.seen {
            return None;
        }
        let slot = self.used_ring() + 4 + 8 * u64::from(self.seen % self.size);
        let head: u32 = mem.read_obj(GuestAddress(slot)).unwrap();
        let len: u32 = mem.read_obj(GuestAddress(slot + 4)).unwrap();
        self.seen = self.seen.wrapping_add(1);
        let at = self.avail_ring() + 4 + 2 * u64::from(self.size);
        mem.write_obj(self.seen, GuestAddress(at)).unwrap();
        fence(Ordering::SeqCst);
        let head = u16::try_from(head).unwrap();
        let held = self.held.remove(&head).expect("used twice, or never given");
        self.free.extend(held);
        Some((head, len))
    }
}
