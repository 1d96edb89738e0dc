// SPDX-License-Identifier: Apache-2.0

//! One queue's thread.
//!
//! A request under way is known by the head of its chain, so there are at most as many as the ring is long, and
//! a chain that is offered again before it was given back breaks the ring (GHSA-f47p-p25q-83rh). What is under
//! way owns what the kernel needs for it until the kernel is done.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::backend::Disk;
use super::engine::{Uring, call_now};
use super::request::{HEADER_LEN, PAYLOAD_MAX, Parts, Request, Status};
use super::task::{Buffers, Next, Task};
use crate::devices::virtio::device::{ActiveQueue, GuestMemory, Interrupt, QueueSnapshot};
use crate::devices::virtio::fs::segments::Chain;
use crate::devices::virtio::service::QueueWorker;
use crate::worker::{Poller, Worker};

/// Token of the queue's notification.
const KICK: u64 = 0;
/// Token of the ring's eventfd.
const COMPLETION: u64 = 1;

/// Requests since the device was made.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// All of them.
    pub(super) requests: AtomicU64,
    /// Ended with another status than OK.
    pub(super) errors: AtomicU64,
    /// Without a place for a status.
    pub(super) malformed: AtomicU64,
}

/// What all queues of a device share.
#[derive(Debug)]
pub(super) struct Shared {
    /// The image.
    pub(super) disk: Disk,
    /// Serial number, padded with zeroes.
    pub(super) serial: [u8; 20],
    /// Counters.
    pub(super) counters: Counters,
}

