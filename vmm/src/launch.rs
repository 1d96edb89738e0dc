// SPDX-License-Identifier: Apache-2.0

//! One run of `caisson-vmm`: configuration in, events out, and the cause of the end.

use std::fs::File;
use std::io::{self, Read, Write};

use caisson_protocol::control::{ExitCause, VmEvent};
use caisson_protocol::vm::MAX_CONFIG_BYTES;
use rustix::time::{ClockId, clock_gettime};

use crate::builder::{self, BuildError};
use crate::control::{ControlError, ControlServer};
use crate::error::chain;
use crate::machine::{Machine, MachineError};
use crate::plan::{PlanError, VmPlan, host_memory_bytes};

/// Longest tail of the console in the last event, bytes.
const CONSOLE_TAIL: usize = 4096;

/// A machine that never ran.
#[derive(Debug, thiserror::Error)]
enum LaunchError {
    #[error("failed to read the configuration")]
    Read(#[source] io::Error),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error(transparent)]
    Start(#[from] MachineError),
}

/// The status pipe.
#[derive(Debug)]
pub struct StatusPipe(Option<File>);

impl StatusPipe {
    /// Events go to `file`, or nowhere.
    pub fn new(file: Option<File>) -> Self {
        Self(file)
    }

    /// Writes one event. Nobody reading is no reason to end.
    fn send(&mut self, event: &VmEvent) {
        let Some(file) = &mut self.0 else { return };
        let result = serde_json::to_vec(event)
            .map_err(io::Error::from)
            .and_then(|mut line| {
                line.push(b'\n');
                file.write_all(&line)
            });
        if let Err(error) = result {
            log::warn!("failed to write to the status pipe: {error}");
        }
    }
}

/// CLOCK_MONOTONIC, nanoseconds.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // Since boot: neither is negative.
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
}

/// Reads the configuration, makes the machine, runs it to its end. `exec_ns` is when the process began.
pub fn run(config: impl Read, mut status: StatusPipe, exec_ns: u64) -> ExitCause {
    let (cause, tail) = match launch(config, &mut status, exec_ns) {
        Ok((mut machine, mut server)) => {
            let (force, failure) = match server.run(&mut machine) {
                Ok(force) => (force, None),
                Err(error) => (
                    true,
                    Some(ExitCause::Vmm {
                        message: chain(&error),
                    }),
                ),
            };
            let cause = machine.shut_down(force);
            (
                failure.unwrap_or(cause),
                machine.console().tail(CONSOLE_TAIL),
            )
        }
        Err(error) => (
            ExitCause::Setup {
                message: chain(&error),
            },
            Vec::new(),
        ),
    };
    status.send(&VmEvent::Exited {
        cause: cause.clone(),
        console_tail: text_tail(&tail),
    });
    cause
}

/// Text of at most [`CONSOLE_TAIL`] bytes.
fn text_tail(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut start = text.len().saturating_sub(CONSOLE_TAIL);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    text.get(start..).unwrap_or_default().to_owned()
}

/// Whether a run that ended so went as it should.
pub fn is_orderly(cause: &ExitCause) -> bool {
    match cause {
        ExitCause::GuestReset {} | ExitCause::Stopped {} => true,
        ExitCause::GuestPanic { .. }
        | ExitCause::TripleFault {}
        | ExitCause::Kvm { .. }
        | ExitCause::Setup { .. }
        | ExitCause::Vmm { .. } => false,
    }
}

fn launch(
    config: impl Read,
    status: &mut StatusPipe,
    exec_ns: u64,
) -> Result<(Machine, ControlServer), LaunchError> {
    let mut json = Vec::new();
    config
        .take(MAX_CONFIG_BYTES as u64 + 1)
        .read_to_end(&mut json)
        .map_err(LaunchError::Read)?;
    let plan = VmPlan::from_json(&json, host_memory_bytes())?;
    let server = ControlServer::bind(&plan.config().control_socket)?;
    let mut machine = builder::build(plan)?;
    status.send(&VmEvent::Started {
        exec_ns,
        run_ns: monotonic_ns(),
    });
    machine.start()?;
    Ok((machine, server))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::BufRead;

    fn events(json: &[u8]) -> (ExitCause, Vec<VmEvent>) {
        let (read, write) = io::pipe().unwrap();
        let status = StatusPipe::new(Some(File::from(std::os::fd::OwnedFd::from(write))));
        let cause = run(json, status, 0);
        let lines = io::BufReader::new(read).lines();
        let events = lines.map(|line| serde_json::from_str(&line.unwrap()).unwrap());
        (cause, events.collect())
    }

    #[test]
    fn what_cannot_be_made_ends_with_one_event_that_says_why() {
        let (cause, events) = events(b"{");
        let ExitCause::Setup { message } = &cause else {
            panic!("{cause:?}")
        };
        assert!(message.starts_with("the configuration is malformed: "));
        assert_eq!(
            events,
            [VmEvent::Exited {
                cause,
                console_tail: String::new()
            }]
        );
    }

    #[test]
    fn the_console_tail_is_bounded_whatever_the_guest_wrote() {
        assert_eq!(text_tail(b"abc"), "abc");
        let tail = text_tail(&[0xff; CONSOLE_TAIL]);
        assert!(tail.len() <= CONSOLE_TAIL && tail.len() > CONSOLE_TAIL - 4);
    }
}
