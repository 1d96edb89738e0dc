// SPDX-License-Identifier: Apache-2.0

//! All streams of the device, by id and by ports, and what the host's ends do to them.
//!
//! What the guest sends comes in by [`super::from_guest`], what it gets goes out by [`super::to_guest`]. Nothing here
//! knows the epoll set: streams whose interest may have changed are collected in `touched`, closed ones in `closed`, and
//! the worker brings the set up to date after each event.

use std::collections::{HashMap, VecDeque};
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmm_sys_util::epoll::EventSet;

use super::connection::Connection;
use super::counters::{Counters, add};
use super::endpoint::{Endpoint, Gone};
use super::host::{Greeted, Greeting, HostDir};
use super::packet::{Key, Reset};
use super::timers::Timers;
use super::{MAX_CONNECTIONS, MAX_GREETINGS, Patience};

/// First id of a stream or greeting; smaller ones are the worker's own tokens. No id is ever used twice.
const FIRST_ID: u64 = 64;
/// Host ports given to connections of the host: half of the ports, far from those with names.
const FIRST_HOST_PORT: u32 = 1 << 30;
const LAST_HOST_PORT: u32 = (1 << 31) - 1;
/// How much is read at first from a host process in one go, bytes; it grows and shrinks with what comes.
pub(super) const FIRST_READ: usize = 4096;

/// One stream, with its place in the worker's lists.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) connection: Connection,
    pub(super) endpoint: Endpoint,
    /// It is in `ready`.
    pub(super) queued: bool,
    /// The host process has sent something, or its end.
    pub(super) readable: bool,
    /// The guest has forgotten it; only the rest of the buffer is delivered.
    pub(super) draining: bool,
    /// Bytes to read in one go.
    pub(super) read_size: usize,
    /// What its socket is in the epoll set for.
    pub(super) watched: Option<EventSet>,
}

impl Stream {
    fn new(connection: Connection, stream: UnixStream) -> Self {
        Self {
            connection,
            endpoint: Endpoint::new(stream),
            queued: false,
            readable: false,
            draining: false,
            read_size: FIRST_READ,
            watched: None,
        }
    }

    /// What its socket should be in the epoll set for. As epoll reports hang-ups whether asked or not, a socket is in
    /// the set only when something can be done about them.
    pub(super) fn interest(&self) -> Option<EventSet> {
        let mut events = EventSet::empty();
        if self.endpoint.buffered() > 0 {
            events |= EventSet::OUT;
        }
        if !self.draining && !self.queued && self.connection.room() > 0 {
            events |= EventSet::IN;
        }
        let hears_hang_up = !self.draining
            && !self.connection.is_requested()
            && !self.connection.host_may_send()
            && self.connection.host_takes();
        (!events.is_empty() || hears_hang_up).then_some(events)
    }
}

/// All streams.
#[derive(Debug)]
pub(super) struct Muxer {
    pub(super) guest_cid: u32,
    pub(super) dir: Arc<HostDir>,
    pub(super) counters: Arc<Counters>,
    pub(super) patience: Patience,
    pub(super) timers: Timers,
    pub(super) streams: HashMap<u64, Stream>,
    pub(super) keys: HashMap<Key, u64>,
    pub(super) greetings: HashMap<u64, Greeting>,
    /// Streams that have something for the guest, in the order of their turns. Each at most once.
    pub(super) ready: VecDeque<u64>,
    /// RSTs for packets that belong to no stream.
    pub(super) resets: VecDeque<Reset>,
    /// Streams whose interest may have changed.
    pub(super) touched: Vec<u64>,
    /// Ended streams and greetings whose sockets are to leave the epoll set and be closed.
    pub(super) closed: Vec<Closed>,
    next_id: u64,
    next_port: u32,
}

/// A socket on its way out.
#[derive(Debug)]
pub(super) enum Closed {
    /// Of a stream.
    Stream(Stream),
    /// Of a host process that did not get to be one.
    Greeting(Greeting),
}

