// SPDX-License-Identifier: Apache-2.0

//! Copies bytes between a process and its streams to the host: one task per attached stream, one buffer of
//! 64 KiB each, and back-pressure to whoever writes; nothing is ever dropped.
//!
//! ```text
//! stdout, stderr:  process ─ pipe or terminal ─> pump ─ socket ─> host
//! stdin:           host ─ socket ─> pump ─ pipe or terminal ─> process
//! ```
//!
//! An output ends with its pipe, or, when grandchildren hold that open, once what was in it at the end of
//! the process has been sent. If the host goes away, the pipe is closed, and the next write of the process
//! meets a SIGPIPE as it would anywhere.

use std::task::Poll;

use tokio::sync::watch;

use super::endpoint::Endpoint;

const BUFFER: usize = 64 << 10;

/// Sends all that `source` gives to `sink`, and half-closes `sink` after the last byte.
///
/// Returns when everything is sent or nobody takes it any more; `exited` turns true when the process has
/// ended. The sink is handed back unless it is broken.
pub(crate) async fn pump_output(
    source: Endpoint,
    sink: Endpoint,
    mut exited: watch::Receiver<bool>,
) -> Option<Endpoint> {
    let mut buffer = vec![0; BUFFER];
    loop {
        tokio::task::coop::consume_budget().await;
        let count = tokio::select! {
            biased;
            read = source.read(&mut buffer) => read.unwrap_or_default(),
            () = sink.gone() => return None,
            _ = exited.wait_for(|exited| *exited) => break,
        };
        let bytes = buffer.get(..count).unwrap_or_default();
        if bytes.is_empty() {
            sink.shutdown_write();
            return Some(sink);
        }
        sink.write_all(bytes).await.ok()?;
        // A process that writes for ever must not keep us from seeing that another has ended.
        if *exited.borrow() {
            break;
        }
    }
    drain(&source, &sink, &mut buffer).await?;
    sink.shutdown_write();
    Some(sink)
}

/// Sends what is in the pipe now, and no more than it can hold: others may still be writing.
async fn drain(source: &Endpoint, sink: &Endpoint, buffer: &mut [u8]) -> Option<()> {
    let mut left = source.capacity();
    while left > 0 {
        let room = left.min(buffer.len());
        let Poll::Ready(Ok(count @ 1..)) = source.try_read(buffer.get_mut(..room)?) else {
            break;
        };
        sink.write_all(buffer.get(..count)?).await.ok()?;
        left = left.saturating_sub(count);
    }
    Some(())
}

/// When an input is to end before the host says so.
pub(crate) struct InputEnd {
    /// Turns true when the process has ended.
    pub(crate) exited: watch::Receiver<bool>,
    /// Turns true when what has arrived by then is the last.
    pub(crate) close: watch::Receiver<bool>,
}

