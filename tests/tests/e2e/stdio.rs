// SPDX-License-Identifier: Apache-2.0

//! Standard streams: nothing lost, nothing mixed.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::Stdio;

use crate::support::{Bundle, count, is_caisson, new_id, sha256, show, stderr, wait_child};

#[test]
fn stdout_and_stderr_are_apart() {
    let output = Bundle::sh("echo out; echo err >&2; echo out2").run();
    assert!(output.status.success());
    assert_eq!(String::from_utf8_lossy(&output.stdout), "out\nout2\n");
    assert_eq!(stderr(&output), "err\n");
}

/// Random bytes of `mib` MiB in a file of the bundle's root.
fn random_file(bundle: &Bundle, name: &str, mib: usize) -> String {
    let path = bundle.root(name);
    let mut source = File::open("/dev/urandom").unwrap().take((mib as u64) << 20);
    std::io::copy(&mut source, &mut File::create(&path).unwrap()).unwrap();
    sha256(&path)
}

#[test]
fn a_hundred_mib_through_stdout_arrive_whole() {
    let mib = count("MiB through stdout", 100, 100);
    let bundle = Bundle::busybox().args(&["cat", "/data"]);
    let want = random_file(&bundle, "data", mib);
    let out = bundle.path().join("out");
    let id = new_id();
    let status = bundle
        .run_command(&id)
        .stdout(File::create(&out).unwrap())
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(std::fs::metadata(&out).unwrap().len(), (mib as u64) << 20);
    assert_eq!(sha256(&out), want);
}

#[test]
fn stdin_of_ten_mib_arrives_whole_and_ends() {
    let bundle = Bundle::busybox().args(&["sha256sum"]);
    let want = random_file(&bundle, "data", 10);
    let stdin = File::open(bundle.root("data")).unwrap();
    // A pipe, as a shell would give it, and not the file itself.
    let mut cat = std::process::Command::new("cat")
        .stdin(stdin)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = bundle
        .run_command(&new_id())
        .stdin(cat.stdout.take().unwrap())
        .output()
        .unwrap();
    wait_child(&mut cat);
    assert!(output.status.success(), "{}", show(&output));
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).split(' ').next(),
        Some(want.as_str())
    );
}

#[test]
fn stdin_stays_open_until_it_is_closed() {
    let bundle = Bundle::sh("read a; echo first $a; read b || echo end");
    let mut child = bundle
        .run_command(&new_id())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    stdin.write_all(b"x\n").unwrap();
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "first x\n");
    drop(stdin);
    line.clear();
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "end\n");
    assert!(wait_child(&mut child).success());
}

#[test]
fn what_is_written_just_before_the_end_is_not_lost() {
    // In one guest, by exec: 500 boots would only measure the emulator.
    let bundle = Bundle::busybox().args(&["sleep", "100000"]);
    let container = bundle.start();
    let times = count("write-then-exit", 60, 500);
    for round in 0..times {
        let lines = 1 + (round * 37) % 400;
        let output = container.exec(&format!("seq 1 {lines}; exec echo the end {round}"));
        assert!(output.status.success(), "{}", show(&output));
        let want: String = (1..=lines).map(|n| format!("{n}\n")).collect();
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            format!("{want}the end {round}\n")
        );
    }
}

#[test]
fn the_last_bytes_of_the_main_process_are_not_lost() {
    let times = count("containers that write and end", 5, 50);
    for round in 0..times {
        let bundle = Bundle::sh("seq 1 20000; echo last");
        let out = bundle.stdout();
        assert!(
            out.ends_with("20000\nlast\n"),
            "round {round}: {} bytes",
            out.len()
        );
        assert_eq!(out.lines().count(), 20001);
    }
}

#[test]
fn a_reader_that_goes_away_early_ends_the_writer() {
    let bundle = Bundle::sh("trap '' PIPE; while echo line; do :; done; echo stopped >&2; exit 3");
    let mut child = bundle
        .run_command(&new_id())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "line\n");
    drop(stdout);
    assert_eq!(wait_child(&mut child).code(), Some(3));
    let mut text = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert!(text.contains("stopped"), "{text}");
}

#[test]
fn a_grandchild_that_keeps_stdout_open_does_not_hold_the_end_back() {
    let bundle = Bundle::busybox().args(&["sleep", "100000"]);
    let container = bundle.start();
    let start = std::time::Instant::now();
    // Into a file: a pipe would be held open by the grandchild itself where the runtime passes it on.
    let out = bundle.path().join("out");
    let status = crate::support::runtime()
        .args(["exec", &container.id, "sh", "-c", "sleep 50 & echo done"])
        .stdout(File::create(&out).unwrap())
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(std::fs::read_to_string(&out).unwrap(), "done\n");
    // runc waits for the end of its pipes here; what the process itself wrote is all that must arrive.
    if is_caisson() {
        assert!(
            start.elapsed() < std::time::Duration::from_secs(40),
            "{:?}",
            start.elapsed()
        );
    }
}

#[test]
fn a_process_that_closes_its_streams_early_still_ends_with_its_status() {
    let output = Bundle::sh("echo before; exec >&- 2>&- <&-; sleep 1; exit 9").run();
    assert_eq!(output.status.code(), Some(9));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "before\n");
}
