// SPDX-License-Identifier: Apache-2.0

//! The entropy device's thread: fills buffers, within its rate.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use super::{BYTES_PER_SECOND, MAX_REQUEST};
use crate::devices::virtio::device::{ActiveQueue, GuestMemory, Interrupt, QueueSnapshot};
use crate::devices::virtio::service::QueueWorker;
use crate::worker::{Poller, Worker};

const KICK: u64 = 0;
const TIMER: u64 = 1;
/// How long the device rests when its rate is used up: it then has this part of a second's bytes.
const REST: Duration = Duration::from_millis(100);

type Chain = DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap>>;

/// See the module.
pub(super) struct RngWorker {
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
    queue: Option<ActiveQueue>,
    bytes: Arc<AtomicU64>,
    budget: Budget,
    timer: TimerFd,
    resting: bool,
    /// The guest broke the queue; nothing is served until a reset.
    broken: bool,
}

impl std::fmt::Debug for RngWorker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RngWorker")
            .field("queue", &self.queue)
            .field("budget", &self.budget)
            .finish_non_exhaustive()
    }
}

/// A bucket of bytes that fills with time.
#[derive(Debug)]
struct Budget {
    left: u64,
    at: Instant,
}

impl Budget {
    fn refill(&mut self, now: Instant) {
        let micros = now.saturating_duration_since(self.at).as_micros();
        let fresh = u128::from(BYTES_PER_SECOND) * micros / 1_000_000;
        let left = u128::from(self.left) + fresh;
        // At most BYTES_PER_SECOND, which is a u64.
        self.left = u64::try_from(left.min(u128::from(BYTES_PER_SECOND))).unwrap_or(0);
        self.at = now;
    }

    /// Takes one request's worth, if there is one.
    fn take(&mut self) -> bool {
        let request = MAX_REQUEST as u64;
        let enough = self.left >= request;
        if enough {
            self.left -= request;
        }
        enough
    }

    fn give_back(&mut self, bytes: u64) {
        self.left = self.left.saturating_add(bytes);
    }
}

impl RngWorker {
    pub(super) fn new(
        memory: GuestMemory,
        interrupt: Arc<Interrupt>,
        queue: Option<ActiveQueue>,
        bytes: Arc<AtomicU64>,
    ) -> io::Result<Self> {
        Ok(Self {
            memory,
            interrupt,
            queue,
            bytes,
            budget: Budget {
                left: BYTES_PER_SECOND,
                at: Instant::now(),
            },
            timer: TimerFd::new().map_err(os_error)?,
            resting: false,
            broken: false,
        })
    }

    fn serve(&mut self) -> io::Result<()> {
        let Some(ActiveQueue { queue, .. }) = &mut self.queue else {
            return Ok(());
        };
        if self.broken || self.resting {
            return Ok(());
        }
        self.budget.refill(Instant::now());
        let memory = self.memory.memory();
        let mut used = false;
        let result = loop {
            if !self.budget.take() {
                self.resting = true;
                break Ok(());
            }
            let chain = match queue.iter(memory.clone()) {
                Ok(mut chains) => chains.next(),
                Err(error) => break Err(error),
            };
            let Some(chain) = chain else {
                self.budget.give_back(MAX_REQUEST as u64);
                break Ok(());
            };
            let head = chain.head_index();
            let written = fill(chain, &memory)?;
            self.budget
                .give_back((MAX_REQUEST as u64).saturating_sub(written.into()));
            self.bytes.fetch_add(written.into(), Ordering::Relaxed);
            if let Err(error) = queue.add_used(&*memory, head, written) {
                break Err(error);
            }
            used = true;
        };
        let signal = used && queue.needs_notification(&*memory).unwrap_or(true);
        if let Err(error) = result {
            log::warn!("rng: the guest broke its queue: {error}");
            self.broken = true;
            self.interrupt.needs_reset();
        } else if signal {
            self.interrupt.signal_used();
        }
        if self.resting {
            self.timer.reset(REST, None).map_err(os_error)?;
        }
        Ok(())
    }
}

