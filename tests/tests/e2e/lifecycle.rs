// SPDX-License-Identifier: Apache-2.0

//! create, start, state, kill, delete: in every order, many at once, and nothing left.

use std::process::Output;

use crate::support::{Bundle, Container, Traces, count, is_caisson, new_id, runtime, show, stderr};

fn fails(output: &Output, text: &str) {
    assert!(!output.status.success(), "{}", show(output));
    assert!(stderr(output).contains(text), "{}", show(output));
}

#[test]
fn created_running_stopped_gone() {
    let before = Traces::now();
    let bundle = Bundle::sh("echo ran");
    let pid_file = bundle.path().join("pid");
    let container = bundle.container(&new_id());
    let output = container.try_create(&["--pid-file", pid_file.to_str().unwrap()]);
    assert!(output.status.success(), "{}", show(&output));
    let state = container.state().unwrap();
    assert_eq!(state["status"], "created");
    assert_eq!(state["id"], container.id.as_str());
    assert_eq!(state["bundle"], bundle.path().to_str().unwrap());
    assert!(state["ociVersion"].as_str().unwrap().starts_with("1."));
    let pid: i64 = std::fs::read_to_string(&pid_file).unwrap().parse().unwrap();
    assert_eq!(state["pid"], pid);
    assert!(std::path::Path::new(&format!("/proc/{pid}")).exists());
    assert_eq!(container.output(), "", "nothing runs before start");
    container.ok(&["start"]);
    container.wait_status("stopped");
    assert_eq!(container.output(), "ran\n");
    assert_eq!(container.state().unwrap()["pid"], 0);
    container.ok(&["delete"]);
    assert!(container.state().is_none());
    Traces::wait_until_gone(&before);
}

#[test]
fn annotations_and_owner_are_in_the_state() {
    let bundle = Bundle::busybox()
        .edit(|spec| spec["annotations"] = serde_json::json!({"org.example.key": "value"}));
    let container = bundle.create();
    let state = container.state().unwrap();
    assert_eq!(state["annotations"]["org.example.key"], "value");
    let list = runtime()
        .args(["list", "--format", "json"])
        .output()
        .unwrap();
    let list: serde_json::Value = serde_json::from_slice(&list.stdout).unwrap();
    let own = list
        .as_array()
        .unwrap()
        .iter()
        .find(|entry| entry["id"] == container.id.as_str());
    assert_eq!(own.expect("it is listed")["status"], "created");
    let table = runtime().args(["list"]).output().unwrap();
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(table.starts_with("ID"), "{table}");
    assert!(table.contains(&container.id), "{table}");
    let quiet = runtime().args(["list", "-q"]).output().unwrap();
    assert!(
        String::from_utf8(quiet.stdout)
            .unwrap()
            .lines()
            .any(|line| line == container.id)
    );
}

#[test]
fn wrong_orders_are_refused_and_change_nothing() {
    let bundle = Bundle::busybox().args(&["sleep", "100000"]);
    let container = bundle.create();
    container.ok(&["start"]);
    fails(&container.verb(&["start"], &[]), "cannot start");
    fails(&container.verb(&["delete"], &[]), "not stopped");
    fails(&container.verb(&["resume"], &[]), "paus");
    assert_eq!(container.status(), "running");
    container.ok_args(&["kill"], &["KILL"]);
    container.wait_status("stopped");
    fails(&container.verb(&["kill"], &["TERM"]), "not running");
    fails(&container.verb(&["start"], &[]), "stopped");
    fails(&container.verb(&["pause"], &[]), "not running");
    container.ok(&["delete"]);
    fails(&container.verb(&["delete"], &[]), "does not exist");
}

#[test]
fn an_unknown_id_does_not_exist() {
    for verb in ["start", "state", "delete", "pause", "resume", "ps"] {
        let output = runtime()
            .args([verb, "no-such-container"])
            .output()
            .unwrap();
        fails(&output, "does not exist");
    }
    fails(
        &runtime()
            .args(["kill", "no-such-container", "TERM"])
            .output()
            .unwrap(),
        "does not exist",
    );
    fails(
        &runtime()
            .args(["exec", "no-such-container", "true"])
            .output()
            .unwrap(),
        "does not exist",
    );
    // As runc: forced deletion of what is not there is no failure.
    assert!(
        runtime()
            .args(["delete", "--force", "no-such-container"])
            .status()
            .unwrap()
            .success()
    );
}

