// SPDX-License-Identifier: Apache-2.0

//! Calls to the agent: one deadline for each, one place where its errors become ours.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use caisson_protocol::PROTOCOL_VERSION;
use caisson_protocol::agent::agent::{
    ContainerRequest, CreateContainerRequest, CreateSandboxRequest, ExecProcessRequest,
    HandshakeRequest, HandshakeResponse, ListProcessesResponse, ProcessRequest,
    RemoveContainerRequest, ResizePtyRequest, ShutdownRequest, SignalProcessRequest,
    UpdateContainerRequest, WaitProcessResponse,
};
use caisson_protocol::agent::agent_ttrpc::AgentClient;
use caisson_protocol::error::ErrorCode;
use caisson_protocol::ports::{AGENT_RPC, MAX_LINE};
use rustix::net::{RecvFlags, recv};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::time::timeout;
use ttrpc::r#async::transport::Socket;
use ttrpc::context::Context;

/// Longest text of the agent that is passed on, characters.
const MAX_TEXT: usize = 1024;

/// What goes wrong with the guest.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// A vsock connection could not be made.
    #[error("failed to connect to port {port} of the guest")]
    Connect {
        /// Which.
        port: u32,
        /// Why not.
        source: io::Error,
    },
    /// The guest image is of another version.
    #[error(
        "the agent in the guest image speaks protocol version {guest}, this caisson speaks \
         {PROTOCOL_VERSION}: install an initramfs of the same version"
    )]
    Version {
        /// Its version.
        guest: u32,
    },
    /// The agent answered with an error.
    #[error("{call}: {text}")]
    Answer {
        /// Which call.
        call: &'static str,
        /// What kind.
        code: ErrorCode,
        /// In its words.
        text: String,
    },
    /// The connection broke.
    #[error("{call}: the connection to the agent broke: {text}")]
    Broken {
        /// During which call.
        call: &'static str,
        /// In ttRPC's words.
        text: String,
    },
    /// No answer in time.
    #[error("{call}: the agent did not answer within {limit:?}")]
    Timeout {
        /// Which call.
        call: &'static str,
        /// How long it was given.
        limit: Duration,
    },
    /// A stdio stream was refused.
    #[error("the agent refused a stream: {0}")]
    Stream(String),
}

impl GuestError {
    /// Whether the connection is lost rather than the request refused: most often the VM ends.
    pub fn is_lost_connection(&self) -> bool {
        match self {
            Self::Connect { .. } | Self::Broken { .. } | Self::Stream(_) => true,
            Self::Version { .. } | Self::Answer { .. } | Self::Timeout { .. } => false,
        }
    }

    /// Whether the agent refused something because of the state that the container is in.
    pub fn refuses_state(&self) -> bool {
        self.code() == Some(ErrorCode::FailedPrecondition)
    }

    /// The agent's error code, if it answered with one.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Answer { code, .. } => Some(*code),
            Self::Connect { .. }
            | Self::Version { .. }
            | Self::Broken { .. }
            | Self::Timeout { .. }
            | Self::Stream(_) => None,
        }
    }
}

/// What the guest says, for people: one line, bounded, no control characters.
pub fn clean(text: &str) -> String {
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(MAX_TEXT).map(printable).collect()
}

/// The Unix socket through which guest ports are reached.
#[derive(Debug, Clone)]
pub struct Connector {
    /// Path of the socket; short enough for a `sockaddr_un`.
    pub socket: PathBuf,
    /// Deadline of a connection, and of each call but waits.
    pub limit: Duration,
}

impl Connector {
    /// A stream to guest port `port`.
    ///
    /// # Errors
    /// When the VMM or the guest does not take it in time.
    pub async fn connect(&self, port: u32) -> Result<UnixStream, GuestError> {
        let connect = async {
            let mut stream = UnixStream::connect(&self.socket).await?;
            stream
                .write_all(format!("CONNECT {port}\n").as_bytes())
                .await?;
            let line = read_line(&mut stream).await?;
            if !line.starts_with("OK ") {
                let text = clean(&line);
                return Err(io::Error::other(format!("unexpected answer {text:?}")));
            }
            Ok(stream)
        };
        timeout(self.limit, connect)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(|source| GuestError::Connect { port, source })
    }
}

/// Reads one line without taking a byte more than it from the stream.
///
/// # Errors
/// When the stream ends before, the line is longer than [`MAX_LINE`] or not UTF-8.
pub async fn read_line(stream: &mut UnixStream) -> io::Result<String> {
    let mut line = Vec::new();
    let mut seen = [0; 128];
    loop {
        // Looked at first, so that what follows the line stays in the stream.
        let peek = || Ok(recv(&*stream, &mut seen, RecvFlags::PEEK)?.1);
        let count = stream.async_io(Interest::READABLE, peek).await?;
        let seen = seen.get(..count).unwrap_or_default();
        let end = seen.iter().position(|byte| *byte == b'\n');
        let taken = end.map_or(count, |end| end + 1);
        if taken == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let start = line.len();
        line.resize(start + taken, 0);
        stream.read_exact(&mut line[start..]).await?;
        // The end of the line is no part of its length.
        if line.len() - usize::from(end.is_some()) > MAX_LINE {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if end.is_some() {
            line.pop();
            break;
        }
    }
    String::from_utf8(line).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// A connection to the agent on which the handshake was done.
#[derive(Clone)]
pub struct GuestClient {
    agent: AgentClient,
    limit: Duration,
}

impl std::fmt::Debug for GuestClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestClient").finish_non_exhaustive()
    }
}

