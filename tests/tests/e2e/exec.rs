// SPDX-License-Identifier: Apache-2.0

//! Further processes in a running container.

use std::process::Stdio;

use crate::support::{Bundle, is_caisson, runtime, show, stderr, wait_child};

fn sleeping() -> Bundle {
    Bundle::busybox().args(&["sleep", "100000"])
}

#[test]
fn exec_has_its_own_status_and_streams() {
    let bundle = sleeping();
    let container = bundle.start();
    let output = container.exec("echo out; echo err >&2; exit 5");
    assert_eq!(output.status.code(), Some(5));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "out\n");
    assert_eq!(stderr(&output), "err\n");
    assert_eq!(container.exec("kill -9 $$").status.code(), Some(137));
    assert_eq!(container.status(), "running");
}

#[test]
fn exec_takes_user_cwd_and_environment() {
    let bundle = sleeping();
    let container = bundle.start();
    let output = runtime()
        .args([
            "exec",
            "--user",
            "1000:2000",
            "--cwd",
            "/tmp",
            "--env",
            "KEY=a value",
            &container.id,
        ])
        .args(["sh", "-c", "id -u; id -g; pwd; echo $KEY"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", show(&output));
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "1000\n2000\n/tmp\na value\n"
    );
}

#[test]
fn exec_takes_a_process_file() {
    let bundle = sleeping();
    let container = bundle.start();
    let process = serde_json::json!({
        "args": ["sh", "-c", "echo $FROM $(pwd) $(id -u)"],
        "cwd": "/etc",
        "env": ["PATH=/bin", "FROM=file"],
        "user": {"uid": 1000, "gid": 1000},
    });
    let path = bundle.path().join("process.json");
    std::fs::write(&path, process.to_string()).unwrap();
    let output = runtime()
        .arg("exec")
        .arg("--process")
        .arg(&path)
        .arg(&container.id)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", show(&output));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "file /etc 1000\n");
}

#[test]
fn exec_sees_the_containers_processes_and_files() {
    let bundle = Bundle::sh("echo from-init > /tmp/file; exec sleep 100000");
    let container = bundle.start();
    crate::support::wait_for("the file", || bundle.root("tmp/file").exists());
    let output = container.exec("cat /tmp/file; ps | grep -c 'sleep 100000'; hostname");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.starts_with("from-init\n"), "{}", show(&output));
    assert!(text.ends_with("e2e\n"), "{}", show(&output));
}

#[test]
fn exec_reads_stdin_to_its_end() {
    let bundle = sleeping();
    let container = bundle.start();
    let mut child = runtime()
        .args(["exec", &container.id, "wc", "-c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let writer = std::thread::spawn(move || {
        std::io::Write::write_all(&mut stdin, &vec![7_u8; 3 << 20]).unwrap();
    });
    let status = wait_child(&mut child);
    writer.join().unwrap();
    let mut text = String::new();
    std::io::Read::read_to_string(&mut child.stdout.take().unwrap(), &mut text).unwrap();
    assert!(status.success());
    assert_eq!(text.trim(), (3 << 20).to_string());
}

#[test]
fn exec_of_a_missing_program_fails_by_name_and_harms_nothing() {
    let bundle = sleeping();
    let container = bundle.start();
    let output = container.verb(&["exec"], &["no-such-program"]);
    assert!(
        stderr(&output).contains("executable file not found in $PATH"),
        "{}",
        show(&output)
    );
    if is_caisson() {
        assert_eq!(output.status.code(), Some(127));
        assert_eq!(
            container.verb(&["exec"], &["/etc/passwd"]).status.code(),
            Some(126)
        );
    }
    assert_eq!(container.status(), "running");
    assert!(container.exec("true").status.success());
}

#[test]
fn exec_detached_writes_its_pid_and_ends_by_itself() {
    let bundle = sleeping();
    let container = bundle.start();
    let pid_file = bundle.path().join("exec.pid");
    let status = runtime()
        .args(["exec", "--detach", "--pid-file"])
        .arg(&pid_file)
        .args([&container.id, "sh", "-c", "sleep 2; echo done > /tmp/done"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    let pid: i32 = std::fs::read_to_string(&pid_file)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    assert!(std::path::Path::new(&format!("/proc/{pid}")).exists());
    crate::support::wait_for("the detached exec", || bundle.root("tmp/done").exists());
}

#[test]
fn exec_needs_a_running_container() {
    let bundle = Bundle::busybox();
    let container = bundle.start();
    container.wait_status("stopped");
    let output = container.exec("true");
    assert!(!output.status.success());
    assert!(stderr(&output).contains("stopped"), "{}", stderr(&output));
}

#[test]
fn ten_execs_at_once_do_not_mix() {
    let bundle = sleeping();
    let container = bundle.start();
    let threads: Vec<_> = (0..10)
        .map(|n| {
            let id = container.id.clone();
            std::thread::spawn(move || {
                let script = format!("for i in $(seq 1 500); do echo {n}-$i; done; exit {n}");
                let output = runtime()
                    .args(["exec", &id, "sh", "-c", &script])
                    .output()
                    .unwrap();
                assert_eq!(output.status.code(), Some(n), "{}", show(&output));
                let want: String = (1..=500).map(|i| format!("{n}-{i}\n")).collect();
                assert_eq!(String::from_utf8_lossy(&output.stdout), want);
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn ps_lists_the_containers_processes() {
    let bundle = sleeping();
    let container = bundle.start();
    let output = runtime()
        .args(["ps", "--format", "json", &container.id])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", show(&output));
    let pids: Vec<i64> = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(pids.len(), 1, "{pids:?}");
    let table = container.ok(&["ps"]);
    assert!(table.lines().next().unwrap().contains("PID"), "{table}");
    assert!(table.contains("sleep 100000"), "{table}");
}
