// SPDX-License-Identifier: Apache-2.0

//! Exit statuses and signals.

use crate::support::{Bundle, is_caisson, runtime, stderr, wait_child, wait_for};

#[test]
fn run_exits_with_the_containers_status() {
    for code in [0, 1, 42] {
        let output = Bundle::sh(&format!("exit {code}")).run();
        assert_eq!(output.status.code(), Some(code));
        assert_eq!(stderr(&output), "");
    }
}

#[test]
fn death_by_a_signal_is_128_plus_its_number() {
    for (signal, code) in [("KILL", 137), ("TERM", 143)] {
        // A shell that is PID 1 does not die of its own signals; its child does, and it passes that on.
        let output = Bundle::sh(&format!("sh -c 'kill -{signal} $$'; exit $?")).run();
        assert_eq!(output.status.code(), Some(code));
    }
}

#[test]
fn the_main_process_killed_from_outside_is_128_plus_the_signal() {
    let bundle = Bundle::sh("echo up; exec sleep 1000");
    let id = crate::support::new_id();
    let mut child = bundle
        .run_command(&id)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut reader = std::io::BufReader::new(child.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut reader, &mut line).unwrap();
    assert_eq!(line, "up\n");
    assert!(
        runtime()
            .args(["kill", &id, "KILL"])
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(wait_child(&mut child).code(), Some(137));
}

#[test]
fn a_missing_program_is_127_and_named() {
    let output = Bundle::busybox().args(&["no-such-program"]).run();
    assert!(
        stderr(&output).contains("no-such-program"),
        "{}",
        stderr(&output)
    );
    assert!(
        stderr(&output).contains("executable file not found in $PATH"),
        "{}",
        stderr(&output)
    );
    if is_caisson() {
        assert_eq!(output.status.code(), Some(127));
    } else {
        assert!(!output.status.success());
    }
}

#[test]
fn a_program_that_is_not_executable_is_126() {
    let bundle = Bundle::busybox().args(&["/etc/passwd"]);
    let output = bundle.run();
    assert!(
        stderr(&output).contains("permission denied"),
        "{}",
        stderr(&output)
    );
    if is_caisson() {
        assert_eq!(output.status.code(), Some(126));
    } else {
        assert!(!output.status.success());
    }
}

#[test]
fn a_signal_reaches_the_containers_process() {
    let bundle =
        Bundle::sh("trap 'echo got usr1; exit 7' USR1; echo up; while :; do sleep 1; done");
    let container = bundle.start();
    container.wait_output("up");
    container.ok_args(&["kill"], &["USR1"]);
    container.wait_output("got usr1");
    container.wait_status("stopped");
}

#[test]
fn signals_have_names_and_numbers() {
    let script = "for s in USR1 USR2 HUP; do trap \"echo got $s\" $s; done; echo up; while :; do sleep 1; done";
    let bundle = Bundle::sh(script);
    let container = bundle.start();
    container.wait_output("up");
    container.ok_args(&["kill"], &["SIGUSR1"]);
    container.wait_output("got USR1");
    container.ok_args(&["kill"], &["12"]);
    container.wait_output("got USR2");
    container.ok_args(&["kill"], &["hup"]);
    container.wait_output("got HUP");
    let wrong = container.verb(&["kill"], &["NOSUCH"]);
    assert!(!wrong.status.success());
    assert!(stderr(&wrong).contains("NOSUCH"), "{}", stderr(&wrong));
}

#[test]
fn a_process_that_ignores_sigterm_lives_until_sigkill() {
    let bundle = Bundle::sh("trap 'echo ignored' TERM; echo up; while :; do sleep 1; done");
    let container = bundle.start();
    container.wait_output("up");
    container.ok(&["kill"]);
    container.wait_output("ignored");
    assert_eq!(container.status(), "running");
    container.ok_args(&["kill"], &["KILL"]);
    container.wait_status("stopped");
}

#[test]
fn kill_all_reaches_every_process() {
    let bundle = Bundle::sh(
        "trap 'echo one' USR1; sh -c 'trap \"echo two\" USR1; echo up; while :; do sleep 1; done' & \
         while :; do sleep 1; done",
    );
    let container = bundle.start();
    container.wait_output("up");
    let output = runtime()
        .args(["kill", "--all", &container.id, "USR1"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    wait_for("both handlers", || {
        let output = container.output();
        output.contains("one") && output.contains("two")
    });
}
