// SPDX-License-Identifier: Apache-2.0

//! What the agent and a helper say to each other: JSON packets over a SOCK_SEQPACKET pair.
//!
//! ```text
//! agent ── Request + 3 descriptors ──> helper
//! agent <── Log*, terminal's master?, Created | Failed ── helper (and the processes that it makes)
//! agent ── one empty-handed packet: the pid is registered, go ──> helper, which ends
//! agent <── Failed, or the end of the channel when the program runs ── the container's process
//! ```

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Longest packet, bytes.
const MAX_PACKET: usize = 16 << 10;
/// Longest text in a report, bytes; the rest is cut.
pub(crate) const MAX_TEXT: usize = 2 << 10;
/// What comes with the terminal's master (libcontainer sends the multiplexer's name).
const TERMINAL: &[u8] = b"/dev/ptmx";

/// What a helper is to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Task {
    /// A container with its first process.
    Create,
    /// One more process in a container.
    Exec,
}

/// First packet; with it come the process's stdin, stdout and stderr.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Request {
    /// Create or exec.
    pub(crate) task: Task,
    /// The container's name for libcontainer: a number.
    pub(crate) name: String,
    /// Directory of this container or exec with its `config.json`; the start socket is made in it.
    pub(crate) directory: PathBuf,
    /// Below the mount point of cgroup2, absolute.
    pub(crate) cgroup: PathBuf,
    /// Make a terminal and send its master.
    pub(crate) terminal: bool,
}

/// Kind of a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum FailureKind {
    /// The program does not exist.
    CommandNotFound,
    /// The program cannot be executed.
    CommandNotExecutable,
    /// Anything else.
    Other,
}

/// A packet of a helper.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Report {
    /// What libcontainer said at level error; the first is nearest to the cause.
    Log(String),
    /// The process waits for its start.
    Created {
        /// In the agent's pid namespace.
        pid: i32,
    },
    /// It came to nothing.
    Failed {
        /// What kind.
        kind: FailureKind,
        /// For people.
        message: String,
    },
}

/// What the agent receives.
#[derive(Debug)]
pub(crate) enum Received {
    /// A report.
    Report(Report),
    /// The master of the terminal asked for.
    Terminal(OwnedFd),
    /// Every process that could report has ended or executed its program.
    End,
}

