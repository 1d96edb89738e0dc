// SPDX-License-Identifier: Apache-2.0

//! Packet headers: 44 bytes of the guest in, a packet or the reason why it is none out (virtio 1.2, 5.10.6).
//!
//! Nothing here does I/O or touches guest memory: the header was copied once before, and what is decided here is
//! decided on that copy. The packet type of the `virtio-vsock` crate is not used for it, because it takes payloads of one
//! descriptor only (Linux sends several with MSG_ZEROCOPY); the tests hold our encoding against it.

use super::MAX_PAYLOAD;

/// Bytes of a header (`struct virtio_vsock_hdr`).
pub(super) const HEADER_SIZE: usize = 44;
/// VIRTIO_VSOCK_TYPE_STREAM.
pub(super) const TYPE_STREAM: u16 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE: the sender takes no more data.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_SEND: the sender sends no more data.
pub(super) const SHUTDOWN_SEND: u32 = 2;
/// Both directions.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

const HOST_CID: u64 = caisson_protocol::ports::HOST_CID as u64;

/// `struct virtio_vsock_hdr`, fields as numbers of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Header {
    /// Context id of the sender.
    pub(super) src_cid: u64,
    /// Context id of the receiver.
    pub(super) dst_cid: u64,
    /// Port of the sender.
    pub(super) src_port: u32,
    /// Port of the receiver.
    pub(super) dst_port: u32,
    /// Payload, bytes.
    pub(super) len: u32,
    /// Kind of socket.
    pub(super) kind: u16,
    /// What the packet does; see [`Op`].
    pub(super) op: u16,
    /// For SHUTDOWN.
    pub(super) flags: u32,
    /// Receive buffer of the sender for this stream, bytes.
    pub(super) buf_alloc: u32,
    /// Bytes of this stream that the sender's application has taken, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// Decodes; every 44 bytes are some header.
    pub(super) fn from_bytes(b: &[u8; HEADER_SIZE]) -> Self {
        let le32 = |at: [u8; 4]| u32::from_le_bytes(at);
        Self {
            src_cid: u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]),
            dst_cid: u64::from_le_bytes([b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]]),
            src_port: le32([b[16], b[17], b[18], b[19]]),
            dst_port: le32([b[20], b[21], b[22], b[23]]),
            len: le32([b[24], b[25], b[26], b[27]]),
            kind: u16::from_le_bytes([b[28], b[29]]),
            op: u16::from_le_bytes([b[30], b[31]]),
            flags: le32([b[32], b[33], b[34], b[35]]),
            buf_alloc: le32([b[36], b[37], b[38], b[39]]),
            fwd_cnt: le32([b[40], b[41], b[42], b[43]]),
        }
    }

    /// Encodes.
    pub(super) fn to_bytes(self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

/// What a packet does (virtio 1.2, 5.10.6, `enum virtio_vsock_op`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Grants it.
    Response = 2,
    /// Ends or refuses it.
    Reset = 3,
    /// Closes one or both directions.
    Shutdown = 4,
    /// Carries data.
    Data = 5,
    /// Carries nothing but the credit fields.
    CreditUpdate = 6,
    /// Asks for a credit update.
    CreditRequest = 7,
}

impl Op {
    fn from_wire(op: u16) -> Option<Self> {
        match op {
            1 => Some(Self::Request),
            2 => Some(Self::Response),
            3 => Some(Self::Reset),
            4 => Some(Self::Shutdown),
            5 => Some(Self::Data),
            6 => Some(Self::CreditUpdate),
            7 => Some(Self::CreditRequest),
            _ => None,
        }
    }
}

/// Names a stream between this guest and the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// Port on the host's side.
    pub(super) host_port: u32,
    /// Port on the guest's side.
    pub(super) guest_port: u32,
}

