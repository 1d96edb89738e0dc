// SPDX-License-Identifier: Apache-2.0

//! The life of one stream, without its sockets: what the guest's packets and the host's end do to it, which packets
//! the guest is owed, and when it is over.
//!
//! ```text
//!  guest REQUEST ──> Open (owes RESPONSE)        host CONNECT ──> Requested (owes REQUEST) ── RESPONSE ──> Open
//!  Open: data both ways; each side closes its directions one by one (SHUTDOWN flags)
//!    guest closed both, or RST ──> over: what is buffered still goes to the host, then its socket is closed
//!    host closed both ──> SHUTDOWN with both flags, then the guest's RST or a deadline ends it
//! ```

use super::credit::Credit;
use super::packet::{
    Header, Key, Op, Packet, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};

const HOST_CID: u64 = caisson_protocol::ports::HOST_CID as u64;

/// Where a stream is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The guest was asked, or is about to be.
    Requested,
    /// Both sides agreed.
    Open,
}

/// What the caller has to do after a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing.
    Nothing,
    /// The guest took the host's connection: tell the host.
    Accepted,
    /// Pass the payload on.
    Deliver,
    /// Directions were closed: pass that on.
    Closed,
    /// The guest has forgotten the stream: deliver what is buffered and end it. With `answer`, it awaits a RST.
    Over {
        /// Whether the guest is owed a RST.
        answer: bool,
    },
}

/// The guest did what this stream does not allow: RST, and the stream ends at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Violation {
    /// More data than we gave credit for.
    Overrun,
    /// A packet that has no place in this phase.
    OutOfOrder,
}

/// Packets owed to the guest. Each kind once, however often it is asked for: so nothing grows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Owed {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
}

/// One stream.
#[derive(Debug)]
pub(super) struct Connection {
    key: Key,
    guest_cid: u64,
    phase: Phase,
    credit: Credit,
    owed: Owed,
    /// Directions that the guest closed, as in its SHUTDOWN packets.
    guest_closed: u32,
    /// Directions that the host's end closed, as they are to be told.
    host_closed: u32,
    /// What of `host_closed` the guest was told.
    told_closed: u32,
}

impl Connection {
    fn new(key: Key, guest_cid: u64, phase: Phase) -> Self {
        Self {
            key,
            guest_cid,
            phase,
            credit: Credit::default(),
            owed: Owed::default(),
            guest_closed: 0,
            host_closed: 0,
            told_closed: 0,
        }
    }

    /// A stream that the guest asked for and that the host took.
    pub(super) fn from_guest(request: &Packet, guest_cid: u64) -> Self {
        let mut connection = Self::new(request.key, guest_cid, Phase::Open);
        connection
            .credit
            .guest_says(request.buf_alloc, request.fwd_cnt);
        connection.owed.response = true;
        connection
    }

    /// A stream that the host asks the guest for.
    pub(super) fn from_host(key: Key, guest_cid: u64) -> Self {
        let mut connection = Self::new(key, guest_cid, Phase::Requested);
        connection.owed.request = true;
        connection
    }

    /// Its ports.
    pub(super) fn key(&self) -> Key {
        self.key
    }

    /// Whether the guest has not yet answered the host's request.
    pub(super) fn is_requested(&self) -> bool {
        self.phase == Phase::Requested
    }

    /// Takes a packet of the guest for this stream.
    ///
    /// # Errors
    /// When the stream does not allow it.
    pub(super) fn packet(&mut self, packet: &Packet) -> Result<Step, Violation> {
        if packet.op == Op::Reset {
            return Ok(Step::Over { answer: false });
        }
        self.credit.guest_says(packet.buf_alloc, packet.fwd_cnt);
        match (packet.op, self.phase) {
            (Op::Response, Phase::Requested) if !self.owed.request => {
                self.phase = Phase::Open;
                Ok(Step::Accepted)
            }
            (Op::Data, Phase::Open) => {
                if self.guest_closed & SHUTDOWN_SEND != 0 {
                    return Err(Violation::OutOfOrder);
                }
                match self.credit.received(packet.len) {
                    Ok(()) => Ok(Step::Deliver),
                    Err(_) => Err(Violation::Overrun),
                }
            }
            (Op::Shutdown, Phase::Open) => {
                self.guest_closed |= packet.shutdown;
                if self.guest_closed == SHUTDOWN_BOTH {
                    Ok(Step::Over { answer: true })
                } else {
                    Ok(Step::Closed)
                }
            }
            (Op::CreditUpdate, Phase::Open) => Ok(Step::Nothing),
            (Op::CreditRequest, Phase::Open) => {
                self.owed.credit_update = true;
                Ok(Step::Nothing)
            }
            (Op::Request | Op::Response | Op::Reset, Phase::Open)
            | (
                Op::Request
                | Op::Response
                | Op::Reset
                | Op::Shutdown
                | Op::Data
                | Op::CreditUpdate
                | Op::CreditRequest,
                Phase::Requested,
            ) => Err(Violation::OutOfOrder),
        }
    }

