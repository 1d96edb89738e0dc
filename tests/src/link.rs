// SPDX-License-Identifier: Apache-2.0

//! The host's end of the port: many commands at once over one socket.
//!
//! One thread reads and hands every frame to its command's queue. A queue is bounded by the credit that the
//! guest was given, so a command whose output nobody takes stops, and stops nobody else.

use std::collections::HashMap;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::frame::{Exit, Frame, FrameError, MAX_PAYLOAD, RunRequest, Stream, WINDOW, WindowSize};

/// What happens to a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// It wrote to its stdout (or to its terminal).
    Stdout(Vec<u8>),
    /// It wrote to its stderr.
    Stderr(Vec<u8>),
    /// It ended; nothing comes after this.
    Exited(Exit),
}

/// Why a command could not be run or followed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The guest could not start it.
    #[error("{0}")]
    Refused(String),
    /// The machine has ended, or the wire to it is broken.
    #[error("the testbed's machine has ended")]
    Gone,
    /// The wire.
    #[error("failed to talk to the testbed's machine")]
    Frame(#[from] FrameError),
    /// Nothing happened for as long as the caller wanted to wait.
    #[error("the command was silent for {0:?}")]
    Timeout(Duration),
}

/// What the reader knows of a command.
#[derive(Debug)]
struct Entry {
    events: mpsc::Sender<Result<Event, LinkError>>,
    stdin: Arc<Credit>,
}

/// How many bytes of stdin the guest is ready to take; `None` when the command has ended.
#[derive(Debug)]
struct Credit {
    bytes: Mutex<Option<usize>>,
    changed: Condvar,
}

/// The commands by channel; `None` when the machine is gone.
type Table = Arc<Mutex<Option<HashMap<u32, Entry>>>>;

/// The connection to the machine.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    writer: Arc<Mutex<UnixStream>>,
    table: Table,
    next: Arc<Mutex<u32>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Link {
    /// Takes over the port of a machine that has said hello.
    pub(crate) fn new(port: UnixStream) -> io::Result<Self> {
        let mut reader = port.try_clone()?;
        let table: Table = Arc::new(Mutex::new(Some(HashMap::new())));
        let link = Self {
            writer: Arc::new(Mutex::new(port)),
            table,
            next: Arc::new(Mutex::new(1)),
        };
        let reading = link.clone();
        std::thread::spawn(move || {
            while let Ok((channel, frame)) = Frame::read_from(&mut reader) {
                if reading.dispatch(channel, frame).is_err() {
                    break;
                }
            }
            // Every queue ends, and so does every wait.
            let gone = lock(&reading.table).take();
            for entry in gone.into_iter().flatten().map(|(_, entry)| entry) {
                entry.stdin.close();
            }
        });
        Ok(link)
    }

    fn send(&self, channel: u32, frame: &Frame) -> Result<(), LinkError> {
        Ok(frame.write_to(&mut *lock(&self.writer), channel)?)
    }

    fn dispatch(&self, channel: u32, frame: Frame) -> Result<(), LinkError> {
        let mut table = lock(&self.table);
        let Some(table) = table.as_mut() else {
            return Err(LinkError::Gone);
        };
        let event = match frame {
            Frame::Stdout(bytes) => Ok(Event::Stdout(bytes)),
            Frame::Stderr(bytes) => Ok(Event::Stderr(bytes)),
            Frame::Credit(Stream::Stdin, bytes) => {
                if let Some(entry) = table.get(&channel) {
                    entry.stdin.give(bytes);
                }
                return Ok(());
            }
            Frame::Exited(exit) => Ok(Event::Exited(exit)),
            Frame::Refused(why) => Err(LinkError::Refused(why)),
            _ => return Err(LinkError::Gone),
        };
        let last = matches!(event, Ok(Event::Exited(_)) | Err(_));
        let unheard = match table.get(&channel) {
            Some(entry) => entry.events.send(event).err().map(|unsent| unsent.0),
            None => None,
        };
        if last && let Some(entry) = table.remove(&channel) {
            entry.stdin.close();
        }
        // Nobody listens any more: let the command run on to its end all the same.
        match unheard {
            Some(Ok(event)) => give_credit(self, channel, &event),
            _ => Ok(()),
        }
    }

    /// Starts a command.
    pub(crate) fn run(&self, request: RunRequest) -> Result<Running, LinkError> {
        let channel = {
            let mut next = lock(&self.next);
            let channel = *next;
            *next = next.wrapping_add(1);
            channel
        };
        let (events, received) = mpsc::channel();
        let credit = Arc::new(Credit {
            bytes: Mutex::new(Some(WINDOW)),
            changed: Condvar::new(),
        });
        let entry = Entry {
            events,
            stdin: Arc::clone(&credit),
        };
        lock(&self.table)
            .as_mut()
            .ok_or(LinkError::Gone)?
            .insert(channel, entry);
        self.send(channel, &Frame::Run(request))?;
        let stdin = Stdin {
            link: self.clone(),
            channel,
            credit,
        };
        Ok(Running {
            link: self.clone(),
            channel,
            events: received,
            stdin: Some(stdin),
            ended: false,
        })
    }

    /// Asks the machine to end.
    pub(crate) fn power_off(&self) -> Result<(), LinkError> {
        self.send(0, &Frame::PowerOff)
    }
}

