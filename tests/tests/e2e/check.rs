// SPDX-License-Identifier: Apache-2.0

//! `caisson check`: a machine that can run Caisson is told so, and one that cannot is told what to do.

use std::process::{Command, Output};

use serde_json::Value;

use crate::support::{runtime, show};

/// The rows of a report, and its verdict.
fn rows(output: &Output) -> (Vec<Value>, bool) {
    println!("{}", show(output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = report["checks"].as_array().unwrap().clone();
    assert!(!rows.is_empty());
    for row in &rows {
        assert!(!row["name"].as_str().unwrap().is_empty());
        assert!(!row["what"].as_str().unwrap().is_empty(), "{row}");
        let advised = !row["advice"].as_str().unwrap().is_empty();
        assert_eq!(
            advised,
            row["ok"] == false,
            "advice where it is needed: {row}"
        );
    }
    (rows, report["ok"].as_bool().unwrap())
}

#[test]
fn a_machine_with_kvm_passes_in_every_row() {
    let (rows, ok) = rows(&runtime().args(["check", "--json"]).output().unwrap());
    let bad: Vec<_> = rows.iter().filter(|row| row["ok"] != true).collect();
    assert!(bad.is_empty(), "{bad:#?}");
    assert!(ok);
    // The instructions that a KVM without real virtualization cannot do are tried one by one.
    let names: Vec<_> = rows
        .iter()
        .map(|row| row["name"].as_str().unwrap())
        .collect();
    for tried in ["xsave", "cmpxchg16b", "int3", "iretq"] {
        assert!(
            names.iter().any(|name| name.contains(tried)),
            "{tried}: {names:?}"
        );
    }
    for host in [
        "host kernel",
        "cgroup v2",
        "guest kernel",
        "guest initramfs",
        "VMM",
    ] {
        assert!(names.contains(&host), "{host}: {names:?}");
    }
    let table = runtime().arg("check").output().unwrap();
    println!("{}", show(&table));
    assert_eq!(table.status.code(), Some(0));
    let text = String::from_utf8(table.stdout).unwrap();
    assert!(text.contains("This machine can run Caisson."));
    assert_eq!(
        text.matches("\nyes ").count() + usize::from(text.starts_with("yes ")),
        rows.len()
    );
}

/// `caisson check --json` behind a shell that makes another /dev first.
fn check_after(prepare: &str) -> Output {
    let script = format!(
        "mount -t tmpfs tmpfs /dev && mknod -m 666 /dev/null c 1 3 && {prepare} caisson check --json"
    );
    Command::new("unshare")
        .args(["--mount", "sh", "-c", &script])
        .output()
        .unwrap()
}

fn fails_for(output: &Output, text: &str) {
    let (rows, ok) = rows(output);
    assert_eq!(output.status.code(), Some(1));
    assert!(!ok);
    let row = rows.iter().find(|row| row["ok"] == false).unwrap();
    assert!(row.to_string().contains("/dev/kvm"), "{row}");
    assert!(row.to_string().contains(text), "{row}");
}

#[test]
fn a_machine_without_dev_kvm_fails() {
    fails_for(&check_after(""), "does not exist");
}

#[test]
fn dev_kvm_without_permission_fails() {
    let output = check_after(
        "mknod -m 000 /dev/kvm c 10 232 && chown 65534:65534 /dev/kvm && \
         exec setpriv --bounding-set=-dac_override,-dac_read_search --inh-caps=-dac_override,-dac_read_search",
    );
    fails_for(&output, "ermission");
}
