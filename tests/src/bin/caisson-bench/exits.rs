// SPDX-License-Identifier: Apache-2.0

//! KVM exits by reason.

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::{Context, Result};

use crate::boot::MEMORY_MIB;
use crate::trace::{Event, Exits, Trace};
use crate::vmm::{Guest, Monitor};
use crate::{Bench, Of, setup};

pub(crate) fn measure(bench: &Bench) -> Result<()> {
    let guest = Guest::new(&bench.setup, MEMORY_MIB)?;
    let bundle = bench.setup.bundle("true", &["true"])?;
    for run in 0..bench.runs {
        for monitor in Monitor::all(&bench.setup) {
            let events = until_init(&guest, monitor).with_context(|| monitor.name())?;
            tell(monitor.name(), run, &events)?;
        }
        let trace = Trace::start(Exits::All)?;
        let mut command = Command::new("caisson");
        command.args(["run", "--bundle"]).arg(&bundle);
        setup::output(command.arg("bench-exits"))?;
        tell("caisson run, whole", run, &trace.rest()?)?;
    }
    Ok(())
}

fn until_init(guest: &Guest<'_>, monitor: Monitor) -> Result<Vec<Event>> {
    let mut trace = Trace::start(Exits::All)?;
    let vmm = guest.start(monitor)?;
    let events = trace.until_init()?;
    drop(vmm);
    Ok(events)
}

/// A sample for each reason, and the sum.
fn tell(subject: &str, run: u32, events: &[Event]) -> Result<()> {
    let mut by_reason: BTreeMap<&str, u64> = BTreeMap::new();
    for event in events {
        if let Event::Exit { reason, .. } = event {
            *by_reason.entry(reason).or_default() += 1;
        }
    }
    let of = Of {
        part: "exits",
        subject,
        run,
    };
    for (reason, count) in &by_reason {
        of.tell(reason, *count)?;
    }
    of.tell("all", by_reason.values().sum())
}
