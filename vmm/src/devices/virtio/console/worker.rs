// SPDX-License-Identifier: Apache-2.0

//! The console's thread: output buffers into the ring.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::OUTPUT;
use crate::devices::console_ring::ConsoleRing;
use crate::devices::virtio::device::{ActiveQueue, GuestMemory, Interrupt, QueueSnapshot};
use crate::devices::virtio::service::QueueWorker;
use crate::worker::{Poller, Worker};

/// Most bytes taken of one chain; the driver sends 16 at a time, writers to `/dev/hvc0` a page. More is passed
/// over.
const MAX_CHAIN_BYTES: u32 = 64 << 10;
/// Bytes copied at once.
const CHUNK: usize = 4096;

type Chain = DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap>>;

/// See the module.
#[derive(Debug)]
pub(super) struct ConsoleWorker {
    pub(super) memory: GuestMemory,
    pub(super) interrupt: Arc<Interrupt>,
    pub(super) input: Option<ActiveQueue>,
    pub(super) output: Option<ActiveQueue>,
    pub(super) ring: ConsoleRing,
    pub(super) bytes: Arc<AtomicU64>,
    /// The guest broke the queue; nothing is served until a reset.
    pub(super) broken: bool,
}

impl Worker for ConsoleWorker {
    fn start(&mut self, poller: &Poller) -> io::Result<()> {
        if let Some(output) = &self.output {
            poller.add(output.kick.as_raw_fd(), OUTPUT as u64, EventSet::IN)?;
        }
        self.serve();
        Ok(())
    }

    fn ready(&mut self, _token: u64, _events: EventSet, _poller: &Poller) -> io::Result<()> {
        if let Some(output) = &self.output {
            // Nothing to read after a reset's drain is no error.
            let _ = output.kick.read();
        }
        self.serve();
        Ok(())
    }
}

impl QueueWorker for ConsoleWorker {
    fn thread_name(&self) -> String {
        "console".to_owned()
    }

    fn queues(&self) -> Vec<(usize, Option<QueueSnapshot>)> {
        [&self.input, &self.output]
            .map(|queue| queue.as_ref().map(QueueSnapshot::from))
            .into_iter()
            .enumerate()
            .collect()
    }
}

impl ConsoleWorker {
    fn serve(&mut self) {
        let Some(ActiveQueue { queue, .. }) = &mut self.output else {
            return;
        };
        if self.broken {
            return;
        }
        let memory = self.memory.memory();
        let mut used = false;
        let result = loop {
            let chain = match queue.iter(memory.clone()) {
                Ok(mut chains) => chains.next(),
                Err(error) => break Err(error),
            };
            let Some(chain) = chain else { break Ok(()) };
            let head = chain.head_index();
            let bytes = output(chain, &memory, &self.ring);
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
            if let Err(error) = queue.add_used(&*memory, head, 0) {
                break Err(error);
            }
            used = true;
        };
        let signal = used && queue.needs_notification(&*memory).unwrap_or(true);
        if let Err(error) = result {
            log::warn!("console: the guest broke its queue: {error}");
            self.broken = true;
            self.interrupt.needs_reset();
        } else if signal {
            self.interrupt.signal_used();
        }
    }
}

