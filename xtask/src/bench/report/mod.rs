// SPDX-License-Identifier: Apache-2.0

//! Samples as tables, in Markdown.

mod aims;
mod monitors;
mod runtimes;
mod truth;

use std::collections::BTreeSet;
use std::fmt::Write;

use caisson_testbed::bench::{Line, Sample};

use super::stats::Stats;

/// Nanoseconds in a millisecond.
const MS: f64 = 1e6;

const INTRO: &str = "\
Written by `cargo xtask bench --docs`, which measures again and overwrites this file.

Everything was measured in the testbed on QEMU's instruction-count clock (`-icount shift=0,sleep=off`, one CPU): a virtual
nanosecond is an emulated instruction, whatever else the machine does. It knows no caches and makes each instruction as dear as any
other, so **only ratios within a table mean something**; they do not replace a run on hardware. Where somebody is compared, all take
turns run by run; a first turn that warms caches is not counted. Times are medians (least–most). The moment when a guest's init begins is
taken from KVM's own trace (the first exit at a user-space address), the same way for every VMM.

`cargo xtask bench PART…` measures less; raw samples are left in `target/bench/samples.jsonl`.
";

/// What was measured.
#[derive(Debug)]
pub(super) struct Report {
    facts: Vec<(String, String)>,
    samples: Vec<Sample>,
}

impl Report {
    /// Of `caisson-bench`'s lines, for the tree at `revision`.
    pub(super) fn new(lines: Vec<Line>, revision: &str) -> Self {
        let mut facts = vec![("revision".to_owned(), revision.to_owned())];
        let mut samples = Vec::new();
        for line in lines {
            match line {
                Line::Fact { name, value } => facts.push((name, value)),
                Line::Sample(sample) => samples.push(sample),
            }
        }
        Self { facts, samples }
    }

    fn stats(&self, part: &str, subject: &str, metric: &str) -> Option<Stats> {
        let of = |sample: &&Sample| {
            sample.part == part && sample.subject == subject && sample.metric == metric
        };
        Stats::of(self.samples.iter().filter(of).map(|sample| sample.value))
    }

    /// A metric's cell in units of `scale`; a dash if it was not measured.
    fn cell(&self, part: &str, subject: &str, metric: &str, scale: f64, digits: usize) -> String {
        let stats = self.stats(part, subject, metric);
        stats.map_or("–".to_owned(), |stats| stats.show(scale, digits))
    }

    /// Subjects of a part, in the order of their first samples.
    fn subjects(&self, part: &str) -> Vec<&str> {
        let mut seen = BTreeSet::new();
        let of = self.samples.iter().filter(|sample| sample.part == part);
        of.map(|sample| sample.subject.as_str())
            .filter(|subject| seen.insert(*subject))
            .collect()
    }

    /// The whole document.
    pub(super) fn markdown(&self) -> String {
        let mut text = format!("# Benchmarks\n\n{INTRO}\n| measured with | |\n|---|---|\n");
        for (name, value) in &self.facts {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "| {name} | {value} |");
        }
        for section in [
            self.aims(),
            self.boot(),
            self.exits(),
            self.start(),
            self.stages(),
            self.memory(),
            self.truth(),
        ]
        .into_iter()
        .flatten()
        {
            text.push('\n');
            text.push_str(&section);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn sample(part: &str, subject: &str, metric: &str, value: u64) -> Line {
        Line::Sample(Sample {
            part: part.to_owned(),
            subject: subject.to_owned(),
            metric: metric.to_owned(),
            run: 0,
            value,
        })
    }

    #[test]
    fn a_part_that_was_not_measured_has_no_table_and_no_aim_is_claimed_without_all_of_them() {
        let report = Report::new(
            vec![
                sample("start", "caisson", "run_ns", 300_000_000),
                sample("start", "caisson", "exec_ns", 50_000_000),
                sample("start", "runc", "run_ns", 100_000_000),
                sample("start", "runc", "exec_ns", 50_000_000),
            ],
            "abc",
        );
        let text = report.markdown();
        assert!(
            text.contains("| caisson | 300.0 (300.0–300.0) | 3.00 | 50.0 (50.0–50.0) | 1.00 |"),
            "{text}"
        );
        assert!(
            !text.contains("Against the aims") && !text.contains("## Memory"),
            "{text}"
        );
        assert_eq!(report.timeline(), None);
    }

    #[test]
    fn reasons_are_sorted_by_what_we_have_most_of_and_missing_ones_are_none() {
        let report = Report::new(
            vec![
                sample("exits", "caisson-vmm", "msr", 3),
                sample("exits", "caisson-vmm", "npf", 30),
                sample("exits", "qemu microvm", "io", 900),
            ],
            "abc",
        );
        let text = report.markdown();
        let rows: Vec<&str> = text
            .lines()
            .filter(|line| line.ends_with(") |") || line.ends_with("| 0 |"))
            .collect();
        assert_eq!(
            rows,
            [
                "| npf | 30 (30–30) | 0 |",
                "| msr | 3 (3–3) | 0 |",
                "| io | 0 | 900 (900–900) |"
            ]
        );
    }
}