impl Closed {
    /// The descriptor, if it is in the epoll set.
    pub(super) fn watched(&self) -> Option<RawFd> {
        match self {
            Self::Stream(stream) => stream.watched.map(|_| stream.endpoint.fd()),
            Self::Greeting(greeting) => Some(greeting.fd()),
        }
    }
}

impl Muxer {
    /// No streams.
    pub(super) fn new(
        guest_cid: u32,
        dir: Arc<HostDir>,
        counters: Arc<Counters>,
        patience: Patience,
        timers: Timers,
    ) -> Self {
        Self {
            guest_cid,
            dir,
            counters,
            patience,
            timers,
            streams: HashMap::new(),
            keys: HashMap::new(),
            greetings: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            touched: Vec::new(),
            closed: Vec::new(),
            next_id: FIRST_ID,
            next_port: FIRST_HOST_PORT,
        }
    }

    /// Whether one more stream or greeting fits.
    pub(super) fn has_room(&self) -> bool {
        self.streams.len() + self.greetings.len() < MAX_CONNECTIONS
    }

    /// Whether one more host process may be greeted; else it waits in the backlog.
    pub(super) fn takes_greetings(&self) -> bool {
        self.greetings.len() < MAX_GREETINGS
    }

    fn new_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    /// Puts a stream in its place.
    pub(super) fn insert(&mut self, connection: Connection, stream: UnixStream) -> u64 {
        let id = self.new_id();
        self.keys.insert(connection.key(), id);
        self.streams.insert(id, Stream::new(connection, stream));
        self.counters.connections.fetch_add(1, Ordering::Relaxed);
        self.enqueue(id);
        id
    }

    /// Gives a stream a turn at the rx queue, after those that wait.
    pub(super) fn enqueue(&mut self, id: u64) {
        if let Some(stream) = self.streams.get_mut(&id) {
            if !stream.queued {
                stream.queued = true;
                self.ready.push_back(id);
            }
            self.touched.push(id);
        }
    }

    /// As [`Self::enqueue`], if it owes the guest a packet.
    pub(super) fn enqueue_if_owing(&mut self, id: u64) {
        self.touched.push(id);
        if self
            .streams
            .get(&id)
            .is_some_and(|stream| !stream.draining && stream.connection.owes())
        {
            self.enqueue(id);
        }
    }

    /// Ends a stream at once: its socket is closed, what it held is gone.
    pub(super) fn remove(&mut self, id: u64) {
        let Some(stream) = self.streams.remove(&id) else {
            return;
        };
        let key = stream.connection.key();
        if self.keys.get(&key) == Some(&id) {
            self.keys.remove(&key);
        }
        if stream.queued {
            self.ready.retain(|ready| *ready != id);
        }
        self.timers.cancel(id);
        self.counters.connections.fetch_sub(1, Ordering::Relaxed);
        self.closed.push(Closed::Stream(stream));
    }

    /// As [`Self::remove`], and the guest gets a RST.
    pub(super) fn reset(&mut self, id: u64) {
        if let Some(stream) = self.streams.get(&id) {
            if !stream.draining {
                self.resets.push_back(Reset::of(stream.connection.key()));
            }
            self.remove(id);
        }
    }

