// SPDX-License-Identifier: Apache-2.0

//! A container's processes as `ps` shows them, from /proc.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read};

use caisson_protocol::agent::agent::ProcessInfo;

use crate::process::wall_clock_ns;

/// Most bytes of a command line in an answer.
const MAX_COMMAND: u64 = 4096;
/// Most processes in an answer.
const MAX_PROCESSES: usize = 4096;
/// Major number of the devices of pseudo-terminals.
const PTS_MAJOR: u64 = 136;

/// What `ps` shows of `pids`; those that ended meanwhile are left out. `execs` has the exec ids by pid.
pub(crate) fn list(pids: &[i32], execs: &HashMap<i32, String>) -> Vec<ProcessInfo> {
    let clock = Clock::now();
    let mut found: Vec<ProcessInfo> = { pids.iter() }
        .take(MAX_PROCESSES)
        .filter_map(|pid| read(*pid, &clock).ok())
        .collect();
    for process in &mut found {
        let exec = i32::try_from(process.pid)
            .ok()
            .and_then(|pid| execs.get(&pid));
        process.exec_id = exec.cloned().unwrap_or_default();
    }
    found
}

/// For turning the kernel's ticks since boot into wall clock.
struct Clock {
    boot_ns: u64,
    tick_ns: u64,
}

impl Clock {
    fn now() -> Self {
        let since_boot = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let seconds = u64::try_from(since_boot.tv_sec).unwrap_or_default();
        let nanoseconds = u64::try_from(since_boot.tv_nsec).unwrap_or_default();
        let since_boot_ns = seconds * 1_000_000_000 + nanoseconds;
        let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK);
        let ticks = ticks
            .ok()
            .flatten()
            .and_then(|ticks| u64::try_from(ticks).ok());
        Self {
            boot_ns: wall_clock_ns().saturating_sub(since_boot_ns),
            tick_ns: 1_000_000_000 / ticks.filter(|ticks| *ticks > 0).unwrap_or(100),
        }
    }
}

fn read(pid: i32, clock: &Clock) -> io::Result<ProcessInfo> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let stat = parse_stat(&stat).ok_or(io::ErrorKind::InvalidData)?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let mut command = Vec::new();
    let file = File::open(format!("/proc/{pid}/cmdline"))?;
    file.take(MAX_COMMAND).read_to_end(&mut command)?;
    Ok(ProcessInfo {
        pid: u32::try_from(pid).unwrap_or_default(),
        parent_pid: stat.parent_pid,
        uid: effective_uid(&status).unwrap_or_default(),
        command: command_line(&command).unwrap_or_else(|| format!("[{}]", stat.name)),
        start_time_ns: clock.boot_ns + stat.start_ticks.saturating_mul(clock.tick_ns),
        cpu_time_ns: stat.cpu_ticks.saturating_mul(clock.tick_ns),
        terminal: terminal_name(stat.terminal),
        ..Default::default()
    })
}

#[derive(Debug, PartialEq, Eq)]
struct Stat {
    name: String,
    parent_pid: u32,
    terminal: u64,
    cpu_ticks: u64,
    start_ticks: u64,
}

/// The fields of proc_pid_stat(5) that are shown. The name may hold spaces and parentheses.
fn parse_stat(text: &str) -> Option<Stat> {
    let (before, after) = text.rsplit_once(") ")?;
    let (_, name) = before.split_once(" (")?;
    let fields: Vec<&str> = after.split_whitespace().collect();
    // `fields` begins with field 3 of the manual page.
    let number = |field: usize| fields.get(field - 3)?.parse::<i64>().ok();
    let unsigned = |field| u64::try_from(number(field)?).ok();
    Some(Stat {
        name: name.to_owned(),
        parent_pid: u32::try_from(number(4)?).ok()?,
        terminal: u64::try_from(number(7)?).unwrap_or_default(),
        cpu_ticks: unsigned(14)?.checked_add(unsigned(15)?)?,
        start_ticks: unsigned(22)?,
    })
}

fn effective_uid(status: &str) -> Option<u32> {
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

fn command_line(bytes: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(bytes);
    let words: Vec<&str> = text.trim_end_matches('\0').split('\0').collect();
    let line = words.join(" ");
    (!line.is_empty()).then_some(line)
}

fn terminal_name(device: u64) -> String {
    let (major, minor) = (
        (device >> 8) & 0xfff,
        (device & 0xff) | ((device >> 12) & 0xfff00),
    );
    if major == PTS_MAJOR {
        format!("pts/{minor}")
    } else {
        "?".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_and_spaces_does_not_shift_the_fields() {
        let text = "12 (a) R (b) S 3 12 12 34817 12 0 0 0 0 0 7 5 0 0 20 0 1 0 900 0 0\n";
        let want = Stat {
            name: "a) R (b".into(),
            parent_pid: 3,
            terminal: 34817,
            cpu_ticks: 12,
            start_ticks: 900,
        };
        assert_eq!(parse_stat(text), Some(want));
        assert_eq!(parse_stat("12 (short) S 3"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn terminals_and_commands_are_named_as_by_ps() {
        assert_eq!(terminal_name(34817), "pts/1");
        assert_eq!(terminal_name(0), "?");
        assert_eq!(command_line(b"sh\0-c\0x y\0").as_deref(), Some("sh -c x y"));
        assert_eq!(command_line(b""), None);
    }

    #[test]
    fn this_process_is_found_with_its_parent() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let execs = HashMap::from([(pid, "e".to_owned())]);
        let found = list(&[pid, i32::MAX], &execs);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].parent_pid, std::os::unix::process::parent_id());
        assert_eq!(found[0].exec_id, "e");
        let age = wall_clock_ns() - found[0].start_time_ns;
        assert!(age < 3_600_000_000_000, "started an hour ago? {age}");
    }
}
