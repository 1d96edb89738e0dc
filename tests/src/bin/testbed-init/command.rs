// SPDX-License-Identifier: Apache-2.0

//! Runs one command: a session of its own, on pipes or on a terminal, with a thread for each stream.
//!
//! The end of the process is the end of the command: what it wrote is sent to the last byte, what processes
//! that it left behind write afterwards is read and thrown away (so that they meet no closed pipe).

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::Command;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use anyhow::{Context, Result};
use caisson_testbed::frame::{Exit, Frame, RunRequest, Stream, WindowSize};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::{Pid, setsid};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};

use crate::machine::ENVIRONMENT;
use crate::server::{Credit, Port, Started, lock};

/// Most bytes in one frame of output.
const CHUNK: usize = 32 * 1024;

/// The master side of a command's terminal.
pub(crate) struct Terminal(OwnedFd);

impl Terminal {
    /// Gives the terminal a new size; a terminal that has just gone needs none.
    pub(crate) fn resize(&self, size: WindowSize) {
        let _ = rustix::termios::tcsetwinsize(
            &self.0,
            rustix::termios::Winsize {
                ws_row: size.rows,
                ws_col: size.columns,
                ws_xpixel: 0,
                ws_ypixel: 0,
            },
        );
    }
}

/// A command and its way to the host.
pub(crate) struct Task {
    pub(crate) channel: u32,
    pub(crate) port: Arc<Port>,
    pub(crate) stdin: mpsc::Receiver<Vec<u8>>,
    pub(crate) stdout: Arc<Credit>,
    pub(crate) stderr: Arc<Credit>,
    pub(crate) started: Arc<Mutex<Option<Started>>>,
}

/// The machine's ends of a command's streams.
struct Ends {
    stdin: OwnedFd,
    stdout: OwnedFd,
    /// None on a terminal.
    stderr: Option<OwnedFd>,
}

/// A stream on its way to the host.
struct Pump {
    source: File,
    credit: Arc<Credit>,
    port: Arc<Port>,
    channel: u32,
    frame: fn(Vec<u8>) -> Frame,
    /// Becomes readable when the process has ended. A terminal ends by itself when its session does.
    ended: Option<Arc<EventFd>>,
}

impl Task {
    /// Runs the command to its end and gives the frame that says how it ended.
    pub(crate) fn run(self, request: RunRequest) -> Frame {
        match self.try_run(request) {
            Ok(exit) => Frame::Exited(exit),
            Err(error) => Frame::Refused(format!("{error:#}")),
        }
    }

    fn try_run(self, request: RunRequest) -> Result<Exit> {
        let (program, arguments) = request.argv.split_first().context("the command is empty")?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .envs(ENVIRONMENT)
            .envs(request.env);
        command.current_dir(request.cwd.as_deref().unwrap_or("/root"));
        let ends = match request.tty {
            Some(size) => on_terminal(&mut command, size)?,
            None => on_pipes(&mut command)?,
        };
        let tty = request.tty.is_some();
        let terminal = match tty {
            true => Some(Terminal(
                ends.stdin
                    .try_clone()
                    .context("failed to keep the terminal")?,
            )),
            false => None,
        };
        let ended = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
        let mut child = command
            .spawn()
            .with_context(|| format!("failed to run {program}"))?;
        // It holds the child's ends of the streams, and a stream with an open writer never ends.
        drop(command);
        let pid = Pid::from_raw(i32::try_from(child.id()).context("pid out of range")?);
        *lock(&self.started) = Some(Started { pid, terminal });

        let (port, channel, stdin) = (Arc::clone(&self.port), self.channel, self.stdin);
        thread::spawn(move || feed(&port, channel, &stdin, File::from(ends.stdin), tty));
        let (drained, all_drained) = mpsc::channel();
        let stdout = (
            ends.stdout,
            self.stdout,
            Frame::Stdout as fn(Vec<u8>) -> Frame,
        );
        let stderr = ends
            .stderr
            .map(|fd| (fd, self.stderr, Frame::Stderr as fn(_) -> _));
        for (source, credit, frame) in std::iter::once(stdout).chain(stderr) {
            let pump = Pump {
                source: File::from(source),
                credit,
                port: Arc::clone(&self.port),
                channel,
                frame,
                ended: (!tty).then(|| Arc::clone(&ended)),
            };
            let drained = drained.clone();
            thread::spawn(move || pump.run(drained));
        }
        drop(drained);
        let status = child.wait().context("failed to wait for the command")?;
        ended
            .write(1)
            .context("failed to tell the end of the command")?;
        // Fails, and so ends, when every pump has dropped its sender.
        while all_drained.recv().is_ok() {}
        Ok(match (status.code(), status.signal()) {
            (Some(code), _) => Exit::Code(code),
            (None, signal) => Exit::Signal(signal.unwrap_or(0)),
        })
    }
}

