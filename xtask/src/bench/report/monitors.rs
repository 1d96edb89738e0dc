// SPDX-License-Identifier: Apache-2.0

//! Tables of virtual machine monitors.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::super::stats::float;
use super::{MS, Report};

impl Report {
    /// From exec to init, each VMM.
    pub(super) fn boot(&self) -> Option<String> {
        let ours = self.stats("boot", "caisson-vmm", "exec_to_init_ns")?;
        let firecracker = match self.stats("boot", "firecracker", "exec_to_init_ns") {
            Some(_) => {
                " Firecracker has vsock, entropy and a serial port, and its system call filters on."
            }
            None => "",
        };
        let mut text = format!(
            "## VMM exec to guest init\n\n\
            The same kernel, initramfs and command line, 128 MiB, one vCPU. caisson-vmm has vsock, file system, console and entropy \
            devices; QEMU's machine the same without a file system, and everything else off.{firecracker} Virtual ms.\n\n\
            | | exec to first KVM_RUN | first KVM_RUN to init | exec to init | of caisson-vmm |\n|---|---|---|---|---|\n"
        );
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

    /// Exits by reason, each VMM, and a whole `run`.
    pub(super) fn exits(&self) -> Option<String> {
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

    /// Of VMMs and their guests.
    pub(super) fn memory(&self) -> Option<String> {
        let subjects = self.subjects("memory");
        subjects.first()?;
        let mut text = "## Memory\n\nFrom `/proc/PID/smaps` of the VMM, KiB. `caisson, N MiB` is a pod with a sleeping container, a minute \
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