    /// `count` bytes of the guest reached the host.
    pub(super) fn forwarded(&mut self, count: u32) {
        self.credit.forwarded(count);
        self.owed.credit_update |= self.credit.update_due();
    }

    /// The host sends no more.
    pub(super) fn host_sends_no_more(&mut self) {
        self.host_closed |= SHUTDOWN_SEND;
    }

    /// The host takes no more: what comes from the guest goes nowhere.
    pub(super) fn host_takes_no_more(&mut self) {
        self.host_closed |= SHUTDOWN_RECEIVE;
        self.credit.forwarded_all();
        self.owed.credit_update |= self.credit.update_due();
    }

    /// Whether the host's end takes data.
    pub(super) fn host_takes(&self) -> bool {
        self.host_closed & SHUTDOWN_RECEIVE == 0
    }

    /// Whether the guest said that it sends no more.
    pub(super) fn guest_sends_no_more(&self) -> bool {
        self.guest_closed & SHUTDOWN_SEND != 0
    }

    /// Whether the guest said that it takes no more.
    pub(super) fn guest_takes_no_more(&self) -> bool {
        self.guest_closed & SHUTDOWN_RECEIVE != 0
    }

    /// Whether the host's data can still go to the guest, credit apart.
    pub(super) fn host_may_send(&self) -> bool {
        self.phase == Phase::Open
            && self.host_closed & SHUTDOWN_SEND == 0
            && !self.guest_takes_no_more()
    }

    /// How many bytes of the host may go to the guest now.
    pub(super) fn room(&self) -> u32 {
        if self.host_may_send() {
            self.credit.room()
        } else {
            0
        }
    }

    /// Whether the guest was told that both directions are closed, and owes us a RST.
    pub(super) fn is_closing(&self) -> bool {
        self.told_closed == SHUTDOWN_BOTH
    }

    /// Whether a packet other than data is owed to the guest.
    pub(super) fn owes(&self) -> bool {
        self.owed != Owed::default() || self.owes_shutdown()
    }

    fn owes_shutdown(&self) -> bool {
        self.phase == Phase::Open && self.host_closed != self.told_closed
    }

    /// Takes the next owed packet, if any. It is on its way then.
    pub(super) fn next_owed(&mut self) -> Option<Header> {
        if std::mem::take(&mut self.owed.request) {
            return Some(self.header(Op::Request, 0, 0));
        }
        if std::mem::take(&mut self.owed.response) {
            return Some(self.header(Op::Response, 0, 0));
        }
        if std::mem::take(&mut self.owed.credit_update) {
            return Some(self.header(Op::CreditUpdate, 0, 0));
        }
        if std::mem::take(&mut self.owed.credit_request) {
            return Some(self.header(Op::CreditRequest, 0, 0));
        }
        if self.owes_shutdown() {
            self.told_closed = self.host_closed;
            return Some(self.header(Op::Shutdown, 0, self.host_closed));
        }
        None
    }

    /// The header for `count` bytes of data, at most [`Self::room`], which are on their way then.
    pub(super) fn data(&mut self, count: u32) -> Header {
        self.credit.sent(count);
        self.owed.credit_update = false;
        if self.credit.room() == 0 {
            self.owed.credit_request = true;
        }
        self.header(Op::Data, count, 0)
    }

