// SPDX-License-Identifier: Apache-2.0

//! A guest for the tests: a driver with real rings in guest memory and real notifications, and just enough of a vsock
//! stack to talk, or to misbehave, on top of it.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use caisson_protocol::ports::{HOST_SOCKET, guest_to_host_socket};
use caisson_protocol::vm::VsockConfig;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::packet::{HEADER_SIZE, Header, Key, Op, SHUTDOWN_BOTH, TYPE_STREAM};
use super::test_driver::Driver;
use super::{Patience, VsockDevice};
use crate::devices::virtio::device::{
    Activation, ActiveQueue, GuestMemory, Interrupt, VirtioDevice as _,
};

pub(super) const CID: u32 = 3;
const WRITE: u16 = 2;
const EVENT_IDX: u64 = 1 << 29;
/// Nothing in these tests takes longer, whatever else the machine does.
pub(super) const LONG: Duration = Duration::from_secs(60);

/// The guest's side of a stream.
#[derive(Debug, Default)]
pub(super) struct Peer {
    pub(super) buf_alloc: u32,
    pub(super) forwarded: u32,
    pub(super) sent: u32,
    pub(super) host_alloc: u32,
    pub(super) host_took: u32,
    pub(super) received: Vec<u8>,
    pub(super) operations: Vec<u16>,
    pub(super) shutdown: u32,
    pub(super) reset: bool,
    /// The application takes what comes; else it stays in the receive buffer.
    pub(super) takes: bool,
}

/// A guest with a device.
pub(super) struct TestGuest {
    pub(super) device: VsockDevice,
    pub(super) memory: GuestMemory,
    pub(super) rx: Driver,
    pub(super) tx: Driver,
    pub(super) events: Driver,
    pub(super) interrupt: Arc<Interrupt>,
    line: EventFd,
    features: u64,
    pub(super) peers: HashMap<Key, Peer>,
    /// Packets for streams that the guest does not know.
    pub(super) stray: VecDeque<Header>,
    dir: Arc<tempfile::TempDir>,
}

impl TestGuest {
    pub(super) fn new() -> Self {
        Self::with(EVENT_IDX, Patience::default())
    }

    pub(super) fn with(features: u64, patience: Patience) -> Self {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let mut device = VsockDevice::new(&VsockConfig {
            guest_cid: CID,
            socket_dir: dir.path().to_owned(),
        })
        .unwrap();
        device.set_patience(patience);
        let ranges = [
            (GuestAddress(0), 8 << 20),
            (GuestAddress(8 << 20), 16 << 20),
        ];
        let memory = GuestMemory::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        let event_idx = features & EVENT_IDX != 0;
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let interrupt = Arc::new(Interrupt::new(line.try_clone().unwrap()));
        let mut guest = Self {
            device,
            memory,
            rx: Driver::new(0x1000, 128, 0x10_0000, 4096, event_idx),
            tx: Driver::new(0x4000, 128, 0x20_0000, 0x1_1000, event_idx),
            events: Driver::new(0x8000, 16, 0x9000, 16, event_idx),
            interrupt,
            line,
            features,
            peers: HashMap::new(),
            stray: VecDeque::new(),
            dir,
        };
        guest.activate();
        guest
    }

    pub(super) fn activate(&mut self) {
        let queues = [&self.rx, &self.tx, &self.events].map(|ring| Some(ring.active()));
        self.activate_queues(queues.into());
        self.give_buffers();
    }

    pub(super) fn activate_queues(&mut self, queues: Vec<Option<ActiveQueue>>) {
        self.device
            .activate(Activation {
                memory: self.memory.clone(),
                queues,
                interrupt: Arc::clone(&self.interrupt),
                features: self.features | 1 << 32,
            })
            .unwrap();
    }