/// A packet of the guest that means something for the stream `key`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packet {
    /// Which stream.
    pub(super) key: Key,
    /// What it does.
    pub(super) op: Op,
    /// Payload, bytes: at most [`MAX_PAYLOAD`], and there.
    pub(super) len: u32,
    /// Directions that a SHUTDOWN closes: a subset of [`SHUTDOWN_BOTH`].
    pub(super) shutdown: u32,
    /// The guest's receive buffer, bytes.
    pub(super) buf_alloc: u32,
    /// What the guest's application has taken, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

/// A RST that the guest is owed for a packet that belongs to no stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reset {
    /// Whom the guest wrote to: context id and kind of socket come back to it as they were.
    pub(super) from_cid: u64,
    /// Kind of socket.
    pub(super) kind: u16,
    /// The ports.
    pub(super) key: Key,
}

impl Reset {
    /// The answer to a packet for an ordinary stream.
    pub(super) fn of(key: Key) -> Self {
        Self {
            from_cid: HOST_CID,
            kind: TYPE_STREAM,
            key,
        }
    }

    /// The packet.
    pub(super) fn header(self, guest_cid: u64) -> Header {
        Header {
            src_cid: self.from_cid,
            dst_cid: guest_cid,
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            kind: self.kind,
            op: Op::Reset as u16,
            ..Header::default()
        }
    }
}

/// What to do with a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Give it to its stream.
    Take(Packet),
    /// It is not for us: answer with RST, no stream is touched.
    Refuse(Reset),
    /// It is for this stream, but bytes are missing or too many: end the stream.
    Broken(Key),
    /// Drop it without an answer.
    Ignore,
}

