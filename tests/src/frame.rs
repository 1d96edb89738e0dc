// SPDX-License-Identifier: Apache-2.0

//! The wire between the host and `testbed-init`: frames on one virtio-serial port.
//!
//! A frame is a header of [`HEADER_BYTES`] (kind, three zero bytes, channel, length; little endian) and a
//! payload of at most [`MAX_PAYLOAD`] bytes. Channel 0 is the machine itself; every command has a channel
//! that the host chose, never used twice.
//!
//! Order: the host sends [`Frame::Setup`] once, the guest answers [`Frame::Hello`] when the machine is ready,
//! then commands come in any number at once. Bytes of a stream are sent only within the credit that the other
//! side gave ([`WINDOW`] at the start, more by [`Frame::Credit`] as they are used up), so no reader is ever
//! made to wait by another command's slow one. A command ends with [`Frame::Exited`] or [`Frame::Refused`];
//! all that it had written by then was sent before.

use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Bytes in front of every payload.
pub const HEADER_BYTES: usize = 12;
/// Longest payload, bytes.
pub const MAX_PAYLOAD: usize = 64 * 1024;
/// Credit of each stream at its start, bytes.
pub const WINDOW: usize = 256 * 1024;
/// Name of the virtio-serial port, as in `/sys/class/virtio-ports/*/name`.
pub const PORT_NAME: &str = "caisson.testbed";

/// A directory of the host that the guest is to mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestMount {
    /// Tag of the virtio-fs device.
    pub tag: String,
    /// Where it is mounted, an absolute path; made when missing.
    pub path: String,
    /// Mounted read-only.
    pub read_only: bool,
}

/// What the machine is to look like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Setup {
    /// Tags of trees that are laid over the root file system, the uppermost first.
    pub layers: Vec<String>,
    /// Directories of the host.
    pub mounts: Vec<GuestMount>,
}

/// What the machine turned out to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hello {
    /// `uname -r`.
    pub kernel: String,
    /// /dev/kvm is there.
    pub kvm: bool,
    /// Modules that could not be loaded, and why.
    pub warnings: Vec<String>,
}

/// Size of a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// One command to be run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunRequest {
    /// Program, looked up in PATH, and its arguments.
    pub argv: Vec<String>,
    /// Variables set besides the machine's own.
    pub env: Vec<(String, String)>,
    /// Working directory; `/root` without it.
    pub cwd: Option<String>,
    /// A terminal of this size is its stdin, stdout and stderr; everything comes back as stdout.
    pub tty: Option<WindowSize>,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exit {
    /// By exit(2) with this status.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl Exit {
    /// The status that a shell shows for it: 128 + N for signal N.
    pub fn shell_status(self) -> u8 {
        match self {
            Self::Code(code) => u8::try_from(code).unwrap_or(255),
            Self::Signal(number) => u8::try_from(number.saturating_add(128)).unwrap_or(255),
        }
    }

    /// Exit status 0.
    pub fn success(self) -> bool {
        self == Self::Code(0)
    }
}

/// A stream that credit is given for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Host to guest.
    Stdin,
    /// Guest to host.
    Stdout,
    /// Guest to host.
    Stderr,
}

/// What a frame says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Host: make the machine ready.
    Setup(Setup),
    /// Guest: it is.
    Hello(Hello),
    /// Guest: it could not be made ready; the text says why.
    Failed(String),
    /// Host: end the machine.
    PowerOff,
    /// Host: run this on the frame's channel.
    Run(RunRequest),
    /// Host: bytes for the command.
    Stdin(Vec<u8>),
    /// Host: no more of them.
    StdinEnd,
    /// Guest: bytes of the command.
    Stdout(Vec<u8>),
    /// Guest: bytes of the command.
    Stderr(Vec<u8>),
    /// Either: this many bytes more may be sent.
    Credit(Stream, u32),
    /// Host: the terminal has a new size.
    Resize(WindowSize),
    /// Host: send this signal to the command's process group.
    Signal(i32),
    /// Guest: it ended.
    Exited(Exit),
    /// Guest: it could not be started; the text says why.
    Refused(String),
}

