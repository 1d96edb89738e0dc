// SPDX-License-Identifier: Apache-2.0

//! The aims beside what was measured.

use std::fmt::Write;

use super::{MS, Report};

/// What Firecracker takes from exec to init, virtual ms, as measured elsewhere with a minimal kernel of its own.
const FIRECRACKER_MS: f64 = 128.9;
/// The part of it that is aimed at.
const OF_FIRECRACKER: f64 = 0.9;
/// Firecracker's memory that is not its guest's, KiB, as measured elsewhere.
const FIRECRACKER_KIB: f64 = 3992.0;

/// A row. It is reached when no more is measured than `bound`.
#[derive(Debug)]
struct Aim {
    figure: &'static str,
    aim: String,
    measured: f64,
    bound: f64,
}

/// An aim whose bound is written as it is.
fn aim(figure: &'static str, aim: &str, measured: f64, bound: f64) -> Aim {
    let aim = aim.to_owned();
    Aim {
        figure,
        aim,
        measured,
        bound,
    }
}

impl Aim {
    fn row(&self) -> String {
        let Self {
            figure,
            aim,
            measured,
            bound,
        } = self;
        let reached = if measured <= bound { "yes" } else { "**no**" };
        let digits = if *measured >= 100.0 { 0 } else { 2 };
        format!("| {figure} | {aim} | {measured:.digits$} | {reached} |")
    }
}

impl Report {
    /// The project's aims beside what was measured, if all was.
    pub(super) fn aims(&self) -> Option<String> {
        let mut aims = vec![self.boot_aim()?];
        aims.extend(self.exit_aims()?);
        aims.extend(self.runtime_aims()?);
        aims.push(self.memory_aim()?);
        aims.push(aim(
            "exits of an idle pod per second",
            "≤ 2",
            self.median("memory", "caisson, 128 MiB", "exits of 10 s")? / 10.0,
            2.0,
        ));
        aims.extend(self.truth_aims()?);
        let mut text =
            "## Against the aims\n\n| figure | aim | measured | reached |\n|---|---|---|---|\n"
                .to_owned();
        for aim in aims {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{}", aim.row());
        }
        Some(text)
    }

    fn median(&self, part: &str, subject: &str, metric: &str) -> Option<f64> {
        Some(self.stats(part, subject, metric)?.median)
    }

    /// Beside Firecracker if it was measured in the same run, else beside what is known of it.
    fn boot_aim(&self) -> Option<Aim> {
        let median = |subject| self.median("boot", subject, "exec_to_init_ns");
        let ours = median("caisson-vmm")?;
        Some(match median("firecracker") {
            Some(theirs) => aim(
                "VMM exec to guest init, of Firecracker's time",
                "≤ 0.9",
                ours / theirs,
                OF_FIRECRACKER,
            ),
            None => aim(
                "VMM exec to guest init, virtual ms",
                "≤ 116 (0.9 × Firecracker's published 128.9)",
                ours / MS,
                OF_FIRECRACKER * FIRECRACKER_MS,
            ),
        })
    }

    fn exit_aims(&self) -> Option<[Aim; 2]> {
        let all = |subject| self.median("exits", subject, "all");
        Some([
            aim("KVM exits until init", "≤ 700", all("caisson-vmm")?, 700.0),
            aim(
                "KVM exits of a whole `caisson run … true`",
                "≤ 5,000",
                all("caisson run, whole")?,
                5000.0,
            ),
        ])
    }

    fn runtime_aims(&self) -> Option<[Aim; 2]> {
        let ratio = |metric| {
            let median = |subject| self.median("start", subject, metric);
            Some(median("caisson")? / median("runc")?)
        };
        Some([
            aim("`run … true`, of runc's time", "≤ 3", ratio("run_ns")?, 3.0),
            aim(
                "`exec … true`, of runc's time",
                "≤ 1.5",
                ratio("exec_ns")?,
                1.5,
            ),
        ])
    }

    /// As [`Self::boot_aim`].
    fn memory_aim(&self) -> Option<Aim> {
        let median = |subject| self.median("memory", subject, "own_pss_kib");
        let theirs = median("firecracker at init, 128 MiB");
        let bound = theirs.unwrap_or(FIRECRACKER_KIB);
        let of = theirs.map_or("Firecracker's", |_| "Firecracker's at init, in this run");
        Some(Aim {
            figure: "VMM memory that is not the guest's (PSS), KiB",
            aim: format!("≤ {bound:.0} ({of})"),
            measured: median("caisson, 128 MiB")?,
            bound,
        })
    }

    fn truth_aims(&self) -> Option<[Aim; 2]> {
        let worst = |metric| Some(self.worst(metric)? / MS);
        Some([
            aim(
                "`state` says stopped after the VMM, the per-container process or the agent was killed, virtual ms, worst",
                "≤ 1,000",
                worst("stopped_ns")?,
                1000.0,
            ),
            aim(
                "nothing left after that and `delete --force`, virtual ms, worst",
                "≤ 1,000",
                worst("gone_ns")?,
                1000.0,
            ),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::sample;
    use super::*;

    fn report(firecracker: Option<(u64, u64)>) -> Report {
        let mut lines = vec![
            sample("boot", "caisson-vmm", "exec_to_init_ns", 117_000_000),
            sample("memory", "caisson, 128 MiB", "own_pss_kib", 2500),
        ];
        if let Some((ns, kib)) = firecracker {
            lines.push(sample("boot", "firecracker", "exec_to_init_ns", ns));
            lines.push(sample(
                "memory",
                "firecracker at init, 128 MiB",
                "own_pss_kib",
                kib,
            ));
        }
        Report::new(lines, "abc")
    }

    #[test]
    fn without_firecracker_in_the_run_what_is_known_of_it_is_the_aim() {
        let report = report(None);
        assert!(
            report
                .boot_aim()
                .unwrap()
                .row()
                .ends_with("| 117 | **no** |")
        );
        let memory = report.memory_aim().unwrap().row();
        assert!(
            memory.ends_with("≤ 3992 (Firecracker's) | 2500 | yes |"),
            "{memory}"
        );
    }

    #[test]
    fn with_firecracker_in_the_run_it_is_the_aim() {
        let report = report(Some((130_000_000, 2499)));
        let boot = report.boot_aim().unwrap().row();
        assert_eq!(
            boot,
            "| VMM exec to guest init, of Firecracker's time | ≤ 0.9 | 0.90 | yes |"
        );
        let memory = report.memory_aim().unwrap().row();
        assert!(
            memory.ends_with("in this run) | 2500 | **no** |"),
            "{memory}"
        );
    }
}