/// Judges a packet of the guest `guest_cid`; `payload` is how many bytes its chain holds after the header.
pub(super) fn judge(bytes: &[u8; HEADER_SIZE], payload: usize, guest_cid: u64) -> Verdict {
    let header = Header::from_bytes(bytes);
    if header.src_cid != guest_cid {
        return Verdict::Ignore;
    }
    let key = Key {
        host_port: header.dst_port,
        guest_port: header.src_port,
    };
    let op = Op::from_wire(header.op);
    if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM || op.is_none() {
        if op == Some(Op::Reset) {
            return Verdict::Ignore;
        }
        return Verdict::Refuse(Reset {
            from_cid: header.dst_cid,
            kind: header.kind,
            key,
        });
    }
    let Some(op) = op else {
        return Verdict::Ignore;
    };
    let len_fits =
        usize::try_from(header.len).is_ok_and(|len| len <= payload && len <= MAX_PAYLOAD);
    if !len_fits && op != Op::Reset {
        return Verdict::Broken(key);
    }
    Verdict::Take(Packet {
        key,
        op,
        len: if op == Op::Data { header.len } else { 0 },
        shutdown: header.flags & SHUTDOWN_BOTH,
        buf_alloc: header.buf_alloc,
        fwd_cnt: header.fwd_cnt,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use virtio_vsock::packet::{PKT_HEADER_SIZE, VsockPacket};

    use super::*;

    fn header() -> Header {
        Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 1000,
            dst_port: 1024,
            len: 10,
            kind: TYPE_STREAM,
            op: Op::Data as u16,
            flags: 0,
            buf_alloc: 4096,
            fwd_cnt: 7,
        }
    }

    #[test]
    fn a_packet_names_its_stream_by_both_ports() {
        let Verdict::Take(packet) = judge(&header().to_bytes(), 10, 3) else {
            panic!("not taken");
        };
        assert_eq!(packet.key.host_port, 1024);
        assert_eq!(packet.key.guest_port, 1000);
        assert_eq!(
            (packet.len, packet.buf_alloc, packet.fwd_cnt),
            (10, 4096, 7)
        );
    }

    #[test]
    fn a_length_beyond_the_chain_or_the_bound_breaks_the_stream() {
        let short = judge(&header().to_bytes(), 9, 3);
        assert!(matches!(short, Verdict::Broken(_)));
        let mut big = header();
        big.len = u32::try_from(MAX_PAYLOAD).unwrap() + 1;
        let verdict = judge(&big.to_bytes(), usize::MAX, 3);
        assert!(matches!(verdict, Verdict::Broken(_)));
        big.len -= 1;
        let verdict = judge(&big.to_bytes(), MAX_PAYLOAD, 3);
        assert!(matches!(verdict, Verdict::Take(_)));
    }

    #[test]
    fn a_false_sender_gets_no_answer_and_a_false_address_a_reset() {
        let mut false_sender = header();
        false_sender.src_cid = 4;
        assert_eq!(judge(&false_sender.to_bytes(), 10, 3), Verdict::Ignore);
        let mut elsewhere = header();
        elsewhere.dst_cid = 77;
        let Verdict::Refuse(reset) = judge(&elsewhere.to_bytes(), 10, 3) else {
            panic!("not refused");
        };
        let answer = reset.header(3);
        assert_eq!((answer.src_cid, answer.dst_cid), (77, 3));
        assert_eq!((answer.src_port, answer.dst_port), (1024, 1000));
    }

    #[test]
    fn other_socket_types_and_unknown_operations_are_refused() {
        let mut seqpacket = header();
        seqpacket.kind = 2;
        assert!(matches!(judge(&seqpacket.to_bytes(), 10, 3), Verdict::Refuse(r) if r.kind == 2));
        let mut unknown = header();
        unknown.op = 8;
        assert!(matches!(
            judge(&unknown.to_bytes(), 10, 3),
            Verdict::Refuse(_)
        ));
    }

    #[test]
    fn a_reset_is_never_answered() {
        for (dst_cid, kind, len) in [(2, 1, 0), (2, 2, 0), (9, 1, 0), (2, 1, u32::MAX)] {
            let mut reset = header();
            reset.op = Op::Reset as u16;
            (reset.dst_cid, reset.kind, reset.len) = (dst_cid, kind, len);
            let verdict = judge(&reset.to_bytes(), 0, 3);
            assert!(
                matches!(verdict, Verdict::Ignore | Verdict::Take(_)),
                "{verdict:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn encoding_and_decoding_are_inverse_for_all_bytes(bytes: [u8; 32], tail: [u8; 12]) {
            let mut all = [0; HEADER_SIZE];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&tail);
            prop_assert_eq!(Header::from_bytes(&all).to_bytes(), all);
        }

        #[test]
        fn the_encoding_is_the_one_of_the_virtio_vsock_crate(
            cids: (u64, u64), ports: (u32, u32), len: u32, kind: u16, op: u16, rest: (u32, u32, u32)
        ) {
            let ours = Header {
                src_cid: cids.0, dst_cid: cids.1, src_port: ports.0, dst_port: ports.1, len, kind, op,
                flags: rest.0, buf_alloc: rest.1, fwd_cnt: rest.2,
            };
            let mut raw = [0u8; PKT_HEADER_SIZE];
            // SAFETY: `raw` outlives the packet and is not touched while it lives.
            let mut packet = unsafe { VsockPacket::new(&mut raw, None) }.unwrap();
            packet.set_src_cid(cids.0).set_dst_cid(cids.1).set_src_port(ports.0).set_dst_port(ports.1);
            packet.set_len(len).set_type(kind).set_op(op).set_flags(rest.0);
            packet.set_buf_alloc(rest.1).set_fwd_cnt(rest.2);
            prop_assert_eq!(ours.to_bytes(), raw);
        }

        #[test]
        fn what_is_taken_is_within_bounds(bytes: [u8; 32], tail: [u8; 12], payload in 0usize..200_000) {
            let mut all = [0; HEADER_SIZE];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&tail);
            // Make what would be dropped at once rare.
            all[..16].copy_from_slice(&[3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
            all[27] &= 1;
            all[29] = 0;
            all[31] = 0;
            all[28] &= 3;
            all[30] &= 7;
            if let Verdict::Take(packet) = judge(&all, payload, 3) {
                let len = usize::try_from(packet.len).unwrap();
                prop_assert!(len <= payload && len <= MAX_PAYLOAD);
                prop_assert!(packet.len == 0 || packet.op == Op::Data);
                prop_assert!(packet.shutdown <= SHUTDOWN_BOTH);
            }
        }
    }
}