fn os_error(error: vmm_sys_util::errno::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

impl QueueWorker for RngWorker {
    fn thread_name(&self) -> String {
        "rng".to_owned()
    }

    fn queues(&self) -> Vec<(usize, Option<QueueSnapshot>)> {
        vec![(0, self.queue.as_ref().map(QueueSnapshot::from))]
    }
}

impl Worker for RngWorker {
    fn start(&mut self, poller: &Poller) -> io::Result<()> {
        if let Some(queue) = &self.queue {
            poller.add(queue.kick.as_raw_fd(), KICK, EventSet::IN)?;
        }
        poller.add(self.timer.as_raw_fd(), TIMER, EventSet::IN)?;
        self.serve()
    }

    fn ready(&mut self, token: u64, _events: EventSet, _poller: &Poller) -> io::Result<()> {
        if token == TIMER {
            self.timer.wait().map_err(os_error)?;
            self.resting = false;
        } else if let Some(queue) = &self.queue {
            // Nothing to read after a reset's drain is no error.
            let _ = queue.kick.read();
        }
        self.serve()
    }
}

/// Fills a chain's writable buffers with at most [`MAX_REQUEST`] bytes; says how many. Memory that is not there
/// ends it.
fn fill(chain: Chain, memory: &GuestMemoryMmap) -> io::Result<u32> {
    let mut written = 0;
    for descriptor in chain {
        if !descriptor.is_write_only() {
            continue;
        }
        let mut buffer = [0; MAX_REQUEST];
        let length = usize::try_from(descriptor.len())
            .unwrap_or(MAX_REQUEST)
            .min(MAX_REQUEST - written);
        let Some(part) = buffer.get_mut(..length).filter(|part| !part.is_empty()) else {
            break;
        };
        // Up to 256 bytes come whole, more may be cut short by a signal.
        let count = match getrandom(&mut *part, GetRandomFlags::empty()) {
            Ok(count) => count,
            Err(rustix::io::Errno::INTR) => 0,
            Err(error) => return Err(error.into()),
        };
        let Some(random) = part.get(..count) else {
            break;
        };
        if memory.write_slice(random, descriptor.addr()).is_err() {
            break;
        }
        written += count;
        if count < length {
            break;
        }
    }
    // At most MAX_REQUEST.
    Ok(u32::try_from(written).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::device::{Activation, VirtioDevice};
    use crate::devices::virtio::rng::{QUEUE_SIZES, RngDevice};
    use crate::devices::virtio::service::tests::goes_on_restored;
    use virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;
    use virtio_queue::Queue;
    use virtio_queue::desc::RawDescriptor;
    use virtio_queue::desc::split::Descriptor;
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::GuestAddress;
    use vmm_sys_util::eventfd::EventFd;

    fn worker(memory: &GuestMemoryMmap, driver: &MockSplitQueue<'_, GuestMemoryMmap>) -> RngWorker {
        RngWorker::new(
            GuestMemory::new(memory.clone()),
            Arc::new(Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap())),
            Some(ActiveQueue {
                queue: driver.create_queue().unwrap(),
                kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            }),
            Arc::default(),
        )
        .unwrap()
    }

    fn buffer(address: u64, length: u32) -> RawDescriptor {
        RawDescriptor::from(Descriptor::new(
            address,
            length,
            VRING_DESC_F_WRITE as u16,
            0,
        ))
    }

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x100000)]).unwrap()
    }

    #[test]
    fn buffers_are_filled_up_to_the_bound() {
        let memory = memory();
        let driver = MockSplitQueue::new(&memory, 16);
        let chains = [
            buffer(0x8000, 64),
            buffer(0x10000, u32::MAX),
            buffer(u64::MAX - 8, 64),
        ];
        driver.add_desc_chains(&chains, 0).unwrap();
        let mut worker = worker(&memory, &driver);
        worker.serve().unwrap();
        assert_eq!(driver.used().idx().load(), 3);
        let mut bytes = [0; 64];
        memory.read_slice(&mut bytes, GuestAddress(0x8000)).unwrap();
        assert_ne!(bytes, [0; 64]);
        let after: u64 = memory
            .read_obj(GuestAddress(0x10000 + MAX_REQUEST as u64))
            .unwrap();
        assert_eq!(after, 0, "beyond the bound nothing is written");
        assert_eq!(worker.interrupt.status(), 1);
    }

    #[test]
    fn the_rate_is_bounded_and_the_rest_waits_for_the_timer() {
        let memory = memory();
        let driver = MockSplitQueue::new(&memory, 16);
        driver.add_desc_chains(&[buffer(0x8000, 64)], 0).unwrap();
        let mut worker = worker(&memory, &driver);
        worker.budget = Budget {
            left: 0,
            at: Instant::now() + Duration::from_secs(3600),
        };
        worker.serve().unwrap();
        assert!(worker.resting);
        assert_eq!(driver.used().idx().load(), 0);
        worker.timer.wait().unwrap();
        worker.resting = false;
        worker.budget.at = Instant::now() - REST;
        worker.serve().unwrap();
        assert_eq!(driver.used().idx().load(), 1);
    }

    #[test]
    fn the_budget_never_holds_more_than_a_second() {
        let start = Instant::now();
        let mut budget = Budget { left: 0, at: start };
        budget.refill(start + Duration::from_millis(500));
        assert_eq!(budget.left, BYTES_PER_SECOND / 2);
        budget.refill(start + Duration::from_secs(1_000_000));
        assert_eq!(budget.left, BYTES_PER_SECOND);
    }

    #[test]
    fn it_goes_on_after_a_pause_and_after_a_restore() {
        let memory = memory();
        let driver = MockSplitQueue::new(&memory, QUEUE_SIZES[0]);
        let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let activation = |queue: Queue| Activation {
            memory: GuestMemory::new(memory.clone()),
            queues: vec![Some(ActiveQueue {
                queue,
                kick: kick.try_clone().unwrap(),
            })],
            interrupt: Arc::new(Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap())),
            features: 1 << 32,
        };
        let mut device = RngDevice::new();
        device
            .activate(activation(driver.create_queue().unwrap()))
            .unwrap();
        assert!(device.save().is_err(), "a running device is not saved");
        device.pause();
        driver.add_desc_chains(&[buffer(0x8000, 64)], 0).unwrap();
        assert_eq!(
            driver.used().idx().load(),
            0,
            "nothing is served in a pause"
        );
        device.resume().unwrap();
        device.pause();
        assert_eq!(driver.used().idx().load(), 1);
        let state = device.save().unwrap();

        let mut again = RngDevice::new();
        goes_on_restored(&mut again, &state, 0, activation);
        assert_eq!(driver.used().idx().load(), 1, "nothing is served twice");
        again.reset();

        let mut other = state;
        other["queues"][0]["max_size"] = 32.into();
        assert!(again.restore(other).is_err());
    }
}
