// SPDX-License-Identifier: Apache-2.0

//! A process's stdio: one vsock stream for each of stdin, stdout and stderr, copied by a thread each.
//!
//! Rules for the end of a stream:
//!
//! - our stdin ends (or fails) → the stream is half-closed → the agent closes the process's stdin;
//! - the agent half-closes stdout or stderr → everything was sent → the copy is complete ([`Outputs::drained`]);
//! - nobody reads our stdout any more (EPIPE) → the stream is closed, and the process gets EPIPE in its turn;
//! - the VM dies → all streams end.
//!
//! Threads and blocking calls, because our stdio belongs to others as well: it may be a file, a terminal or a
//! pipe shared with the caller, and making it non-blocking would change it for them.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;

use caisson_protocol::agent::agent::Stdio;
use caisson_protocol::ports::{AGENT_STDIO, StdioHello, Stream};
use rustix::fs::{fstat, major, minor};
use tokio::io::AsyncWriteExt;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::client::{Connector, GuestError, ProcessId, clean, read_line};

/// Bytes copied at once.
const CHUNK: usize = 64 << 10;

/// Our ends of a process's stdio. `None` is /dev/null.
#[derive(Debug, Default)]
pub struct LocalStdio {
    /// Read and sent.
    pub stdin: Option<OwnedFd>,
    /// Gets the process's stdout, with a terminal all that it shows.
    pub stdout: Option<OwnedFd>,
    /// Gets the process's stderr.
    pub stderr: Option<OwnedFd>,
}

impl LocalStdio {
    /// Duplicates of this process's own stdin, stdout and stderr; those that are /dev/null or closed are left out.
    pub fn inherited() -> Self {
        let keep = |fd: io::Result<OwnedFd>| fd.ok().filter(|fd| !is_null(fd));
        Self {
            stdin: keep(io::stdin().as_fd().try_clone_to_owned()),
            stdout: keep(io::stdout().as_fd().try_clone_to_owned()),
            stderr: keep(io::stderr().as_fd().try_clone_to_owned()),
        }
    }

    /// What the agent is asked for.
    pub fn request(&self) -> Stdio {
        Stdio {
            stdin: self.stdin.is_some(),
            stdout: self.stdout.is_some(),
            stderr: self.stderr.is_some(),
            ..Default::default()
        }
    }
}

/// Linux's /dev/null: character device 1:3.
fn is_null(fd: &OwnedFd) -> bool {
    fstat(fd).is_ok_and(|stat| {
        rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::CharacterDevice
            && (major(stat.st_rdev), minor(stat.st_rdev)) == (1, 3)
    })
}

/// The copies from the guest that are under way.
#[derive(Debug)]
pub struct Outputs {
    ends: Vec<oneshot::Receiver<()>>,
}

impl Outputs {
    /// Waits until all that the guest sent was written.
    pub async fn drained(self) {
        for end in self.ends {
            // An error means that the thread is gone, which is an end as well.
            end.await.unwrap_or_default();
        }
    }
}

/// Attaches to the streams of `process` for which `local` has an end, and starts to copy.
///
/// # Errors
/// When a stream cannot be connected or is refused.
pub async fn attach(
    connector: &Connector,
    process: &ProcessId,
    local: LocalStdio,
) -> Result<Outputs, GuestError> {
    // All at once: each is a conversation of several turns with the guest.
    let open = |wanted: bool, stream| async move {
        match wanted {
            true => open(connector, process, stream).await.map(Some),
            false => Ok(None),
        }
    };
    let (stdout, stderr, stdin) = tokio::try_join!(
        open(local.stdout.is_some(), Stream::Stdout),
        open(local.stderr.is_some(), Stream::Stderr),
        open(local.stdin.is_some(), Stream::Stdin),
    )?;
    let mut ends = Vec::new();
    if let (Some(stream), Some(fd)) = (stdout, local.stdout) {
        ends.push(copy_out("stdout", stream, fd)?);
    }
    if let (Some(stream), Some(fd)) = (stderr, local.stderr) {
        ends.push(copy_out("stderr", stream, fd)?);
    }
    if let (Some(stream), Some(fd)) = (stdin, local.stdin) {
        copy_in(fd, stream)?;
    }
    Ok(Outputs { ends })
}

