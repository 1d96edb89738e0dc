// SPDX-License-Identifier: Apache-2.0

//! The testbed kernel's trace events: what KVM and exec do, and when, without a word from who is measured.
//! <https://docs.kernel.org/trace/events.html>
//!
//! A guest's init has begun when its vCPU leaves the guest for the first time at a user space address: a C
//! library asks CPUID as the first thing it does, and that always leaves the guest.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const ROOT: &str = "/sys/kernel/tracing";
/// Addresses of position-independent programs, as a filter of events says it.
const USER: &str = "guest_rip > 0x10000000000 && guest_rip < 0x800000000000";
const USER_RANGE: std::ops::Range<u64> = 0x100_0000_0000..0x8000_0000_0000;
/// Nothing that is measured takes longer between two events, milliseconds.
const LIMIT_MS: u16 = 60_000;

/// An event of the trace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// A process has become another program.
    Exec { at_ns: u64, pid: u32, path: String },
    /// A vCPU is about to run the guest, at a low address: the firmware or the kernel's first instructions.
    Entry { at_ns: u64 },
    /// A vCPU has left the guest.
    Exit {
        at_ns: u64,
        reason: String,
        user: bool,
    },
}

/// Which exits are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exits {
    /// Of user space alone: the few that tell of init, which disturb no measured time.
    OfUserSpace,
    /// All, to be counted.
    All,
}

/// A running trace. Stopped when dropped.
#[derive(Debug)]
pub(crate) struct Trace {
    pipe: File,
    text: Vec<u8>,
}

fn write(name: &str, text: &str) -> Result<()> {
    let path = Path::new(ROOT).join(name);
    fs::write(&path, text).with_context(|| format!("failed to write {}", path.display()))
}

impl Trace {
    /// Starts one, empty.
    pub(crate) fn start(exits: Exits) -> Result<Self> {
        let root = PathBuf::from(ROOT);
        if !root.join("trace").exists() {
            nix::mount::mount(
                Some("tracefs"),
                &root,
                Some("tracefs"),
                nix::mount::MsFlags::empty(),
                None::<&str>,
            )
            .context("failed to mount tracefs")?;
        }
        write("events/enable", "0")?;
        write("trace_clock", "mono")?;
        write("buffer_size_kb", "16384")?;
        write("trace", "")?;
        let filter = match exits {
            Exits::OfUserSpace => USER,
            Exits::All => "0",
        };
        write("events/kvm/kvm_exit/filter", filter)?;
        write("events/kvm/kvm_entry/filter", "rip < 0x100000000")?;
        for event in ["kvm/kvm_exit", "kvm/kvm_entry", "sched/sched_process_exec"] {
            write(&format!("events/{event}/enable"), "1")?;
        }
        let path = root.join("trace_pipe");
        let pipe =
            File::open(&path).with_context(|| format!("failed to open {}", path.display()))?;
        Ok(Self {
            pipe,
            text: Vec::new(),
        })
    }

    /// The next event; waits for it.
    pub(crate) fn next(&mut self) -> Result<Event> {
        loop {
            match self.ready()? {
                Some(event) => return Ok(event),
                None if self.wait(LIMIT_MS.into())? => self.fill()?,
                None => bail!("no event within {LIMIT_MS} ms"),
            }
        }
    }

    /// All events until init, with that.
    pub(crate) fn until_init(&mut self) -> Result<Vec<Event>> {
        let mut events = Vec::new();
        loop {
            let event = self.next()?;
            let init = matches!(event, Event::Exit { user: true, .. });
            events.push(event);
            if init {
                return Ok(events);
            }
        }
    }

    /// What has come and was not read yet. What is traced has ended before.
    pub(crate) fn rest(mut self) -> Result<Vec<Event>> {
        write("events/enable", "0")?;
        let mut events = Vec::new();
        loop {
            match self.ready()? {
                Some(event) => events.push(event),
                None if self.wait(PollTimeout::ZERO)? => self.fill()?,
                None => return Ok(events),
            }
        }
    }

