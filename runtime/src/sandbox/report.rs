// SPDX-License-Identifier: Apache-2.0

//! What the process that a caller runs (`create`, `exec -d`) and the one that it leaves behind tell each other: one
//! line of JSON each way over a socket pair that the second one inherits.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use rustix::io::{FdFlags, fcntl_setfd};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{RuntimeError, chain};
use crate::sys;

/// Longest line, bytes.
const MAX_LINE: u64 = 16 << 20;

/// What became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Report {
    /// The container is created, or the exec's process runs.
    Ready {},
    /// It is not, and nothing is left to wait for.
    Failed {
        /// The chain of causes.
        message: String,
        /// What the caller is to end with.
        exit_status: u8,
    },
}

impl Report {
    /// The report of a failure.
    pub fn of(error: &RuntimeError) -> Self {
        Self::Failed {
            message: chain(error),
            exit_status: error.exit_status(),
        }
    }

    /// The failure as an error again.
    ///
    /// # Errors
    /// When it reports one.
    pub fn into_result(self) -> Result<(), RuntimeError> {
        match self {
            Self::Ready {} => Ok(()),
            Self::Failed {
                message,
                exit_status,
            } => Err(RuntimeError::Reported {
                message,
                exit_status,
            }),
        }
    }
}

/// One end of the socket pair.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
}

impl Channel {
    /// The end that this process inherited as descriptor `fd`.
    ///
    /// # Errors
    /// When there is no such descriptor.
    pub fn inherited(fd: i32) -> Result<Self, RuntimeError> {
        let fd =
            sys::take_inherited_fd(fd).map_err(RuntimeError::system("take the sync socket"))?;
        Ok(Self {
            stream: UnixStream::from(fd),
        })
    }

    /// Starts this program again with `arguments`, and `--sync-fd` with the other end; it inherits stdio.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(arguments: &[std::ffi::OsString]) -> Result<(Self, Child), RuntimeError> {
        let (ours, theirs) =
            UnixStream::pair().map_err(RuntimeError::system("make a socket pair"))?;
        let theirs = OwnedFd::from(theirs);
        sys::close_all_on_exec().map_err(RuntimeError::system("close descriptors"))?;
        fcntl_setfd(&theirs, FdFlags::empty())
            .map_err(RuntimeError::system("share the sync socket"))?;
        let child = Command::new("/proc/self/exe")
            .arg0("caisson")
            .args(arguments)
            .arg("--sync-fd")
            .arg(theirs.as_raw_fd().to_string())
            .spawn()
            .map_err(RuntimeError::system("start the per-container process"))?;
        Ok((Self { stream: ours }, child))
    }

    /// Sends a line.
    ///
    /// # Errors
    /// When the other end is gone.
    pub fn send<T: Serialize>(&mut self, value: &T) -> io::Result<()> {
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        self.stream.write_all(&line)
    }

    /// Waits for a line. `None` when the other end was closed instead.
    ///
    /// # Errors
    /// When the line is no such value.
    pub fn receive<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        let mut line = Vec::new();
        BufReader::new((&self.stream).take(MAX_LINE)).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(None);
        }
        Ok(Some(serde_json::from_slice(&line)?))
    }

    /// Waits for the report of `child`, which has the other end.
    ///
    /// # Errors
    /// The failure that it reports, or that it ended without a report.
    pub fn outcome(mut self, child: &mut Child) -> Result<(), RuntimeError> {
        match self.receive::<Report>() {
            Ok(Some(report)) => report.into_result(),
            Ok(None) | Err(_) => {
                let how = match child.wait() {
                    Ok(status) => status.to_string(),
                    Err(error) => error.to_string(),
                };
                Err(RuntimeError::Reported {
                    message: format!("the per-container process ended without a report: {how}"),
                    exit_status: 1,
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_cross_the_channel_and_a_closed_one_is_seen() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut a, mut b) = (Channel { stream: a }, Channel { stream: b });
        let report = Report::Failed {
            message: "why\nnot".into(),
            exit_status: 127,
        };
        a.send(&report).unwrap();
        assert_eq!(b.receive::<Report>().unwrap(), Some(report.clone()));
        assert_eq!(report.into_result().unwrap_err().exit_status(), 127);
        drop(a);
        assert_eq!(b.receive::<Report>().unwrap(), None);
    }
}