    fn header(&mut self, op: Op, len: u32, flags: u32) -> Header {
        let (buf_alloc, fwd_cnt) = self.credit.announce();
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            len,
            kind: TYPE_STREAM,
            op: op as u16,
            flags,
            buf_alloc,
            fwd_cnt,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::vsock::credit::BUFFER;

    const KEY: Key = Key {
        host_port: 1024,
        guest_port: 5000,
    };

    fn packet(op: Op) -> Packet {
        Packet {
            key: KEY,
            op,
            len: 0,
            shutdown: 0,
            buf_alloc: 1000,
            fwd_cnt: 0,
        }
    }

    fn open() -> Connection {
        let mut connection = Connection::from_guest(&packet(Op::Request), 3);
        assert_eq!(connection.next_owed().unwrap().op, Op::Response as u16);
        connection
    }

    fn shutdown(flags: u32) -> Packet {
        Packet {
            shutdown: flags,
            ..packet(Op::Shutdown)
        }
    }

    #[test]
    fn the_host_asks_first_and_talks_after_the_answer() {
        let mut connection = Connection::from_host(KEY, 3);
        let early = connection.packet(&packet(Op::Response));
        assert_eq!(early, Err(Violation::OutOfOrder), "nothing was asked yet");
        let request = connection.next_owed().unwrap();
        assert_eq!(
            (request.op, request.buf_alloc),
            (Op::Request as u16, BUFFER)
        );
        assert_eq!(connection.room(), 0);
        assert_eq!(connection.packet(&packet(Op::Response)), Ok(Step::Accepted));
        assert_eq!(connection.room(), 1000);
        let again = connection.packet(&packet(Op::Response));
        assert_eq!(again, Err(Violation::OutOfOrder));
    }

    #[test]
    fn nothing_but_an_answer_fits_an_unanswered_request() {
        for op in [Op::Data, Op::Shutdown, Op::CreditUpdate, Op::CreditRequest] {
            let mut connection = Connection::from_host(KEY, 3);
            connection.next_owed();
            assert_eq!(connection.packet(&packet(op)), Err(Violation::OutOfOrder));
        }
        let mut connection = Connection::from_host(KEY, 3);
        let refused = connection.packet(&packet(Op::Reset));
        assert_eq!(refused, Ok(Step::Over { answer: false }));
    }

    #[test]
    fn data_after_the_guests_own_shutdown_is_a_violation() {
        let mut connection = open();
        assert_eq!(
            connection.packet(&shutdown(SHUTDOWN_SEND)),
            Ok(Step::Closed)
        );
        assert_eq!(
            connection.packet(&packet(Op::Data)),
            Err(Violation::OutOfOrder)
        );
        assert_eq!(connection.room(), 1000, "the other direction is open");
    }

    #[test]
    fn data_beyond_the_credit_is_a_violation() {
        let mut connection = open();
        let mut data = packet(Op::Data);
        data.len = BUFFER;
        assert_eq!(connection.packet(&data), Ok(Step::Deliver));
        data.len = 1;
        assert_eq!(connection.packet(&data), Err(Violation::Overrun));
    }

    #[test]
    fn the_guest_may_close_both_directions_at_once_or_one_by_one() {
        let mut at_once = open();
        let over = Ok(Step::Over { answer: true });
        assert_eq!(at_once.packet(&shutdown(SHUTDOWN_BOTH)), over);
        let mut by_one = open();
        assert_eq!(by_one.packet(&shutdown(SHUTDOWN_RECEIVE)), Ok(Step::Closed));
        assert_eq!(by_one.room(), 0, "the guest takes no more");
        assert_eq!(by_one.packet(&shutdown(SHUTDOWN_SEND)), over);
    }

    #[test]
    fn the_hosts_half_close_is_told_once_and_the_full_close_again() {
        let mut connection = open();
        connection.host_sends_no_more();
        let told = connection.next_owed().unwrap();
        assert_eq!((told.op, told.flags), (Op::Shutdown as u16, SHUTDOWN_SEND));
        assert!(!connection.owes() && !connection.is_closing());
        connection.host_takes_no_more();
        assert_eq!(connection.next_owed().unwrap().flags, SHUTDOWN_BOTH);
        assert!(connection.is_closing());
        assert_eq!(connection.next_owed(), None);
    }

    #[test]
    fn what_goes_to_the_guest_stays_within_its_credit() {
        let mut connection = open();
        connection.data(1000);
        assert_eq!(connection.room(), 0);
        let asked = connection.next_owed().unwrap();
        assert_eq!(asked.op, Op::CreditRequest as u16);
        let mut update = packet(Op::CreditUpdate);
        update.fwd_cnt = 300;
        connection.packet(&update).unwrap();
        assert_eq!(connection.room(), 300);
    }

    #[test]
    fn a_credit_request_is_answered_once_however_often_it_is_asked() {
        let mut connection = open();
        for _ in 0..100 {
            connection.packet(&packet(Op::CreditRequest)).unwrap();
        }
        assert_eq!(connection.next_owed().unwrap().op, Op::CreditUpdate as u16);
        assert_eq!(connection.next_owed(), None);
    }
}
