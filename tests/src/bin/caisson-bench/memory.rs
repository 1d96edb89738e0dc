// SPDX-License-Identifier: Apache-2.0

//! Memory of a VMM and of an idle guest, from /proc/PID/smaps, and exits of an idle guest.

use std::ops::RangeInclusive;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::boot::MEMORY_MIB;
use crate::setup::Container;
use crate::trace::{Event, Exits, Trace};
use crate::vmm::{Guest, Monitor};
use crate::{Bench, Of};

/// Guests that are looked at, MiB.
const SIZES: [u64; 2] = [128, 512];
const ID: &str = "bench-memory";
/// A guest is idle after this.
const SETTLE: Duration = Duration::from_secs(60);
/// How long an idle guest's exits are counted.
const IDLE: Duration = Duration::from_secs(10);

pub(crate) fn measure(bench: &Bench) -> Result<()> {
    let idle = bench.setup.bundle("idle", &["sleep", "100000"])?;
    let guest = Guest::new(&bench.setup, MEMORY_MIB)?;
    // Memory varies less than times: fewer turns tell as much.
    for run in 0..bench.runs.min(3) {
        for size in SIZES {
            let config = bench.setup.config(size)?;
            let container = Container::start("caisson", ID, &idle, Some(&config))?;
            std::thread::sleep(SETTLE);
            let record = bench.setup.state_file(ID, "record.json")?;
            let pid = record["vmm"]["pid"]
                .as_u64()
                .context("the record has no VMM")?;
            let memory = Memory::of(pid, size)?;
            let trace = Trace::start(Exits::All)?;
            std::thread::sleep(IDLE);
            let exits = trace.rest()?;
            drop(container);
            let subject = format!("caisson, {size} MiB");
            let of = of(&subject, run);
            memory.tell(&of)?;
            let exits = exits
                .iter()
                .filter(|event| matches!(event, Event::Exit { .. }));
            of.tell("exits of 10 s", u64::try_from(exits.count())?)?;
        }
        for monitor in Monitor::all(&bench.setup) {
            let mut trace = Trace::start(Exits::OfUserSpace)?;
            let vmm = guest.start(monitor)?;
            trace.until_init()?;
            let memory = Memory::of(vmm.pid().into(), MEMORY_MIB)?;
            let subject = format!("{} at init, {MEMORY_MIB} MiB", monitor.name());
            memory.tell(&of(&subject, run))?;
        }
    }
    Ok(())
}

fn of(subject: &str, run: u32) -> Of<'_> {
    Of {
        part: "memory",
        subject,
        run,
    }
}

/// Of a VMM, KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Memory {
    /// The guest's pages that are there.
    guest: u64,
    /// Of those, what no other process shares.
    guest_private: u64,
    /// Pages that are not the guest's and of this process alone.
    own_private: u64,
    /// Pages that are not the guest's, shared ones divided among those who share them.
    own_pss: u64,
}

impl Memory {
    fn of(pid: u64, guest_mib: u64) -> Result<Self> {
        let path = format!("/proc/{pid}/smaps");
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("failed to read {path}"))?;
        sum(&mappings(&text), guest_mib << 20)
    }

    fn tell(&self, of: &Of<'_>) -> Result<()> {
        of.tell("guest_kib", self.guest)?;
        of.tell("guest_private_kib", self.guest_private)?;
        of.tell("own_private_kib", self.own_private)?;
        of.tell("own_pss_kib", self.own_pss)
    }
}

/// A line of smaps and those below it.
#[derive(Debug, Clone, Copy, Default)]
struct Mapping {
    start: u64,
    end: u64,
    rss: u64,
    private: u64,
    pss: u64,
}

fn mappings(smaps: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(first), value) = (words.next(), words.next()) else {
            continue;
        };
        let range = first.split_once('-').and_then(|(start, end)| {
            let hex = |text| u64::from_str_radix(text, 16).ok();
            Some((hex(start)?, hex(end)?))
        });
        if let Some((start, end)) = range {
            mappings.push(Mapping {
                start,
                end,
                ..Mapping::default()
            });
            continue;
        }
        let kib = value.and_then(|value| value.parse().ok()).unwrap_or(0);
        if let Some(mapping) = mappings.last_mut() {
            match first {
                "Rss:" => mapping.rss = kib,
                "Pss:" => mapping.pss = kib,
                "Private_Clean:" | "Private_Dirty:" => mapping.private += kib,
                _ => {}
            }
        }
    }
    mappings
}

/// The guest's memory is, of the runs of neighbouring mappings that are as long as it, the one with most in it:
/// an allocator's reservations can be as long, and are nearly empty.
fn sum(mappings: &[Mapping], guest_bytes: u64) -> Result<Memory> {
    let runs = (0..mappings.len()).filter_map(|first| run_from(mappings, first, guest_bytes));
    let rss = |run: &RangeInclusive<usize>| -> u64 {
        let run = mappings.get(run.clone()).unwrap_or_default();
        run.iter().map(|mapping| mapping.rss).sum()
    };
    let guest = runs.max_by_key(rss);
    let guest = guest.context("the guest's memory was not found in smaps")?;
    let mut memory = Memory::default();
    for (index, mapping) in mappings.iter().enumerate() {
        if guest.contains(&index) {
            memory.guest += mapping.rss;
            memory.guest_private += mapping.private;
        } else {
            memory.own_private += mapping.private;
            memory.own_pss += mapping.pss;
        }
    }
    Ok(memory)
}

/// The neighbours from `first` on that are exactly so long.
fn run_from(mappings: &[Mapping], first: usize, bytes: u64) -> Option<RangeInclusive<usize>> {
    let start = mappings.get(first)?.start;
    let mut end = start;
    for (index, mapping) in mappings.iter().enumerate().skip(first) {
        if mapping.start != end {
            return None;
        }
        end = mapping.end;
        if end - start == bytes {
            return Some(first..=index);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_memory_is_told_from_the_monitors_own() {
        let smaps = "\
1000-3000 r-xp 00000000 00:1b 100 /vmm
Size: 8 kB
Rss: 8 kB
Pss: 4 kB
Private_Clean: 0 kB
Private_Dirty: 0 kB
100000-140000 rw-p 00000000 00:00 0
Rss: 100 kB
Pss: 100 kB
Private_Dirty: 100 kB
140000-200000 rw-p 00000000 00:1b 7 /vmlinux
Rss: 50 kB
Pss: 25 kB
Private_Clean: 10 kB
300000-400000 ---p 00000000 00:00 0
Rss: 8 kB
Pss: 8 kB
Private_Dirty: 8 kB
500000-501000 rw-p 00000000 00:00 0 [stack]
Rss: 4 kB
Pss: 4 kB
Private_Dirty: 4 kB
VmFlags: rd wr
";
        let memory = sum(&mappings(smaps), 1 << 20).unwrap();
        let expected = Memory {
            guest: 150,
            guest_private: 110,
            own_private: 12,
            own_pss: 16,
        };
        assert_eq!(memory, expected);
        assert!(sum(&mappings(smaps), 3 << 20).is_err());
    }
}
