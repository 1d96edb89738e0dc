// SPDX-License-Identifier: Apache-2.0

//! The device's thread: three queues and all sockets in one epoll set.
//!
//! After each event the worker serves the rx queue, tells the guest, and brings the epoll set up to date. Work per event
//! is bounded; what is left is come back to by way of the set itself: sockets are level-triggered, queues notify
//! themselves.

use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use rustix::net::SocketFlags;
use vm_memory::{Bytes as _, GuestAddressSpace as _, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::counters::add;
use super::from_guest::Taken;
use super::muxer::Muxer;
use super::ring::{Ring, RingBroken};
use super::to_guest::Served;
use super::{MAX_RESETS, Patience};
use crate::devices::virtio::device::{GuestMemory, Interrupt, QueueSnapshot};
use crate::devices::virtio::service::QueueWorker;
use crate::worker::{Poller, Worker};

const RX: u64 = 0;
const TX: u64 = 1;
const EVENT: u64 = 2;
const LISTENER: u64 = 3;
const TIMER: u64 = 4;
/// Deadline after which accepting is tried again.
const ACCEPT_AGAIN: u64 = 5;

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, as it goes into an event buffer.
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

/// All that the thread owns.
#[derive(Debug)]
pub(super) struct VsockWorker {
    pub(super) memory: GuestMemory,
    pub(super) interrupt: Arc<Interrupt>,
    pub(super) rx: Ring,
    pub(super) tx: Ring,
    pub(super) events: Ring,
    pub(super) muxer: Muxer,
    pub(super) listener: UnixListener,
    /// The guest is to be told that all streams are gone.
    pub(super) reset_owed: bool,
    /// What was negotiated, for saving.
    pub(super) features: u64,
    /// The tx queue waits until RSTs have gone.
    pub(super) tx_blocked: bool,
    /// The guest broke a ring: nothing is served until it resets the device.
    pub(super) broken: bool,
    /// The listener is in the epoll set.
    pub(super) listening: bool,
    /// Descriptors or memory ran out while accepting.
    pub(super) accept_later: bool,
}

impl QueueWorker for VsockWorker {
    fn thread_name(&self) -> String {
        "vsock".to_owned()
    }

    fn queues(&self) -> Vec<(usize, Option<QueueSnapshot>)> {
        [&self.rx, &self.tx, &self.events]
            .map(Ring::snapshot)
            .into_iter()
            .enumerate()
            .collect()
    }
}

impl Worker for VsockWorker {
    fn start(&mut self, poller: &Poller) -> io::Result<()> {
        let started = self.begin(poller);
        self.or_needs_reset(started)
    }

    fn ready(&mut self, token: u64, events: EventSet, poller: &Poller) -> io::Result<()> {
        let handled = self.event(token, events, poller);
        self.or_needs_reset(handled)
    }

    fn finish(&mut self) {
        self.muxer.timers.stop();
    }
}

impl VsockWorker {
    fn begin(&mut self, poller: &Poller) -> io::Result<()> {
        self.muxer.dir.enter()?;
        if self.broken {
            return Ok(());
        }
        self.muxer.timers.go_on();
        poller.add(self.muxer.timers.fd(), TIMER, EventSet::IN)?;
        let rings = [(&self.rx, RX), (&self.tx, TX), (&self.events, EVENT)];
        for (ring, token) in rings {
            if let Some(kick) = ring.kick_fd() {
                poller.add(kick, token, EventSet::IN)?;
            }
        }
        // The epoll set is new: nothing is in it yet.
        self.listening = false;
        for (id, stream) in &mut self.muxer.streams {
            stream.watched = None;
            self.muxer.touched.push(*id);
        }
        for (id, greeting) in &self.muxer.greetings {
            poller.add(greeting.fd(), *id, EventSet::IN)?;
        }
        self.tx_blocked = false;
        let taken = self.take_packets();
        self.settle(taken, poller)
    }

    fn event(&mut self, token: u64, events: EventSet, poller: &Poller) -> io::Result<()> {
        add(&self.muxer.counters.events, 1);
        if self.broken {
            return Ok(());
        }
        let mut outcome = Ok(());
        match token {
            RX => self.rx.take_kick(),
            TX => {
                self.tx.take_kick();
                outcome = self.take_packets();
            }
            EVENT => self.events.take_kick(),
            LISTENER => self.accept(poller)?,
            TIMER => self.expire(),
            id if self.muxer.greetings.contains_key(&id) => {
                if let Some(fd) = self.muxer.greeting_readable(id) {
                    poller.remove(fd)?;
                }
            }
            id => self.muxer.socket_event(id, events),
        }
        self.settle(outcome, poller)
    }

    /// An error ends the thread's loop, so the guest has to know that nobody serves it.
    fn or_needs_reset(&self, outcome: io::Result<()>) -> io::Result<()> {
        if outcome.is_err() {
            self.interrupt.needs_reset();
        }
        outcome
    }

    fn take_packets(&mut self) -> Result<(), RingBroken> {
        let mem = self.memory.memory();
        match self.muxer.take_packets(&mem, &mut self.tx)? {
            Taken::All => {}
            Taken::Batch => self.kick(TX),
            Taken::Blocked => self.tx_blocked = true,
        }
        Ok(())
    }

    /// Has the epoll set report one of our own queues.
    fn kick(&self, token: u64) {
        let ring = if token == RX { &self.rx } else { &self.tx };
        if let Err(error) = ring.kick_self() {
            // Only a full counter gets here, and then the event is reported anyway.
            log::warn!("vsock queue notification is full: {error}");
        }
    }

    /// The end of every event: `outcome` is how the rings fared in it.
    fn settle(&mut self, outcome: Result<(), RingBroken>, poller: &Poller) -> io::Result<()> {
        let memory = self.memory.clone();
        let mem = memory.memory();
        if let Err(error) = outcome.and_then(|()| self.serve(&mem)) {
            self.break_down(&error, poller)?;
        }
        self.update_poller(poller)
    }

    fn serve(&mut self, mem: &GuestMemoryMmap) -> Result<(), RingBroken> {
        if self.muxer.serve(mem, &mut self.rx)? == Served::Batch {
            self.kick(RX);
        }
        if self.tx_blocked && self.muxer.resets.len() < MAX_RESETS {
            self.tx_blocked = false;
            self.kick(TX);
        }
        if self.reset_owed {
            self.send_transport_reset(mem)?;
        }
        // All queues share the line: one interrupt tells of them all.
        let mut signal = false;
        for ring in [&mut self.tx, &mut self.rx, &mut self.events] {
            signal |= ring.needs_signal(mem)?;
        }
        if signal {
            self.interrupt.signal_used();
        }
        Ok(())
    }

    /// Tells the guest that all its streams are gone, when it has an event buffer.
    fn send_transport_reset(&mut self, mem: &GuestMemoryMmap) -> Result<(), RingBroken> {
        loop {
            while let Some(mut chain) = self.events.pop(mem)? {
                let head = chain.head_index();
                let buffer = chain
                    .next()
                    .filter(|buffer| buffer.is_write_only() && buffer.len() >= 4);
                let written = buffer
                    .is_some_and(|buffer| mem.write_slice(&TRANSPORT_RESET, buffer.addr()).is_ok());
                if written {
                    self.events.complete(mem, head, TRANSPORT_RESET.len())?;
                    self.reset_owed = false;
                    return Ok(());
                }
                add(&self.muxer.counters.malformed, 1);
                self.events.complete(mem, head, 0)?;
            }
            if !self.events.listen(mem)? {
                return Ok(());
            }
        }
    }

    /// The guest broke a ring: end all streams and wait for its reset.
    fn break_down(&mut self, error: &RingBroken, poller: &Poller) -> io::Result<()> {
        log::warn!("vsock stops until the guest resets it: {error}");
        add(&self.muxer.counters.broken_rings, 1);
        self.broken = true;
        self.muxer.clear();
        for ring in [&self.rx, &self.tx, &self.events] {
            if let Some(kick) = ring.kick_fd() {
                poller.remove(kick)?;
            }
        }
        poller.remove(self.muxer.timers.fd())?;
        self.interrupt.needs_reset();
        Ok(())
    }

    fn accept(&mut self, poller: &Poller) -> io::Result<()> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        match rustix::net::accept_with(&self.listener, flags) {
            Ok(stream) => {
                if let Some((id, fd)) = self.muxer.greet(stream.into()) {
                    poller.add(fd, id, EventSet::IN)?;
                }
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::CONNABORTED) => {}
            Err(error) => {
                log::warn!("failed to accept a vsock connection: {error}");
                self.accept_later = true;
                let Patience { accept, .. } = self.muxer.patience;
                self.muxer.timers.set(ACCEPT_AGAIN, accept);
            }
        }
        Ok(())
    }

    fn expire(&mut self) {
        for id in self.muxer.timers.expired() {
            if id == ACCEPT_AGAIN {
                self.accept_later = false;
            } else {
                self.muxer.expired(id);
            }
        }
    }

    /// Brings the epoll set in line with what was done.
    fn update_poller(&mut self, poller: &Poller) -> io::Result<()> {
        self.close_sockets(poller)?;
        while let Some(id) = self.muxer.touched.pop() {
            let Some(stream) = self.muxer.streams.get_mut(&id) else {
                continue;
            };
            let (old, new) = (stream.watched, stream.interest());
            let fd = stream.endpoint.fd();
            let changed = match (old, new) {
                (None, Some(events)) => poller.add(fd, id, events),
                (Some(before), Some(events)) if before != events => poller.modify(fd, id, events),
                (Some(_), None) => poller.remove(fd),
                (Some(_), Some(_)) | (None, None) => Ok(()),
            };
            match changed {
                Ok(()) => stream.watched = new,
                Err(error) => {
                    log::warn!("failed to watch the socket of a vsock stream: {error}");
                    self.muxer.reset(id);
                    self.kick(RX);
                }
            }
        }
        self.close_sockets(poller)?;
        let listen = !self.broken && !self.accept_later && self.muxer.takes_greetings();
        if listen != self.listening {
            let fd = self.listener.as_raw_fd();
            if listen {
                poller.add(fd, LISTENER, EventSet::IN)?;
            } else {
                poller.remove(fd)?;
            }
            self.listening = listen;
        }
        self.muxer.timers.arm()
    }

    fn close_sockets(&mut self, poller: &Poller) -> io::Result<()> {
        for closed in self.muxer.closed.drain(..) {
            if let Some(fd) = closed.watched() {
                poller.remove(fd)?;
            }
        }
        Ok(())
    }
}