/// Why the wire is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The port or socket failed; `UnexpectedEof` when the other side has gone.
    #[error("failed to {0} the testbed's port")]
    Io(&'static str, #[source] io::Error),
    /// A payload longer than [`MAX_PAYLOAD`].
    #[error("frame of {0} bytes is longer than allowed")]
    TooLong(usize),
    /// A kind that does not exist, or a payload that does not fit its kind.
    #[error("malformed frame of kind {0}")]
    Malformed(u8),
    /// A payload that is no JSON of the right shape.
    #[error("malformed payload in frame of kind {0}")]
    Json(u8, #[source] serde_json::Error),
}

impl Frame {
    /// The kind byte and the payload.
    fn encode(&self) -> Result<(u8, Vec<u8>), FrameError> {
        fn json<T: Serialize>(kind: u8, value: &T) -> Result<(u8, Vec<u8>), FrameError> {
            Ok((
                kind,
                serde_json::to_vec(value).map_err(|e| FrameError::Json(kind, e))?,
            ))
        }
        match self {
            Self::Setup(setup) => json(1, setup),
            Self::Hello(hello) => json(2, hello),
            Self::Failed(why) => json(3, why),
            Self::PowerOff => Ok((4, Vec::new())),
            Self::Run(request) => json(5, request),
            Self::Stdin(bytes) => Ok((6, bytes.clone())),
            Self::StdinEnd => Ok((7, Vec::new())),
            Self::Stdout(bytes) => Ok((8, bytes.clone())),
            Self::Stderr(bytes) => Ok((9, bytes.clone())),
            Self::Credit(stream, bytes) => {
                let mut payload = vec![match stream {
                    Stream::Stdin => 0,
                    Stream::Stdout => 1,
                    Stream::Stderr => 2,
                }];
                payload.extend_from_slice(&bytes.to_le_bytes());
                Ok((10, payload))
            }
            Self::Resize(size) => json(11, size),
            Self::Signal(number) => Ok((12, number.to_le_bytes().to_vec())),
            Self::Exited(exit) => json(13, exit),
            Self::Refused(why) => json(14, why),
        }
    }

    fn decode(kind: u8, payload: Vec<u8>) -> Result<Self, FrameError> {
        fn json<T: DeserializeOwned>(kind: u8, payload: &[u8]) -> Result<T, FrameError> {
            serde_json::from_slice(payload).map_err(|e| FrameError::Json(kind, e))
        }
        let malformed = || FrameError::Malformed(kind);
        Ok(match kind {
            1 => Self::Setup(json(kind, &payload)?),
            2 => Self::Hello(json(kind, &payload)?),
            3 => Self::Failed(json(kind, &payload)?),
            4 => Self::PowerOff,
            5 => Self::Run(json(kind, &payload)?),
            6 => Self::Stdin(payload),
            7 => Self::StdinEnd,
            8 => Self::Stdout(payload),
            9 => Self::Stderr(payload),
            10 => {
                let (stream, bytes) = payload.split_first().ok_or_else(malformed)?;
                let stream = match stream {
                    0 => Stream::Stdin,
                    1 => Stream::Stdout,
                    2 => Stream::Stderr,
                    _ => return Err(malformed()),
                };
                let bytes = bytes.try_into().map_err(|_| malformed())?;
                Self::Credit(stream, u32::from_le_bytes(bytes))
            }
            11 => Self::Resize(json(kind, &payload)?),
            12 => {
                let number = payload.as_slice().try_into().map_err(|_| malformed())?;
                Self::Signal(i32::from_le_bytes(number))
            }
            13 => Self::Exited(json(kind, &payload)?),
            14 => Self::Refused(json(kind, &payload)?),
            _ => return Err(malformed()),
        })
    }

    /// Writes the frame in one call, so that frames of several threads stay whole under one lock.
    ///
    /// # Errors
    /// If the payload is too long or the port fails.
    pub fn write_to(&self, port: &mut impl Write, channel: u32) -> Result<(), FrameError> {
        let (kind, payload) = self.encode()?;
        if payload.len() > MAX_PAYLOAD {
            return Err(FrameError::TooLong(payload.len()));
        }
        let length =
            u32::try_from(payload.len()).map_err(|_| FrameError::TooLong(payload.len()))?;
        let mut bytes = Vec::with_capacity(HEADER_BYTES.saturating_add(payload.len()));
        bytes.extend_from_slice(&[kind, 0, 0, 0]);
        bytes.extend_from_slice(&channel.to_le_bytes());
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&payload);
        port.write_all(&bytes)
            .map_err(|e| FrameError::Io("write to", e))
    }

    /// Reads one frame and its channel.
    ///
    /// # Errors
    /// If the port fails or ends, or the frame is malformed.
    pub fn read_from(port: &mut impl Read) -> Result<(u32, Self), FrameError> {
        let io = |e| FrameError::Io("read from", e);
        let mut header = [0_u8; HEADER_BYTES];
        port.read_exact(&mut header).map_err(io)?;
        let [kind, z1, z2, z3, c0, c1, c2, c3, l0, l1, l2, l3] = header;
        if [z1, z2, z3] != [0; 3] {
            return Err(FrameError::Malformed(kind));
        }
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        if length > MAX_PAYLOAD {
            return Err(FrameError::TooLong(length));
        }
        let mut payload = vec![0; length];
        port.read_exact(&mut payload).map_err(io)?;
        Ok((
            u32::from_le_bytes([c0, c1, c2, c3]),
            Self::decode(kind, payload)?,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one_of_each() -> Vec<Frame> {
        let mount = GuestMount {
            tag: "t".into(),
            path: "/share".into(),
            read_only: true,
        };
        let size = WindowSize {
            rows: 24,
            columns: 80,
        };
        let run = RunRequest {
            argv: vec!["sh".into(), "ü\n".into()],
            env: vec![("A".into(), "=".into())],
            cwd: Some("/".into()),
            tty: Some(size),
        };
        vec![
            Frame::Setup(Setup {
                layers: vec!["l".into()],
                mounts: vec![mount],
            }),
            Frame::Hello(Hello {
                kernel: "6".into(),
                kvm: true,
                warnings: vec!["w".into()],
            }),
            Frame::Failed("why".into()),
            Frame::PowerOff,
            Frame::Run(run),
            Frame::Stdin(vec![0, 255]),
            Frame::StdinEnd,
            Frame::Stdout(vec![7; MAX_PAYLOAD]),
            Frame::Stderr(Vec::new()),
            Frame::Credit(Stream::Stdin, u32::MAX),
            Frame::Credit(Stream::Stdout, 1),
            Frame::Credit(Stream::Stderr, 0),
            Frame::Resize(size),
            Frame::Signal(-1),
            Frame::Exited(Exit::Signal(9)),
            Frame::Refused("why".into()),
        ]
    }

    #[test]
    fn every_frame_is_read_as_it_was_written() {
        let mut wire = Vec::new();
        for (channel, frame) in (u32::MAX - 20..).zip(one_of_each()) {
            frame.write_to(&mut wire, channel).unwrap();
        }
        let mut wire = wire.as_slice();
        for (channel, frame) in (u32::MAX - 20..).zip(one_of_each()) {
            assert_eq!(Frame::read_from(&mut wire).unwrap(), (channel, frame));
        }
        assert!(matches!(
            Frame::read_from(&mut wire),
            Err(FrameError::Io(..))
        ));
    }

    #[test]
    fn malformed_frames_are_refused() {
        let read = |bytes: &[u8]| Frame::read_from(&mut &*bytes).unwrap_err();
        assert!(matches!(
            read(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            FrameError::Malformed(0)
        ));
        assert!(matches!(
            read(&[6, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            FrameError::Malformed(6)
        ));
        assert!(matches!(
            read(&[6, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0]),
            FrameError::TooLong(0x1_0001)
        ));
        assert!(matches!(
            read(&[12, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 9]),
            FrameError::Malformed(12)
        ));
        assert!(matches!(
            read(&[10, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 3, 1, 0, 0, 0]),
            FrameError::Malformed(10)
        ));
        assert!(matches!(
            read(&[5, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, b'{', b'}']),
            FrameError::Json(5, _)
        ));
        let long = Frame::Stdin(vec![0; MAX_PAYLOAD + 1]).write_to(&mut Vec::new(), 1);
        assert!(matches!(long, Err(FrameError::TooLong(_))));
    }

    #[test]
    fn a_shell_status_is_the_code_or_128_and_the_signal() {
        assert_eq!(Exit::Code(42).shell_status(), 42);
        assert_eq!(Exit::Signal(9).shell_status(), 137);
        assert_eq!(Exit::Code(-1).shell_status(), 255);
        assert!(Exit::Code(0).success() && !Exit::Signal(0).success());
    }
}
