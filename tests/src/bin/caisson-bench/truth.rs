// SPDX-License-Identifier: Apache-2.0

//! How soon `caisson state` tells the truth after a process of a pod has died, and how soon nothing is left of it.
//!
//! `state` is asked again and again, without a pause: what is measured is longer than the truth by up to one call,
//! whose length is measured, too. The testbed's one CPU is shared by who asks and by who finds out.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::doomed::{self, Order};
use crate::setup::{self, Container, Setup};
use crate::{Bench, Of};

const ID: &str = "bench-truth";
/// Where cgroups are.
const CGROUPS: &str = "/sys/fs/cgroup";
/// What takes longer has failed.
const LIMIT: Duration = Duration::from_secs(30);

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Vmm,
    Monitor,
    Agent,
}

impl Victim {
    /// All, in the order of their turns.
    const ALL: [Self; 3] = [Self::Vmm, Self::Monitor, Self::Agent];

    /// What it is called in tables.
    fn name(self) -> &'static str {
        match self {
            Self::Vmm => "the VMM",
            Self::Monitor => "the per-container process",
            Self::Agent => "the agent in the guest",
        }
    }
}

pub(crate) fn measure(bench: &Bench) -> Result<()> {
    let setup = &bench.setup;
    let bundle = setup.bundle("idle", &["sleep", "100000"])?;
    let config = doomed::config(setup)?;
    for turn in 0..=bench.runs {
        for victim in Victim::ALL {
            let config = (victim == Victim::Agent).then_some(config.as_path());
            let container = Container::start("caisson", ID, &bundle, config)?;
            let run = turn.checked_sub(1);
            let times = end_of(setup, &container, victim, run.is_none());
            let times = times.with_context(|| format!("SIGKILL of {}", victim.name()))?;
            let Some(run) = run else { continue };
            let of = Of {
                part: "truth",
                subject: victim.name(),
                run,
            };
            of.tell("state_ns", times.state_ns)?;
            of.tell("stopped_ns", times.stopped_ns)?;
            of.tell("gone_ns", times.gone_ns)?;
        }
    }
    Ok(())
}

/// Of one end.
#[derive(Debug, Clone, Copy)]
struct Times {
    /// One call of `state`, before.
    state_ns: u64,
    /// From the kill until `state` has said `stopped`.
    stopped_ns: u64,
    /// From the kill until `delete --force` has returned and nothing is left.
    gone_ns: u64,
}

/// Kills one and looks. `proves` also waits to see that it was that which ended the container.
fn end_of(setup: &Setup, container: &Container<'_>, victim: Victim, proves: bool) -> Result<Times> {
    let traces = Traces::of(&setup.state_file(ID, "record.json")?)?;
    let mut order = match victim {
        Victim::Agent => Some(Order::prepare(ID)?),
        Victim::Vmm | Victim::Monitor => None,
    };
    let asked = Instant::now();
    ensure!(status()? == "running", "the container does not run");
    let state_ns = nanoseconds(asked)?;

    let begin = Instant::now();
    match (victim, &mut order) {
        (Victim::Vmm, _) => sigkill(traces.vmm)?,
        (Victim::Monitor, _) => sigkill(traces.monitor)?,
        (Victim::Agent, order) => order.as_mut().context("no order")?.give()?,
    }
    until("state says stopped", || Ok(status()? == "stopped"))?;
    let stopped_ns = nanoseconds(begin)?;
    if proves {
        until("the cause is known", || proven(setup, victim))?;
    }
    container.delete()?;
    until("nothing is left", || Ok(traces.left()?.is_empty()))
        .with_context(|| format!("left: {:?}", traces.left()))?;
    Ok(Times {
        state_ns,
        stopped_ns,
        gone_ns: nanoseconds(begin)?,
    })
}

