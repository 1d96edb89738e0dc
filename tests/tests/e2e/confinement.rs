// SPDX-License-Identifier: Apache-2.0

//! Namespaces, masked paths, seccomp and cgroup limits inside the guest, and the guest's kernel itself.

use serde_json::json;

use crate::support::{Bundle, is_caisson, show, stderr};

#[test]
fn the_kernel_is_the_guests_own() {
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let guest = Bundle::busybox().args(&["uname", "-r"]).stdout();
    assert!(guest.starts_with("6.12"), "{guest}");
    assert_eq!(guest == host, !is_caisson(), "{guest}");
}

#[test]
fn the_host_is_not_to_be_seen() {
    let bundle = Bundle::sh("ps; cat /proc/1/cmdline | tr '\\0' ' '");
    let text = bundle.stdout();
    assert!(!text.contains("testbed"), "{text}");
    // ps itself, the shell and the header.
    assert!(text.lines().count() <= 6, "{text}");
}

#[test]
fn pid_mount_ipc_and_uts_namespaces_are_its_own() {
    let script =
        "for ns in pid mnt ipc uts net cgroup; do readlink /proc/self/ns/$ns; done; echo $$";
    let bundle = Bundle::sh(script);
    let text = bundle.stdout();
    assert!(text.ends_with("\n1\n"), "{text}");
    let bundle = Bundle::sh("hostname changed; hostname")
        .edit(|spec| spec["process"]["capabilities"] = json!({
            "bounding": ["CAP_SYS_ADMIN"], "effective": ["CAP_SYS_ADMIN"], "permitted": ["CAP_SYS_ADMIN"]}));
    assert_eq!(bundle.stdout(), "changed\n");
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert_ne!(host.trim(), "changed");
}

#[test]
fn a_read_only_root_refuses_writes() {
    let bundle = Bundle::sh("touch /file 2>&1; echo $?; touch /dev/shm/ok && echo tmpfs")
        .edit(|spec| spec["root"]["readonly"] = json!(true));
    let text = bundle.stdout();
    assert!(text.contains("Read-only file system"), "{text}");
    assert!(text.ends_with("1\ntmpfs\n"), "{text}");
    assert!(!bundle.root("file").exists());
}

#[test]
fn masked_paths_are_empty_and_read_only_paths_refuse_writes() {
    let bundle = Bundle::sh(
        "mkdir -p /masked; cat /proc/keys | wc -c; ls /sys/firmware | wc -l; \
         (echo 1 > /proc/sys/vm/swappiness) 2>&1 | grep -c 'Read-only'",
    );
    assert_eq!(bundle.stdout(), "0\n0\n1\n");
}

#[test]
fn masked_files_and_directories_of_the_root() {
    let bundle =
        Bundle::sh("cat /secret; ls -A /secrets | wc -l; touch /ro/x 2>&1 | grep -c Read-only")
            .edit(|spec| {
                spec["linux"]["maskedPaths"] = json!(["/secret", "/secrets", "/not-there"]);
                spec["linux"]["readonlyPaths"] = json!(["/ro", "/not-there"]);
            });
    std::fs::write(bundle.root("secret"), "hidden").unwrap();
    std::fs::create_dir(bundle.root("secrets")).unwrap();
    std::fs::create_dir(bundle.root("ro")).unwrap();
    std::fs::write(bundle.root("secrets/one"), "hidden").unwrap();
    assert_eq!(bundle.stdout(), "0\n1\n");
    assert_eq!(
        std::fs::read_to_string(bundle.root("secret")).unwrap(),
        "hidden"
    );
}

#[test]
fn seccomp_forbids_a_call() {
    let bundle = Bundle::sh("mkdir /tmp/one && echo made; ln -s a /tmp/link 2>&1 || echo refused").edit(|spec| {
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["symlink", "symlinkat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]
        });
    });
    let text = bundle.stdout();
    assert!(
        text.starts_with("made\n") && text.ends_with("refused\n"),
        "{text}"
    );
    assert!(text.contains("Operation not permitted"), "{text}");
}