async fn open(
    connector: &Connector,
    process: &ProcessId,
    stream: Stream,
) -> Result<UnixStream, GuestError> {
    let connect_error = |source| GuestError::Connect {
        port: AGENT_STDIO,
        source,
    };
    let mut connection = connector.connect(AGENT_STDIO).await?;
    let hello = StdioHello {
        container: process.container.clone(),
        exec: process.exec.clone(),
        stream,
    };
    let exchange = async {
        let mut line = serde_json::to_vec(&hello)?;
        line.push(b'\n');
        connection.write_all(&line).await?;
        read_line(&mut connection).await
    };
    let answer = timeout(connector.limit, exchange)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map_err(connect_error)?;
    if answer != "OK" {
        return Err(GuestError::Stream(clean(&answer)));
    }
    let connection = connection.into_std().map_err(connect_error)?;
    connection.set_nonblocking(false).map_err(connect_error)?;
    Ok(connection)
}

fn copy_out(
    name: &str,
    mut stream: UnixStream,
    to: OwnedFd,
) -> Result<oneshot::Receiver<()>, GuestError> {
    let (done, end) = oneshot::channel();
    let mut to = File::from(to);
    spawn(name, move || {
        copy(&mut stream, &mut to);
        // Whatever side ended it: the other one is to know. It may already.
        stream.shutdown(Shutdown::Both).unwrap_or_default();
        // Nobody waits any more when the process's end was not wanted.
        done.send(()).unwrap_or_default();
    })?;
    Ok(end)
}

fn copy_in(from: OwnedFd, mut stream: UnixStream) -> Result<(), GuestError> {
    let mut from = File::from(from);
    spawn("stdin", move || {
        copy(&mut from, &mut stream);
        stream.shutdown(Shutdown::Write).unwrap_or_default();
    })
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), GuestError> {
    let builder = thread::Builder::new().name(name.to_owned());
    builder
        .spawn(work)
        .map(drop)
        .map_err(|source| GuestError::Connect {
            port: AGENT_STDIO,
            source,
        })
}

/// Copies until either side is at its end. A read error (EIO of a terminal that was hung up, a reset stream) is
/// an end like any other.
fn copy(from: &mut impl Read, to: &mut impl Write) {
    let mut chunk = vec![0; CHUNK];
    loop {
        match from.read(&mut chunk) {
            Ok(0) => return,
            Ok(count) => {
                if to.write_all(&chunk[..count]).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn output_is_drained_only_when_all_of_it_was_written() {
        let (mut guest, ours) = UnixStream::pair().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let end = copy_out("t", ours, writer).unwrap();
        let outputs = Outputs { ends: vec![end] };
        let sent: Vec<u8> = (0..1_000_000_u32).map(|i| i.to_le_bytes()[0]).collect();
        let expected = sent.clone();
        let guest = thread::spawn(move || {
            guest.write_all(&sent).unwrap();
            guest.shutdown(Shutdown::Write).unwrap();
            guest
        });
        let read = thread::spawn(move || {
            let mut all = Vec::new();
            File::from(reader).read_to_end(&mut all).unwrap();
            all
        });
        outputs.drained().await;
        assert!(read.join().unwrap() == expected);
        guest.join().unwrap();
    }

    #[test]
    fn the_end_of_stdin_half_closes_and_a_reader_that_went_away_closes() {
        let (mut guest, ours) = UnixStream::pair().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        File::from(writer).write_all(b"in").unwrap();
        copy_in(reader, ours).unwrap();
        let mut all = String::new();
        guest.read_to_string(&mut all).unwrap();
        assert_eq!(all, "in");

        let (mut guest, ours) = UnixStream::pair().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        drop(reader);
        drop(copy_out("t", ours, writer).unwrap());
        guest.write_all(b"lost").unwrap();
        assert_eq!(guest.read(&mut [0; 8]).unwrap(), 0);
    }

    #[test]
    fn dev_null_is_known() {
        let null = OwnedFd::from(File::open("/dev/null").unwrap());
        let zero = OwnedFd::from(File::open("/dev/zero").unwrap());
        assert!(is_null(&null));
        assert!(!is_null(&zero));
    }
}
