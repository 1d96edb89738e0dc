// SPDX-License-Identifier: Apache-2.0

//! Where the time of one start goes: what the runtime wrote down, the trace, and the container's first output.

use std::io::Read;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::time::{ClockId, clock_gettime};
use serde_json::Value;

use crate::trace::{Event, Exits, Trace};
use crate::{Bench, Of};

/// Says something, and lives until its input ends.
const COMMAND: [&str; 3] = ["sh", "-c", "echo; read line"];
const ID: &str = "bench-stages";

pub(crate) fn measure(bench: &Bench) -> Result<()> {
    let bundle = bench.setup.bundle("stages", &COMMAND)?;
    for turn in 0..=bench.runs {
        let mut lengths = vec![("caisson", lengths(&one_start(bench, &bundle)?)?)];
        for runtime in ["runc", "crun"] {
            let times = first_output(runtime, &bundle, || Ok(()))?;
            lengths.push((
                runtime,
                vec![
                    ("to_first_output_ns", times.output_ns - times.begin_ns),
                    ("end_ns", times.end_ns - times.closed_ns),
                ],
            ));
        }
        let Some(run) = turn.checked_sub(1) else {
            continue;
        };
        for (subject, lengths) in lengths {
            let part = "stages";
            for (name, length) in lengths {
                Of { part, subject, run }.tell(name, length)?;
            }
        }
    }
    Ok(())
}

/// A stage's name and its end.
type Moments = Vec<(&'static str, u64)>;

/// Lengths of the stages, each from the end of the one before, and of all up to the first output.
fn lengths(moments: &Moments) -> Result<Vec<(&'static str, u64)>> {
    let mut lengths = Vec::new();
    for pair in moments.windows(2) {
        if let [(before, from), (name, to)] = pair {
            let length = to.checked_sub(*from);
            lengths.push((
                *name,
                length.with_context(|| format!("{name} ended before {before}"))?,
            ));
        }
    }
    let at = |name: &str| {
        moments
            .iter()
            .find(|(at, _)| *at == name)
            .map(|(_, ns)| *ns)
    };
    if let (Some(begin), Some(output)) = (at("begin"), at("first_output_ns")) {
        lengths.push(("to_first_output_ns", output - begin));
    }
    Ok(lengths)
}

fn one_start(bench: &Bench, bundle: &std::path::Path) -> Result<Moments> {
    let mut trace = Trace::start(Exits::OfUserSpace)?;
    let (mut init_ns, mut record) = (0, Value::Null);
    let times = first_output("caisson", bundle, || {
        for event in trace.until_init()? {
            if let Event::Exit {
                at_ns, user: true, ..
            } = event
            {
                init_ns = at_ns;
            }
        }
        record = bench.setup.state_file(ID, "record.json")?;
        Ok(())
    })?;
    let recorded = |name: &str| {
        let value = record["timings_ns"][name].as_u64();
        value.with_context(|| format!("the record has no time {name}"))
    };
    Ok(vec![
        ("begin", times.begin_ns),
        ("checked_ns", recorded("monitor")?),
        ("vmm_exec_ns", recorded("vmm_exec")?),
        ("kvm_run_ns", recorded("vmm_run")?),
        ("init_ns", init_ns),
        ("agent_ns", recorded("agent_ready")?),
        ("created_ns", recorded("created")?),
        ("first_output_ns", times.output_ns),
        ("closed", times.closed_ns),
        ("end_ns", times.end_ns),
    ])
}

/// Of a `run` in the foreground.
#[derive(Debug, Clone, Copy)]
struct Times {
    /// Before its process was made.
    begin_ns: u64,
    /// Its output has begun.
    output_ns: u64,
    /// Its input was closed, which ends it.
    closed_ns: u64,
    /// It was reaped.
    end_ns: u64,
}

/// Runs a container and looks at it with `meanwhile`, after its first output.
fn first_output(
    runtime: &str,
    bundle: &std::path::Path,
    meanwhile: impl FnOnce() -> Result<()>,
) -> Result<Times> {
    let begin_ns = now_ns()?;
    let mut child = Command::new(runtime)
        .args(["run", "--bundle"])
        .arg(bundle)
        .arg(ID)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("failed to run {runtime}"))?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let read = stdout.context("no stdout")?.read(&mut [0]);
    let output_ns = now_ns()?;
    ensure!(
        read.context("failed to read")? == 1,
        "{runtime} said nothing"
    );
    let seen = meanwhile();
    let closed_ns = now_ns()?;
    drop(stdin);
    let status = child.wait().context("failed to wait")?;
    seen?;
    // `read` says that there was no line.
    ensure!(
        status.code() == Some(1),
        "{runtime} run ended with {status}"
    );
    Ok(Times {
        begin_ns,
        output_ns,
        closed_ns,
        end_ns: now_ns()?,
    })
}

/// The clock of the trace and of the record.
fn now_ns() -> Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).context("no clock")?;
    let seconds = u64::try_from(now.tv_sec())?;
    Ok(seconds * 1_000_000_000 + u64::try_from(now.tv_nsec())?)
}