/// Which process: of `container`, the exec `exec`, or the container's own when that is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessId {
    /// Id of the container.
    pub container: String,
    /// Id of the exec, or empty.
    pub exec: String,
}

impl ProcessId {
    fn request(&self) -> ProcessRequest {
        ProcessRequest {
            container_id: self.container.clone(),
            exec_id: self.exec.clone(),
            ..Default::default()
        }
    }
}

macro_rules! call {
    ($self:ident, $method:ident, $request:expr) => {
        timed(
            stringify!($method),
            $self.limit,
            $self.agent.$method(Context::default(), &$request),
        )
    };
}

async fn timed<T>(
    call: &'static str,
    limit: Duration,
    answer: impl Future<Output = ttrpc::Result<T>>,
) -> Result<T, GuestError> {
    match timeout(limit, answer).await {
        Ok(answer) => answer.map_err(|error| failed(call, &error)),
        Err(_) => Err(GuestError::Timeout { call, limit }),
    }
}

fn failed(call: &'static str, error: &ttrpc::Error) -> GuestError {
    match ErrorCode::of(error) {
        Some((code, text)) => GuestError::Answer {
            call,
            code,
            text: clean(text),
        },
        None => GuestError::Broken {
            call,
            text: clean(&error.to_string()),
        },
    }
}