/// Lets the guest send as many bytes again as the event carried.
fn give_credit(link: &Link, channel: u32, event: &Event) -> Result<(), LinkError> {
    let (stream, bytes) = match event {
        Event::Stdout(bytes) => (Stream::Stdout, bytes),
        Event::Stderr(bytes) => (Stream::Stderr, bytes),
        Event::Exited(_) => return Ok(()),
    };
    // A frame's payload is at most MAX_PAYLOAD bytes.
    let length = u32::try_from(bytes.len()).unwrap_or(0);
    link.send(channel, &Frame::Credit(stream, length))
}

impl Credit {
    fn give(&self, bytes: u32) {
        if let Some(held) = &mut *lock(&self.bytes) {
            *held = held.saturating_add(bytes as usize);
        }
        self.changed.notify_all();
    }

    fn close(&self) {
        *lock(&self.bytes) = None;
        self.changed.notify_all();
    }

    /// Waits for some credit and uses at most `wanted` of it; `None` when the command has ended.
    fn take(&self, wanted: usize) -> Option<usize> {
        let held = lock(&self.bytes);
        let waited = self.changed.wait_while(held, |held| *held == Some(0));
        let mut held = waited.unwrap_or_else(PoisonError::into_inner);
        let held = held.as_mut()?;
        let taken = wanted.min(*held);
        *held -= taken;
        Some(taken)
    }
}

/// The stdin of a running command. Dropping it is the end of the input.
#[derive(Debug)]
pub struct Stdin {
    link: Link,
    channel: u32,
    credit: Arc<Credit>,
}

impl Write for Stdin {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let wanted = bytes.len().min(MAX_PAYLOAD);
        let taken = self.credit.take(wanted).ok_or(io::ErrorKind::BrokenPipe)?;
        let part = bytes.get(..taken).unwrap_or_default();
        self.link
            .send(self.channel, &Frame::Stdin(part.to_vec()))
            .map_err(|error| io::Error::new(io::ErrorKind::BrokenPipe, error))?;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Stdin {
    fn drop(&mut self) {
        // A machine that is gone needs no end of input.
        let _ = self.link.send(self.channel, &Frame::StdinEnd);
    }
}

/// A running command. Dropped before its end, its process group is killed.
#[derive(Debug)]
pub struct Running {
    link: Link,
    channel: u32,
    events: mpsc::Receiver<Result<Event, LinkError>>,
    stdin: Option<Stdin>,
    ended: bool,
}

impl Running {
    /// Its stdin, once.
    pub fn take_stdin(&mut self) -> Option<Stdin> {
        self.stdin.take()
    }

    /// Waits for what happens next. Output that is not taken makes the command wait.
    ///
    /// # Errors
    /// If it could not be started, or the machine is gone.
    pub fn next_event(&mut self) -> Result<Event, LinkError> {
        let received = self.events.recv().map_err(|_| LinkError::Gone).flatten();
        self.took(received)
    }

    /// As [`Running::next_event`], for at most `limit`.
    ///
    /// # Errors
    /// Also [`LinkError::Timeout`], after which the command still runs.
    pub fn next_event_within(&mut self, limit: Duration) -> Result<Event, LinkError> {
        let received = match self.events.recv_timeout(limit) {
            Ok(received) => received,
            Err(RecvTimeoutError::Timeout) => return Err(LinkError::Timeout(limit)),
            Err(RecvTimeoutError::Disconnected) => Err(LinkError::Gone),
        };
        self.took(received)
    }

    fn took(&mut self, received: Result<Event, LinkError>) -> Result<Event, LinkError> {
        self.ended |= matches!(received, Ok(Event::Exited(_)) | Err(_));
        let event = received?;
        if !self.ended {
            give_credit(&self.link, self.channel, &event)?;
        }
        Ok(event)
    }

    /// Sends a signal to the command's process group.
    ///
    /// # Errors
    /// If the machine is gone.
    pub fn signal(&self, number: i32) -> Result<(), LinkError> {
        self.link.send(self.channel, &Frame::Signal(number))
    }

