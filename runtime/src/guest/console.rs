// SPDX-License-Identifier: Apache-2.0

//! Terminals on this side of a guest's terminal.
//!
//! The guest's own pty does all that a terminal does (echo, line editing, turning ctrl-C into SIGINT). What is on
//! this side only carries bytes and a window size, so it is put in raw mode:
//!
//! - with `--console-socket`, a pty of which the caller gets the master over that socket (runc's protocol) and this
//!   process keeps the slave, as its controlling terminal so that SIGWINCH tells of new sizes;
//! - without it, the terminal that the caller runs in.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{
    OptionalActions, Termios, Winsize, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize,
};

use super::stdio::LocalStdio;
use crate::sys;

/// What goes wrong with a terminal.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The console socket cannot be reached.
    #[error("failed to connect to console socket {path}")]
    Socket {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A call on a terminal failed.
    #[error("failed to {operation}")]
    Terminal {
        /// What was tried.
        operation: &'static str,
        /// Why not.
        source: io::Error,
    },
}

fn terminal_error<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> ConsoleError {
    move |source| ConsoleError::Terminal {
        operation,
        source: source.into(),
    }
}

/// Rows and columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Size {
    /// Rows, 0 if unknown.
    pub rows: u16,
    /// Columns, 0 if unknown.
    pub columns: u16,
}

/// The terminal on this side.
#[derive(Debug)]
pub struct Console {
    tty: OwnedFd,
    /// What to put back at the end: only for a terminal that is not ours.
    restore: Option<Termios>,
    controlling: bool,
}

impl Console {
    /// Makes a pty, sends its master to `socket`, and keeps the slave. With `controlling`, which wants a session
    /// leader without a terminal, the slave becomes the controlling terminal.
    ///
    /// # Errors
    /// When the socket cannot be reached, or the kernel gives no pty.
    pub fn send_to(socket: &Path, size: Size, controlling: bool) -> Result<Self, ConsoleError> {
        let stream = UnixStream::connect(socket).map_err(|source| ConsoleError::Socket {
            path: socket.to_owned(),
            source,
        })?;
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).map_err(terminal_error("open a pty"))?;
        unlockpt(&master).map_err(terminal_error("unlock a pty"))?;
        let tty =
            ioctl_tiocgptpeer(&master, flags).map_err(terminal_error("open a pty's slave"))?;
        if size.rows != 0 && size.columns != 0 {
            let winsize = Winsize {
                ws_row: size.rows,
                ws_col: size.columns,
                ws_xpixel: 0,
                ws_ypixel: 0,
            };
            tcsetwinsize(&tty, winsize).map_err(terminal_error("set a pty's size"))?;
        }
        make_raw(&tty)?;
        if controlling {
            rustix::process::ioctl_tiocsctty(&tty)
                .map_err(terminal_error("take a pty as controlling terminal"))?;
        }
        send_fd(&stream, master.as_fd()).map_err(terminal_error("send the pty's master"))?;
        Ok(Self {
            tty,
            restore: None,
            controlling,
        })
    }

    /// This process's own terminal (its stdin), put in raw mode until this is dropped.
    ///
    /// # Errors
    /// When stdin is no terminal.
    pub fn own() -> Result<Self, ConsoleError> {
        let tty = io::stdin()
            .as_fd()
            .try_clone_to_owned()
            .map_err(terminal_error("open the terminal"))?;
        let before = make_raw(&tty)?;
        Ok(Self {
            tty,
            restore: Some(before),
            controlling: false,
        })
    }

    /// Its size now.
    pub fn size(&self) -> Size {
        tcgetwinsize(&self.tty).map_or(Size::default(), |size| Size {
            rows: size.ws_row,
            columns: size.ws_col,
        })
    }

    /// Its ends for [`super::stdio::attach`].
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn stdio(&self) -> Result<LocalStdio, ConsoleError> {
        let clone = || {
            self.tty
                .try_clone()
                .map_err(terminal_error("share the terminal"))
        };
        Ok(LocalStdio {
            stdin: Some(clone()?),
            stdout: Some(clone()?),
            stderr: None,
        })
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // There is nobody to tell if the terminal is gone.
        if let Some(before) = &self.restore {
            tcsetattr(&self.tty, OptionalActions::Now, before).unwrap_or_default();
        }
        if self.controlling {
            sys::release_controlling_terminal(self.tty.as_fd()).unwrap_or_default();
        }
    }
}

/// Raw mode; gives back what it was before.
fn make_raw(tty: &OwnedFd) -> Result<Termios, ConsoleError> {
    let before = tcgetattr(tty).map_err(terminal_error("read the terminal's mode"))?;
    let mut raw = before.clone();
    raw.make_raw();
    tcsetattr(tty, OptionalActions::Now, &raw)
        .map_err(terminal_error("set the terminal's mode"))?;
    Ok(before)
}

/// Sends a descriptor as runc does: SCM_RIGHTS with a name as payload.
fn send_fd(stream: &UnixStream, fd: BorrowedFd<'_>) -> io::Result<()> {
    let fds = [fd];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    let name = [IoSlice::new(b"/dev/ptmx")];
    sendmsg(stream, &name, &mut control, SendFlags::empty())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

    use super::*;

    fn receive_fd(stream: &UnixStream) -> OwnedFd {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut payload = [0; 64];
        let mut iov = [io::IoSliceMut::new(&mut payload)];
        let got = recvmsg(stream, &mut iov, &mut control, RecvFlags::empty()).unwrap();
        assert!(got.bytes > 0, "runc's clients want a payload");
        let message = control.drain().next().unwrap();
        let RecvAncillaryMessage::ScmRights(mut fds) = message else {
            panic!("no descriptor");
        };
        fds.next().unwrap()
    }

    #[test]
    fn the_master_arrives_and_carries_bytes_untouched_both_ways() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let size = Size {
            rows: 33,
            columns: 77,
        };
        let console = Console::send_to(&path, size, false).unwrap();
        let master = receive_fd(&listener.accept().unwrap().0);
        assert_eq!(console.size(), size);
        let ends = console.stdio().unwrap();
        let mut ours = File::from(ends.stdin.unwrap());
        let mut theirs = File::from(master);
        let bytes = b"\x03\x04\r\n\x1a";
        let mut read = [0; 5];
        theirs.write_all(bytes).unwrap();
        ours.read_exact(&mut read).unwrap();
        assert_eq!(&read, bytes);
        ours.write_all(bytes).unwrap();
        theirs.read_exact(&mut read).unwrap();
        assert_eq!(&read, bytes);
    }

    #[test]
    fn a_socket_that_is_not_there_is_named() {
        let error = Console::send_to(Path::new("/nonexistent"), Size::default(), false);
        assert!(error.unwrap_err().to_string().contains("/nonexistent"));
    }
}
