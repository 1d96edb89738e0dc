// SPDX-License-Identifier: Apache-2.0

//! `run … true` and `exec … true`, beside the runtimes that share the host's kernel.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::setup::{self, Container};
use crate::{Bench, Of};

/// In the order of their turns.
const RUNTIMES: [&str; 3] = ["caisson", "runc", "crun"];
const ID: &str = "bench-start";

pub(crate) fn measure(bench: &Bench) -> Result<()> {
    let bundle = bench.setup.bundle("true", &["true"])?;
    alternate(bench, "run_ns", |runtime| run(runtime, &bundle))?;

    let idle = bench.setup.bundle("idle", &["sleep", "100000"])?;
    let mut containers = Vec::new();
    for runtime in RUNTIMES {
        containers.push(Container::start(runtime, ID, &idle, None)?);
    }
    alternate(bench, "exec_ns", |runtime| {
        timed(Command::new(runtime).args(["exec", ID, "true"]))
    })
}

/// Measures each runtime in turn; the first turn is not told.
fn alternate(
    bench: &Bench,
    metric: &str,
    mut measured: impl FnMut(&'static str) -> Result<u64>,
) -> Result<()> {
    for run in 0..=bench.runs {
        for subject in RUNTIMES {
            let value = measured(subject).context(subject)?;
            if let Some(run) = run.checked_sub(1) {
                let part = "start";
                Of { part, subject, run }.tell(metric, value)?;
            }
        }
    }
    Ok(())
}

fn run(runtime: &str, bundle: &Path) -> Result<u64> {
    timed(
        Command::new(runtime)
            .args(["run", "--bundle"])
            .arg(bundle)
            .arg(ID),
    )
}

/// How long a command takes, from before its process is made until it is reaped, nanoseconds.
fn timed(command: &mut Command) -> Result<u64> {
    let start = Instant::now();
    setup::output(command)?;
    Ok(u64::try_from(start.elapsed().as_nanos())?)
}
