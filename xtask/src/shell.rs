// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask shell`: one command, or a prompt, in a testbed.

use std::io::{self, IsTerminal, Read, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use caisson_testbed::frame::WindowSize;
use caisson_testbed::{Command, Event, Options, Running, Share, Stdin, Testbed};
use clap::Args;
use nix::sys::signal::{SigSet, Signal};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::{build, install, say};

/// Options of `shell`.
#[derive(Debug, Args)]
pub(crate) struct Shell {
    /// Run this line with `bash -c` instead of giving a prompt
    #[arg(short, long, value_name = "LINE")]
    command: Option<String>,
    /// A directory of the host, read-write at /share
    #[arg(long, value_name = "DIR")]
    share: Option<PathBuf>,
    /// Without building and installing Caisson
    #[arg(long)]
    no_install: bool,
    /// Memory of the machine
    #[arg(long, value_name = "MIB", default_value_t = 6144)]
    memory: u32,
    /// Processors of the machine; more than one is for hunting races, see docs/testing.md
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// Count instructions instead of time: every run takes the same virtual time
    #[arg(long)]
    icount: bool,
    /// Keep the output of the machine's console in this file
    #[arg(long, value_name = "FILE")]
    console_log: Option<PathBuf>,
}

impl Shell {
    pub(crate) fn run(self) -> Result<u8> {
        let mut options = Options::new(build::testbed_init()?);
        options.memory_mib = self.memory;
        options.cpus = self.cpus;
        options.instruction_count = self.icount;
        options.console_log = self.console_log;
        if let Some(dir) = self.share {
            let dir = dir
                .canonicalize()
                .with_context(|| format!("no directory {dir:?}"))?;
            options.shares.push(Share {
                dir,
                path: "/share".to_owned(),
                read_only: false,
            });
        }
        let stage = match self.no_install {
            true => None,
            false => Some(install::staged()?),
        };
        options.install = stage.as_ref().map(|stage| stage.path().to_owned());
        let terminal = self.command.is_none() && io::stdin().is_terminal();
        let window = match terminal {
            true => Some(SigSet::from(Signal::SIGWINCH)),
            false => None,
        };
        // Before the testbed's threads are started.
        window
            .as_ref()
            .map(SigSet::thread_block)
            .transpose()
            .context("failed to block SIGWINCH")?;

        let testbed = Testbed::start(&options)?;
        for warning in &testbed.hello().warnings {
            say(&format!("testbed: {warning}"));
        }
        let mut command = match &self.command {
            Some(line) => Command::new(["bash", "-c", line]),
            None => Command::new(["bash", "-l"]),
        };
        if let Ok(term) = std::env::var("TERM") {
            command = command.env("TERM", &term);
        }
        let status = match window {
            Some(signals) => interactive(&testbed, command, signals),
            None => forward(&mut testbed.spawn(&command)?),
        };
        let status = status.with_context(|| format!("in the testbed{}", testbed.console_tail()))?;
        testbed.shutdown();
        Ok(status)
    }
}

/// Runs the command on a terminal that follows this one.
fn interactive(testbed: &Testbed, mut command: Command, signals: SigSet) -> Result<u8> {
    command.tty = Some(window_size());
    let raw = RawTerminal::new().context("failed to set the terminal")?;
    let mut running = testbed.spawn(&command)?;
    let resize = running.resizer();
    std::thread::spawn(
        move || {
            while signals.wait().is_ok() && resize(window_size()).is_ok() {}
        },
    );
    let status = forward(&mut running);
    drop(raw);
    status
}

/// Passes stdin in and stdout and stderr out, to the end of the command.
fn forward(running: &mut Running) -> Result<u8> {
    if let Some(stdin) = running.take_stdin() {
        // Not joined: it may wait for input that never comes.
        std::thread::spawn(move || pass_stdin(stdin));
    }
    loop {
        match running.next_event()? {
            Event::Stdout(bytes) => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(&bytes).and_then(|()| stdout.flush())
            }
            Event::Stderr(bytes) => io::stderr().lock().write_all(&bytes),
            Event::Exited(exit) => return Ok(exit.shell_status()),
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