/// Whether what is written down shows that it was the agent's death; of the others nobody is left who writes, or
/// the process is known.
fn proven(setup: &Setup, victim: Victim) -> Result<bool> {
    if victim != Victim::Agent {
        return Ok(true);
    }
    let record = setup.state_file(ID, "record.json")?;
    let cause = record["exit"]["cause"].as_str();
    let wrong = cause.is_some_and(|cause| !cause.contains(doomed::PANIC));
    ensure!(!wrong, "the guest ended because of {cause:?}");
    Ok(cause.is_some())
}

/// What `state` says of the container.
fn status() -> Result<String> {
    let said = setup::output(Command::new("caisson").args(["state", ID]))?;
    let state: Value = serde_json::from_str(&said).context("state printed no JSON")?;
    let status = state["status"].as_str();
    status.map(str::to_owned).context("state has no status")
}

fn sigkill(pid: i32) -> Result<()> {
    kill(Pid::from_raw(pid), Signal::SIGKILL).with_context(|| format!("failed to kill {pid}"))
}

/// Asks until it is so.
fn until(what: &str, mut so: impl FnMut() -> Result<bool>) -> Result<()> {
    let begin = Instant::now();
    while !so()? {
        ensure!(begin.elapsed() < LIMIT, "not within {LIMIT:?}: {what}");
    }
    Ok(())
}

fn nanoseconds(since: Instant) -> Result<u64> {
    Ok(u64::try_from(since.elapsed().as_nanos())?)
}

/// What a pod is on the host.
#[derive(Debug)]
struct Traces {
    vmm: i32,
    monitor: i32,
    /// The processes, the state directory, the cgroup.
    paths: Vec<PathBuf>,
}

impl Traces {
    /// As its record has it.
    fn of(record: &Value) -> Result<Self> {
        let pid = |name: &str| -> Result<i32> {
            let pid = record[name]["pid"].as_i64();
            let pid = pid.with_context(|| format!("the record has no {name}"))?;
            Ok(i32::try_from(pid)?)
        };
        let (vmm, monitor) = (pid("vmm")?, pid("monitor")?);
        let cgroup = record["cgroup"].as_str();
        let cgroup = cgroup.context("the record has no cgroup")?;
        let traces = Self {
            vmm,
            monitor,
            paths: vec![
                format!("/proc/{vmm}").into(),
                format!("/proc/{monitor}").into(),
                setup::state_path(ID, ""),
                Path::new(CGROUPS).join(cgroup.trim_start_matches('/')),
            ],
        };
        // One that is not there now would never be found left.
        for path in &traces.paths {
            ensure!(path.exists(), "a running pod has no {}", path.display());
        }
        Ok(traces)
    }

    /// What there still is.
    fn left(&self) -> Result<Vec<String>> {
        let there = self.paths.iter().filter(|path| path.exists());
        let mut left: Vec<String> = there.map(|path| path.display().to_string()).collect();
        for list in ["/proc/self/mountinfo", "/proc/net/unix"] {
            let lines =
                fs::read_to_string(list).with_context(|| format!("failed to read {list}"))?;
            let ours = lines.lines().filter(|line| line.contains(ID));
            left.extend(ours.map(str::to_owned));
        }
        Ok(left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_left_of_a_pod_is_named_and_a_pod_without_a_trace_is_refused() {
        let this = i32::try_from(std::process::id()).unwrap();
        let record = |cgroup: &str| json!({"vmm": {"pid": this}, "monitor": {"pid": this}, "cgroup": cgroup});
        // There is no such container on the machine of who runs this.
        let error = Traces::of(&record("")).unwrap_err();
        assert!(error.to_string().contains(ID), "{error}");
        let error = Traces::of(&json!({"vmm": {"pid": 1}})).unwrap_err();
        assert!(error.to_string().contains("monitor"), "{error}");

        let dir = tempfile::tempdir().unwrap();
        let traces = Traces {
            vmm: this,
            monitor: this,
            paths: vec![dir.path().to_owned(), dir.path().join("none")],
        };
        assert_eq!(traces.left().unwrap(), [dir.path().display().to_string()]);
        drop(dir);
        assert!(traces.left().unwrap().is_empty());
    }
}