/// A ring that cannot be gone on with.
#[derive(Debug, thiserror::Error)]
enum RingError {
    #[error("{0}")]
    Queue(#[from] virtio_queue::Error),
    #[error("chain {0} is offered while it is under way")]
    Duplicate(u16),
    #[error("chain {0} is outside the ring")]
    Head(u16),
    #[error("failed to hand calls to the kernel: {0}")]
    Submit(#[from] io::Error),
}

/// A request that was taken from the ring.
#[derive(Debug)]
struct InFlight {
    task: Task,
    memory: Arc<GuestMemoryMmap>,
    status: GuestAddress,
    /// Bytes in the used ring when it ends well.
    used: u32,
}

/// How a worker gets calls to the kernel.
#[derive(Debug)]
pub(super) enum Engine {
    /// Not decided: by io_uring where there is one.
    Any,
    /// By io_uring.
    Uring(Box<Uring>),
    /// One after another.
    Calls,
}

/// A queue and all that is needed to serve it.
#[derive(Debug)]
pub(super) struct BlkWorker {
    /// The ring and its notification.
    pub(super) queue: ActiveQueue,
    /// Index of the queue.
    pub(super) index: usize,
    shared: Arc<Shared>,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
    engine: Engine,
    write_flags: i32,
    in_flight: Vec<Option<InFlight>>,
    pending: usize,
    /// Chains were given back since the guest was last told.
    ended: bool,
    broken: bool,
}

impl BlkWorker {
    /// The worker of queue `index`. Unless the driver knows flushes, each write is made `durable`.
    pub(super) fn new(
        index: usize,
        queue: ActiveQueue,
        shared: Arc<Shared>,
        (memory, interrupt): (GuestMemory, Arc<Interrupt>),
        engine: Engine,
        durable: bool,
    ) -> Self {
        let slots = usize::from(queue.queue.size());
        Self {
            queue,
            index,
            shared,
            memory,
            interrupt,
            engine,
            write_flags: if durable { libc::RWF_DSYNC } else { 0 },
            in_flight: std::iter::repeat_with(|| None).take(slots).collect(),
            pending: 0,
            ended: false,
            broken: false,
        }
    }

    fn serve(&mut self) -> io::Result<()> {
        if self.broken {
            return Ok(());
        }
        let served = self.drain().and_then(|more| {
            self.submit()?;
            self.notify()?;
            Ok(more)
        });
        match served {
            Ok(false) => Ok(()),
            // The ring was full: whoever wants to stop this thread comes first.
            Ok(true) => self.queue.kick.write(1),
            Err(error) => {
                self.give_up(&error);
                Ok(())
            }
        }
    }

    fn give_up(&mut self, error: &RingError) {
        log::warn!("blk: queue {} is broken: {error}", self.index);
        self.broken = true;
        self.interrupt.needs_reset();
    }

    /// Takes at most one ring full of chains; true when there may be more.
    fn drain(&mut self) -> Result<bool, RingError> {
        let memory = self.memory.memory().into_inner();
        let mut left = self.queue.queue.size();
        loop {
            self.queue.queue.disable_notification(&*memory)?;
            while let Some(chain) = self.queue.queue.iter(&*memory)?.next() {
                self.begin(&memory, chain)?;
                left = left.saturating_sub(1);
                if left == 0 {
                    return Ok(true);
                }
            }
            if !self.queue.queue.enable_notification(&*memory)? {
                return Ok(false);
            }
        }
    }

    /// Starts a request, or ends it at once.
    fn begin(
        &mut self,
        memory: &Arc<GuestMemoryMmap>,
        chain: DescriptorChain<&GuestMemoryMmap>,
    ) -> Result<(), RingError> {
        let head = chain.head_index();
        match self.in_flight.get(usize::from(head)) {
            None => return Err(RingError::Head(head)),
            Some(Some(_)) => return Err(RingError::Duplicate(head)),
            Some(None) => {}
        }
        self.shared
            .counters
            .requests
            .fetch_add(1, Ordering::Relaxed);
        let collected = Chain::collect(memory, chain).ok();
        let Some((status, chain)) = collected.and_then(|chain| Some((chain.last_writable?, chain)))
        else {
            self.shared
                .counters
                .malformed
                .fetch_add(1, Ordering::Relaxed);
            self.queue.queue.add_used(&**memory, head, 0)?;
            self.ended = true;
            return Ok(());
        };
        match self.prepare(memory, chain) {
            Ok((task, used)) => {
                let request = InFlight {
                    task,
                    memory: memory.clone(),
                    status,
                    used,
                };
                self.advance(head, request)
            }
            Err(end) => self.end(head, memory, status, end, 1),
        }
    }

    /// Parses the request of a chain; returns what is to do, and the used length.
    fn prepare(
        &self,
        memory: &Arc<GuestMemoryMmap>,
        chain: Chain<'_>,
    ) -> Result<(Task, u32), Status> {
        let Chain {
            mut readable,
            mut writable,
            ..
        } = chain;
        let mut header = [0; HEADER_LEN];
        let data_in = readable.split_off(HEADER_LEN).ok_or(Status::IoError)?;
        readable.copy_to(&mut header);
        let room = writable.len().checked_sub(1).ok_or(Status::IoError)?;
        writable.split_off(room).ok_or(Status::IoError)?;
        let mut payload = [0; PAYLOAD_MAX];
        let copied = data_in.copy_to(&mut payload);
        let parts = Parts {
            header,
            data_in_len: data_in.len(),
            payload: payload.get(..copied).unwrap_or_default(),
            data_out_len: room,
        };
        let used = u32::try_from(room + 1).unwrap_or(u32::MAX);
        Ok(match Request::parse(parts, self.shared.disk.geometry())? {
            Request::Read { offset } => {
                let buffers = Buffers::guest(memory.clone(), &writable);
                (Task::read(buffers, offset), used)
            }
            Request::Write { offset } => {
                let buffers = Buffers::guest(memory.clone(), &data_in);
                (Task::write(buffers, offset), 1)
            }
            Request::Flush => (Task::flush(), 1),
            Request::GetId => {
                writable.copy_from(&self.shared.serial);
                return Err(Status::Ok);
            }
            Request::Discard(ranges) => (Task::discard(ranges), 1),
            Request::WriteZeroes(ranges) => (Task::zero(ranges), 1),
        })
    }

    /// Makes the next call of a request, or ends it.
    fn advance(&mut self, head: u16, mut request: InFlight) -> Result<(), RingError> {
        loop {
            let Some(call) = request.task.call() else {
                let InFlight {
                    memory,
                    status,
                    used,
                    ..
                } = request;
                return self.end(head, &memory, status, Status::Ok, used);
            };
            if let Engine::Uring(uring) = &mut self.engine {
                let slot = self
                    .in_flight
                    .get_mut(usize::from(head))
                    .ok_or(RingError::Head(head))?;
                // SAFETY: the request, which owns the vectors and keeps guest memory mapped, goes to its
                // slot right away and stays there untouched until its call is done; this worker leaks it
                // rather than dropping it before.
                unsafe { uring.push(&call, head, self.write_flags) }?;
                *slot = Some(request);
                self.pending += 1;
                return Ok(());
            }
            let result = call_now(self.shared.disk.file(), &call, self.write_flags);
            if let Next::Done(end) = request.task.done(result) {
                let used = if end == Status::Ok { request.used } else { 1 };
                return self.end(head, &request.memory, request.status, end, used);
            }
        }
    }

    /// Takes what the kernel has done.
    fn complete(&mut self) -> Result<(), RingError> {
        loop {
            let Engine::Uring(uring) = &mut self.engine else {
                return Ok(());
            };
            let Some((id, result)) = uring.completed() else {
                return Ok(());
            };
            let head = u16::try_from(id).unwrap_or(u16::MAX);
            let slot = self.in_flight.get_mut(usize::from(head));
            let Some(mut request) = slot.and_then(Option::take) else {
                log::error!("blk: a call was done that nobody made");
                continue;
            };
            self.pending -= 1;
            match request.task.done(result) {
                Next::Again => self.advance(head, request)?,
                Next::Done(end) => {
                    let used = if end == Status::Ok { request.used } else { 1 };
                    self.end(head, &request.memory, request.status, end, used)?;
                }
            }
        }
    }

    /// Gives a chain back.
    fn end(
        &mut self,
        head: u16,
        memory: &GuestMemoryMmap,
        status: GuestAddress,
        end: Status,
        used: u32,
    ) -> Result<(), RingError> {
        if end != Status::Ok {
            self.shared.counters.errors.fetch_add(1, Ordering::Relaxed);
        }
        if self.broken {
            return Ok(());
        }
        // The address was in memory when the chain was taken, and this is the same memory.
        if memory.write_obj(end.to_byte(), status).is_err() {
            self.shared
                .counters
                .malformed
                .fetch_add(1, Ordering::Relaxed);
        }
        self.queue.queue.add_used(memory, head, used)?;
        self.ended = true;
        Ok(())
    }

    fn submit(&mut self) -> Result<(), RingError> {
        if let Engine::Uring(uring) = &mut self.engine {
            uring.submit(0)?;
        }
        Ok(())
    }

    fn notify(&mut self) -> Result<(), RingError> {
        if !std::mem::take(&mut self.ended) {
            return Ok(());
        }
        let memory = self.memory.memory();
        if self.queue.queue.needs_notification(&*memory)? {
            self.interrupt.signal_used();
        }
        Ok(())
    }

    /// Decides on the engine.
    fn choose_engine(&mut self) {
        if let Engine::Any = self.engine {
            let entries = self.queue.queue.size();
            self.engine = match Uring::new(self.shared.disk.file(), entries) {
                Ok(uring) => Engine::Uring(Box::new(uring)),
                Err(error) => {
                    log::info!("blk: no io_uring, so calls one after another: {error}");
                    Engine::Calls
                }
            };
        }
    }
}

impl QueueWorker for BlkWorker {
    fn thread_name(&self) -> String {
        format!("blk-{}", self.index)
    }

    fn queues(&self) -> Vec<(usize, Option<QueueSnapshot>)> {
        vec![(self.index, Some(QueueSnapshot::from(&self.queue)))]
    }
}

impl Worker for BlkWorker {
    fn start(&mut self, poller: &Poller) -> io::Result<()> {
        self.choose_engine();
        let mut watched = poller.add(self.queue.kick.as_raw_fd(), KICK, EventSet::IN);
        if let Engine::Uring(uring) = &self.engine {
            watched = watched.and_then(|()| poller.add(uring.ready_fd(), COMPLETION, EventSet::IN));
        }
        if let Err(error) = watched {
            self.interrupt.needs_reset();
            return Err(error);
        }
        self.serve()
    }

    fn ready(&mut self, token: u64, _events: EventSet, _poller: &Poller) -> io::Result<()> {
        let event = match (&self.engine, token) {
            (Engine::Uring(uring), COMPLETION) => uring.ready(),
            _ => &self.queue.kick,
        };
        match event.read() {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            _ => {}
        }
        if token != COMPLETION {
            return self.serve();
        }
        let completed = self.complete().and_then(|()| {
            self.submit()?;
            self.notify()
        });
        if let Err(error) = completed {
            self.give_up(&error);
        }
        Ok(())
    }

    /// Waits for all that is under way: nothing touches guest memory afterwards.
    fn finish(&mut self) {
        while self.pending > 0 {
            let Engine::Uring(uring) = &mut self.engine else {
                return;
            };
            let waited = uring.submit(1).map_err(RingError::from);
            if let Err(error) = waited.and_then(|()| self.complete()) {
                // Completions of a broken ring are only counted.
                let again = self.broken;
                self.give_up(&error);
                if again {
                    return;
                }
            }
        }
        if !self.broken
            && let Err(error) = self.notify()
        {
            self.give_up(&error);
        }
    }
}

impl Drop for BlkWorker {
    fn drop(&mut self) {
        if self.pending > 0 {
            log::error!("blk: {} requests are still with the kernel", self.pending);
            // What the kernel may still write to must stay.
            Box::leak(Box::new(std::mem::take(&mut self.in_flight)));
        }
    }
}
