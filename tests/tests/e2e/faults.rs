// SPDX-License-Identifier: Apache-2.0

//! Processes of Caisson killed at bad moments: the state tells the truth, and nothing is left.

use std::time::Duration;

use crate::support::{Bundle, Container, Traces, children, count, show, wait_for, wait_within};

/// Truth must come within a second; the testbed is an emulated machine that is shared with another, so the
/// bound is wider and still catches a poll or a missed event.
pub(crate) const TRUTH: Duration = Duration::from_secs(5);

fn kill(pid: i32) {
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
}

fn comm(pid: i32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm"))
        .unwrap_or_default()
        .trim()
        .to_owned()
}

fn vmm_of(container: &Container<'_>) -> i32 {
    let pid = container.pid();
    let vmm = children(pid)
        .into_iter()
        .find(|child| comm(*child).starts_with("caisson-vmm"));
    vmm.unwrap_or_else(|| panic!("no VMM below {pid}"))
}

/// A container that only waits.
pub(crate) fn sleeping() -> Bundle {
    Bundle::busybox().args(&["sleep", "100000"])
}

/// Its state says so in time, and it goes by force.
pub(crate) fn stopped_then_gone(container: &Container<'_>, before: &Traces) {
    wait_within("status stopped", TRUTH, &mut || {
        container.status() == "stopped"
    });
    container.ok(&["delete", "--force"]);
    assert!(container.state().is_none());
    Traces::wait_until_gone(before);
}

#[test]
fn the_vmm_killed_while_idle() {
    let before = Traces::now();
    let bundle = sleeping();
    let container = bundle.start();
    kill(vmm_of(&container));
    stopped_then_gone(&container, &before);
}

#[test]
fn the_vmm_killed_during_an_exec() {
    let before = Traces::now();
    let bundle = sleeping();
    let container = bundle.start();
    let id = container.id.clone();
    let exec = std::thread::spawn(move || {
        crate::support::runtime()
            .args(["exec", &id, "sh", "-c", "touch /tmp/up; sleep 1000"])
            .output()
            .unwrap()
    });
    wait_for("the exec", || bundle.root("tmp/up").exists());
    kill(vmm_of(&container));
    let output = exec.join().unwrap();
    assert!(!output.status.success(), "{}", show(&output));
    assert!(!output.stderr.is_empty(), "an exec whose VM died says so");
    stopped_then_gone(&container, &before);
}

#[test]
fn the_monitor_killed_while_idle_takes_the_vm_with_it() {
    let before = Traces::now();
    let bundle = sleeping();
    let container = bundle.start();
    let vmm = vmm_of(&container);
    kill(container.pid());
    wait_within("end of the VMM", TRUTH, &mut || {
        !comm(vmm).starts_with("caisson-vmm")
    });
    stopped_then_gone(&container, &before);
}

#[test]
fn the_monitor_killed_during_an_exec() {
    let before = Traces::now();
    let bundle = sleeping();
    let container = bundle.start();
    let id = container.id.clone();
    let exec = std::thread::spawn(move || {
        crate::support::runtime()
            .args(["exec", &id, "sh", "-c", "touch /tmp/up; sleep 1000"])
            .output()
            .unwrap()
    });
    wait_for("the exec", || bundle.root("tmp/up").exists());
    kill(container.pid());
    let output = exec.join().unwrap();
    assert!(!output.status.success(), "{}", show(&output));
    stopped_then_gone(&container, &before);
}

/// Processes of Caisson that have the id on their command line, and their VMM, each with its name.
fn processes_of(id: &str) -> Vec<(i32, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else {
            continue;
        };
        let args = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let args = String::from_utf8_lossy(&args).replace('\0', " ");
        if args.contains(id) && comm(pid).starts_with("caisson") {
            let below = children(pid).into_iter().map(|child| (child, comm(child)));
            found.extend(below.filter(|(_, name)| name.starts_with("caisson-vmm")));
            found.push((pid, comm(pid)));
        }
    }
    found
}

/// Kills one of Caisson's processes at moments spread over a `create`, and looks at what is left.
fn killed_while_starting(which: &str, pick: fn(&[(i32, String)]) -> Option<i32>) {
    let before = Traces::now();
    let bundle = sleeping();
    let moments = count("moments of create", 3, 40);
    let mut seen = 0;
    for moment in 0..moments {
        let container = bundle.container(&crate::support::new_id());
        std::thread::scope(|scope| {
            let creating = scope.spawn(|| container.try_create(&[]));
            let mut victim = None;
            while victim.is_none() && !creating.is_finished() {
                victim = pick(&processes_of(&container.id));
                std::thread::sleep(Duration::from_millis(5));
            }
            seen += u32::from(victim.is_some());
            // Spread over the length of a start; the moment itself is what varies.
            std::thread::sleep(Duration::from_millis(150) * u32::try_from(moment).unwrap());
            if let Some(victim) = victim {
                // It may have ended by itself meanwhile.
                let _ = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(victim),
                    nix::sys::signal::Signal::SIGKILL,
                );
            }
            let output = creating.join().unwrap();
            println!("{which} killed at moment {moment}: {}", show(&output));
            // One that was killed itself cannot.
            if output.status.code().is_some_and(|code| code != 0) {
                assert!(!output.stderr.is_empty(), "a create that fails says why");
            }
        });
        if let Some(state) = container.state() {
            println!("state: {state}");
        }
        container.ok(&["delete", "--force"]);
        assert!(container.state().is_none());
        Traces::wait_until_gone(&before);
    }
    assert!(seen > 0, "no {which} was ever seen");
}

#[test]
fn the_vmm_killed_while_starting() {
    killed_while_starting("VMM", |all| {
        all.iter()
            .find(|(_, comm)| comm.starts_with("caisson-vmm"))
            .map(|(pid, _)| *pid)
    });
}

#[test]
fn the_monitor_killed_while_starting() {
    killed_while_starting("monitor", |all| {
        // The one that is a parent of others and not `create` itself: the youngest plain `caisson`.
        let plain: Vec<i32> = all
            .iter()
            .filter(|(_, comm)| !comm.starts_with("caisson-vmm"))
            .map(|(pid, _)| *pid)
            .collect();
        (plain.len() >= 2)
            .then(|| plain.into_iter().max())
            .flatten()
    });
}

#[test]
fn create_itself_killed_leaves_what_delete_can_remove() {
    killed_while_starting("create", |all| {
        all.iter()
            .filter(|(_, comm)| !comm.starts_with("caisson-vmm"))
            .map(|(pid, _)| *pid)
            .min()
    });
}

#[test]
fn a_stuck_vm_is_deleted_by_force() {
    let before = Traces::now();
    let bundle = sleeping();
    let container = bundle.start();
    let vmm = nix::unistd::Pid::from_raw(vmm_of(&container));
    nix::sys::signal::kill(vmm, nix::sys::signal::Signal::SIGSTOP).unwrap();
    container.ok(&["delete", "--force"]);
    assert!(container.state().is_none());
    Traces::wait_until_gone(&before);
}
