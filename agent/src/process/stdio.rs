// SPDX-License-Identifier: Apache-2.0

//! The pipes of a process: its ends, and ours until the host attaches to them.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use caisson_protocol::agent::agent::Stdio;
use rustix::fs::{Gid, Uid};
use rustix::pipe::{PipeFlags, pipe_with};

use super::StreamError;

/// One of our ends.
#[derive(Debug, Default)]
pub(crate) enum StreamSlot {
    /// The process has /dev/null there.
    #[default]
    NotRequested,
    /// Nobody attached yet.
    Waiting(OwnedFd),
    /// A pump has it, or it was closed.
    Taken,
}

impl StreamSlot {
    /// Takes the descriptor, once.
    ///
    /// # Errors
    /// When there is none or it was taken.
    pub(crate) fn take(&mut self) -> Result<OwnedFd, StreamError> {
        match std::mem::replace(self, Self::Taken) {
            Self::Waiting(fd) => Ok(fd),
            Self::Taken => Err(StreamError::Attached),
            Self::NotRequested => {
                *self = Self::NotRequested;
                Err(StreamError::NotRequested)
            }
        }
    }

    /// Closes it if nobody took it.
    pub(crate) fn close(&mut self) {
        if matches!(self, Self::Waiting(_)) {
            *self = Self::Taken;
        }
    }
}

/// Our ends of a process's streams.
#[derive(Debug, Default)]
pub(crate) struct HostEnds {
    /// We write.
    pub(crate) stdin: StreamSlot,
    /// We read.
    pub(crate) stdout: StreamSlot,
    /// We read.
    pub(crate) stderr: StreamSlot,
    /// The master, for resizing.
    pub(crate) terminal: Option<OwnedFd>,
}

impl HostEnds {
    /// Those of a process with a terminal: stdin and stdout are its master.
    ///
    /// # Errors
    /// When no more descriptors are to be had.
    pub(crate) fn of_terminal(master: OwnedFd, stdio: &Stdio) -> std::io::Result<Self> {
        let slot = |asked: bool| -> std::io::Result<StreamSlot> {
            Ok(if asked {
                StreamSlot::Waiting(master.try_clone()?)
            } else {
                StreamSlot::NotRequested
            })
        };
        Ok(Self {
            stdin: slot(stdio.stdin)?,
            stdout: slot(stdio.stdout)?,
            stderr: StreamSlot::NotRequested,
            terminal: Some(master),
        })
    }
}

/// Makes the pipes asked for, and gives our ends and the process's (stdin, stdout, stderr; /dev/null where
/// none was asked for, and for a terminal, which the process makes itself). The process's ends belong to
/// `owner`, so that it can open `/dev/stdout` again.
///
/// # Errors
/// When no more descriptors are to be had.
pub(crate) fn make_pipes(
    stdio: &Stdio,
    owner: (u32, u32),
) -> std::io::Result<(HostEnds, [OwnedFd; 3])> {
    let pipe = |asked: bool| -> std::io::Result<Option<(OwnedFd, OwnedFd)>> {
        if !asked || stdio.terminal {
            return Ok(None);
        }
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        let (uid, gid) = (Uid::from_raw(owner.0), Gid::from_raw(owner.1));
        rustix::fs::fchown(read.as_fd(), Some(uid), Some(gid))?;
        Ok(Some((read, write)))
    };
    let null = || -> std::io::Result<OwnedFd> {
        let file = File::options().read(true).write(true).open("/dev/null")?;
        Ok(file.into())
    };
    let (mut ends, mut theirs) = (HostEnds::default(), [null()?, null()?, null()?]);
    let [stdin, stdout, stderr] = &mut theirs;
    if let Some((read, write)) = pipe(stdio.stdin)? {
        ends.stdin = StreamSlot::Waiting(write);
        *stdin = read;
    }
    for (asked, slot, theirs) in [
        (stdio.stdout, &mut ends.stdout, stdout),
        (stdio.stderr, &mut ends.stderr, stderr),
    ] {
        if let Some((read, write)) = pipe(asked)? {
            *slot = StreamSlot::Waiting(read);
            *theirs = write;
        }
    }
    Ok((ends, theirs))
}