    /// The next event of those that were read.
    fn ready(&mut self) -> Result<Option<Event>> {
        while let Some(end) = self.text.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.text.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            if line.contains("LOST") {
                bail!("the trace has lost events: {}", line.trim());
            }
            if let Some(event) = parse(&line) {
                return Ok(Some(event));
            }
        }
        Ok(None)
    }

    fn wait(&self, limit: PollTimeout) -> Result<bool> {
        let mut fds = [PollFd::new(self.pipe.as_fd(), PollFlags::POLLIN)];
        Ok(poll(&mut fds, limit).context("failed to wait for the trace")? > 0)
    }

    fn fill(&mut self) -> Result<()> {
        let mut bytes = vec![0; 64 << 10];
        let length = self
            .pipe
            .read(&mut bytes)
            .context("failed to read the trace")?;
        self.text
            .extend_from_slice(bytes.get(..length).unwrap_or_default());
        Ok(())
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        // It is started anew each time.
        let _ = write("events/enable", "0");
    }
}

/// `task-pid [cpu] flags seconds: event: details`.
fn parse(line: &str) -> Option<Event> {
    let mut parts = line.splitn(3, ": ");
    let at_ns = nanoseconds(parts.next()?.rsplit(' ').next()?)?;
    let name = parts.next()?;
    let details = parts.next()?.trim();
    let field = |name: &str| {
        let mut words = details.split_whitespace();
        words.find(|word| *word == name).and_then(|_| words.next())
    };
    match name.trim() {
        "sched_process_exec" => {
            let (path, rest) = details.strip_prefix("filename=")?.rsplit_once(" pid=")?;
            let pid = rest.split(' ').next()?.parse().ok()?;
            let path = path.to_owned();
            Some(Event::Exec { at_ns, pid, path })
        }
        "kvm_entry" => Some(Event::Entry { at_ns }),
        "kvm_exit" => {
            let rip = field("rip")?.strip_prefix("0x")?;
            let rip = u64::from_str_radix(rip, 16).ok()?;
            // A reason may be two words, as `UD excp` is.
            let (_, reason) = details.split_once("reason ")?;
            let reason = reason.split(" rip ").next()?.to_owned();
            let user = USER_RANGE.contains(&rip);
            Some(Event::Exit {
                at_ns,
                reason,
                user,
            })
        }
        _ => None,
    }
}

/// `seconds.microseconds`.
fn nanoseconds(text: &str) -> Option<u64> {
    let (seconds, micros) = text.split_once('.')?;
    let seconds: u64 = seconds.parse().ok()?;
    let micros: u64 = micros.parse().ok()?;
    seconds
        .checked_mul(1_000_000_000)?
        .checked_add(micros * 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_trace_are_understood() {
        let exec = "   caisson-vmm-146     [000] .....     4.652978: sched_process_exec: filename=/usr/a b pid=146 old_pid=145";
        assert_eq!(
            parse(exec),
            Some(Event::Exec {
                at_ns: 4_652_978_000,
                pid: 146,
                path: "/usr/a b".to_owned()
            })
        );
        let exit = "  vcpu0-150 [000] d..1.  14.000001: kvm_exit: vcpu 0 reason UD excp rip 0x7f17f0aa15bf info1 0x0 info2 0x0";
        let parsed = parse(exit).unwrap();
        assert_eq!(
            parsed,
            Event::Exit {
                at_ns: 14_000_001_000,
                reason: "UD excp".to_owned(),
                user: true
            }
        );
        let kernel = exit.replace("0x7f17f0aa15bf", "0xffffffff81ef5996");
        assert!(matches!(
            parse(&kernel),
            Some(Event::Exit { user: false, .. })
        ));
        let entry =
            "  vcpu0-150 [000] d..1.  1.000005: kvm_entry: vcpu 0, rip 0xfff0 intr_info 0x0";
        assert_eq!(
            parse(entry),
            Some(Event::Entry {
                at_ns: 1_000_005_000
            })
        );
        assert_eq!(parse("CPU:0 [LOST 12 EVENTS]"), None);
        assert_eq!(parse(""), None);
    }
}
