// SPDX-License-Identifier: Apache-2.0

//! The rx queue: RSTs, owed packets and data for the guest, stream by stream in turns.
//!
//! Data is read from the host's sockets straight into the guest's buffers, many buffers in one system call. Nothing is
//! read without a buffer to put it in, so a guest that gives none makes the host's senders wait.

use vm_memory::GuestMemoryMmap;

use super::MAX_PAYLOAD;
use super::chain::{Chain, Direction, Slice};
use super::counters::add;
use super::endpoint::Received;
use super::muxer::{FIRST_READ, Muxer};
use super::packet::{HEADER_SIZE, Header};
use super::ring::{Ring, RingBroken};

/// Turns before other events get theirs.
const BATCH: usize = 64;
/// Unusable buffers looked at in one turn.
const MAX_BAD_BUFFERS: usize = 64;
/// Pieces of guest memory read into with one call.
const MAX_SLICES: usize = 256;

/// Why [`Muxer::serve`] stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Served {
    /// Nothing is left for the guest.
    All,
    /// There may be more; go on after other events.
    Batch,
    /// The guest has to give buffers, and will notify us when it does.
    Starved,
}

/// How a stream's turn went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    Done,
    Starved,
}

/// A buffer of the guest, taken off the queue and not yet given back.
struct Buffer<'m> {
    head: u16,
    chain: Chain<'m>,
}

impl Muxer {
    /// Gives the guest what waits for it, as far as it has buffers.
    ///
    /// # Errors
    /// When the ring is broken.
    pub(super) fn serve(
        &mut self,
        mem: &GuestMemoryMmap,
        rx: &mut Ring,
    ) -> Result<Served, RingBroken> {
        if self.resets.is_empty() && self.ready.is_empty() {
            return Ok(Served::All);
        }
        rx.silence(mem)?;
        for _ in 0..BATCH {
            let turn = if let Some(reset) = self.resets.front().copied() {
                let header = reset.header(u64::from(self.guest_cid));
                let turn = self.send(mem, rx, header)?;
                if turn == Turn::Done {
                    add(&self.counters.resets, 1);
                    self.resets.pop_front();
                }
                turn
            } else if let Some(id) = self.ready.front().copied() {
                let turn = self.turn(mem, rx, id)?;
                if turn == Turn::Done {
                    self.ready.pop_front();
                    self.after_turn(id);
                }
                turn
            } else {
                return Ok(Served::All);
            };
            if turn == Turn::Starved && !rx.listen(mem)? {
                return Ok(Served::Starved);
            }
        }
        Ok(Served::Batch)
    }