#[test]
fn ids_that_could_be_paths_are_refused() {
    let bundle = Bundle::busybox();
    let before = Traces::now();
    for id in [
        "a/b",
        "..",
        ".",
        "../x",
        "",
        "a b",
        "x\ny",
        "é",
        &"x".repeat(1025),
    ] {
        let output = bundle.container(id).try_create(&[]);
        assert!(!output.status.success(), "{id:?}: {}", show(&output));
        if is_caisson() {
            for verb in ["state", "start", "delete"] {
                assert!(
                    !runtime().args([verb, id]).status().unwrap().success(),
                    "{verb} {id:?}"
                );
            }
        }
    }
    Traces::wait_until_gone(&before);
}

#[test]
fn an_id_is_given_once() {
    let bundle = Bundle::busybox().args(&["sleep", "100000"]);
    let container = bundle.start();
    let again = bundle.container(&container.id);
    let output = again.try_create(&[]);
    assert!(!output.status.success());
    assert!(stderr(&output).contains("exist"), "{}", show(&output));
    assert_eq!(container.status(), "running");
    assert!(container.exec("true").status.success());
}

#[test]
fn of_many_creates_of_one_id_exactly_one_wins() {
    let before = Traces::now();
    let bundle = Bundle::busybox().args(&["sleep", "100000"]);
    let id = new_id();
    let wins = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|n| {
                let (bundle, id) = (&bundle, &id);
                scope.spawn(move || {
                    let out = std::fs::File::create(bundle.path().join(format!("out{n}"))).unwrap();
                    let mut command = runtime();
                    command
                        .args(["create", "--bundle"])
                        .arg(bundle.path())
                        .arg(id);
                    let err = out.try_clone().unwrap();
                    command.stdout(out).stderr(err).status().unwrap().success()
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| u32::from(thread.join().unwrap()))
            .sum::<u32>()
    });
    let container = bundle.container(&id);
    assert_eq!(wins, 1);
    assert_eq!(container.status(), "created");
    container.ok(&["start"]);
    assert!(container.exec("true").status.success());
    container.ok(&["delete", "--force"]);
    Traces::wait_until_gone(&before);
}

#[test]
fn many_containers_at_once() {
    let many = count("containers at once", 4, 20);
    let before = Traces::now();
    let bundles: Vec<Bundle> = (0..many)
        .map(|n| Bundle::sh(&format!("echo container {n}; exec sleep 100000")))
        .collect();
    let containers: Vec<Container<'_>> = std::thread::scope(|scope| {
        let threads: Vec<_> = bundles
            .iter()
            .map(|bundle| scope.spawn(|| bundle.start()))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    for (n, container) in containers.iter().enumerate() {
        container.wait_output(&format!("container {n}\n"));
        assert_eq!(container.status(), "running");
    }
    for container in &containers {
        container.ok(&["delete", "--force"]);
    }
    Traces::wait_until_gone(&before);
}

#[test]
fn create_and_delete_many_times_leaves_nothing() {
    let times = count("create-delete", 5, 100);
    let before = Traces::now();
    let bundle = Bundle::busybox().args(&["sleep", "100000"]);
    for round in 0..times {
        let container = bundle.create();
        if round % 2 == 0 {
            container.ok(&["start"]);
        }
        container.ok(&["delete", "--force"]);
    }
    Traces::wait_until_gone(&before);
}

#[test]
fn run_detached_goes_on_by_itself() {
    let bundle = Bundle::busybox().args(&["sleep", "100000"]);
    let container = bundle.container(&new_id());
    let pid_file = bundle.path().join("pid");
    let status = runtime()
        .args(["run", "--detach", "--pid-file"])
        .arg(&pid_file)
        .arg("--bundle")
        .arg(bundle.path())
        .arg(&container.id)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(container.status(), "running");
    let pid: i32 = std::fs::read_to_string(&pid_file).unwrap().parse().unwrap();
    assert_eq!(container.pid(), pid);
}

#[test]
fn delete_force_of_a_running_container_is_idempotent() {
    let before = Traces::now();
    let bundle = Bundle::busybox().args(&["sleep", "100000"]);
    let container = bundle.start();
    container.ok(&["delete", "--force"]);
    container.ok(&["delete", "--force"]);
    assert!(container.state().is_none());
    Traces::wait_until_gone(&before);
}

#[test]
fn run_leaves_nothing() {
    let before = Traces::now();
    assert!(Bundle::sh("echo hello").run().status.success());
    assert_eq!(Bundle::sh("exit 3").run().status.code(), Some(3));
    assert!(
        !Bundle::busybox()
            .args(&["no-such-program"])
            .run()
            .status
            .success()
    );
    Traces::wait_until_gone(&before);
}
