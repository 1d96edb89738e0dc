// SPDX-License-Identifier: Apache-2.0

//! One queue's thread: takes chains off the ring, has them served, gives them back.
//!
//! Requests are served one after another, so nothing is under way between two events: pausing needs no
//! draining. A thread that file systems of the host keep busy stops only its own queue.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::segments::Chain;
use super::server::Server;
use crate::devices::virtio::device::{ActiveQueue, GuestMemory, Interrupt, QueueSnapshot};
use crate::devices::virtio::service::QueueWorker;
use crate::worker::{Poller, Worker};

/// Token of the queue's notification.
const KICK: u64 = 0;

/// A queue and all that is needed to serve it.
#[derive(Debug)]
pub(super) struct FsWorker {
    /// The ring and its notification.
    pub(super) queue: ActiveQueue,
    /// Index of the queue; 0 is the high priority queue.
    pub(super) index: usize,
    server: Arc<Server>,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
    scratch: Vec<u8>,
    broken: bool,
}

impl FsWorker {
    /// The worker of queue `index`.
    pub(super) fn new(
        index: usize,
        queue: ActiveQueue,
        server: Arc<Server>,
        memory: GuestMemory,
        interrupt: Arc<Interrupt>,
    ) -> Self {
        Self {
            queue,
            index,
            server,
            memory,
            interrupt,
            scratch: Vec::new(),
            broken: false,
        }
    }

    fn serve(&mut self) -> io::Result<()> {
        if self.broken {
            return Ok(());
        }
        match self.drain() {
            Ok(false) => Ok(()),
            // The ring was full: whoever wants to stop this thread comes first.
            Ok(true) => self.queue.kick.write(1),
            Err(error) => {
                log::warn!("fs: queue {} is broken: {error}", self.index);
                self.broken = true;
                self.interrupt.needs_reset();
                Ok(())
            }
        }
    }

    /// Serves at most one ring full of chains; true when there may be more.
    fn drain(&mut self) -> Result<bool, virtio_queue::Error> {
        let memory = self.memory.memory();
        let queue = &mut self.queue.queue;
        let mut left = queue.size();
        loop {
            queue.disable_notification(&*memory)?;
            while let Some(chain) = queue.iter(&*memory)?.next() {
                let head = chain.head_index();
                let used = match Chain::collect(&memory, chain) {
                    Ok(chain) => self.server.handle(chain, &mut self.scratch),
                    Err(error) => {
                        log::debug!("fs: chain dropped: {error}");
                        0
                    }
                };
                queue.add_used(&*memory, head, used)?;
                if queue.needs_notification(&*memory)? {
                    self.interrupt.signal_used();
                }
                left = left.saturating_sub(1);
                if left == 0 {
                    return Ok(true);
                }
            }
            if !queue.enable_notification(&*memory)? {
                return Ok(false);
            }
        }
    }
}

impl QueueWorker for FsWorker {
    fn thread_name(&self) -> String {
        format!("fs-{}", self.index)
    }

    fn queues(&self) -> Vec<(usize, Option<QueueSnapshot>)> {
        vec![(self.index, Some(QueueSnapshot::from(&self.queue)))]
    }
}

impl Worker for FsWorker {
    fn start(&mut self, poller: &Poller) -> io::Result<()> {
        let host = &self.server.host;
        let started = host
            .prepare_thread()
            .and_then(|()| poller.add(self.queue.kick.as_raw_fd(), KICK, EventSet::IN));
        if let Err(error) = started {
            self.interrupt.needs_reset();
            return Err(error);
        }
        self.serve()
    }

    fn ready(&mut self, _token: u64, _events: EventSet, _poller: &Poller) -> io::Result<()> {
        match self.queue.kick.read() {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            _ => {}
        }
        self.serve()
    }
}
