// SPDX-License-Identifier: Apache-2.0

//! The loop.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use caisson_protocol::control::{ExitCause, MAX_LINE};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::{Mode, umask};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::{Connection, TooLong};
use super::requests::{self, Next, encode, refusal};
use crate::machine::Machine;

/// Most clients at once; more wait in the socket's backlog.
const MAX_CONNECTIONS: usize = 16;
const LISTENER: u64 = 0;
const ENDING: u64 = 1;
const SIGNALS: u64 = 2;
const FIRST_CLIENT: u64 = 3;

/// A control socket that does not work.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// bind(2) or listen(2).
    #[error("failed to listen on control socket {path}")]
    Bind {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// signalfd(2).
    #[error("failed to watch for signals")]
    Signals(#[source] nix::Error),
    /// epoll.
    #[error("failed to wait for events")]
    Epoll(#[source] io::Error),
}

/// See the module.
#[derive(Debug)]
pub struct ControlServer {
    path: PathBuf,
    listener: UnixListener,
    signals: SignalFd,
    epoll: Epoll,
    clients: BTreeMap<u64, Connection>,
    next: u64,
    listening: bool,
    /// A forced stop was asked for.
    force: bool,
}

impl ControlServer {
    /// Listens on `path` with mode 0600, and takes SIGTERM and SIGINT as an orderly stop. To be called before
    /// there are other threads (which inherit the blocked signals; the umask is the process's).
    ///
    /// # Errors
    /// When the path is taken or cannot be made.
    pub fn bind(path: &Path) -> Result<Self, ControlError> {
        let old = umask(Mode::from_bits_truncate(0o177));
        let listener = UnixListener::bind(path);
        umask(old);
        let listener = listener.and_then(|listener| {
            listener.set_nonblocking(true)?;
            Ok(listener)
        });
        let listener = listener.map_err(|source| ControlError::Bind {
            path: path.into(),
            source,
        })?;
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGTERM);
        mask.add(Signal::SIGINT);
        mask.thread_block().map_err(ControlError::Signals)?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
            .map_err(ControlError::Signals)?;
        Ok(Self {
            path: path.into(),
            listener,
            signals,
            epoll: Epoll::new().map_err(ControlError::Epoll)?,
            clients: BTreeMap::new(),
            next: FIRST_CLIENT,
            listening: true,
            force: false,
        })
    }

    /// Serves until the machine's end is reported. `true`: it is to end without waiting for its devices.
    ///
    /// # Errors
    /// When epoll fails.
    pub fn run(&mut self, machine: &mut Machine) -> Result<bool, ControlError> {
        self.watch(machine).map_err(ControlError::Epoll)?;
        let mut events = [EpollEvent::default(); 16];
        loop {
            let count = match self.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(ControlError::Epoll(error)),
            };
            for event in events.iter().take(count) {
                match event.data() {
                    LISTENER => self.accept().map_err(ControlError::Epoll)?,
                    ENDING => return Ok(self.force),
                    SIGNALS => machine.ending().report(ExitCause::Stopped {}),
                    client => self.serve(client, machine),
                }
            }
        }
    }

    fn watch(&self, machine: &Machine) -> io::Result<()> {
        let add = |fd, token| {
            let event = EpollEvent::new(EventSet::IN, token);
            self.epoll.ctl(ControlOperation::Add, fd, event)
        };
        add(self.listener.as_raw_fd(), LISTENER)?;
        add(machine.ending().event().as_raw_fd(), ENDING)?;
        add(self.signals.as_raw_fd(), SIGNALS)
    }

    fn accept(&mut self) -> io::Result<()> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(true)?;
                let token = self.next;
                self.next += 1;
                let connection = Connection::new(stream);
                let event = EpollEvent::new(EventSet::IN, token);
                self.epoll
                    .ctl(ControlOperation::Add, connection.fd(), event)?;
                self.clients.insert(token, connection);
                self.listen(self.clients.len() < MAX_CONNECTIONS)
            }
            Err(error) => {
                // The client may have gone; descriptors may have run out.
                log::warn!("failed to accept a control connection: {error}");
                Ok(())
            }
        }
    }

    /// Takes new clients, or lets them wait.
    fn listen(&mut self, on: bool) -> io::Result<()> {
        if on != self.listening {
            self.listening = on;
            let events = if on { EventSet::IN } else { EventSet::empty() };
            let event = EpollEvent::new(events, LISTENER);
            self.epoll
                .ctl(ControlOperation::Modify, self.listener.as_raw_fd(), event)?;
        }
        Ok(())
    }

    fn serve(&mut self, token: u64, machine: &mut Machine) {
        let Some(mut client) = self.clients.remove(&token) else {
            return;
        };
        let keep = match self.talk(&mut client, machine) {
            Ok(keep) => keep,
            Err(error) => {
                log::debug!("control connection: {error}");
                false
            }
        };
        // What the client does not take at once, it is sent before it is heard again.
        let interest = if client.has_output() {
            EventSet::OUT
        } else {
            EventSet::IN
        };
        let event = EpollEvent::new(interest, token);
        let fd = client.fd();
        if keep && self.epoll.ctl(ControlOperation::Modify, fd, event).is_ok() {
            self.clients.insert(token, client);
        } else {
            // Closing the descriptor takes it out of the epoll set.
            drop(client);
            if let Err(error) = self.listen(true) {
                log::error!("failed to listen for control connections: {error}");
            }
        }
    }

    /// Reads, answers, writes; `false`: the connection is done.
    fn talk(&mut self, client: &mut Connection, machine: &mut Machine) -> io::Result<bool> {
        if client.has_output() {
            client.flush()?;
        } else {
            client.fill()?;
        }
        while !client.has_output() {
            let line = match client.next_line() {
                Ok(Some(line)) => line,
                Ok(None) => break,
                Err(TooLong) => {
                    let text = format!("a request has more than {MAX_LINE} bytes");
                    client.answer(&encode(&refusal(text)));
                    client.flush()?;
                    return Ok(false);
                }
            };
            let (answer, next) = requests::handle(machine, &line);
            client.answer(&answer);
            let sent = client.flush();
            // A client that does not wait for the answer is obeyed all the same.
            match next {
                Next::Go => {}
                Next::Close => return Ok(false),
                Next::Stop { force } => {
                    self.force |= force;
                    machine.ending().report(ExitCause::Stopped {});
                }
            }
            sent?;
        }
        Ok(client.has_output() || !client.has_ended())
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            log::debug!(
                "failed to remove control socket {}: {error}",
                self.path.display()
            );
        }
    }
}
