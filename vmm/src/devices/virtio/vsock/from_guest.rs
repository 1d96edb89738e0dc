// SPDX-License-Identifier: Apache-2.0

//! The tx queue: packets of the guest, one by one, to their streams.

use virtio_queue::DescriptorChain;
use vm_memory::GuestMemoryMmap;

use super::chain::{Chain, Direction};
use super::connection::{Connection, Step};
use super::counters::add;
use super::endpoint::Gone;
use super::muxer::Muxer;
use super::packet::{Key, Op, Packet, Reset, Verdict, judge};
use super::ring::{Ring, RingBroken};
use super::{MAX_PAYLOAD, MAX_RESETS};

/// Packets taken before other events get their turn.
const BATCH: usize = 64;

/// Why [`Muxer::take_packets`] stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taken {
    /// The queue is empty, and the guest will notify us.
    All,
    /// There may be more; look again after other events.
    Batch,
    /// Too many RSTs wait for rx buffers; look again when some have gone.
    Blocked,
}

impl Muxer {
    /// Takes packets off the tx queue.
    ///
    /// # Errors
    /// When the ring is broken.
    pub(super) fn take_packets(
        &mut self,
        mem: &GuestMemoryMmap,
        tx: &mut Ring,
    ) -> Result<Taken, RingBroken> {
        tx.silence(mem)?;
        for _ in 0..BATCH {
            if self.resets.len() >= MAX_RESETS {
                return Ok(Taken::Blocked);
            }
            let Some(descriptors) = tx.pop(mem)? else {
                if tx.listen(mem)? {
                    continue;
                }
                return Ok(Taken::All);
            };
            let head = descriptors.head_index();
            self.packet(mem, descriptors);
            tx.complete(mem, head, 0)?;
        }
        Ok(Taken::Batch)
    }

    fn packet(&mut self, mem: &GuestMemoryMmap, descriptors: DescriptorChain<&GuestMemoryMmap>) {
        add(&self.counters.tx_packets, 1);
        let Ok(chain) = Chain::new(mem, descriptors, Direction::Readable, MAX_PAYLOAD) else {
            add(&self.counters.malformed, 1);
            return;
        };
        let header = chain.read_header();
        match judge(&header, chain.payload_len, u64::from(self.guest_cid)) {
            Verdict::Take(packet) => self.judged(&packet, &chain),
            Verdict::Refuse(reset) => {
                add(&self.counters.malformed, 1);
                self.resets.push_back(reset);
            }
            Verdict::Broken(key) => {
                add(&self.counters.malformed, 1);
                self.end_or_refuse(key);
            }
            Verdict::Ignore => add(&self.counters.malformed, 1),
        }
    }

    fn judged(&mut self, packet: &Packet, chain: &Chain<'_>) {
        let Some(id) = self.keys.get(&packet.key).copied() else {
            match packet.op {
                Op::Request => self.connect(packet),
                Op::Reset => {}
                Op::Response | Op::Shutdown | Op::Data | Op::CreditUpdate | Op::CreditRequest => {
                    self.resets.push_back(Reset::of(packet.key))
                }
            }
            return;
        };
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        if packet.op == Op::Request && stream.connection.is_closing() {
            // The guest has forgotten the old stream and reuses its port.
            self.remove(id);
            self.connect(packet);
            return;
        }
        match stream.connection.packet(packet) {
            Ok(step) => self.step(id, step, packet, chain),
            Err(_) => {
                add(&self.counters.violations, 1);
                self.reset(id);
            }
        }
    }

    fn step(&mut self, id: u64, step: Step, packet: &Packet, chain: &Chain<'_>) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        match step {
            Step::Nothing => {}
            Step::Accepted => {
                self.timers.cancel(id);
                add(&self.counters.accepted_from_host, 1);
                let line = format!("OK {}\n", packet.key.host_port);
                if stream.endpoint.say(&line) == Err(Gone) {
                    stream.connection.host_takes_no_more();
                }
            }
            Step::Deliver => {
                add(&self.counters.tx_bytes, u64::from(packet.len));
                self.deliver(id, packet, chain);
            }
            Step::Closed => {
                if stream.connection.guest_sends_no_more() {
                    stream.endpoint.finish();
                }
                if stream.connection.guest_takes_no_more() {
                    stream.endpoint.refuse();
                }
            }
            Step::Over { answer } => {
                if stream.connection.is_requested() {
                    add(&self.counters.refused, 1);
                }
                if answer {
                    self.resets.push_back(Reset::of(packet.key));
                }
                self.drain(id);
                return;
            }
        }
        self.enqueue_if_owing(id);
    }

    fn deliver(&mut self, id: u64, packet: &Packet, chain: &Chain<'_>) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        if !stream.connection.host_takes() {
            stream.connection.forwarded(packet.len);
            return;
        }
        let len = usize::try_from(packet.len).unwrap_or(MAX_PAYLOAD);
        match stream.endpoint.deliver(&chain.payload, len) {
            // At most `len`, which came from 32 bits.
            Ok(sent) => stream
                .connection
                .forwarded(u32::try_from(sent).unwrap_or(packet.len)),
            Err(Gone) => stream.connection.host_takes_no_more(),
        }
    }

    /// The guest asks for a port of the host.
    fn connect(&mut self, request: &Packet) {
        let stream = if self.has_room() {
            self.dir.connect(request.key.host_port).ok()
        } else {
            None
        };
        match stream {
            Some(stream) => {
                add(&self.counters.accepted_from_guest, 1);
                let connection = Connection::from_guest(request, u64::from(self.guest_cid));
                self.insert(connection, stream);
            }
            None => {
                add(&self.counters.refused, 1);
                self.resets.push_back(Reset::of(request.key));
            }
        }
    }

    fn end_or_refuse(&mut self, key: Key) {
        match self.keys.get(&key).copied() {
            Some(id) => self.reset(id),
            None => self.resets.push_back(Reset::of(key)),
        }
    }
}