    /// A handle that changes the size of the command's terminal, from any thread.
    pub fn resizer(&self) -> impl Fn(WindowSize) -> Result<(), LinkError> + Send + 'static {
        let (link, channel) = (self.link.clone(), self.channel);
        move |size| link.send(channel, &Frame::Resize(size))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.signal(libc::SIGKILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link and the guest's end of its wire, played by the test.
    fn pair() -> (Link, UnixStream) {
        let (ours, guests) = UnixStream::pair().unwrap();
        guests
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        (Link::new(ours).unwrap(), guests)
    }

    fn request() -> RunRequest {
        RunRequest {
            argv: vec!["true".into()],
            env: Vec::new(),
            cwd: None,
            tty: None,
        }
    }

    fn start(link: &Link, guest: &mut UnixStream) -> (Running, u32) {
        let running = link.run(request()).unwrap();
        match Frame::read_from(guest).unwrap() {
            (channel, Frame::Run(_)) => (running, channel),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn each_command_gets_its_own_events_whoever_is_first() {
        let (link, mut guest) = pair();
        let (mut one, first) = start(&link, &mut guest);
        let (mut two, second) = start(&link, &mut guest);
        assert_ne!(first, second);
        for (frame, channel) in [
            (Frame::Stdout(b"two".to_vec()), second),
            (Frame::Exited(Exit::Code(2)), second),
            (Frame::Stderr(b"one".to_vec()), first),
            (Frame::Exited(Exit::Signal(9)), first),
        ] {
            frame.write_to(&mut guest, channel).unwrap();
        }
        assert_eq!(one.next_event().unwrap(), Event::Stderr(b"one".to_vec()));
        assert_eq!(one.next_event().unwrap(), Event::Exited(Exit::Signal(9)));
        assert_eq!(two.next_event().unwrap(), Event::Stdout(b"two".to_vec()));
        assert_eq!(two.next_event().unwrap(), Event::Exited(Exit::Code(2)));
    }

    #[test]
    fn output_earns_credit_when_it_is_taken_and_not_before() {
        let (link, mut guest) = pair();
        let (mut running, channel) = start(&link, &mut guest);
        let sent = Frame::Stdout(vec![1; 5000]);
        sent.write_to(&mut guest, channel).unwrap();
        guest
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        assert!(
            Frame::read_from(&mut guest).is_err(),
            "credit for output that nobody took"
        );
        guest
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        running.next_event().unwrap();
        let credit = Frame::Credit(Stream::Stdout, 5000);
        assert_eq!(Frame::read_from(&mut guest).unwrap(), (channel, credit));
    }

    #[test]
    fn a_command_that_nobody_follows_is_killed_and_does_not_fill_the_wire() {
        let (link, mut guest) = pair();
        let (running, channel) = start(&link, &mut guest);
        drop(running);
        let mut next = || Frame::read_from(&mut guest).unwrap().1;
        assert_eq!(next(), Frame::Signal(libc::SIGKILL));
        assert_eq!(next(), Frame::StdinEnd);
        Frame::Stdout(vec![1; 7])
            .write_to(&mut guest, channel)
            .unwrap();
        let answer = Frame::read_from(&mut guest).unwrap().1;
        assert_eq!(answer, Frame::Credit(Stream::Stdout, 7));
    }

    #[test]
    fn stdin_waits_for_credit_and_breaks_when_the_command_ends() {
        let (link, mut guest) = pair();
        let (mut running, channel) = start(&link, &mut guest);
        let mut stdin = running.take_stdin().unwrap();
        let writer = std::thread::spawn(move || {
            stdin.write_all(&vec![5; WINDOW + 10]).unwrap();
            stdin.write_all(&vec![6; 2 * WINDOW])
        });
        let mut received = 0;
        while received < WINDOW + 10 {
            match Frame::read_from(&mut guest).unwrap() {
                (_, Frame::Stdin(bytes)) => received += bytes.len(),
                other => panic!("{other:?}"),
            }
            if received == WINDOW {
                // Ten more than the first window, and no byte of what follows.
                Frame::Credit(Stream::Stdin, 10)
                    .write_to(&mut guest, channel)
                    .unwrap();
            }
        }
        assert_eq!(received, WINDOW + 10);
        Frame::Exited(Exit::Code(0))
            .write_to(&mut guest, channel)
            .unwrap();
        let error = writer.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_refusal_and_the_end_of_the_machine_are_told_apart() {
        let (link, mut guest) = pair();
        let (mut refused, channel) = start(&link, &mut guest);
        let (mut cut_off, _) = start(&link, &mut guest);
        let why = Frame::Refused("no such program".into());
        why.write_to(&mut guest, channel).unwrap();
        let error = refused.next_event().unwrap_err();
        assert!(matches!(&error, LinkError::Refused(why) if why == "no such program"));
        let limit = Duration::from_millis(20);
        assert!(matches!(
            cut_off.next_event_within(limit),
            Err(LinkError::Timeout(_))
        ));
        drop(guest);
        assert!(matches!(cut_off.next_event(), Err(LinkError::Gone)));
        assert!(matches!(
            link.run(request()),
            Err(LinkError::Gone | LinkError::Frame(_))
        ));
    }
}
