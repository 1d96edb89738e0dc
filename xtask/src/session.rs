// SPDX-License-Identifier: Apache-2.0

//! A command in the testbed on this process's own stdin, stdout and stderr, or on its terminal.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use caisson_testbed::frame::WindowSize;
use caisson_testbed::{Command, Event, Running, Stdin, Testbed};
use nix::sys::signal::{SigSet, Signal};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// How a command went.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ended {
    /// As a shell shows it.
    pub(crate) status: u8,
    /// From its start to the first byte on its stdout.
    pub(crate) first_output: Option<Duration>,
}

/// Made before the testbed, because threads take over what signals are blocked.
#[derive(Debug)]
pub(crate) struct Session {
    /// Of a terminal: the signal that it has a new size.
    resized: Option<SigSet>,
}

impl Session {
    /// A session on this process's terminal, or on its streams as they are.
    pub(crate) fn new(terminal: bool) -> Result<Self> {
        let resized = terminal.then(|| SigSet::from(Signal::SIGWINCH));
        if let Some(signals) = &resized {
            signals.thread_block().context("failed to block SIGWINCH")?;
        }
        Ok(Self { resized })
    }

    /// Runs the command to its end.
    pub(crate) fn run(self, testbed: &Testbed, mut command: Command) -> Result<Ended> {
        if let Ok(term) = std::env::var("TERM") {
            command = command.env("TERM", &term);
        }
        let result = match self.resized {
            Some(signals) => interactive(testbed, command, signals),
            None => testbed
                .spawn(&command)
                .map_err(Into::into)
                .and_then(|mut run| forward(&mut run)),
        };
        result.with_context(|| format!("in the testbed{}", testbed.console_tail()))
    }
}

/// Runs the command on a terminal that follows this one.
fn interactive(testbed: &Testbed, mut command: Command, signals: SigSet) -> Result<Ended> {
    command.tty = Some(window_size());
    let raw = RawTerminal::new().context("failed to set the terminal")?;
    let mut running = testbed.spawn(&command)?;
    let resize = running.resizer();
    std::thread::spawn(move || while signals.wait().is_ok() && resize(window_size()).is_ok() {});
    let ended = forward(&mut running);
    drop(raw);
    ended
}

/// Passes stdin in and stdout and stderr out, to the end of the command.
fn forward(running: &mut Running) -> Result<Ended> {
    let start = Instant::now();
    if let Some(stdin) = running.take_stdin() {
        // Not joined: it may wait for input that never comes.
        std::thread::spawn(move || pass_stdin(stdin));
    }
    let mut first_output = None;
    loop {
        match running.next_event()? {
            Event::Stdout(bytes) => {
                first_output.get_or_insert_with(|| start.elapsed());
                let mut stdout = io::stdout().lock();
                stdout.write_all(&bytes).and_then(|()| stdout.flush())
            }
            Event::Stderr(bytes) => io::stderr().lock().write_all(&bytes),
            Event::Exited(exit) => {
                return Ok(Ended {
                    status: exit.shell_status(),
                    first_output,
                });
            }
        }
        .context("failed to pass on the command's output")?;
    }
}

fn pass_stdin(mut stdin: Stdin) {
    let mut buffer = vec![0; 32 * 1024];
    // A command that no longer reads ends this, as does the end of our own input.
    while let Ok(length @ 1..) = io::stdin().lock().read(&mut buffer) {
        if stdin
            .write_all(buffer.get(..length).unwrap_or_default())
            .is_err()
        {
            return;
        }
    }
}

fn window_size() -> WindowSize {
    match tcgetwinsize(rustix::stdio::stdin()) {
        Ok(size) => WindowSize {
            rows: size.ws_row,
            columns: size.ws_col,
        },
        Err(_) => WindowSize {
            rows: 24,
            columns: 80,
        },
    }
}

/// The terminal in raw mode; back as it was when dropped.
struct RawTerminal(Termios);

impl RawTerminal {
    fn new() -> rustix::io::Result<Self> {
        let before = tcgetattr(rustix::stdio::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // A terminal that is gone has no mode.
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &self.0);
    }
}
