// SPDX-License-Identifier: Apache-2.0

//! One queue of the device, with its notifications both ways.

use std::io;
use std::os::fd::{AsRawFd as _, RawFd};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT as _, QueueT as _};
use vm_memory::GuestMemoryMmap;

use crate::devices::virtio::device::{ActiveQueue, QueueSnapshot};

/// The guest broke the ring: the device needs a reset.
#[derive(Debug, thiserror::Error)]
#[error("the guest broke a ring")]
pub(super) struct RingBroken(#[from] virtio_queue::Error);

/// A queue in service. One that the driver left unready is always empty.
#[derive(Debug)]
pub(super) struct Ring {
    active: Option<ActiveQueue>,
    /// Buffers were used since the guest was last told.
    used: bool,
}

impl Ring {
    /// Takes a queue.
    pub(super) fn new(active: Option<ActiveQueue>) -> Self {
        Self {
            active,
            used: false,
        }
    }

    /// The descriptor that the guest's notifications come on.
    pub(super) fn kick_fd(&self) -> Option<RawFd> {
        self.active.as_ref().map(|active| active.kick.as_raw_fd())
    }

    /// Takes the guest's notifications.
    pub(super) fn take_kick(&self) {
        if let Some(active) = &self.active {
            // Nothing to read means that somebody took it already; the ring is looked at all the same.
            let _ = active.kick.read();
        }
    }

    /// Has the worker look at this ring again after other events: work was left for fairness.
    ///
    /// # Errors
    /// As write(2) on an eventfd.
    pub(super) fn kick_self(&self) -> io::Result<()> {
        match &self.active {
            Some(active) => active.kick.write(1),
            None => Ok(()),
        }
    }

    /// The next chain of the guest, with the index it is given back by.
    ///
    /// # Errors
    /// When the ring is broken.
    pub(super) fn pop<'m>(
        &mut self,
        mem: &'m GuestMemoryMmap,
    ) -> Result<Option<DescriptorChain<&'m GuestMemoryMmap>>, RingBroken> {
        match &mut self.active {
            Some(active) => Ok(active.queue.iter(mem)?.next()),
            None => Ok(None),
        }
    }

    /// Puts the last `count` chains back that were popped and not completed.
    pub(super) fn put_back(&mut self, count: usize) {
        if let Some(active) = &mut self.active {
            for _ in 0..count {
                active.queue.go_to_previous_position();
            }
        }
    }

    /// Gives a chain back to the guest, with `len` bytes written.
    ///
    /// # Errors
    /// When the ring is broken.
    pub(super) fn complete(
        &mut self,
        mem: &GuestMemoryMmap,
        head: u16,
        len: usize,
    ) -> Result<(), RingBroken> {
        if let Some(active) = &mut self.active {
            let len = u32::try_from(len).unwrap_or(u32::MAX);
            active.queue.add_used(mem, head, len)?;
            self.used = true;
        }
        Ok(())
    }

    /// Asks the guest for no notifications, as long as we look by ourselves.
    ///
    /// # Errors
    /// When the ring is broken.
    pub(super) fn silence(&mut self, mem: &GuestMemoryMmap) -> Result<(), RingBroken> {
        match &mut self.active {
            Some(active) => Ok(active.queue.disable_notification(mem)?),
            None => Ok(()),
        }
    }

    /// Asks the guest for a notification of the next chain. True when there is one already.
    ///
    /// # Errors
    /// When the ring is broken.
    pub(super) fn listen(&mut self, mem: &GuestMemoryMmap) -> Result<bool, RingBroken> {
        match &mut self.active {
            Some(active) => Ok(active.queue.enable_notification(mem)?),
            None => Ok(false),
        }
    }

    /// Whether the guest is to be told of buffers used since this was last asked.
    ///
    /// # Errors
    /// When the ring is broken.
    pub(super) fn needs_signal(&mut self, mem: &GuestMemoryMmap) -> Result<bool, RingBroken> {
        match &mut self.active {
            Some(active) if std::mem::take(&mut self.used) => {
                Ok(active.queue.needs_notification(mem)?)
            }
            Some(_) | None => Ok(false),
        }
    }

    /// Its registers and positions.
    pub(super) fn snapshot(&self) -> Option<QueueSnapshot> {
        self.active
            .as_ref()
            .map(|active| QueueSnapshot::from(&active.queue))
    }

    /// Sets what was negotiated.
    pub(super) fn set_event_idx(&mut self, enabled: bool) {
        if let Some(active) = &mut self.active {
            Queue::set_event_idx(&mut active.queue, enabled);
        }
    }
}