/// Copies a chain's readable bytes to the ring; says how many. What is not in memory is left out.
fn output(chain: Chain, memory: &GuestMemoryMmap, ring: &ConsoleRing) -> u64 {
    let mut left = MAX_CHAIN_BYTES;
    let mut buffer = [0; CHUNK];
    let mut total = 0;
    for descriptor in chain {
        if descriptor.is_write_only() {
            break;
        }
        let mut address = descriptor.addr();
        let mut length = descriptor.len().min(left);
        left -= length;
        while length > 0 {
            let count = usize::try_from(length).unwrap_or(CHUNK).min(CHUNK);
            let Some(chunk) = buffer.get_mut(..count) else {
                return total;
            };
            if memory.read_slice(chunk, address).is_err() {
                return total;
            }
            ring.write(chunk);
            total += count as u64;
            // `count` is at most `length`, and `address + count` was readable.
            length = length.saturating_sub(u32::try_from(count).unwrap_or(length));
            address.0 = address.0.wrapping_add(count as u64);
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::console::{ConsoleDevice, QUEUE_SIZES};
    use crate::devices::virtio::device::{Activation, VirtioDevice};
    use crate::devices::virtio::service::tests::goes_on_restored;
    use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
    use virtio_queue::Queue;
    use virtio_queue::desc::RawDescriptor;
    use virtio_queue::desc::split::Descriptor;
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{GuestAddress, GuestMemoryMmap};
    use vmm_sys_util::eventfd::EventFd;

    const TEXT: u64 = 0x8000;

    fn memory() -> GuestMemoryMmap {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x100000)]).unwrap();
        memory
            .write_slice(b"hello, world", GuestAddress(TEXT))
            .unwrap();
        memory
    }

    fn worker(memory: &GuestMemoryMmap, queue: Queue) -> ConsoleWorker {
        ConsoleWorker {
            memory: GuestMemory::new(memory.clone()),
            interrupt: Arc::new(Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap())),
            input: None,
            output: Some(ActiveQueue {
                queue,
                kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            }),
            ring: ConsoleRing::new(1 << 20),
            bytes: Arc::default(),
            broken: false,
        }
    }

    fn descriptor(address: u64, length: u32, flags: u32, next: u16) -> RawDescriptor {
        RawDescriptor::from(Descriptor::new(address, length, flags as u16, next))
    }

    #[test]
    fn chains_are_written_to_the_ring_and_given_back() {
        let memory = memory();
        let driver = MockSplitQueue::new(&memory, 16);
        driver
            .add_desc_chains(
                &[
                    descriptor(TEXT, 7, VRING_DESC_F_NEXT, 1),
                    descriptor(TEXT + 7, 5, 0, 0),
                ],
                0,
            )
            .unwrap();
        let mut worker = worker(&memory, driver.create_queue().unwrap());
        worker.serve();
        assert_eq!(worker.ring.contents().0, b"hello, world");
        assert_eq!(driver.used().idx().load(), 1);
        assert_eq!(worker.interrupt.status(), 1);
    }

    #[test]
    fn memory_that_is_not_there_and_buffers_to_write_are_passed_over() {
        let memory = memory();
        let driver = MockSplitQueue::new(&memory, 16);
        driver
            .add_desc_chains(
                &[
                    descriptor(u64::MAX - 2, 7, 0, 0),
                    descriptor(TEXT, 5, VRING_DESC_F_WRITE, 0),
                    descriptor(0xff000, u32::MAX, 0, 0),
                ],
                0,
            )
            .unwrap();
        let mut worker = worker(&memory, driver.create_queue().unwrap());
        worker.serve();
        assert_eq!(driver.used().idx().load(), 3);
        assert_eq!(worker.ring.total(), 0x1000);
        assert!(!worker.interrupt.is_broken());
    }

    #[test]
    fn a_broken_ring_breaks_the_device_only() {
        let memory = memory();
        let driver = MockSplitQueue::new(&memory, 16);
        let queue: Queue = driver.create_queue().unwrap();
        // More entries available than the ring has.
        memory
            .write_obj(1000u16, GuestAddress(queue.avail_ring() + 2))
            .unwrap();
        let mut worker = worker(&memory, queue);
        worker.serve();
        assert!(worker.interrupt.is_broken());
    }

    #[test]
    fn it_goes_on_after_a_pause_and_after_a_restore() {
        let memory = memory();
        let driver = MockSplitQueue::new(&memory, QUEUE_SIZES[OUTPUT]);
        let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let ring = ConsoleRing::new(1 << 20);
        let activation = |queue: Queue| Activation {
            memory: GuestMemory::new(memory.clone()),
            queues: vec![
                None,
                Some(ActiveQueue {
                    queue,
                    kick: kick.try_clone().unwrap(),
                }),
            ],
            interrupt: Arc::new(Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap())),
            features: 1 << 32,
        };
        let mut device = ConsoleDevice::new(ring.clone());
        device
            .activate(activation(driver.create_queue().unwrap()))
            .unwrap();
        assert!(device.save().is_err(), "a running device is not saved");
        device.pause();
        driver
            .add_desc_chains(&[descriptor(TEXT, 5, 0, 0)], 0)
            .unwrap();
        assert_eq!(ring.total(), 0, "nothing moves in a pause");
        device.resume().unwrap();
        device.pause();
        assert_eq!(ring.contents().0, b"hello");
        let state = device.save().unwrap();

        let mut again = ConsoleDevice::new(ring.clone());
        goes_on_restored(&mut again, &state, OUTPUT, activation);
        assert_eq!(ring.contents().0, b"hello", "nothing is sent twice");
    }
}