    fn after_turn(&mut self, id: u64) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.queued = false;
            stream.readable = false;
            self.touched.push(id);
        }
    }

    fn turn(&mut self, mem: &GuestMemoryMmap, rx: &mut Ring, id: u64) -> Result<Turn, RingBroken> {
        if self.send_owed(mem, rx, id)? == Turn::Starved {
            return Ok(Turn::Starved);
        }
        let Some(stream) = self.streams.get(&id) else {
            return Ok(Turn::Done);
        };
        if stream.readable && self.read(mem, rx, id)? == Turn::Starved {
            return Ok(Turn::Starved);
        }
        self.send_owed(mem, rx, id)
    }

    fn send_owed(
        &mut self,
        mem: &GuestMemoryMmap,
        rx: &mut Ring,
        id: u64,
    ) -> Result<Turn, RingBroken> {
        while let Some(stream) = self.streams.get(&id)
            && stream.connection.owes()
        {
            let Some(buffer) = self.next_buffer(mem, rx, 1)? else {
                return Ok(Turn::Starved);
            };
            let Some(stream) = self.streams.get_mut(&id) else {
                rx.put_back(1);
                return Ok(Turn::Done);
            };
            let Some(header) = stream.connection.next_owed() else {
                rx.put_back(1);
                return Ok(Turn::Done);
            };
            if stream.connection.is_closing() {
                self.timers.set(id, self.patience.close);
            }
            self.fill(mem, rx, &buffer, header)?;
        }
        Ok(Turn::Done)
    }

    fn send(
        &mut self,
        mem: &GuestMemoryMmap,
        rx: &mut Ring,
        header: Header,
    ) -> Result<Turn, RingBroken> {
        let Some(buffer) = self.next_buffer(mem, rx, 1)? else {
            return Ok(Turn::Starved);
        };
        self.fill(mem, rx, &buffer, header)?;
        Ok(Turn::Done)
    }

    fn fill(
        &self,
        mem: &GuestMemoryMmap,
        rx: &mut Ring,
        buffer: &Buffer<'_>,
        header: Header,
    ) -> Result<(), RingBroken> {
        add(&self.counters.rx_packets, 1);
        buffer.chain.write_header(&header.to_bytes());
        let payload = usize::try_from(header.len).unwrap_or(MAX_PAYLOAD);
        rx.complete(mem, buffer.head, HEADER_SIZE + payload)
    }

    /// The next usable buffer, with room for at most `max_payload` bytes. Unusable ones before it go back empty.
    fn next_buffer<'m>(
        &self,
        mem: &'m GuestMemoryMmap,
        rx: &mut Ring,
        max_payload: usize,
    ) -> Result<Option<Buffer<'m>>, RingBroken> {
        for _ in 0..MAX_BAD_BUFFERS {
            let Some(descriptors) = rx.pop(mem)? else {
                return Ok(None);
            };
            let head = descriptors.head_index();
            match Chain::new(mem, descriptors, Direction::Writable, max_payload) {
                Ok(chain) => return Ok(Some(Buffer { head, chain })),
                Err(_) => {
                    add(&self.counters.malformed, 1);
                    rx.complete(mem, head, 0)?;
                }
            }
        }
        Ok(None)
    }

    /// Buffers for at most `limit` bytes. The first unusable one ends them, as those after it could not be put back.
    fn buffers<'m>(
        &self,
        mem: &'m GuestMemoryMmap,
        rx: &mut Ring,
        limit: usize,
    ) -> Result<Vec<Buffer<'m>>, RingBroken> {
        let Some(first) = self.next_buffer(mem, rx, limit)? else {
            return Ok(Vec::new());
        };
        let mut room = first.chain.payload_len;
        let mut pieces = first.chain.payload.len();
        let mut buffers = vec![first];
        while room < limit && pieces < MAX_SLICES {
            let Some(descriptors) = rx.pop(mem)? else {
                break;
            };
            let head = descriptors.head_index();
            let Ok(chain) = Chain::new(mem, descriptors, Direction::Writable, limit - room) else {
                rx.put_back(1);
                break;
            };
            room += chain.payload_len;
            pieces += chain.payload.len();
            buffers.push(Buffer { head, chain });
        }
        Ok(buffers)
    }

    /// Reads once from a stream's host process, as much as its credit, its share and the guest's buffers allow.
    fn read(&mut self, mem: &GuestMemoryMmap, rx: &mut Ring, id: u64) -> Result<Turn, RingBroken> {
        let Some(stream) = self.streams.get(&id) else {
            return Ok(Turn::Done);
        };
        let credit = usize::try_from(stream.connection.room()).unwrap_or(usize::MAX);
        let limit = credit.min(stream.read_size).min(MAX_PAYLOAD);
        if limit == 0 {
            return Ok(Turn::Done);
        }
        let buffers = self.buffers(mem, rx, limit)?;
        if buffers.is_empty() {
            return Ok(Turn::Starved);
        }
        let slices: Vec<Slice<'_>> = buffers
            .iter()
            .flat_map(|buffer| buffer.chain.payload.iter().cloned())
            .collect();
        let Some(stream) = self.streams.get_mut(&id) else {
            rx.put_back(buffers.len());
            return Ok(Turn::Done);
        };
        let count = match stream.endpoint.receive(&slices) {
            Received::Bytes(count) => count,
            Received::Nothing => 0,
            Received::End => {
                stream.connection.host_sends_no_more();
                0
            }
        };
        stream.read_size = next_read_size(stream.read_size, count);
        add(&self.counters.rx_bytes, u64::try_from(count).unwrap_or(0));
        self.hand_over(mem, rx, id, &buffers, count)?;
        Ok(Turn::Done)
    }

    /// Gives `count` bytes, which are in `buffers`, to the guest, and puts back the buffers without any.
    fn hand_over(
        &mut self,
        mem: &GuestMemoryMmap,
        rx: &mut Ring,
        id: u64,
        buffers: &[Buffer<'_>],
        count: usize,
    ) -> Result<(), RingBroken> {
        let mut left = count;
        for (index, buffer) in buffers.iter().enumerate() {
            let here = buffer.chain.payload_len.min(left);
            let Some(stream) = self.streams.get_mut(&id).filter(|_| here > 0) else {
                rx.put_back(buffers.len() - index);
                return Ok(());
            };
            left -= here;
            // At most MAX_PAYLOAD.
            let header = stream.connection.data(u32::try_from(here).unwrap_or(0));
            self.fill(mem, rx, buffer, header)?;
        }
        Ok(())
    }
}

/// How much to read next: more after a full read, less after one that left most of the buffers empty.
fn next_read_size(size: usize, count: usize) -> usize {
    if count >= size {
        (size * 4).min(MAX_PAYLOAD)
    } else if count <= size / 4 {
        (size / 4).max(FIRST_READ)
    } else {
        size
    }
}
