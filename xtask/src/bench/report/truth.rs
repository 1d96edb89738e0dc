// SPDX-License-Identifier: Apache-2.0

//! How soon the truth is told after a process of a pod was killed.

use std::fmt::Write;

use super::super::stats::float;
use super::{MS, Report};

/// Whose truth is told: as many kinds of process can be killed.
const VICTIMS: usize = 3;

impl Report {
    /// Each victim.
    pub(super) fn truth(&self) -> Option<String> {
        let subjects = self.subjects("truth");
        subjects.first()?;
        let mut text = "## A process of a pod killed\n\nOne process of a pod with a sleeping container gets SIGKILL (the agent, which as PID 1 cannot be, is made to fault at a \
            word from the host). From then until `caisson state` has said \
            `stopped`, and until `caisson delete --force`, called then, has returned and nothing is left: no process, state directory, cgroup, mount \
            or socket. `state` is asked without a pause, so the first is too long by up to one call of it, whose length before the kill \
            is in the last column. Virtual ms.\n\n\
            | killed | `state` says stopped | nothing left | one call of `state` |\n|---|---|---|---|\n"
            .to_owned();
        for subject in subjects {
            let show = |metric| self.cell("truth", subject, metric, MS, 1);
            let _ = writeln!(
                text,
                "| {subject} | {} | {} | {} |",
                show("stopped_ns"),
                show("gone_ns"),
                show("state_ns")
            );
        }
        Some(text)
    }

    /// The longest of all runs and all victims, if each victim was measured.
    pub(super) fn worst(&self, metric: &str) -> Option<f64> {
        let subjects = self.subjects("truth");
        let all = subjects
            .iter()
            .map(|subject| self.stats("truth", subject, metric).map(|stats| stats.max))
            .collect::<Option<Vec<_>>>()?;
        let worst = all.iter().max().filter(|_| all.len() == VICTIMS)?;
        Some(float(*worst))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::sample;
    use super::*;

    fn report(samples: &[(&str, u64)]) -> Report {
        let lines = samples
            .iter()
            .map(|(subject, value)| sample("truth", subject, "stopped_ns", *value));
        Report::new(lines.collect(), "abc")
    }

    #[test]
    fn the_worst_is_of_all_runs_and_no_victim_may_be_missing() {
        let all = [("a", 10), ("b", 20), ("c", 30), ("a", 90)];
        assert_eq!(report(&all).worst("stopped_ns"), Some(90.0));
        assert_eq!(report(&all).worst("gone_ns"), None);
        let without_c = [("a", 10), ("b", 20), ("a", 90)];
        assert_eq!(report(&without_c).worst("stopped_ns"), None);
    }

    #[test]
    fn each_victim_has_a_row() {
        let text = report(&[("the VMM", 2_500_000), ("the VMM", 3_500_000)]).truth();
        let text = text.unwrap();
        assert!(
            text.ends_with("| the VMM | 3.0 (2.5–3.5) | – | – |\n"),
            "{text}"
        );
        assert_eq!(report(&[]).truth(), None);
    }
}