/// Why a packet could not be sent or understood.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChannelError {
    /// The socket.
    #[error("failed to use the channel between agent and helper")]
    Socket(#[source] io::Error),
    /// The content.
    #[error("bad packet between agent and helper")]
    Packet(#[source] serde_json::Error),
    /// Descriptors are missing.
    #[error("a packet between agent and helper came without its descriptors")]
    Descriptors,
}

impl From<Errno> for ChannelError {
    fn from(errno: Errno) -> Self {
        Self::Socket(errno.into())
    }
}

/// A connected pair: the agent's end and the helper's.
///
/// # Errors
/// When no more descriptors are to be had.
pub(crate) fn pair() -> Result<(AgentEnd, OwnedFd), ChannelError> {
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    let socket = crate::sys::watch(ours, Interest::READABLE).map_err(ChannelError::Socket)?;
    Ok((AgentEnd { socket }, theirs))
}

/// The agent's end.
#[derive(Debug)]
pub(crate) struct AgentEnd {
    socket: AsyncFd<OwnedFd>,
}

impl AgentEnd {
    /// Sends the request with the three descriptors of the process.
    ///
    /// # Errors
    /// When the helper is gone.
    pub(crate) fn request(
        &self,
        request: &Request,
        stdio: &[OwnedFd; 3],
    ) -> Result<(), ChannelError> {
        let bytes = serde_json::to_vec(request).map_err(ChannelError::Packet)?;
        let fds = stdio.each_ref().map(OwnedFd::as_fd);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(ChannelError::Descriptors);
        }
        let flags = SendFlags::NOSIGNAL;
        sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut control, flags)?;
        Ok(())
    }

    /// Lets the helper end.
    ///
    /// # Errors
    /// When the helper is gone.
    pub(crate) fn go(&self) -> Result<(), ChannelError> {
        rustix::net::send(&self.socket, b"go", SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// The next packet.
    ///
    /// # Errors
    /// When the packet makes no sense.
    pub(crate) async fn receive(&self) -> Result<Received, ChannelError> {
        loop {
            let mut guard = self.socket.readable().await.map_err(ChannelError::Socket)?;
            match receive_packet(&self.socket) {
                Err(Errno::AGAIN) => guard.clear_ready(),
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Ok(Received::End),
                Err(errno) => return Err(errno.into()),
                Ok((bytes, _)) if bytes.is_empty() => return Ok(Received::End),
                Ok((bytes, mut fds)) if bytes == TERMINAL => {
                    let master = fds.pop().ok_or(ChannelError::Descriptors)?;
                    return Ok(Received::Terminal(master));
                }
                Ok((bytes, _)) => {
                    let report = serde_json::from_slice(&bytes).map_err(ChannelError::Packet)?;
                    return Ok(Received::Report(report));
                }
            }
        }
    }
}

/// Receives the request at the helper's end.
///
/// # Errors
/// When it is not one.
pub(crate) fn receive_request(socket: &OwnedFd) -> Result<(Request, [OwnedFd; 3]), ChannelError> {
    let (bytes, fds) = receive_packet(socket)?;
    let request = serde_json::from_slice(&bytes).map_err(ChannelError::Packet)?;
    let fds = fds.try_into().map_err(|_| ChannelError::Descriptors)?;
    Ok((request, fds))
}

/// Waits at the helper's end until the agent says go, or is gone.
pub(crate) fn wait_for_go(socket: &OwnedFd) {
    while let Err(Errno::INTR) = receive_packet(socket) {}
}

/// Sends `report` from the helper or a process that it made; texts are cut to [`MAX_TEXT`].
pub(crate) fn send_report(socket: impl AsFd, report: &Report) {
    // Nobody listens any more: there is nobody to tell.
    if let Ok(bytes) = serde_json::to_vec(report) {
        let _ = rustix::net::send(socket, &bytes, SendFlags::NOSIGNAL);
    }
}

/// `text`, cut to [`MAX_TEXT`].
pub(crate) fn bounded(mut text: String) -> String {
    if text.len() > MAX_TEXT {
        let end = (0..=MAX_TEXT).rev().find(|at| text.is_char_boundary(*at));
        text.truncate(end.unwrap_or_default());
    }
    text
}

fn receive_packet(socket: impl AsFd) -> Result<(Vec<u8>, Vec<OwnedFd>), Errno> {
    let mut bytes = vec![0; MAX_PACKET];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        flags,
    )?;
    bytes.truncate(received.bytes);
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    Ok((bytes, fds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Request {
        Request {
            task: Task::Exec,
            name: "7".into(),
            directory: "/run/x".into(),
            cgroup: "/caisson/7".into(),
            terminal: true,
        }
    }

    #[tokio::test]
    async fn a_request_arrives_with_its_descriptors_and_reports_come_back() {
        let (agent, helper) = pair().unwrap();
        let (read, write) = rustix::pipe::pipe().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap().into();
        agent.request(&request(), &[read, write, null]).unwrap();
        let (got, [read, write, _]) = receive_request(&helper).unwrap();
        assert_eq!(got, request());
        rustix::io::write(&write, b"x").unwrap();
        assert_eq!(rustix::io::read(&read, &mut [0; 2]).unwrap(), 1);

        agent.go().unwrap();
        wait_for_go(&helper);
        let report = Report::Created { pid: 12 };
        send_report(&helper, &report);
        assert!(matches!(agent.receive().await, Ok(Received::Report(got)) if got == report));
        drop(helper);
        assert!(matches!(agent.receive().await, Ok(Received::End)));
    }

    #[tokio::test]
    async fn a_packet_that_is_no_report_is_refused() {
        let (agent, helper) = pair().unwrap();
        rustix::net::send(&helper, b"{\"Grown\":1}", SendFlags::empty()).unwrap();
        assert!(matches!(
            agent.receive().await,
            Err(ChannelError::Packet(_))
        ));
        rustix::net::send(&helper, TERMINAL, SendFlags::empty()).unwrap();
        let missing = agent.receive().await;
        assert!(matches!(missing, Err(ChannelError::Descriptors)));
    }

    #[test]
    fn long_texts_are_cut_at_a_character() {
        let cut = bounded("ö".repeat(MAX_TEXT));
        assert_eq!(cut, "ö".repeat(MAX_TEXT / 2));
    }
}