impl GuestClient {
    /// Connects and shakes hands.
    ///
    /// # Errors
    /// When the agent cannot be reached, or is of another version.
    pub async fn connect(connector: &Connector) -> Result<(Self, HandshakeResponse), GuestError> {
        let stream = connector.connect(AGENT_RPC).await?;
        let client = Self {
            agent: AgentClient::new(ttrpc::r#async::Client::new(Socket::from(stream))),
            limit: connector.limit,
        };
        let request = HandshakeRequest {
            protocol_version: PROTOCOL_VERSION,
            host_version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        };
        let answer = call!(client, handshake, request).await?;
        if answer.protocol_version != PROTOCOL_VERSION {
            let guest = answer.protocol_version;
            return Err(GuestError::Version { guest });
        }
        Ok((client, answer))
    }

    /// `CreateSandbox`.
    ///
    /// # Errors
    /// As every call: the agent's answer, a broken connection, or none in time.
    pub async fn create_sandbox(&self, request: CreateSandboxRequest) -> Result<(), GuestError> {
        call!(self, create_sandbox, request).await.map(drop)
    }

    /// `CreateContainer`.
    ///
    /// # Errors
    /// As every call.
    pub async fn create_container(
        &self,
        request: CreateContainerRequest,
    ) -> Result<(), GuestError> {
        call!(self, create_container, request).await.map(drop)
    }

    /// `StartContainer`.
    ///
    /// # Errors
    /// As every call.
    pub async fn start_container(&self, id: &str) -> Result<(), GuestError> {
        call!(self, start_container, container(id)).await.map(drop)
    }

    /// `RemoveContainer`.
    ///
    /// # Errors
    /// As every call.
    pub async fn remove_container(&self, id: &str, force: bool) -> Result<(), GuestError> {
        let request = RemoveContainerRequest {
            container_id: id.to_owned(),
            force,
            ..Default::default()
        };
        call!(self, remove_container, request).await.map(drop)
    }

    /// `ExecProcess`.
    ///
    /// # Errors
    /// As every call.
    pub async fn exec_process(&self, request: ExecProcessRequest) -> Result<(), GuestError> {
        call!(self, exec_process, request).await.map(drop)
    }

    /// `SignalProcess`.
    ///
    /// # Errors
    /// As every call.
    pub async fn signal(
        &self,
        process: &ProcessId,
        signal: u32,
        all: bool,
    ) -> Result<(), GuestError> {
        let request = SignalProcessRequest {
            container_id: process.container.clone(),
            exec_id: process.exec.clone(),
            signal,
            all,
            ..Default::default()
        };
        call!(self, signal_process, request).await.map(drop)
    }

    /// `WaitProcess`: the only call without a deadline.
    ///
    /// # Errors
    /// As every call.
    pub async fn wait_process(
        &self,
        process: &ProcessId,
    ) -> Result<WaitProcessResponse, GuestError> {
        let request = process.request();
        let answer = self.agent.wait_process(Context::default(), &request).await;
        answer.map_err(|error| failed("wait_process", &error))
    }

    /// `RemoveProcess`.
    ///
    /// # Errors
    /// As every call.
    pub async fn remove_process(&self, process: &ProcessId) -> Result<(), GuestError> {
        call!(self, remove_process, process.request())
            .await
            .map(drop)
    }

    /// `ResizePty`.
    ///
    /// # Errors
    /// As every call.
    pub async fn resize_pty(
        &self,
        process: &ProcessId,
        rows: u16,
        columns: u16,
    ) -> Result<(), GuestError> {
        let request = ResizePtyRequest {
            container_id: process.container.clone(),
            exec_id: process.exec.clone(),
            rows: rows.into(),
            columns: columns.into(),
            ..Default::default()
        };
        call!(self, resize_pty, request).await.map(drop)
    }

    /// `ListProcesses`.
    ///
    /// # Errors
    /// As every call.
    pub async fn list_processes(&self, id: &str) -> Result<ListProcessesResponse, GuestError> {
        call!(self, list_processes, container(id)).await
    }

    /// `PauseContainer`.
    ///
    /// # Errors
    /// As every call.
    pub async fn pause(&self, id: &str) -> Result<(), GuestError> {
        call!(self, pause_container, container(id)).await.map(drop)
    }

    /// `ResumeContainer`.
    ///
    /// # Errors
    /// As every call.
    pub async fn resume(&self, id: &str) -> Result<(), GuestError> {
        call!(self, resume_container, container(id)).await.map(drop)
    }

    /// `UpdateContainer`.
    ///
    /// # Errors
    /// As every call.
    pub async fn update(&self, id: &str, resources_json: Vec<u8>) -> Result<(), GuestError> {
        let request = UpdateContainerRequest {
            container_id: id.to_owned(),
            resources_json,
            ..Default::default()
        };
        call!(self, update_container, request).await.map(drop)
    }

    /// `Shutdown`: processes are given `grace_ms` after SIGTERM.
    ///
    /// # Errors
    /// As every call.
    pub async fn shutdown(&self, grace_ms: u32) -> Result<(), GuestError> {
        let request = ShutdownRequest {
            grace_ms,
            ..Default::default()
        };
        call!(self, shutdown, request).await.map(drop)
    }
}

fn container(id: &str) -> ContainerRequest {
    ContainerRequest {
        container_id: id.to_owned(),
        ..Default::default()
    }
}

/// The exit status in an answer, clamped to what a status can be: a hostile guest sends any number.
pub fn exit_status(answer: &WaitProcessResponse) -> u8 {
    u8::try_from(answer.exit_status).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_status_out_of_range_is_clamped() {
        for (sent, is) in [(0, 0), (42, 42), (255, 255), (256, 255), (u32::MAX, 255)] {
            let answer = WaitProcessResponse {
                exit_status: sent,
                ..Default::default()
            };
            assert_eq!(exit_status(&answer), is);
        }
    }

    #[test]
    fn texts_of_the_guest_are_cut_and_hold_no_control_characters() {
        assert_eq!(clean("a\x1b[31m\nb"), "a [31m b");
        assert_eq!(clean(&"é".repeat(5000)).chars().count(), MAX_TEXT);
    }

    #[tokio::test]
    async fn a_line_that_never_ends_is_refused() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let writer = tokio::spawn(async move {
            let flood = [b'x'; 2 * MAX_LINE];
            theirs.write_all(&flood).await.map(|()| theirs)
        });
        let error = read_line(&mut ours).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        writer.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_line_may_come_in_parts_and_be_of_any_length_up_to_the_bound() {
        for length in [0, 1, 127, 128, 129, MAX_LINE] {
            let (mut ours, mut theirs) = UnixStream::pair().unwrap();
            let sent = "y".repeat(length);
            let text = sent.clone();
            let writer = tokio::spawn(async move {
                for part in text.as_bytes().chunks(100) {
                    theirs.write_all(part).await.unwrap();
                    tokio::task::yield_now().await;
                }
                theirs.write_all(b"\nrest").await.unwrap();
            });
            assert_eq!(read_line(&mut ours).await.unwrap(), sent);
            writer.await.unwrap();
            let mut rest = String::new();
            ours.read_to_string(&mut rest).await.unwrap();
            assert_eq!(rest, "rest");
        }
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"no end").await.unwrap();
        drop(theirs);
        let error = read_line(&mut ours).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[tokio::test]
    async fn a_connection_takes_only_the_answers_line_from_the_stream() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let line = read_line(&mut stream).await.unwrap();
            stream.write_all(b"OK 77\nhello").await.unwrap();
            line
        });
        let limit = Duration::from_secs(5);
        let connector = Connector { socket, limit };
        let mut stream = connector.connect(1025).await.unwrap();
        assert_eq!(server.await.unwrap(), "CONNECT 1025");
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "hello");
    }

    #[tokio::test]
    async fn a_guest_that_never_answers_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let limit = Duration::from_millis(50);
        let connector = Connector { socket, limit };
        let error = connector.connect(1).await.unwrap_err();
        assert!(
            matches!(&error, GuestError::Connect { source, .. } if source.kind() == io::ErrorKind::TimedOut)
        );
        drop(listener);
    }
}
