// SPDX-License-Identifier: Apache-2.0

//! `caisson-bench [--runs N] [PART]…`: measures in the testbed, and writes a JSON line per measurement to stdout
//! ([`caisson_testbed::bench`]). `cargo xtask bench` runs it and makes tables of what it says.
//!
//! | part | what |
//! |---|---|
//! | [`boot`] | from the VMM's exec to the guest's init, beside QEMU's microvm with the same kernel and initramfs |
//! | [`exits`] | KVM exits by reason until then, and of a whole `run` |
//! | [`start`] | `run … true` and `exec … true` beside runc and crun |
//! | [`stages`] | where the time of one start goes, up to the first output, and of its end |
//! | [`memory`] | of the VMM and of an idle guest, and exits of an idle guest |
//! | [`truth`] | how soon `state` says that a pod has ended of which a process was killed, and nothing is left |
//!
//! Whoever is compared takes turns, run by run, and the first turn of each, which warms caches, is not counted.

mod boot;
mod doomed;
mod exits;
mod memory;
mod root;
mod setup;
mod stages;
mod start;
mod trace;
mod truth;
mod vmm;

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use caisson_testbed::bench::{Line, Sample};

/// A part's name and what runs it.
type Part = (&'static str, fn(&Bench) -> Result<()>);

const PARTS: [Part; 6] = [
    ("boot", boot::measure),
    ("exits", exits::measure),
    ("start", start::measure),
    ("stages", stages::measure),
    ("memory", memory::measure),
    ("truth", truth::measure),
];

/// What every part needs.
#[derive(Debug)]
struct Bench {
    /// How often each is measured.
    runs: u32,
    setup: setup::Setup,
}

/// The name of a part's measurement and whose it is.
#[derive(Debug, Clone, Copy)]
struct Of<'a> {
    part: &'a str,
    subject: &'a str,
    run: u32,
}

impl Of<'_> {
    /// Writes one measurement out.
    fn tell(&self, metric: &str, value: u64) -> Result<()> {
        tell(&Line::Sample(Sample {
            part: self.part.to_owned(),
            subject: self.subject.to_owned(),
            metric: metric.to_owned(),
            run: self.run,
            value,
        }))
    }
}

fn tell(line: &Line) -> Result<()> {
    let mut text = serde_json::to_string(line)?;
    text.push('\n');
    std::io::stdout()
        .write_all(text.as_bytes())
        .context("failed to write a measurement")
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // There is nowhere to tell that stderr is gone.
            let _ = writeln!(std::io::stderr(), "caisson-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    if std::process::id() == 1 {
        return doomed::init();
    }
    let (mut runs, mut chosen) = (10, Vec::new());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--runs" => {
                let value = arguments.next().context("--runs needs a value")?;
                runs = value
                    .parse()
                    .with_context(|| format!("{value:?} is no number of runs"))?;
            }
            name => match PARTS.iter().find(|(part, _)| *part == name) {
                Some(part) => chosen.push(*part),
                None => bail!("there is no part {name:?}"),
            },
        }
    }
    if chosen.is_empty() {
        chosen.extend(PARTS);
    }
    root::enter()?;
    let bench = Bench {
        runs,
        setup: setup::Setup::new()?,
    };
    for (name, value) in bench.setup.facts()? {
        tell(&Line::Fact { name, value })?;
    }
    for (name, measure) in chosen {
        // For whoever waits; that nobody does stops no measurement.
        let _ = std::io::stderr().write_all(format!("measuring: {name}\n").as_bytes());
        measure(&bench).with_context(|| format!("part {name}"))?;
    }
    Ok(())
}
