// SPDX-License-Identifier: Apache-2.0

//! Credit of one stream, both ways (virtio 1.2, 5.10.6.3): arithmetic alone.
//!
//! Each side says how large its receive buffer is (`buf_alloc`) and how much of the stream its application has taken
//! (`fwd_cnt`); the other never has more on the way than fits. All counters run modulo 2^32. What the guest says may be a
//! lie: then its own stream stalls or is ended, and nothing of ours grows.

use std::num::Wrapping;

/// Receive buffer that we announce for each stream, bytes; no stream ever buffers more on the host.
pub(super) const BUFFER: u32 = 256 * 1024;
/// An update is due when the guest believes that less than this is free.
const LOW: u32 = BUFFER / 2;
/// Smallest step worth a packet of its own while there is more in the buffer.
const STEP: u32 = BUFFER / 8;

/// The guest sent more than it had credit for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Overrun;

/// Counters of one stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Credit {
    guest_buffer: u32,
    guest_took: Wrapping<u32>,
    sent: Wrapping<u32>,
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    announced: Wrapping<u32>,
}

impl Credit {
    /// The guest's side of things, from any of its packets.
    pub(super) fn guest_says(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.guest_buffer = buf_alloc;
        self.guest_took = Wrapping(fwd_cnt);
    }

    /// How many bytes may go to the guest now. A guest that claims to have taken more than was sent gets nothing.
    pub(super) fn room(&self) -> u32 {
        let on_the_way = self.sent - self.guest_took;
        self.guest_buffer.saturating_sub(on_the_way.0)
    }

    /// `count` bytes, at most [`Self::room`], went to the guest.
    pub(super) fn sent(&mut self, count: u32) {
        self.sent += count;
    }

    /// `count` bytes came from the guest.
    ///
    /// # Errors
    /// When our buffer has no room for them; nothing is counted then.
    pub(super) fn received(&mut self, count: u32) -> Result<(), Overrun> {
        // `received - forwarded` is at most BUFFER at all times, so this cannot overflow 64 bits or wrap.
        let buffered = u64::from((self.received - self.forwarded).0) + u64::from(count);
        if buffered > u64::from(BUFFER) {
            return Err(Overrun);
        }
        self.received += count;
        Ok(())
    }

    /// `count` of the received bytes left our buffer.
    pub(super) fn forwarded(&mut self, count: u32) {
        let buffered = (self.received - self.forwarded).0;
        self.forwarded += count.min(buffered);
    }

    /// All that was received left our buffer.
    pub(super) fn forwarded_all(&mut self) {
        self.forwarded = self.received;
    }

    /// `buf_alloc` and `fwd_cnt` for a packet that now goes to the guest.
    pub(super) fn announce(&mut self) -> (u32, u32) {
        self.announced = self.forwarded;
        (BUFFER, self.forwarded.0)
    }

    /// Whether the guest should hear of freed space without waiting for another packet.
    pub(super) fn update_due(&self) -> bool {
        let news = (self.forwarded - self.announced).0;
        let believed_free = BUFFER.saturating_sub((self.received - self.announced).0);
        let all_gone = self.forwarded == self.received;
        news > 0 && believed_free < LOW && (news >= STEP || all_gone)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn room_is_what_the_guest_said_less_what_is_on_the_way() {
        let mut credit = Credit::default();
        assert_eq!(credit.room(), 0);
        credit.guest_says(1000, 0);
        credit.sent(400);
        assert_eq!(credit.room(), 600);
        credit.guest_says(1000, 400);
        assert_eq!(credit.room(), 1000);
        credit.guest_says(100, 400);
        assert_eq!(credit.room(), 100);
    }

    #[test]
    fn a_shrunk_buffer_and_a_false_count_give_no_room() {
        let mut credit = Credit::default();
        credit.guest_says(1000, 0);
        credit.sent(800);
        credit.guest_says(500, 0);
        assert_eq!(credit.room(), 0);
        credit.guest_says(u32::MAX - 1, 801);
        assert_eq!(credit.room(), 0);
    }

    #[test]
    fn the_counters_wrap() {
        let mut credit = Credit::default();
        let mut took = 0u32;
        for _ in 0..5 {
            credit.guest_says(u32::MAX, took);
            assert_eq!(credit.room(), u32::MAX);
            credit.sent(0x7fff_ffff);
            took = took.wrapping_add(0x7fff_ffff);
        }
        for _ in 0..40_000 {
            credit.received(BUFFER).unwrap();
            assert_eq!(credit.received(1), Err(Overrun));
            credit.forwarded(BUFFER);
        }
    }

    #[test]
    fn more_than_the_buffer_is_an_overrun_and_counts_nothing() {
        let mut credit = Credit::default();
        credit.received(BUFFER - 1).unwrap();
        assert_eq!(credit.received(2), Err(Overrun));
        credit.received(1).unwrap();
        assert_eq!(credit.received(u32::MAX), Err(Overrun));
    }

    #[test]
    fn an_update_is_due_when_it_runs_low_and_not_for_every_byte() {
        let mut credit = Credit::default();
        credit.received(1000).unwrap();
        credit.forwarded(1000);
        assert!(!credit.update_due(), "there is plenty");
        credit.received(LOW).unwrap();
        assert!(!credit.update_due(), "only a little became free");
        credit.forwarded(STEP);
        assert!(credit.update_due());
        credit.announce();
        assert!(!credit.update_due(), "nothing new");
        credit.received(STEP + 1).unwrap();
        credit.forwarded(1);
        assert!(!credit.update_due(), "one byte is not worth a packet");
        credit.forwarded_all();
        assert!(credit.update_due(), "nothing more will become free");
    }

    proptest! {
        /// However the host reads, a guest that waits for credit is told of it in the end.
        #[test]
        fn a_guest_out_of_credit_always_hears_again(reads in prop::collection::vec(1u32..100_000, 1..200)) {
            let mut credit = Credit::default();
            let (mut told, mut sent) = (0u32, 0u32);
            for read in reads {
                let free = BUFFER - sent.wrapping_sub(told);
                credit.received(free).unwrap();
                sent = sent.wrapping_add(free);
                let mut buffered = BUFFER;
                let mut heard = false;
                while buffered > 0 {
                    let step = read.min(buffered);
                    credit.forwarded(step);
                    buffered -= step;
                    if credit.update_due() {
                        credit.announce();
                        heard = true;
                        break;
                    }
                }
                prop_assert!(heard);
                credit.forwarded_all();
                told = credit.announce().1;
            }
        }

        #[test]
        fn lies_never_make_the_buffer_grow(
            steps in prop::collection::vec((any::<u32>(), any::<u32>(), any::<u32>(), 0u32..70_000, 0u32..70_000), 1..300)
        ) {
            let mut credit = Credit::default();
            let mut buffered = 0u64;
            for (alloc, took, _, count, out) in steps {
                credit.guest_says(alloc, took);
                let room = credit.room();
                prop_assert!(room <= alloc);
                credit.sent(room.min(count));
                if credit.received(count).is_ok() {
                    buffered += u64::from(count);
                }
                prop_assert!(buffered <= u64::from(BUFFER));
                let out = u64::from(out).min(buffered);
                credit.forwarded(u32::try_from(out).unwrap());
                buffered -= out;
            }
        }
    }
}