/// Sends `first`, then all that `source` gives to `sink`; closes both at the end of either.
pub(crate) async fn pump_input(
    first: Vec<u8>,
    source: Endpoint,
    sink: Endpoint,
    mut end: InputEnd,
) {
    let mut buffer = vec![0; BUFFER];
    let mut pending = first;
    loop {
        tokio::select! {
            written = sink.write_all(&pending) => if written.is_err() { return },
            _ = end.exited.wait_for(|exited| *exited) => return,
        }
        tokio::task::coop::consume_budget().await;
        let count = tokio::select! {
            biased;
            read = source.read(&mut buffer) => read.unwrap_or_default(),
            () = sink.gone() => return,
            _ = end.exited.wait_for(|exited| *exited) => return,
            _ = end.close.wait_for(|close| *close) => return,
        };
        if count == 0 {
            return;
        }
        pending.clear();
        pending.extend_from_slice(buffer.get(..count).unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use super::super::endpoint::Kind;
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use tokio::time::{Duration, timeout};

    struct Setup {
        pipe: OwnedFd,
        host: UnixStream,
        exited: watch::Sender<bool>,
        pump: tokio::task::JoinHandle<Option<Endpoint>>,
    }

    fn output() -> Setup {
        let (read, pipe) = rustix::pipe::pipe().unwrap();
        let (ours, host) = UnixStream::pair().unwrap();
        let source = Endpoint::new(read, Kind::Pipe).unwrap();
        let sink = Endpoint::new(ours.into(), Kind::Socket).unwrap();
        let (exited, receiver) = watch::channel(false);
        Setup {
            pipe,
            host,
            exited,
            pump: tokio::spawn(pump_output(source, sink, receiver)),
        }
    }

    fn read_all(mut host: UnixStream) -> std::thread::JoinHandle<Vec<u8>> {
        std::thread::spawn(move || {
            let mut got = Vec::new();
            host.read_to_end(&mut got).unwrap();
            got
        })
    }

    async fn soon<T>(future: impl Future<Output = T>) -> T {
        timeout(Duration::from_secs(20), future).await.unwrap()
    }

    #[tokio::test]
    async fn what_was_written_before_the_exit_arrives_although_a_grandchild_holds_the_pipe() {
        let setup = output();
        rustix::io::write(&setup.pipe, &[1; 60_000]).unwrap();
        setup.exited.send_replace(true);
        let sink = soon(setup.pump).await.unwrap();
        let got = read_all(setup.host);
        drop(sink);
        assert_eq!(got.join().unwrap(), vec![1; 60_000]);
        // The grandchild's next write fails.
        assert!(rustix::io::write(&setup.pipe, b"x").is_err());
    }

    #[tokio::test]
    async fn a_grandchild_that_writes_for_ever_does_not_hold_the_end_up() {
        let setup = output();
        let pipe = setup.pipe;
        let writer =
            std::thread::spawn(move || while rustix::io::write(&pipe, &[2; 4096]).is_ok() {});
        let got = read_all(setup.host);
        setup.exited.send_replace(true);
        drop(soon(setup.pump).await.unwrap());
        writer.join().unwrap();
        got.join().unwrap();
    }

    #[tokio::test]
    async fn a_slow_host_holds_the_process_back_and_loses_nothing() {
        let setup = output();
        let pipe = setup.pipe;
        let writer = std::thread::spawn(move || {
            for _ in 0..500 {
                let mut block: &[u8] = &[3; 10_000];
                while !block.is_empty() {
                    block = &block[rustix::io::write(&pipe, block).unwrap()..];
                }
            }
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!writer.is_finished(), "five megabytes fit in no buffer");
        let got = read_all(setup.host);
        drop(soon(setup.pump).await.unwrap());
        writer.join().unwrap();
        assert_eq!(got.join().unwrap().len(), 5_000_000);
    }

    #[tokio::test]
    async fn a_host_that_goes_away_closes_the_pipe_of_an_idle_process() {
        let setup = output();
        drop(setup.host);
        assert!(soon(setup.pump).await.unwrap().is_none());
        assert!(rustix::io::write(&setup.pipe, b"x").is_err());
    }

    fn input(first: &[u8]) -> (UnixStream, OwnedFd, [watch::Sender<bool>; 2]) {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let (ours, host) = UnixStream::pair().unwrap();
        let source = Endpoint::new(ours.into(), Kind::Socket).unwrap();
        let sink = Endpoint::new(write, Kind::Pipe).unwrap();
        let (exited, close) = (watch::channel(false), watch::channel(false));
        let end = InputEnd {
            exited: exited.1,
            close: close.1,
        };
        tokio::spawn(pump_input(first.to_vec(), source, sink, end));
        (host, read, [exited.0, close.0])
    }

    async fn all_of(read: OwnedFd) -> Vec<u8> {
        let read = Endpoint::new(read, Kind::Pipe).unwrap();
        let (mut got, mut buffer) = (Vec::new(), [0; 999]);
        while let count @ 1.. = soon(read.read(&mut buffer)).await.unwrap() {
            got.extend_from_slice(&buffer[..count]);
        }
        got
    }

    #[tokio::test]
    async fn stdin_arrives_whole_and_closes_with_the_hosts_half() {
        let (mut host, read, _end) = input(b"first ");
        let sent = std::thread::spawn(move || {
            host.write_all(&[4; 300_000]).unwrap();
            host.shutdown(std::net::Shutdown::Write).unwrap();
            host
        });
        let got = all_of(read).await;
        assert_eq!((&got[..6], got.len()), (&b"first "[..], 300_006));
        sent.join().unwrap();
    }

    #[tokio::test]
    async fn closing_stdin_by_call_sends_what_has_arrived_first() {
        let (mut host, read, [_exited, close]) = input(b"");
        host.write_all(&[5; 100_000]).unwrap();
        close.send_replace(true);
        assert_eq!(all_of(read).await.len(), 100_000);
    }

    #[tokio::test]
    async fn a_process_that_closes_its_stdin_closes_the_stream() {
        let (mut host, read, _end) = input(b"");
        drop(read);
        let end = tokio::task::spawn_blocking(move || host.read(&mut [0; 1]).unwrap());
        assert_eq!(soon(end).await.unwrap(), 0);
    }
}