    /// The guest has forgotten a stream. What it sent before still goes to the host.
    pub(super) fn drain(&mut self, id: u64) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        if stream.endpoint.buffered() == 0 {
            self.remove(id);
            return;
        }
        // The host process sees the end when the last byte is gone and the socket is closed.
        stream.draining = true;
        if std::mem::take(&mut stream.queued) {
            self.ready.retain(|ready| *ready != id);
        }
        self.keys.remove(&stream.connection.key());
        self.timers.cancel(id);
        self.touched.push(id);
    }

    /// Ends everything, without a word to the guest.
    pub(super) fn clear(&mut self) {
        let ids: Vec<u64> = self.streams.keys().copied().collect();
        for id in ids {
            self.remove(id);
        }
        let greetings: Vec<u64> = self.greetings.keys().copied().collect();
        for id in greetings {
            self.end_greeting(id);
        }
        self.resets.clear();
        self.touched.clear();
    }

    /// A host process connected; it gets a while for its CONNECT line. Gives back its id and descriptor, to watch.
    /// Without room for it, it is closed.
    pub(super) fn greet(&mut self, stream: UnixStream) -> Option<(u64, RawFd)> {
        if !self.has_room() {
            add(&self.counters.refused, 1);
            return None;
        }
        let id = self.new_id();
        let greeting = Greeting::new(stream);
        let fd = greeting.fd();
        self.greetings.insert(id, greeting);
        self.timers.set(id, self.patience.greeting);
        Some((id, fd))
    }

    /// Ends a greeting.
    pub(super) fn end_greeting(&mut self, id: u64) {
        if let Some(greeting) = self.greetings.remove(&id) {
            self.timers.cancel(id);
            self.closed.push(Closed::Greeting(greeting));
        }
    }

    /// More of a CONNECT line is there. The greeting's descriptor, when it is to leave the epoll set because it became
    /// a stream.
    pub(super) fn greeting_readable(&mut self, id: u64) -> Option<RawFd> {
        match self.greetings.get_mut(&id)?.read() {
            Greeted::Waiting => None,
            Greeted::Over => {
                add(&self.counters.refused, 1);
                self.end_greeting(id);
                None
            }
            Greeted::Port(guest_port) => {
                let greeting = self.greetings.remove(&id)?;
                self.timers.cancel(id);
                let fd = greeting.fd();
                let key = self.free_key(guest_port);
                let connection = Connection::from_host(key, u64::from(self.guest_cid));
                let stream = self.insert(connection, greeting.into_stream());
                self.timers.set(stream, self.patience.request);
                Some(fd)
            }
        }
    }

    /// A host port that makes a new stream with `guest_port`. There are far more ports than streams.
    fn free_key(&mut self, guest_port: u32) -> Key {
        loop {
            let host_port = self.next_port;
            self.next_port = match host_port {
                LAST_HOST_PORT => FIRST_HOST_PORT,
                port => port + 1,
            };
            let key = Key {
                host_port,
                guest_port,
            };
            if !self.keys.contains_key(&key) {
                return key;
            }
        }
    }

    /// Something happened on a stream's socket.
    pub(super) fn socket_event(&mut self, id: u64, events: EventSet) {
        let hung_up = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        if events.contains(EventSet::OUT) || hung_up {
            self.flush(id);
        }
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        if stream.draining {
            return;
        }
        if stream.connection.host_may_send() {
            if (events.contains(EventSet::IN) || hung_up) && stream.connection.room() > 0 {
                stream.readable = true;
                self.enqueue(id);
            }
        } else if hung_up && !stream.connection.is_requested() {
            stream.connection.host_sends_no_more();
            stream.connection.host_takes_no_more();
            self.enqueue_if_owing(id);
        }
    }

    fn flush(&mut self, id: u64) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        if stream.endpoint.buffered() == 0 {
            return;
        }
        match stream.endpoint.flush() {
            Ok(count) => stream
                .connection
                .forwarded(u32::try_from(count).unwrap_or(u32::MAX)),
            Err(Gone) => stream.connection.host_takes_no_more(),
        }
        if stream.draining && stream.endpoint.buffered() == 0 {
            self.remove(id);
        } else {
            self.enqueue_if_owing(id);
        }
    }

    /// Deadlines passed.
    pub(super) fn expired(&mut self, id: u64) {
        add(&self.counters.timeouts, 1);
        if self.greetings.contains_key(&id) {
            add(&self.counters.refused, 1);
            self.end_greeting(id);
        } else {
            if self
                .streams
                .get(&id)
                .is_some_and(|stream| stream.connection.is_requested())
            {
                add(&self.counters.refused, 1);
            }
            self.reset(id);
        }
    }
}
