// SPDX-License-Identifier: Apache-2.0

//! The whole host side against a stand-in for VMM and guest (`examples/fake-guest.rs`): every step, every
//! wrong order, every death, and nothing left behind. Needs root, for mount namespaces.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: what they cannot do fails the test"
)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// A state root, a configuration and a bundle of its own for each test.
struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    fn new(args: &[&str]) -> Self {
        Self::with(args, "", |_| {})
    }

    fn with(args: &[&str], fake: &str, patch: impl FnOnce(&mut Value)) -> Self {
        let host = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        std::fs::create_dir_all(host.path("bundle/rootfs")).unwrap();
        let mut config = json!({
            "ociVersion": "1.0.2",
            "process": {"user": {"uid": 0, "gid": 0}, "args": args, "cwd": "/"},
            "root": {"path": "rootfs"},
            "annotations": {"a": "b"},
            "linux": {}
        });
        patch(&mut config);
        std::fs::write(host.path("bundle/config.json"), config.to_string()).unwrap();
        let vmm = fake_guest();
        let toml = format!(
            "[vm]\nvmm = {vmm:?}\nkernel = \"/dev/null\"\ninitramfs = \"/dev/null\"\n\
             kernel_params = \"fake={fake}\"\n\
             [timeouts]\nboot_ms = 3000\nrequest_ms = 3000\nkill_ms = 500\n"
        );
        std::fs::write(host.path("config.toml"), toml).unwrap();
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_caisson"));
        command
            .arg("--root")
            .arg(self.path("state"))
            .arg("--config")
            .arg(self.path("config.toml"))
            .args(args)
            .current_dir(self.path("bundle"))
            .stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs what must fail; its stderr.
    fn fails(&self, args: &[&str], status: i32) -> String {
        let output = self.run(args);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{args:?}: {stderr}");
        stderr
    }

    fn create(&self, id: &str) {
        // Its stdio must not be ours: the per-container process keeps it.
        let log = std::fs::File::create(self.path("stdout")).unwrap();
        let mut command = self.command(&["create", "--pid-file", "../pid", id]);
        let status = command.stdout(log).stderr(Stdio::inherit()).status();
        assert!(status.unwrap().success());
    }

    fn state(&self, id: &str) -> Value {
        serde_json::from_str(&self.ok(&["state", id])).unwrap()
    }

    fn status(&self, id: &str) -> String {
        self.state(id)["status"].as_str().unwrap().to_owned()
    }

    fn wait_status(&self, id: &str, status: &str, limit: Duration) {
        let deadline = Instant::now() + limit;
        while self.status(id) != status {
            assert!(Instant::now() < deadline, "not {status} in {limit:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// How the container ended, once its per-container process has written it down.
    fn exit(&self, id: &str) -> Value {
        let deadline = Instant::now() + LONG;
        while self.record(id)["phase"] != "stopped" {
            assert!(Instant::now() < deadline, "no exit was written down");
            std::thread::sleep(Duration::from_millis(10));
        }
        self.record(id)["exit"].clone()
    }

    fn record(&self, id: &str) -> Value {
        let path = self.path("state").join(id).join("record.json");
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    /// No state, no mount, and soon no process that was started with our state root.
    fn assert_clean(&self) {
        let state = self.path("state");
        let left = std::fs::read_dir(&state).map_or(0, Iterator::count);
        assert_eq!(left, 0, "something is left in {}", state.display());
        let needle = state.display().to_string();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(&needle));
        let deadline = Instant::now() + LONG;
        while let Some(process) = process_with(&needle) {
            assert!(Instant::now() < deadline, "still runs: {process}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// The command line of a process that has `needle` in it.
fn process_with(needle: &str) -> Option<String> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let mut lines = processes.map(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).replace('\0', " ")
    });
    lines.find(|line| line.contains(needle))
}

/// The stand-in, built first: `cargo test --test lifecycle` alone does not build examples.
fn fake_guest() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let build = || {
        let target = Path::new(env!("CARGO_BIN_EXE_caisson"));
        let profile = target.parent().unwrap();
        let status = Command::new(env!("CARGO"))
            .args([
                "build",
                "--quiet",
                "--offline",
                "--example",
                "fake-guest",
                "--target-dir",
            ])
            .arg(profile.parent().unwrap())
            .arg("--manifest-path")
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
            .status();
        assert!(status.unwrap().success());
        profile.join("examples/fake-guest")
    };
    BUILT.get_or_init(build).clone()
}

const LONG: Duration = Duration::from_secs(10);

#[test]
fn run_passes_stdio_and_the_exit_status_and_leaves_nothing() {
    let host = Host::new(&["sh", "-c", "echo out; echo err >&2; cat; exit 42"]);
    let mut command = host.command(&["run", "c"]);
    let command = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let sent = vec![b'x'; 3_000_000];
    let writer = std::thread::spawn(move || stdin.write_all(&sent).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert_eq!(output.status.code(), Some(42));
    assert!(output.stderr.ends_with(b"err\n"), "{:?}", output.stderr);
    assert!(output.stdout.starts_with(b"out\n"));
    assert_eq!(output.stdout.len(), 3_000_004);
    host.assert_clean();
}

#[test]
fn a_life_step_by_step_and_every_wrong_order() {
    let host = Host::new(&["sleep", "1000"]);
    assert!(
        host.fails(&["state", "c"], 1)
            .contains("container does not exist")
    );
    assert!(
        host.fails(&["start", "c"], 1)
            .contains("container does not exist")
    );
    assert!(
        host.fails(&["create", "a/b"], 1)
            .contains("invalid container ID")
    );
    assert!(
        host.fails(&["delete", ".."], 1)
            .contains("invalid container ID")
    );
    host.create("c");
    let state = host.state("c");
    assert_eq!(state["status"], "created");
    assert_eq!(state["annotations"]["a"], "b");
    let pid = std::fs::read_to_string(host.path("pid")).unwrap();
    assert_eq!(state["pid"].to_string(), pid);
    assert!(
        host.fails(&["create", "c"], 1)
            .contains("container with id exists: c")
    );
    assert_eq!(host.status("c"), "created", "a second create harms nothing");
    host.ok(&["start", "c"]);
    assert_eq!(host.status("c"), "running");
    let twice = host.fails(&["start", "c"], 1);
    assert!(twice.contains("cannot start an already running container"));
    let running = host.fails(&["delete", "c"], 1);
    assert!(running.contains("cannot delete container c that is not stopped: running"));
    assert!(host.ok(&["list"]).contains("running"));
    assert_eq!(host.ok(&["list", "-q"]), "c\n");
    assert!(host.ok(&["ps", "c"]).contains("sleep 1000"));
    host.ok(&["pause", "c"]);
    assert_eq!(host.status("c"), "paused");
    assert!(
        host.fails(&["exec", "c", "true"], 1)
            .contains("paused container")
    );
    host.ok(&["resume", "c"]);
    assert!(
        host.fails(&["resume", "c"], 1)
            .contains("container not paused")
    );
    host.ok(&["kill", "c", "TERM"]);
    host.wait_status("c", "stopped", LONG);
    assert_eq!(host.exit("c")["status"], 143);
    assert_eq!(host.state("c")["pid"], 0);
    assert!(
        host.fails(&["kill", "c"], 1)
            .contains("container not running")
    );
    host.ok(&["kill", "--all", "c"]);
    assert!(
        host.fails(&["exec", "c", "true"], 1)
            .contains("stopped container")
    );
    assert!(host.fails(&["start", "c"], 1).contains("has stopped"));
    host.ok(&["delete", "c"]);
    assert!(
        host.fails(&["delete", "c"], 1)
            .contains("container does not exist")
    );
    host.ok(&["delete", "--force", "c"]);
    host.assert_clean();
}

#[test]
fn exec_has_stdio_and_status_of_its_own() {
    let host = Host::new(&["sleep", "1000"]);
    host.create("c");
    host.ok(&["start", "c"]);
    let output = host.run(&["exec", "c", "sh", "-c", "echo hi; echo no >&2; exit 7"]);
    assert_eq!(output.status.code(), Some(7));
    assert_eq!(output.stdout, b"hi\n");
    assert_eq!(output.stderr, b"no\n");
    let missing = host.fails(&["exec", "c", "no-such-program"], 127);
    let text = "exec: \\\"no-such-program\\\": executable file not found in $PATH";
    assert!(missing.contains(text), "{missing}");
    let bad = host.fails(&["exec", "c", "/etc/passwd"], 126);
    assert!(bad.contains("permission denied"), "{bad}");
    let mut detached = host.command(&[
        "exec",
        "-d",
        "--pid-file",
        "../exec.pid",
        "c",
        "sleep",
        "900",
    ]);
    let status = detached
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    assert!(status.unwrap().success());
    let pid = std::fs::read_to_string(host.path("exec.pid")).unwrap();
    assert!(Path::new("/proc").join(pid.trim()).exists());
    host.ok(&["delete", "--force", "c"]);
    let gone = Instant::now() + LONG;
    while Path::new("/proc").join(pid.trim()).join("exe").exists() {
        assert!(
            Instant::now() < gone,
            "the exec's process outlives its container"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    host.assert_clean();
}

#[test]
fn a_boot_that_fails_says_why_and_leaves_nothing() {
    for (fake, expected) in [
        ("panics", "Kernel panic - not syncing: fake"),
        ("panics", "last words of the kernel"),
        ("silent", "not ready within 3000 ms"),
        ("silent", "stuck here"),
        ("other-version", "protocol version 2"),
        ("dies-in-create", "triple fault"),
    ] {
        let host = Host::with(&["true"], fake, |_| {});
        let stderr = host.fails(&["run", "c"], 1);
        assert!(stderr.contains(expected), "{fake}: {stderr}");
        host.assert_clean();
    }
}

#[test]
fn a_program_that_is_missing_is_told_by_status_and_text() {
    let host = Host::new(&["no-such-program"]);
    let stderr = host.fails(&["run", "c"], 127);
    assert!(
        stderr.contains("executable file not found in $PATH"),
        "{stderr}"
    );
    host.assert_clean();
    let host = Host::new(&["/etc/passwd"]);
    host.fails(&["run", "c"], 126);
    host.assert_clean();
}

#[test]
fn the_json_log_holds_the_error_that_clients_show() {
    let host = Host::new(&["no-such-program"]);
    let log = host.path("log.json").display().to_string();
    let mut args = vec!["--log", &log, "--log-format", "json", "create", "c"];
    host.fails(&args, 127);
    args.truncate(4);
    let text = std::fs::read_to_string(&log).unwrap();
    let errors = text.lines().filter_map(|line| {
        let value: Value = serde_json::from_str(line).unwrap();
        (value["level"] == "error").then(|| value["msg"].as_str().unwrap().to_owned())
    });
    let errors: Vec<_> = errors.collect();
    assert!(
        errors
            .last()
            .unwrap()
            .contains("executable file not found in $PATH")
    );
    host.assert_clean();
}

#[test]
fn the_death_of_vmm_or_monitor_is_seen_at_once_and_force_cleans_up() {
    for victim in ["vmm", "monitor"] {
        let host = Host::new(&["sleep", "1000"]);
        host.create("c");
        host.ok(&["start", "c"]);
        let record = host.record("c");
        let pid = record[victim]["pid"].to_string();
        assert!(
            Command::new("kill")
                .args(["-9", &pid])
                .status()
                .unwrap()
                .success()
        );
        host.wait_status("c", "stopped", Duration::from_secs(1));
        if victim == "vmm" {
            let exit = host.exit("c");
            assert_eq!(exit["status"], 137);
            assert!(
                exit["cause"]
                    .as_str()
                    .unwrap()
                    .contains("killed by signal 9")
            );
        }
        host.ok(&["delete", "--force", "c"]);
        host.assert_clean();
    }
}

#[test]
fn sigkill_works_whatever_the_guest_does_about_it() {
    for fake in ["ignores-signals", "hangs-on-signals"] {
        let host = Host::with(&["sleep", "1000"], fake, |_| {});
        host.create("c");
        host.ok(&["start", "c"]);
        host.ok(&["kill", "c", "KILL"]);
        host.wait_status("c", "stopped", LONG);
        host.ok(&["delete", "c"]);
        host.assert_clean();
    }
}

#[test]
fn signals_to_the_per_container_process_reach_the_container() {
    let host = Host::new(&[
        "sh",
        "-c",
        "trap 'exit 9' USR1; while :; do sleep 0.05; done",
    ]);
    host.create("c");
    host.ok(&["start", "c"]);
    let pid = host.state("c")["pid"].to_string();
    assert!(
        Command::new("kill")
            .args(["-USR1", &pid])
            .status()
            .unwrap()
            .success()
    );
    host.wait_status("c", "stopped", LONG);
    assert_eq!(host.exit("c")["status"], 9);
    host.ok(&["delete", "c"]);
    host.assert_clean();
}

#[test]
fn a_created_container_can_be_killed_and_deleted_unstarted() {
    let host = Host::new(&["sleep", "1000"]);
    host.create("c");
    host.ok(&["kill", "c", "KILL"]);
    host.wait_status("c", "stopped", LONG);
    host.ok(&["delete", "c"]);
    host.create("c");
    host.ok(&["delete", "c"]);
    host.assert_clean();
}

#[test]
fn of_twenty_creates_of_one_id_one_wins() {
    let host = Host::new(&["sleep", "1000"]);
    let children: Vec<_> = (0..20)
        .map(|_| {
            let mut command = host.command(&["create", "c"]);
            let command = command.stdout(Stdio::null()).stderr(Stdio::null());
            command.spawn().unwrap()
        })
        .collect();
    let statuses = children.into_iter().map(|mut child| child.wait().unwrap());
    assert_eq!(statuses.filter(|status| status.success()).count(), 1);
    assert_eq!(host.status("c"), "created");
    host.ok(&["delete", "--force", "c"]);
    host.assert_clean();
}

#[test]
fn deleting_while_creating_leaves_nothing() {
    for step in 0..30 {
        let host = Host::new(&["sleep", "1000"]);
        let mut command = host.command(&["create", "c"]);
        let mut child = command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(step));
        host.ok(&["delete", "--force", "c"]);
        child.wait().unwrap();
        // The create may have come after the delete.
        host.ok(&["delete", "--force", "c"]);
        host.assert_clean();
    }
}

#[test]
fn killing_the_creator_leaves_what_force_can_delete() {
    for step in 0..30 {
        let host = Host::new(&["sleep", "1000"]);
        let mut command = host.command(&["create", "c"]);
        let mut child = command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(step));
        child.kill().unwrap();
        child.wait().unwrap();
        host.ok(&["delete", "--force", "c"]);
        let deadline = Instant::now() + LONG;
        while host.path("state/c").exists() {
            assert!(Instant::now() < deadline);
        }
        // A per-container process that came too late ends by itself.
        host.assert_clean();
    }
}

#[test]
fn a_terminal_goes_over_the_console_socket() {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let host = Host::with(&["sh", "-c", "echo ready; cat"], "", |config| {
        config["process"]["terminal"] = json!(true);
    });
    let refused = host.fails(&["create", "c"], 1);
    assert!(
        refused.contains("without setting console socket"),
        "{refused}"
    );
    let listener = std::os::unix::net::UnixListener::bind(host.path("console")).unwrap();
    let mut create = host.command(&["create", "--console-socket", "../console", "c"]);
    assert!(create.stdout(Stdio::null()).status().unwrap().success());
    let (stream, _) = listener.accept().unwrap();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut payload = [0; 64];
    let mut iov = [std::io::IoSliceMut::new(&mut payload)];
    recvmsg(&stream, &mut iov, &mut control, RecvFlags::empty()).unwrap();
    let Some(RecvAncillaryMessage::ScmRights(mut fds)) = control.drain().next() else {
        panic!("no terminal");
    };
    let mut master = std::fs::File::from(fds.next().unwrap());
    host.ok(&["start", "c"]);
    master.write_all(b"ping\n").unwrap();
    let mut seen = Vec::new();
    while !seen.ends_with(b"ping\n") {
        let mut byte = [0];
        std::io::Read::read_exact(&mut master, &mut byte).unwrap();
        seen.push(byte[0]);
    }
    assert_eq!(seen, b"ready\nping\n");
    host.ok(&["delete", "--force", "c"]);
    host.assert_clean();
}

#[test]
fn bad_inputs_each_have_an_error_and_leave_nothing() {
    let host = Host::new(&["true"]);
    std::fs::write(host.path("bundle/config.json"), "{\n  \"x\": }\n").unwrap();
    let stderr = host.fails(&["run", "c"], 1);
    assert!(stderr.contains("line 2 column 8"), "{stderr}");
    std::fs::remove_file(host.path("bundle/config.json")).unwrap();
    assert!(
        host.fails(&["run", "c"], 1)
            .contains("config.json not found")
    );

    let host = Host::new(&["true"]);
    std::fs::remove_dir(host.path("bundle/rootfs")).unwrap();
    assert!(host.fails(&["run", "c"], 1).contains("rootfs"));

    let host = Host::new(&["true"]);
    let missing = "[vm]\nvmm = \"/nonexistent\"\n";
    std::fs::write(host.path("config.toml"), missing).unwrap();
    assert!(host.fails(&["run", "c"], 1).contains("/nonexistent"));
    std::fs::write(host.path("config.toml"), "[vm]\nmemroy_mib = 1\n").unwrap();
    assert!(host.fails(&["run", "c"], 1).contains("memroy_mib"));
    host.assert_clean();
    let host = Host::new(&["true"]);
    assert!(
        host.fails(&["create", "--preserve-fds", "1", "c"], 1)
            .contains("not supported")
    );
    host.assert_clean();
}

#[test]
fn binds_are_seen_by_the_vmm_only_and_read_only_ones_are_so_on_the_host() {
    let shared = tempfile::tempdir().unwrap();
    std::fs::write(shared.path().join("file"), "content").unwrap();
    let dir = shared.path().display().to_string();
    let file = format!("{dir}/file");
    let host = Host::with(&["sleep", "1000"], "", |config| {
        config["mounts"] = json!([
            {"destination": "/ro", "type": "bind", "source": dir, "options": ["rbind", "ro"]},
            {"destination": "/rw", "type": "bind", "source": dir, "options": ["bind"]},
            {"destination": "/file", "type": "bind", "source": file, "options": ["bind", "ro"]}
        ]);
        config["root"]["readonly"] = json!(true);
    });
    host.create("c");
    let vmm = host.record("c")["vmm"]["pid"].to_string();
    let served = format!(
        "/proc/{vmm}/root{}",
        host.path("state/c/shared/c").display()
    );
    let served = Path::new(&served);
    let write = |name: &str| std::fs::write(served.join(name), "x").map_err(|e| e.kind());
    let read_only = Err(std::io::ErrorKind::ReadOnlyFilesystem);
    assert_eq!(write("m1/new"), Ok(()));
    assert_eq!(write("m0/new"), read_only);
    assert_eq!(write("m2"), read_only);
    assert_eq!(write("rootfs/new"), read_only, "sealed after creation");
    assert_eq!(write("new"), read_only, "the served directory itself");
    let text = std::fs::read_to_string(served.join("m2")).unwrap();
    assert_eq!(text, "content");
    assert_eq!(
        std::fs::read_dir(host.path("state/c/shared"))
            .unwrap()
            .count(),
        0
    );
    host.ok(&["delete", "--force", "c"]);
    assert!(shared.path().join("new").exists());
    host.assert_clean();
}