/// Gives the command three pipes.
fn on_pipes(command: &mut Command) -> Result<Ends> {
    let (child_stdin, stdin) = io::pipe().context("failed to make a pipe")?;
    let (stdout, child_stdout) = io::pipe().context("failed to make a pipe")?;
    let (stderr, child_stderr) = io::pipe().context("failed to make a pipe")?;
    command
        .stdin(child_stdin)
        .stdout(child_stdout)
        .stderr(child_stderr);
    // SAFETY: between fork and exec this calls setsid(2) alone, which is async-signal-safe, and converts
    // its errno without allocating.
    unsafe {
        command.pre_exec(|| {
            setsid()?;
            Ok(())
        });
    }
    Ok(Ends {
        stdin: stdin.into(),
        stdout: stdout.into(),
        stderr: Some(stderr.into()),
    })
}

/// Gives the command a terminal of its own, which controls its session.
fn on_terminal(command: &mut Command, size: WindowSize) -> Result<Ends> {
    let open = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(open).context("failed to open a terminal")?;
    grantpt(&master)
        .and_then(|()| unlockpt(&master))
        .context("failed to unlock a terminal")?;
    let slave = ioctl_tiocgptpeer(&master, open).context("failed to open a terminal's slave")?;
    let terminal = Terminal(master);
    terminal.resize(size);
    let duplicate = |fd: &OwnedFd| fd.try_clone().context("failed to duplicate a terminal");
    command
        .stdin(duplicate(&slave)?)
        .stdout(duplicate(&slave)?)
        .stderr(slave);
    // SAFETY: between fork and exec this calls setsid(2) and ioctl(2) alone, on the child's stdin, which
    // is the terminal by then; both are async-signal-safe, and their errors are converted without
    // allocating.
    unsafe {
        command.pre_exec(|| {
            setsid()?;
            rustix::process::ioctl_tiocsctty(io::stdin())?;
            Ok(())
        });
    }
    Ok(Ends {
        stdin: duplicate(&terminal.0)?,
        stdout: terminal.0,
        stderr: None,
    })
}

/// Writes what comes for the command's stdin, and gives the host credit for it again.
fn feed(port: &Port, channel: u32, bytes: &mpsc::Receiver<Vec<u8>>, mut stdin: File, tty: bool) {
    let mut open = true;
    for bytes in bytes {
        // A command that does not read its input to the end is none of our business.
        open = open && stdin.write_all(&bytes).is_ok();
        // A frame's payload is at most MAX_PAYLOAD bytes.
        let length = u32::try_from(bytes.len()).unwrap_or(0);
        port.send(channel, &Frame::Credit(Stream::Stdin, length));
    }
    if tty && open {
        // End of file, as typed: ^D. A terminal cannot be closed on one side.
        drop(stdin.write_all(&[4]));
    }
}

impl Pump {
    /// Sends until the stream or the process ends, drops `drained`, and throws away what comes after.
    fn run(mut self, drained: mpsc::Sender<()>) {
        if let Err(error) = self.send_all() {
            crate::log(&format!("testbed-init: {error:#}"));
        }
        drop(drained);
        let mut rest = [0; 4096];
        while matches!(self.source.read(&mut rest), Ok(1..)) {}
    }

    fn send_all(&mut self) -> Result<()> {
        let mut buffer = vec![0; CHUNK];
        loop {
            if self.wait()? {
                // The process has ended; what it wrote is in the pipe by now, and no more is its own.
                let mut left = rustix::io::ioctl_fionread(&self.source)
                    .context("failed to see how much output is left")?;
                while left > 0 {
                    let wanted = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
                    let length = self.send_some(&mut buffer[..wanted])?;
                    if length == 0 {
                        break;
                    }
                    left = left.saturating_sub(length as u64);
                }
                return Ok(());
            }
            if self.send_some(&mut buffer)? == 0 {
                return Ok(());
            }
        }
    }

    /// Waits for output (false) or for the end of the process (true).
    fn wait(&self) -> Result<bool> {
        let Some(ended) = &self.ended else {
            return Ok(false);
        };
        let mut fds = [
            PollFd::new(ended.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.source.as_fd(), PollFlags::POLLIN),
        ];
        loop {
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) => return Ok(fds[0].any().unwrap_or(true)),
                Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("failed to wait for output"),
            }
        }
    }

    /// Reads once and sends that; 0 at the end. A terminal whose last holder has gone answers EIO.
    fn send_some(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let length = loop {
            match self.source.read(buffer) {
                Ok(length) => break length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::EIO) => break 0,
                Err(error) => return Err(error).context("failed to read output"),
            }
        };
        if length > 0 {
            self.credit.take(length);
            self.port
                .send(self.channel, &(self.frame)(buffer[..length].to_vec()));
        }
        Ok(length)
    }
}
