// SPDX-License-Identifier: Apache-2.0

//! A process of a container as the host sees it: its streams, its end.
//!
//! Made by [`crate::container`] once the pid is known. The [`Process`] owns our ends of the pipes (or the
//! terminal's master) until the host attaches a stream, and a [`pump`] from then on. When the reaper tells
//! of the end, the attached outputs are drained; only then does [`Process::finished`] answer.

pub(crate) mod endpoint;
pub(crate) mod pump;
pub(crate) mod stdio;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use caisson_protocol::ports::Stream;
use rustix::termios::Winsize;
use tokio::sync::{oneshot, watch};

use self::endpoint::{Endpoint, Kind};
use self::pump::{InputEnd, pump_input, pump_output};
use self::stdio::{HostEnds, StreamSlot};
use crate::reaper::Exit;

/// Longest time that an ended output waits for the host to close its side of the stream, which shows that
/// the host has read everything.
const LINGER: Duration = Duration::from_secs(30);

/// The end of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Finished {
    /// How it ended.
    pub(crate) exit: Exit,
    /// Wall clock, nanoseconds since the epoch.
    pub(crate) at_ns: u64,
}

/// Why a stream was not attached or a terminal not resized.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StreamError {
    /// Not asked for at creation.
    #[error("the process was created without this stream")]
    NotRequested,
    /// Attached once already.
    #[error("the stream is attached already")]
    Attached,
    /// There is none.
    #[error("the process has no terminal")]
    NoTerminal,
    /// Does not fit in the kernel's 16 bits.
    #[error("{rows} rows of {columns} columns are no size of a terminal")]
    Size {
        /// As asked.
        rows: u32,
        /// As asked.
        columns: u32,
    },
    /// The kernel refused.
    #[error("failed to use the stream: {0}")]
    System(rustix::io::Errno),
}

#[derive(Debug)]
struct Streams {
    stdin: StreamSlot,
    stdout: StreamSlot,
    stderr: StreamSlot,
    /// One for each attached output; true when it has sent everything.
    outputs: Vec<watch::Receiver<bool>>,
}

/// See the module's story.
#[derive(Debug)]
pub(crate) struct Process {
    /// In the agent's pid namespace.
    pub(crate) pid: i32,
    terminal: Option<OwnedFd>,
    streams: Mutex<Streams>,
    exited: watch::Sender<bool>,
    finished: OnceLock<Finished>,
    close_stdin: watch::Sender<bool>,
}

impl Process {
    /// A process that runs with these streams; `on_exit` hears of its end before its output is drained.
    pub(crate) fn new(
        pid: i32,
        ends: HostEnds,
        exit: oneshot::Receiver<Exit>,
        on_exit: impl FnOnce(Finished) + Send + 'static,
    ) -> Arc<Self> {
        let process = Arc::new(Self {
            pid,
            terminal: ends.terminal,
            streams: Mutex::new(Streams {
                stdin: ends.stdin,
                stdout: ends.stdout,
                stderr: ends.stderr,
                outputs: Vec::new(),
            }),
            exited: watch::Sender::new(false),
            finished: OnceLock::new(),
            close_stdin: watch::Sender::new(false),
        });
        tokio::spawn(process.clone().follow(exit, on_exit));
        process
    }

    async fn follow(
        self: Arc<Self>,
        exit: oneshot::Receiver<Exit>,
        on_exit: impl FnOnce(Finished) + Send,
    ) {
        // The reaper never drops a sender that it has not used, as long as it runs.
        let Ok(exit) = exit.await else { return };
        let at_ns = wall_clock_ns();
        let finished = Finished { exit, at_ns };
        // A process ends once.
        let _ = self.finished.set(finished);
        self.exited.send_replace(true);
        on_exit(finished);
    }

    /// Whether it has ended (its output may still be on its way).
    pub(crate) fn has_exited(&self) -> bool {
        *self.exited.borrow()
    }

    /// Waits for its end, not for its output.
    pub(crate) async fn exited(&self) {
        // The sender is ours.
        let _ = self.exited.subscribe().wait_for(|exited| *exited).await;
    }

    /// Waits for its end and until what it wrote has gone into its attached streams.
    pub(crate) async fn finished(&self) -> Option<Finished> {
        self.exited().await;
        let outputs = self.lock().outputs.clone();
        for mut output in outputs {
            // A pump that is gone has nothing more to send.
            let _ = output.wait_for(|done| *done).await;
        }
        self.finished.get().copied()
    }

    /// Takes a stream for [`Self::attach`]; it can be taken once.
    ///
    /// # Errors
    /// When it was not asked for at creation or is taken.
    pub(crate) fn take_stream(&self, stream: Stream) -> Result<OwnedFd, StreamError> {
        let mut streams = self.lock();
        match stream {
            Stream::Stdin => streams.stdin.take(),
            Stream::Stdout => streams.stdout.take(),
            Stream::Stderr => streams.stderr.take(),
        }
    }

