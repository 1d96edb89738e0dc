// SPDX-License-Identifier: Apache-2.0

//! The aims beside what was measured.

use std::fmt::Write;

use super::{MS, Report};

impl Report {
    /// The project's aims beside what was measured, if all was.
    pub(super) fn aims(&self) -> Option<String> {
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
            (
                "`state` says stopped after the VMM, the per-container process or the agent was killed, virtual ms, worst",
                "≤ 1,000",
                self.worst("stopped_ns")? / MS,
                1000.0,
            ),
            (
                "nothing left after that and `delete --force`, virtual ms, worst",
                "≤ 1,000",
                self.worst("gone_ns")? / MS,
                1000.0,
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
}
