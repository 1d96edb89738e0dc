// SPDX-License-Identifier: Apache-2.0

//! `caisson-bench [--runs N] [--firecracker PATH] [PART]…`: measures in the testbed, and writes a JSON line per measurement to stdout
//! ([`caisson_testbed::bench`]). `cargo xtask bench` runs it and makes tables of what it says.
//!
//! | part | what |
//! |---|---|
//! | [`boot`] | from the VMM's exec to the guest's init, beside QEMU's microvm, and Firecracker if it is given, with the same kernel and initramfs |
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
use std::path::PathBuf;
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

/// What the command line says.
#[derive(Debug)]
struct Arguments {
    runs: u32,
    firecracker: Option<PathBuf>,
    parts: Vec<Part>,
}

impl Arguments {
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Self> {
        let (mut runs, mut firecracker, mut parts) = (10, None, Vec::new());
        while let Some(word) = words.next() {
            match word.as_str() {
                "--runs" => {
                    let value = words.next().context("--runs needs a value")?;
                    runs = value
                        .parse()
                        .with_context(|| format!("{value:?} is no number of runs"))?;
                }
                "--firecracker" => {
                    let value = words.next().context("--firecracker needs a value")?;
                    firecracker = Some(PathBuf::from(value));
                }
                name => match PARTS.iter().find(|(part, _)| *part == name) {
                    Some(part) => parts.push(*part),
                    None => bail!("there is no part {name:?}"),
                },
            }
        }
        if parts.is_empty() {
            parts.extend(PARTS);
        }
        Ok(Self {
            runs,
            firecracker,
            parts,
        })
    }
}

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
    let arguments = Arguments::parse(std::env::args().skip(1))?;
    root::enter(arguments.firecracker.as_deref())?;
    let bench = Bench {
        runs: arguments.runs,
        setup: setup::Setup::new(arguments.firecracker)?,
    };
    for (name, value) in bench.setup.facts()? {
        tell(&Line::Fact { name, value })?;
    }
    for (name, measure) in arguments.parts {
        // For whoever waits; that nobody does stops no measurement.
        let _ = std::io::stderr().write_all(format!("measuring: {name}\n").as_bytes());
        measure(&bench).with_context(|| format!("part {name}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Arguments> {
        Arguments::parse(words.iter().map(|word| (*word).to_owned()))
    }

    #[test]
    fn without_arguments_all_is_measured_and_of_monitors_those_that_the_testbed_has() {
        let all = parse(&[]).unwrap();
        assert_eq!((all.runs, all.parts.len()), (10, PARTS.len()));
        assert_eq!(all.firecracker, None);
    }

    #[test]
    fn arguments_are_taken_and_wrong_ones_refused() {
        let some = parse(&["boot", "--firecracker", "/f", "--runs", "3", "exits"]).unwrap();
        let names: Vec<&str> = some.parts.iter().map(|(name, _)| *name).collect();
        assert_eq!((some.runs, names), (3, vec!["boot", "exits"]));
        assert_eq!(some.firecracker, Some("/f".into()));
        for wrong in [
            &["--runs"][..],
            &["--runs", "x"],
            &["--firecracker"],
            &["bot"],
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
