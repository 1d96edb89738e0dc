// SPDX-License-Identifier: Apache-2.0

//! Tables of runtimes.

use std::fmt::Write;

use super::super::timeline;
use super::{MS, Report};

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

impl Report {
    /// `run` and `exec`, each runtime.
    pub(super) fn start(&self) -> Option<String> {
        let rows = self.beside_runc("start", ["run_ns", "exec_ns"])?;
        Some(format!(
            "## run and exec\n\nThe same busybox bundle. From before the command's process is made until it is reaped, virtual ms.\n\n\
             | | `run … true` | of runc | `exec … true` | of runc |\n|---|---|---|---|---|\n{rows}"
        ))
    }

    /// The stages of a start, and its first output and end, each runtime.
    pub(super) fn stages(&self) -> Option<String> {
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
    pub(in super::super) fn timeline(&self) -> Option<String> {
        let stages = STAGES
            .iter()
            .map(|(metric, label, _)| {
                let stats = self.stats("stages", "caisson", metric)?;
                Some((*label, stats.median / MS))
            })
            .collect::<Option<Vec<_>>>()?;
        Some(timeline::svg("caisson run: to the first output", &stages))
    }

    /// Rows of a part's subjects: each of two metrics in milliseconds and as a part of runc's. Without runc they
    /// say nothing.
    fn beside_runc(&self, part: &str, metrics: [&str; 2]) -> Option<String> {
        let [first, second] =
            metrics.map(|metric| Some((metric, self.stats(part, "runc", metric)?.median)));
        let metrics = [first?, second?];
        let mut text = String::new();
        for subject in self.subjects(part) {
            let _ = write!(text, "| {subject} |");
            for (metric, runc) in metrics {
                let own = self.stats(part, subject, metric)?;
                let _ = write!(text, " {} | {:.2} |", own.show(MS, 1), own.median / runc);
            }
            text.push('\n');
        }
        Some(text)
    }
}
