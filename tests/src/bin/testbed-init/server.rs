// SPDX-License-Identifier: Apache-2.0

//! Reads the host's frames and gives each to its command; ends when the host says so or goes away.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};

use anyhow::{Context, Result, bail};
use caisson_testbed::frame::{Frame, FrameError, Stream, WINDOW};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::command::{self, Terminal};
use crate::log;

/// The side of the port that every command's threads write to.
pub(crate) struct Port(Mutex<File>);

impl Port {
    /// Sends one frame. When the port is gone the reader ends the machine, so there is nobody to tell.
    pub(crate) fn send(&self, channel: u32, frame: &Frame) {
        if let Err(error) = frame.write_to(&mut *lock(&self.0), channel) {
            log(&format!("testbed-init: {:#}", anyhow::Error::new(error)));
        }
    }
}

/// Locks; a thread that died holding it has left nothing half done that matters here.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many bytes of a stream the host is ready to take.
pub(crate) struct Credit {
    bytes: Mutex<usize>,
    more: Condvar,
}

impl Credit {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(WINDOW),
            more: Condvar::new(),
        })
    }

    fn give(&self, bytes: u32) {
        let mut held = lock(&self.bytes);
        *held = held.saturating_add(bytes as usize);
        self.more.notify_all();
    }

    /// Waits until `bytes`, at most [`WINDOW`], may be sent, and uses them up.
    pub(crate) fn take(&self, bytes: usize) {
        let held = lock(&self.bytes);
        let waited = self.more.wait_while(held, |held| *held < bytes);
        let mut held = waited.unwrap_or_else(PoisonError::into_inner);
        *held = held.saturating_sub(bytes);
    }
}

/// What frames for a running command act on.
struct Running {
    /// Taken away by the end of stdin.
    stdin: Option<mpsc::Sender<Vec<u8>>>,
    stdout: Arc<Credit>,
    stderr: Arc<Credit>,
    /// Set once it is started.
    started: Arc<Mutex<Option<Started>>>,
}

/// What there is of a command when it has been started.
pub(crate) struct Started {
    pub(crate) pid: Pid,
    pub(crate) terminal: Option<Terminal>,
}

type Commands = Arc<Mutex<HashMap<u32, Running>>>;

/// Serves the port that is this process's stdin.
pub(crate) fn serve() -> Result<()> {
    let stdin = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .context("failed to take the port")?;
    let mut reader = File::from(stdin);
    let port = reader.try_clone().context("failed to duplicate the port")?;
    let port = Arc::new(Port(Mutex::new(port)));
    let commands = Commands::default();
    loop {
        let (channel, frame) = match Frame::read_from(&mut reader) {
            Ok((_, Frame::PowerOff)) => return Ok(()),
            Ok(received) => received,
            Err(FrameError::Io(_, error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Ok(());
            }
            Err(error) => return Err(error).context("failed to read from the host"),
        };
        handle(&port, &commands, channel, frame)?;
    }
}

fn handle(port: &Arc<Port>, commands: &Commands, channel: u32, frame: Frame) -> Result<()> {
    let mut table = lock(commands);
    let frame = match frame {
        Frame::Run(request) => {
            if table.contains_key(&channel) {
                bail!("the host used channel {channel} twice");
            }
            let (stdin, bytes) = mpsc::channel();
            let running = Running {
                stdin: Some(stdin),
                stdout: Credit::new(),
                stderr: Credit::new(),
                started: Arc::default(),
            };
            let task = command::Task {
                channel,
                port: Arc::clone(port),
                stdin: bytes,
                stdout: Arc::clone(&running.stdout),
                stderr: Arc::clone(&running.stderr),
                started: Arc::clone(&running.started),
            };
            table.insert(channel, running);
            let (commands, port) = (Arc::clone(commands), Arc::clone(port));
            std::thread::spawn(move || {
                let last = task.run(request);
                lock(&commands).remove(&channel);
                port.send(channel, &last);
            });
            return Ok(());
        }
        other => other,
    };
    // A frame for a command that has just ended is late, not wrong.
    let Some(running) = table.get_mut(&channel) else {
        return Ok(());
    };
    match frame {
        Frame::Stdin(bytes) => {
            if let Some(stdin) = &running.stdin {
                // Its thread lives until the command ends.
                drop(stdin.send(bytes));
            }
        }
        Frame::StdinEnd => running.stdin = None,
        Frame::Credit(Stream::Stdout, bytes) => running.stdout.give(bytes),
        Frame::Credit(Stream::Stderr, bytes) => running.stderr.give(bytes),
        Frame::Resize(size) => {
            if let Some(Started {
                terminal: Some(terminal),
                ..
            }) = &*lock(&running.started)
            {
                terminal.resize(size);
            }
        }
        Frame::Signal(number) => {
            let signal = Signal::try_from(number).context("the host sent an unknown signal")?;
            if let Some(Started { pid, .. }) = &*lock(&running.started) {
                // ESRCH: it has just ended.
                let _ = killpg(*pid, signal);
            }
        }
        other => bail!("unexpected frame {other:?}"),
    }
    Ok(())
}
