// SPDX-License-Identifier: Apache-2.0

//! Samples as tables, in Markdown.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use caisson_testbed::bench::{Line, Sample};

use super::stats::{Stats, float};
use super::timeline;

/// Nanoseconds in a millisecond.
const MS: f64 = 1e6;

/// The stages of a start in their order: metric, label, what happens in it.
const STAGES: [(&str, &str, &str); 7] = [
    (
        "checked_ns",
        "caisson run",
        "`caisson run` reads the bundle and the configuration, checks all, takes the id, starts the pod's process",
    ),
    (
        "vmm_exec_ns",
        "pod's process",
        "cgroup, sockets, mounts moved into the VMM's own mount namespace, exec of the VMM",
    ),
    (
        "kvm_run_ns",
        "VMM up",
        "devices, guest memory, kernel and initramfs in it, up to the first KVM_RUN",
    ),
    (
        "init_ns",
        "guest kernel",
        "from its first instruction to the first of init",
    ),
    (
        "agent_ns",
        "agent connected",
        "the agent mounts what it needs, dials the host, is greeted",
    ),
    (
        "created_ns",
        "container created",
        "the shared file system, the sandbox, the container up to its start",
    ),
    (
        "first_output_ns",
        "first output",
        "start, the container's exec, its first byte on the host",
    ),
];

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

    /// Rows of a part's subjects: each of two metrics in milliseconds and as a part of runc's.
    fn beside_runc(&self, part: &str, metrics: [&str; 2]) -> Option<String> {
        let mut text = String::new();
        for subject in self.subjects(part) {
            let _ = write!(text, "| {subject} |");
            for metric in metrics {
                let runc = self.stats(part, "runc", metric)?;
                let own = self.stats(part, subject, metric)?;
                let _ = write!(
                    text,
                    " {} | {:.2} |",
                    own.show(MS, 1),
                    own.median / runc.median
                );
            }
            text.push('\n');
        }
        Some(text)
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
        ]
        .into_iter()
        .flatten()
        {
            text.push('\n');
            text.push_str(&section);
        }
        text
    }

    /// The project's aims beside what was measured, if all was.
    fn aims(&self) -> Option<String> {
        let median = |part, subject, metric| Some(self.stats(part, subject, metric)?.median);
        let ratio = |metric| {
            let ours = median("start", "caisson", metric)?;
            Some(ours / median("start", "runc", metric)?)
        };
        let boot = median("boot", "caisson-vmm", "exec_to_init_ns")? / MS;
        let rows = [
            (
                "VMM exec to guest init, virtual ms",
                "≤ 116 (0.9 × Firecracker's published 128.9)",
                boot,
                116.0,
            ),
            (
                "KVM exits until init",
                "≤ 700",
                median("exits", "caisson-vmm", "all")?,
                700.0,
            ),
            (
                "KVM exits of a whole `caisson run … true`",
                "≤ 5,000",
                median("exits", "caisson run, whole", "all")?,
                5000.0,
            ),
            ("`run … true`, of runc's time", "≤ 3", ratio("run_ns")?, 3.0),
            (
                "`exec … true`, of runc's time",
                "≤ 1.5",
                ratio("exec_ns")?,
                1.5,
            ),
            (
                "VMM memory that is not the guest's (PSS), KiB",
                "≤ 3,992 (Firecracker's)",
                median("memory", "caisson, 128 MiB", "own_pss_kib")?,
                3992.0,
            ),
            (
                "exits of an idle pod per second",
                "≤ 2",
                median("memory", "caisson, 128 MiB", "exits of 10 s")? / 10.0,
                2.0,
            ),
        ];
        let mut text =
            "## Against the aims\n\n| figure | aim | measured | reached |\n|---|---|---|---|\n"
                .to_owned();
        for (figure, aim, measured, bound) in rows {
            let reached = if measured <= bound { "yes" } else { "**no**" };
            let digits = if measured >= 100.0 { 0 } else { 2 };
            let _ = writeln!(
                text,
                "| {figure} | {aim} | {measured:.digits$} | {reached} |"
            );
        }
        Some(text)
    }

    fn boot(&self) -> Option<String> {
        let ours = self.stats("boot", "caisson-vmm", "exec_to_init_ns")?;
        let mut text = "## VMM exec to guest init\n\n\
            The same kernel, initramfs and command line, 128 MiB, one vCPU. caisson-vmm has vsock, file system, console and entropy \
            devices; QEMU's machine the same without a file system, and everything else off. Virtual ms.\n\n\
            | | exec to first KVM_RUN | first KVM_RUN to init | exec to init | of caisson-vmm |\n|---|---|---|---|---|\n"
            .to_owned();
        for subject in self.subjects("boot") {
            let show = |metric| self.cell("boot", subject, metric, MS, 1);
            let whole = self.stats("boot", subject, "exec_to_init_ns")?;
            let _ = writeln!(
                text,
                "| {subject} | {} | {} | {} | {:.2} |",
                show("exec_to_run_ns"),
                show("run_to_init_ns"),
                show("exec_to_init_ns"),
                whole.median / ours.median
            );
        }
        Some(text)
    }

    fn exits(&self) -> Option<String> {
        let subjects = self.subjects("exits");
        let first = subjects.first()?;
        let mut text = format!(
            "## KVM exits by reason\n\nFrom the start to the guest's init, 128 MiB, one vCPU; last, all of a `caisson run … true` to its end \
             (the default guest). Counted by the trace event `kvm_exit`; reasons are AMD's names (`npf`: nested page fault, with device \
             registers among them).\n\n| reason | {} |\n|---|{}\n",
            subjects.join(" | "),
            "---|".repeat(subjects.len())
        );
        let mut reasons: BTreeMap<&str, f64> = BTreeMap::new();
        for sample in self.samples.iter().filter(|sample| sample.part == "exits") {
            let most = reasons.entry(&sample.metric).or_default();
            if sample.subject == *first {
                *most = most.max(float(sample.value));
            }
        }
        let mut reasons: Vec<_> = reasons.into_iter().collect();
        reasons.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(b.0)));
        for (reason, _) in reasons {
            let cells = subjects.iter().map(|subject| {
                let stats = self.stats("exits", subject, reason);
                stats.map_or("0".to_owned(), |stats| stats.show(1.0, 0))
            });
            let _ = writeln!(
                text,
                "| {reason} | {} |",
                cells.collect::<Vec<_>>().join(" | ")
            );
        }
        Some(text)
    }

    fn start(&self) -> Option<String> {
        // Only beside runc does it say something.
        self.stats("start", "runc", "run_ns")?;
        let rows = self.beside_runc("start", ["run_ns", "exec_ns"])?;
        Some(format!(
            "## run and exec\n\nThe same busybox bundle. From before the command's process is made until it is reaped, virtual ms.\n\n\
             | | `run … true` | of runc | `exec … true` | of runc |\n|---|---|---|---|---|\n{rows}"
        ))
    }

    fn stages(&self) -> Option<String> {
        let whole = self.stats("stages", "caisson", "to_first_output_ns")?;
        let mut text = "## Where the time of one start goes\n\n`caisson run` in the foreground with the default guest, from before its process is made to \
            the first byte of the container's output. Virtual ms.\n\n![the stages](timeline.svg)\n\n\
            | stage | what happens | time | share |\n|---|---|---|---|\n"
            .to_owned();
        for (metric, label, what) in STAGES {
            let stats = self.stats("stages", "caisson", metric)?;
            let share = stats.median / whole.median * 100.0;
            let _ = writeln!(
                text,
                "| {label} | {what} | {} | {share:.0} % |",
                stats.show(MS, 1)
            );
        }
        let _ = writeln!(text, "| all | | {} | |", whole.show(MS, 1));
        let end = self.stats("stages", "caisson", "end_ns")?;
        let _ = writeln!(
            text,
            "\nFrom the end of the container's input, which ends it, until `caisson run` is reaped and nothing is left: {}.",
            end.show(MS, 1)
        );
        text.push_str("\n| | to first output | of runc | end | of runc |\n|---|---|---|---|---|\n");
        text.push_str(&self.beside_runc("stages", ["to_first_output_ns", "end_ns"])?);
        Some(text)
    }

    /// The picture, if stages were measured.
    pub(super) fn timeline(&self) -> Option<String> {
        let stages = STAGES
            .iter()
            .map(|(metric, label, _)| {
                let stats = self.stats("stages", "caisson", metric)?;
                Some((*label, stats.median / MS))
            })
            .collect::<Option<Vec<_>>>()?;
        Some(timeline::svg("caisson run: to the first output", &stages))
    }

    fn memory(&self) -> Option<String> {
        let subjects = self.subjects("memory");
        subjects.first()?;
        let mut text = "## Memory\n\nFrom `/proc/PID/smaps` of the VMM, KiB. `caisson, N MiB` is a pod with a sleeping container, five seconds \
            after its start; the guest's pages are counted as the host has them (2 MiB each where it takes huge pages).\n\n\
            | | guest pages touched | of them private | VMM's own, private | VMM's own, PSS | exits in 10 s idle |\n|---|---|---|---|---|---|\n"
            .to_owned();
        for subject in subjects {
            let show = |metric| self.cell("memory", subject, metric, 1.0, 0);
            let _ = writeln!(
                text,
                "| {subject} | {} | {} | {} | {} | {} |",
                show("guest_kib"),
                show("guest_private_kib"),
                show("own_private_kib"),
                show("own_pss_kib"),
                show("exits of 10 s")
            );
        }
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(part: &str, subject: &str, metric: &str, value: u64) -> Line {
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