    /// Makes the rings anew, as a driver does after a reset.
    pub(super) fn fresh_rings(&mut self) {
        let event_idx = self.features & EVENT_IDX != 0;
        let mem = self.memory.memory();
        mem.write_slice(&[0; 0x9000 - 0x1000], GuestAddress(0x1000))
            .unwrap();
        self.rx = Driver::new(0x1000, 128, 0x10_0000, 4096, event_idx);
        self.tx = Driver::new(0x4000, 128, 0x20_0000, 0x1_1000, event_idx);
        self.events = Driver::new(0x8000, 16, 0x9000, 16, event_idx);
        self.peers.clear();
        self.stray.clear();
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(super) fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.path(&guest_to_host_socket(port))).unwrap()
    }

    pub(super) fn dial(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path(HOST_SOCKET)).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream
    }

    pub(super) fn metric(&self, name: &str) -> u64 {
        let mut all = Vec::new();
        self.device.metrics(&mut all);
        all.iter().find(|(n, _)| *n == name).unwrap().1
    }

    /// Gives the device all rx buffers that the driver has.
    pub(super) fn give_buffers(&mut self) {
        let mem = self.memory.memory();
        while let Some(index) = self.rx.free.last().copied() {
            self.rx.add(&mem, &[(self.rx.buffer(index), 4096, WRITE)]);
        }
        self.rx.notify(&mem);
    }

    /// A packet's header, with the credit that the guest gives.
    pub(super) fn header(&self, key: Key, op: Op) -> Header {
        let peer = self.peers.get(&key);
        Header {
            src_cid: u64::from(CID),
            dst_cid: 2,
            src_port: key.guest_port,
            dst_port: key.host_port,
            kind: TYPE_STREAM,
            op: op as u16,
            buf_alloc: peer.map_or(0, |peer| peer.buf_alloc),
            fwd_cnt: peer.map_or(0, |peer| peer.forwarded),
            ..Header::default()
        }
    }

    fn wait_tx(&mut self) {
        let mem = self.memory.memory();
        let deadline = Instant::now() + LONG;
        while self.tx.used(&mem).is_some() || self.tx.free() < 20 {
            if self.tx.free() < 20 {
                assert!(Instant::now() < deadline, "the device takes no packets");
                self.wait_interrupt(Duration::from_millis(50));
            }
        }
    }

    /// Sends a packet as one descriptor.
    pub(super) fn send(&mut self, header: Header, payload: &[u8]) {
        self.wait_tx();
        self.send_now(header, payload);
    }

    /// As `send`; there has to be a free descriptor.
    pub(super) fn send_now(&mut self, header: Header, payload: &[u8]) {
        let mem = self.memory.memory();
        let address = self.tx.buffer(*self.tx.free.last().unwrap());
        mem.write_slice(&header.to_bytes(), GuestAddress(address))
            .unwrap();
        let data = GuestAddress(address + HEADER_SIZE as u64);
        mem.write_slice(payload, data).unwrap();
        let len = u32::try_from(HEADER_SIZE + payload.len()).unwrap();
        self.tx.add(&mem, &[(address, len, 0)]);
        self.tx.notify(&mem);
    }

    pub(super) fn control(&mut self, key: Key, op: Op) {
        self.send(self.header(key, op), &[]);
    }

    pub(super) fn shutdown(&mut self, key: Key, flags: u32) {
        let mut header = self.header(key, Op::Shutdown);
        header.flags = flags;
        self.send(header, &[]);
    }

    /// Sends data without a look at the credit.
    pub(super) fn data(&mut self, key: Key, payload: &[u8]) {
        let mut header = self.header(key, Op::Data);
        header.len = u32::try_from(payload.len()).unwrap();
        self.send(header, payload);
        let peer = self.peers.get_mut(&key).unwrap();
        peer.sent = peer.sent.wrapping_add(header.len);
    }

    /// Sends as much of `payload` as the credit allows.
    pub(super) fn data_within_credit(&mut self, key: Key, payload: &[u8]) -> usize {
        let peer = &self.peers[&key];
        let room = peer.host_alloc - peer.sent.wrapping_sub(peer.host_took);
        let count = payload.len().min(room as usize).min(65536);
        if count > 0 {
            self.data(key, &payload[..count]);
        }
        count
    }

    pub(super) fn wait_interrupt(&self, timeout: Duration) -> bool {
        let fd = self.line.as_raw_fd();
        // SAFETY: `line` is open for as long as `self` lives.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(timeout).unwrap();
        let came = poll(&mut fds, timeout).unwrap() == 1;
        if came {
            self.line.read().unwrap();
            self.interrupt.acknowledge(1);
        }
        came
    }

    /// The next packet of the device, without waiting. Its buffer goes back at once unless `keep`.
    pub(super) fn take_packet(&mut self, keep: bool) -> Option<Header> {
        let mem = self.memory.memory();
        let (head, len) = self.rx.used(&mem)?;
        let mut bytes = vec![0; len as usize];
        mem.read_slice(&mut bytes, GuestAddress(self.rx.buffer(head)))
            .unwrap();
        if !keep {
            self.give_buffers();
        }
        let header = Header::from_bytes(&bytes[..HEADER_SIZE].try_into().unwrap());
        assert_eq!(header.len as usize, bytes.len() - HEADER_SIZE);
        self.heard(header, &bytes[HEADER_SIZE..]);
        Some(header)
    }

    fn heard(&mut self, header: Header, payload: &[u8]) {
        assert_eq!(header.dst_cid, u64::from(CID));
        let key = Key {
            host_port: header.src_port,
            guest_port: header.dst_port,
        };
        let Some(peer) = self.peers.get_mut(&key) else {
            self.stray.push_back(header);
            return;
        };
        peer.host_alloc = header.buf_alloc;
        peer.host_took = header.fwd_cnt;
        peer.operations.push(header.op);
        peer.reset |= header.op == Op::Reset as u16;
        if header.op == Op::Shutdown as u16 {
            peer.shutdown |= header.flags;
        }
        assert!(
            peer.shutdown & 2 == 0 || payload.is_empty(),
            "data after the end"
        );
        peer.received.extend_from_slice(payload);
        let in_buffer = (peer.received.len() as u32).wrapping_sub(peer.forwarded);
        assert!(in_buffer <= peer.buf_alloc, "more than the credit");
        if peer.takes && !payload.is_empty() {
            peer.forwarded = peer.forwarded.wrapping_add(payload.len() as u32);
            if in_buffer >= peer.buf_alloc / 2 {
                self.control(key, Op::CreditUpdate);
            }
        } else if header.op == Op::CreditRequest as u16 {
            self.control(key, Op::CreditUpdate);
        }
    }

    /// Takes packets until `done`.
    pub(super) fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + LONG;
        loop {
            if done(self) {
                return;
            }
            if self.take_packet(false).is_none() {
                assert!(Instant::now() < deadline, "waited in vain for {what}");
                self.wait_interrupt(Duration::from_millis(20));
            }
        }
    }

    /// Takes what comes within `time`.
    pub(super) fn for_a_while(&mut self, time: Duration) {
        let deadline = Instant::now() + time;
        while Instant::now() < deadline {
            if self.take_packet(false).is_none() {
                self.wait_interrupt(Duration::from_millis(5));
            }
        }
    }

    /// Opens a stream to a port of the host, and gives back the host's end as well.
    pub(super) fn connect(
        &mut self,
        host: &UnixListener,
        host_port: u32,
        guest_port: u32,
    ) -> (Key, UnixStream) {
        self.connect_with(host, host_port, guest_port, 256 * 1024)
    }

    pub(super) fn connect_with(
        &mut self,
        host: &UnixListener,
        host_port: u32,
        guest_port: u32,
        buf_alloc: u32,
    ) -> (Key, UnixStream) {
        let key = self.request(host_port, guest_port, buf_alloc);
        self.until("a RESPONSE", |guest| {
            !guest.peers[&key].operations.is_empty()
        });
        assert_eq!(self.peers[&key].operations, [Op::Response as u16]);
        let (stream, _) = host.accept().unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        (key, stream)
    }

    /// Asks for a stream, without waiting for the answer.
    pub(super) fn request(&mut self, host_port: u32, guest_port: u32, buf_alloc: u32) -> Key {
        let key = Key {
            host_port,
            guest_port,
        };
        let peer = Peer {
            buf_alloc,
            takes: true,
            ..Peer::default()
        };
        self.peers.insert(key, peer);
        self.control(key, Op::Request);
        key
    }

    /// Waits for a REQUEST of the host to `guest_port` and takes the stream.
    pub(super) fn accept(&mut self, guest_port: u32) -> Key {
        let mut found = None;
        self.until("a REQUEST", |guest| {
            found = guest.stray.pop_front();
            found.is_some()
        });
        let request = found.unwrap();
        assert_eq!(
            (request.op, request.dst_port),
            (Op::Request as u16, guest_port)
        );
        let key = Key {
            host_port: request.src_port,
            guest_port,
        };
        let peer = Peer {
            buf_alloc: 256 * 1024,
            host_alloc: request.buf_alloc,
            takes: true,
            ..Peer::default()
        };
        self.peers.insert(key, peer);
        self.control(key, Op::Response);
        key
    }

    /// Asserts that the device still serves: a whole new stream works.
    pub(super) fn assert_alive(&mut self) {
        let port = 99_999;
        let _ = std::fs::remove_file(self.path(&guest_to_host_socket(port)));
        let host = self.listen(port);
        let (key, mut end) = self.connect(&host, port, 77_777);
        self.data(key, b"alive?");
        let mut got = [0; 6];
        std::io::Read::read_exact(&mut end, &mut got).unwrap();
        assert_eq!(&got, b"alive?");
        self.shutdown(key, SHUTDOWN_BOTH);
        self.until("a RST", |guest| guest.peers[&key].reset);
        self.peers.remove(&key);
    }
}

impl TestGuest {
    pub(super) fn device_reset(&mut self) {
        self.device.reset();
        self.interrupt.clear();
    }
}
