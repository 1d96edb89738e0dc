// SPDX-License-Identifier: Apache-2.0

//! Every process of Caisson killed at each of the calls by which it changes something: the state tells the truth,
//! and `delete --force` leaves nothing.

use std::fs;
use std::path::Path;

use crate::faults::{TRUTH, sleeping};
use crate::support::{Bundle, Container, Traces, count, new_id, wait_within};
use crate::tracer::{self, Kin, Seen};

/// The numbers of the calls at which a process that makes `calls` of them is killed: all of them, or `few` with the
/// first and the last, denser at the beginning, where most is made.
fn moments(what: &str, calls: &[String], few: usize) -> Vec<usize> {
    println!("calls of {what}: {calls:#?}");
    let all = calls.len();
    let wanted = count(what, few.min(all), all);
    if wanted == all {
        return (0..all).collect();
    }
    let steps = wanted - 1;
    (0..wanted)
        .map(|n| n * n * (all - 1) / (steps * steps))
        .collect()
}

/// Whether a process lives that stands for the container: the per-container process, or who is about to start it.
fn stood_for(id: &str) -> bool {
    fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        let read = |name| fs::read(entry.path().join(name)).unwrap_or_default();
        let stat = String::from_utf8_lossy(&read("stat")).into_owned();
        let zombie = stat
            .rsplit(')')
            .next()
            .is_some_and(|rest| rest.starts_with(" Z"));
        let args = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
        let ours = args.contains(" monitor ") || args.contains(" create ");
        !zombie && args.starts_with("caisson") && ours && args.contains(id)
    })
}

/// What the state says agrees with the processes, within the time that it may take.
fn tells_the_truth(container: &Container<'_>) {
    let mut said = None;
    wait_within("the truth", TRUTH, &mut || {
        let before = stood_for(&container.id);
        said = container.state().map(|state| state["status"].clone());
        println!("state {said:?}, its process lives: {before}");
        match said.as_ref().and_then(|status| status.as_str()) {
            None | Some("stopped") => !before,
            Some("creating" | "created" | "running") => before,
            Some(other) => panic!("status {other}"),
        }
    });
}

fn gone_by_force(container: &Container<'_>, before: &Traces) {
    container.ok(&["delete", "--force"]);
    assert!(container.state().is_none());
    Traces::wait_until_gone(before);
}

fn traced_create(bundle: &Bundle, id: &str, out: &Path, kin: Kin, at: Option<usize>) -> Seen {
    let path = bundle.path().to_str().unwrap();
    tracer::run(&["create", "--bundle", path, id], out, kin, at)
}

/// Kills a process of `create` at its calls.
fn create_killed(what: &str, kin: Kin) {
    let before = Traces::now();
    let bundle = sleeping();
    let out = tempfile::TempDir::new().unwrap();
    let container = bundle.container(&new_id());
    let whole = traced_create(&bundle, &container.id, out.path(), kin, None);
    assert!(whole.status.success(), "{whole:?}");
    gone_by_force(&container, &before);
    for at in moments(what, &whole.calls, 8) {
        let container = bundle.container(&new_id());
        let seen = traced_create(&bundle, &container.id, out.path(), kin, Some(at));
        let stderr = fs::read_to_string(out.path().join("stderr")).unwrap();
        println!(
            "{what} killed at call {at}, {:?}: {}, {stderr}",
            seen.calls.last(),
            seen.status
        );
        if kin != Kin::Itself && !seen.status.success() {
            assert!(!stderr.is_empty(), "a create that fails says why");
            assert!(
                container.state().is_none(),
                "a create that fails leaves nothing"
            );
        }
        if kin == Kin::Itself && seen.killed {
            assert!(!seen.status.success());
        }
        tells_the_truth(&container);
        gone_by_force(&container, &before);
    }
}

#[test]
fn create_killed_at_its_calls() {
    create_killed("create", Kin::Itself);
}

#[test]
fn the_monitor_killed_at_its_calls_while_starting() {
    create_killed("the monitor", Kin::Child);
}

#[test]
fn the_vmm_killed_at_its_calls_while_starting() {
    create_killed("the VMM", Kin::Grandchild);
}

/// Kills a command on a container at its calls; `started` is whether the container runs before.
fn command_killed(what: &str, started: bool, arguments: fn(&str) -> Vec<&str>) {
    let before = Traces::now();
    let bundle = sleeping();
    let out = tempfile::TempDir::new().unwrap();
    let make = || {
        if started {
            bundle.start()
        } else {
            bundle.create()
        }
    };
    let container = make();
    let whole = tracer::run(&arguments(&container.id), out.path(), Kin::Itself, None);
    assert!(whole.status.success(), "{whole:?}");
    gone_by_force(&container, &before);
    for at in moments(what, &whole.calls, 4) {
        let container = make();
        let seen = tracer::run(&arguments(&container.id), out.path(), Kin::Itself, Some(at));
        println!(
            "{what} killed at call {at}, {:?}: {}",
            seen.calls.last(),
            seen.status
        );
        tells_the_truth(&container);
        gone_by_force(&container, &before);
    }
}

#[test]
fn start_killed_at_its_calls() {
    command_killed("start", false, |id| vec!["start", id]);
}

#[test]
fn delete_killed_at_its_calls() {
    command_killed("delete --force", true, |id| vec!["delete", "--force", id]);
}

#[test]
fn kill_killed_at_its_calls() {
    command_killed("kill", true, |id| vec!["kill", id, "KILL"]);
}

#[test]
fn exec_killed_at_its_calls() {
    command_killed("exec", true, |id| vec!["exec", id, "true"]);
}
