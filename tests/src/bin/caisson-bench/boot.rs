// SPDX-License-Identifier: Apache-2.0

//! From the VMM's exec to the guest's init.

use anyhow::{Context, Result};

use crate::trace::{Event, Exits, Trace};
use crate::vmm::{Guest, Monitor};
use crate::{Bench, Of};

/// Guest memory, MiB: what published figures of other VMMs were taken with.
pub(crate) const MEMORY_MIB: u64 = 128;

pub(crate) fn measure(bench: &Bench) -> Result<()> {
    let guest = Guest::new(&bench.setup, MEMORY_MIB)?;
    for run in 0..=bench.runs {
        for monitor in Monitor::all(&bench.setup) {
            let boot = boot(&guest, monitor).with_context(|| monitor.name())?;
            if let Some(run) = run.checked_sub(1) {
                let of = Of {
                    part: "boot",
                    subject: monitor.name(),
                    run,
                };
                of.tell("exec_to_run_ns", boot.run_ns - boot.exec_ns)?;
                of.tell("run_to_init_ns", boot.init_ns - boot.run_ns)?;
                of.tell("exec_to_init_ns", boot.init_ns - boot.exec_ns)?;
            }
        }
    }
    Ok(())
}

/// Moments of a boot, in order, CLOCK_MONOTONIC.
#[derive(Debug, Clone, Copy)]
struct Boot {
    exec_ns: u64,
    run_ns: u64,
    init_ns: u64,
}

fn boot(guest: &Guest<'_>, monitor: Monitor) -> Result<Boot> {
    let mut trace = Trace::start(Exits::OfUserSpace)?;
    let vmm = guest.start(monitor)?;
    let events = trace.until_init()?;
    let exec_ns = events.iter().find_map(|event| match event {
        Event::Exec { at_ns, pid, .. } if *pid == vmm.pid() => Some(*at_ns),
        _ => None,
    });
    let run_ns = events.iter().find_map(|event| match event {
        Event::Entry { at_ns } => Some(*at_ns),
        _ => None,
    });
    let init_ns = events.iter().find_map(|event| match event {
        Event::Exit {
            at_ns, user: true, ..
        } => Some(*at_ns),
        _ => None,
    });
    let boot = Boot {
        exec_ns: exec_ns.context("no exec was seen")?,
        run_ns: run_ns.context("no first KVM_RUN was seen")?,
        init_ns: init_ns.context("no init was seen")?,
    };
    let in_order = boot.exec_ns < boot.run_ns && boot.run_ns < boot.init_ns;
    anyhow::ensure!(in_order, "not in order: {boot:?}");
    Ok(boot)
}