#[test]
fn seccomp_also_holds_for_exec() {
    let bundle = Bundle::busybox().args(&["sleep", "100000"]).edit(|spec| {
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["symlink", "symlinkat"], "action": "SCMP_ACT_ERRNO"}]
        });
    });
    let container = bundle.start();
    let output = container.exec("ln -s a /tmp/link 2>/dev/null || echo refused");
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "refused\n",
        "{}",
        show(&output)
    );
}

#[test]
fn cgroup_limits_are_seen_inside() {
    let bundle =
        Bundle::sh("cd /sys/fs/cgroup; cat memory.max pids.max cpu.max cpu.weight").edit(|spec| {
            spec["linux"]["resources"] = json!({
                "memory": {"limit": 67_108_864},
                "pids": {"limit": 50},
                "cpu": {"quota": 50_000, "period": 100_000, "shares": 1024}
            });
        });
    let text = bundle.stdout();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..3], ["67108864", "50", "50000 100000"], "{text}");
}

#[test]
fn the_oom_killer_ends_the_offender_alone() {
    // `tail` keeps the whole endless line in memory.
    let bundle = Bundle::busybox().args(&["sleep", "100000"]).edit(|spec| {
        spec["linux"]["resources"] = json!({"memory": {"limit": 33_554_432, "swap": 33_554_432}});
    });
    let container = bundle.start();
    let output = container.exec("tail /dev/zero");
    assert_eq!(output.status.code(), Some(137), "{}", show(&output));
    assert_eq!(container.status(), "running");
    let output = container.exec("grep -w oom_kill /sys/fs/cgroup/memory.events; echo alive");
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "oom_kill 1\nalive\n",
        "{}",
        show(&output)
    );
}

#[test]
fn a_container_over_its_memory_limit_ends_with_137() {
    let bundle = Bundle::busybox().args(&["tail", "/dev/zero"]).edit(|spec| {
        spec["linux"]["resources"] = json!({"memory": {"limit": 33_554_432, "swap": 33_554_432}});
    });
    assert_eq!(bundle.run().status.code(), Some(137));
}

#[test]
fn a_fork_bomb_stays_within_its_limit() {
    let bundle = Bundle::busybox()
        .args(&["sleep", "100000"])
        .edit(|spec| spec["linux"]["resources"] = json!({"pids": {"limit": 30}}));
    let container = bundle.start();
    // busybox's shell gives up at the first fork that fails.
    let output = container.exec("for i in $(seq 1 200); do sleep 1000 & done");
    assert!(stderr(&output).contains("can't fork"), "{}", show(&output));
    let pids = container.ok(&["ps", "--format", "json"]);
    let pids: Vec<i64> = serde_json::from_str(&pids).unwrap();
    assert!((20..=30).contains(&pids.len()), "{pids:?}");
    container.ok_args(&["kill"], &["KILL"]);
    container.wait_status("stopped");
}

#[test]
fn kill_minus_one_ends_only_the_containers_processes() {
    let bundle = Bundle::busybox().args(&["sleep", "100000"]);
    let container = bundle.start();
    let output = container.exec("sleep 1000 & kill -9 -1; wait $!; echo $?");
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "137\n",
        "{}",
        show(&output)
    );
    // PID 1 of the container is not reached by its own namespace's SIGKILL, and the agent is outside.
    assert!(container.exec("true").status.success());
}

#[test]
fn pause_stops_and_resume_goes_on() {
    let bundle = Bundle::sh("while :; do echo tick; sleep 0.1; done");
    let container = bundle.start();
    container.wait_output("tick");
    container.ok(&["pause"]);
    assert_eq!(container.status(), "paused");
    // What was on its way arrives; then nothing more.
    std::thread::sleep(std::time::Duration::from_secs(1));
    let before = container.output().len();
    std::thread::sleep(std::time::Duration::from_secs(2));
    assert_eq!(container.output().len(), before);
    container.ok(&["resume"]);
    crate::support::wait_for("more ticks", || container.output().len() > before);
    assert_eq!(container.status(), "running");
}