    /// Connects a stream that was taken with the host's `socket`; `first` are bytes that it has sent
    /// already.
    ///
    /// # Errors
    /// When a descriptor cannot be watched.
    pub(crate) fn attach(
        &self,
        stream: Stream,
        ours: OwnedFd,
        socket: OwnedFd,
        first: Vec<u8>,
    ) -> std::io::Result<()> {
        let kind = match self.terminal {
            Some(_) => Kind::Terminal,
            None => Kind::Pipe,
        };
        let ours = Endpoint::new(ours, kind)?;
        let socket = Endpoint::new(socket, Kind::Socket)?;
        let exited = self.exited.subscribe();
        if stream == Stream::Stdin {
            let close = self.close_stdin.subscribe();
            let end = InputEnd { exited, close };
            tokio::spawn(pump_input(first, socket, ours, end));
            return Ok(());
        }
        let (done, receiver) = watch::channel(false);
        self.lock().outputs.push(receiver);
        tokio::spawn(async move {
            let sink = pump_output(ours, socket, exited).await;
            done.send_replace(true);
            if let Some(sink) = sink {
                let _ = tokio::time::timeout(LINGER, closed_by_peer(&sink)).await;
            }
        });
        Ok(())
    }

    /// Ends the process's stdin after what has arrived by now.
    pub(crate) fn close_stdin(&self) {
        self.close_stdin.send_replace(true);
        self.lock().stdin.close();
    }

    /// Sets the terminal's size.
    ///
    /// # Errors
    /// Without a terminal, or with a size beyond 65,535.
    pub(crate) fn resize(&self, rows: u32, columns: u32) -> Result<(), StreamError> {
        let terminal = self.terminal.as_ref().ok_or(StreamError::NoTerminal)?;
        resize(terminal, rows, columns)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sets the size of the terminal behind `master`.
///
/// # Errors
/// With a size beyond 65,535, or when the kernel refuses.
pub(crate) fn resize(master: &OwnedFd, rows: u32, columns: u32) -> Result<(), StreamError> {
    let size = StreamError::Size { rows, columns };
    let size = Winsize {
        ws_row: u16::try_from(rows).map_err(|_| size)?,
        ws_col: u16::try_from(columns).map_err(|_| size)?,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(master, size).map_err(StreamError::System)
}

async fn closed_by_peer(sink: &Endpoint) {
    let mut ignored = [0; 64];
    while let Ok(1..) = sink.read(&mut ignored).await {}
}

/// Nanoseconds since the epoch.
pub(crate) fn wall_clock_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::stdio::make_pipes;
    use super::*;
    use caisson_protocol::agent::agent::Stdio;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    fn process(stdio: &Stdio) -> (Arc<Process>, oneshot::Sender<Exit>, [OwnedFd; 3]) {
        let (ends, theirs) = make_pipes(stdio, (0, 0)).unwrap();
        let (sender, receiver) = oneshot::channel();
        (Process::new(1, ends, receiver, |_| ()), sender, theirs)
    }

    const EXIT: Exit = Exit {
        status: 3,
        signal: 0,
    };

    #[tokio::test]
    async fn waiting_ends_after_the_output_was_sent() {
        let stdio = Stdio {
            stdout: true,
            ..Default::default()
        };
        let (process, exit, theirs) = process(&stdio);
        let (socket, mut host) = UnixStream::pair().unwrap();
        let ours = process.take_stream(Stream::Stdout).unwrap();
        process
            .attach(Stream::Stdout, ours, socket.into(), Vec::new())
            .unwrap();
        rustix::io::write(&theirs[1], b"last words").unwrap();
        exit.send(EXIT).unwrap();
        assert_eq!(process.finished().await.unwrap().exit, EXIT);
        let mut got = String::new();
        host.read_to_string(&mut got).unwrap();
        assert_eq!(got, "last words");
    }

    #[tokio::test]
    async fn a_stream_is_attached_once_and_only_if_asked_for() {
        let stdio = Stdio {
            stdin: true,
            ..Default::default()
        };
        let (process, _exit, _theirs) = process(&stdio);
        assert!(process.take_stream(Stream::Stdin).is_ok());
        let again = process.take_stream(Stream::Stdin).unwrap_err();
        assert_eq!(again, StreamError::Attached);
        let never = process.take_stream(Stream::Stderr).unwrap_err();
        assert_eq!(never, StreamError::NotRequested);
        assert_eq!(process.resize(1, 1), Err(StreamError::NoTerminal));
    }

    #[tokio::test]
    async fn a_process_nobody_attached_to_finishes_too() {
        let stdio = Stdio {
            stdout: true,
            stderr: true,
            ..Default::default()
        };
        let (process, exit, theirs) = process(&stdio);
        rustix::io::write(&theirs[2], b"unheard").unwrap();
        exit.send(EXIT).unwrap();
        assert!(process.finished().await.is_some() && process.has_exited());
    }

    #[tokio::test]
    async fn closing_an_unattached_stdin_closes_the_pipe() {
        let stdio = Stdio {
            stdin: true,
            ..Default::default()
        };
        let (process, _exit, theirs) = process(&stdio);
        process.close_stdin();
        assert_eq!(rustix::io::read(&theirs[0], &mut [0; 4]).unwrap(), 0);
    }
}
