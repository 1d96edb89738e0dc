// SPDX-License-Identifier: Apache-2.0

//! Bundles, containers and the commands of the runtime under test.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// Longest wait for something that the runtime should do at once; the testbed is an emulated machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// The full counts are asked for.
pub(crate) fn soak() -> bool {
    std::env::var_os("CAISSON_SOAK").is_some_and(|value| value == "1")
}

/// `small` in an ordinary run, `full` with `--soak`; printed, so that a log says which it was.
pub(crate) fn count(what: &str, small: usize, full: usize) -> usize {
    let count = if soak() { full } else { small };
    println!("count: {what}: {count} (ordinary {small}, soak {full})");
    count
}

/// The command of the runtime under test.
pub(crate) fn runtime() -> Command {
    let name = std::env::var("CAISSON_RUNTIME").unwrap_or_else(|_| "caisson".to_owned());
    let mut command = Command::new(name);
    command.stdin(Stdio::null());
    command
}

/// Whether the runtime under test is Caisson (and not another one, run as an oracle).
pub(crate) fn is_caisson() -> bool {
    std::env::var("CAISSON_RUNTIME").map_or(true, |name| name.ends_with("caisson"))
}

/// An OCI bundle in a temporary directory.
pub(crate) struct Bundle {
    dir: TempDir,
    spec: Value,
    options: Vec<String>,
}

impl Bundle {
    /// Busybox's root file system; its process is `true`.
    pub(crate) fn busybox() -> Self {
        let dir = TempDir::with_prefix("e2e-").unwrap();
        let root = dir.path().join("rootfs");
        for name in ["bin", "dev", "etc", "proc", "sys", "tmp", "root", "home"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        let mode = |mode| std::os::unix::fs::PermissionsExt::from_mode(mode);
        fs::set_permissions(root.join("tmp"), mode(0o1777)).unwrap();
        fs::copy(busybox_path(), root.join("bin/busybox")).unwrap();
        let list = Command::new(busybox_path()).arg("--list").output().unwrap();
        for applet in String::from_utf8(list.stdout).unwrap().lines() {
            if applet != "busybox" {
                symlink("busybox", root.join("bin").join(applet)).unwrap();
            }
        }
        fs::write(
            root.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home:/bin/sh\n",
        )
        .unwrap();
        fs::write(
            root.join("etc/group"),
            "root:x:0:\nuser:x:1000:\nextra:x:2000:user\n",
        )
        .unwrap();
        Self {
            dir,
            spec: default_spec(),
            options: Vec::new(),
        }
        .args(&["true"])
    }

    /// Busybox running `script`.
    pub(crate) fn sh(script: &str) -> Self {
        Self::busybox().args(&["sh", "-c", script])
    }

    /// With options that go before `create` and `run`.
    pub(crate) fn options(mut self, options: &[&str]) -> Self {
        self.options = options.iter().map(|&option| option.to_owned()).collect();
        self
    }

    /// With another command line.
    pub(crate) fn args(self, args: &[&str]) -> Self {
        self.edit(|spec| spec["process"]["args"] = json!(args))
    }

    /// With a change in `config.json`.
    pub(crate) fn edit(mut self, change: impl FnOnce(&mut Value)) -> Self {
        change(&mut self.spec);
        self.write();
        self
    }

    /// With one more mount.
    pub(crate) fn mount(self, mount: Value) -> Self {
        self.edit(|spec| spec["mounts"].as_array_mut().unwrap().push(mount))
    }

    fn write(&self) {
        let text = serde_json::to_vec_pretty(&self.spec).unwrap();
        fs::write(self.path().join("config.json"), text).unwrap();
    }

    /// The bundle's directory.
    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A path in the container's root, as the host sees it.
    pub(crate) fn root(&self, path: &str) -> PathBuf {
        self.path()
            .join("rootfs")
            .join(path.trim_start_matches('/'))
    }

    /// `run` in the foreground, to its end.
    pub(crate) fn run(&self) -> Output {
        let id = new_id();
        let output = self.run_command(&id).output().unwrap();
        println!("run {id}: {}", show(&output));
        output
    }

    /// The command of [`Self::run`], for another stdio.
    pub(crate) fn run_command(&self, id: &str) -> Command {
        let mut command = runtime();
        command
            .args(&self.options)
            .args(["run", "--bundle"])
            .arg(self.path())
            .arg(id);
        command
    }

    /// `run`, which must end with status 0; its standard output.
    pub(crate) fn stdout(&self) -> String {
        let output = self.run();
        assert!(output.status.success(), "{}", show(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// `create` under a new id.
    pub(crate) fn create(&self) -> Container<'_> {
        let container = Container {
            id: new_id(),
            bundle: self,
            files: TempDir::new().unwrap(),
        };
        let output = container.try_create(&[]);
        assert!(output.status.success(), "create: {}", show(&output));
        container
    }

    /// `create` and `start`.
    pub(crate) fn start(&self) -> Container<'_> {
        let container = self.create();
        container.ok(&["start"]);
        container
    }

    /// A container with an id, not created yet.
    pub(crate) fn container(&self, id: &str) -> Container<'_> {
        Container {
            id: id.to_owned(),
            bundle: self,
            files: TempDir::new().unwrap(),
        }
    }
}

/// A container by its id; deleted by force when dropped.
pub(crate) struct Container<'a> {
    pub(crate) id: String,
    bundle: &'a Bundle,
    files: TempDir,
}

impl Container<'_> {
    /// `create`, its streams in files ([`Self::output`]), as the container keeps them open.
    pub(crate) fn try_create(&self, options: &[&str]) -> Output {
        let file = |name| File::create(self.files.path().join(name)).unwrap();
        let status = runtime()
            .args(&self.bundle.options)
            .arg("create")
            .args(options)
            .arg("--bundle")
            .arg(self.bundle.path())
            .arg(&self.id)
            .stdout(file("stdout"))
            .stderr(file("stderr"))
            .status()
            .unwrap();
        let read = |name| fs::read(self.files.path().join(name)).unwrap();
        Output {
            status,
            stdout: read("stdout"),
            stderr: read("stderr"),
        }
    }

    /// What the created container wrote to standard output so far.
    pub(crate) fn output(&self) -> String {
        fs::read_to_string(self.files.path().join("stdout")).unwrap()
    }

    /// `VERB ID ARGS…`.
    pub(crate) fn verb(&self, verb: &[&str], args: &[&str]) -> Output {
        let output = runtime()
            .args(verb)
            .arg(&self.id)
            .args(args)
            .output()
            .unwrap();
        println!("{verb:?} {} {args:?}: {}", self.id, show(&output));
        output
    }

    /// `VERB ID`, which must succeed; its standard output.
    pub(crate) fn ok(&self, verb: &[&str]) -> String {
        self.ok_args(verb, &[])
    }

    /// `VERB ID ARGS…`, which must succeed; its standard output.
    pub(crate) fn ok_args(&self, verb: &[&str], args: &[&str]) -> String {
        let output = self.verb(verb, args);
        assert!(
            output.status.success(),
            "{verb:?} {args:?}: {}",
            show(&output)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// `exec ID sh -c SCRIPT`.
    pub(crate) fn exec(&self, script: &str) -> Output {
        self.verb(&["exec"], &["sh", "-c", script])
    }

    /// The state as the runtime gives it; `None` when it knows no such container.
    pub(crate) fn state(&self) -> Option<Value> {
        let output = runtime().arg("state").arg(&self.id).output().unwrap();
        output
            .status
            .success()
            .then(|| serde_json::from_slice(&output.stdout).unwrap())
    }

    /// `status` of the state.
    pub(crate) fn status(&self) -> String {
        let state = self.state().expect("the container is known");
        state["status"].as_str().unwrap().to_owned()
    }

    /// `pid` of the state.
    pub(crate) fn pid(&self) -> i32 {
        let state = self.state().expect("the container is known");
        i32::try_from(state["pid"].as_i64().unwrap()).unwrap()
    }

    /// Waits until `status` is this.
    pub(crate) fn wait_status(&self, status: &str) {
        wait_for(&format!("status {status} of {}", self.id), || {
            self.status() == status
        });
    }

    /// Waits until the container's output has this text.
    pub(crate) fn wait_output(&self, text: &str) {
        wait_for(&format!("output {text:?}"), || self.output().contains(text));
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        let output = runtime().args(["delete", "--force", &self.id]).output();
        if std::thread::panicking() {
            // A container whose create was never called has none.
            for name in ["stdout", "stderr"] {
                let text = fs::read_to_string(self.files.path().join(name));
                println!("{name}: {}", text.unwrap_or_default());
            }
            println!("delete --force: {output:?}");
        }
    }
}

/// An id no other container has.
pub(crate) fn new_id() -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!(
        "t{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}

/// Status and streams, for a message; long streams are cut.
pub(crate) fn show(output: &Output) -> String {
    let cut = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        let end = text
            .char_indices()
            .nth(2000)
            .map_or(text.len(), |(at, _)| at);
        text[..end].to_owned()
    };
    format!(
        "{}\n--- stdout\n{}\n--- stderr\n{}",
        output.status,
        cut(&output.stdout),
        cut(&output.stderr)
    )
}

/// Standard error as text.
pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Waits until `done` is true, by looking again and again; panics after [`DEADLINE`].
pub(crate) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    wait_within(what, DEADLINE, &mut done);
}

/// As [`wait_for`] with a bound of its own.
pub(crate) fn wait_within(what: &str, bound: Duration, done: &mut dyn FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < bound, "{what}: not within {bound:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits for the end of a child, which must come before the deadline.
pub(crate) fn wait_child(child: &mut Child) -> std::process::ExitStatus {
    let mut status = None;
    wait_for("end of the command", || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    status.unwrap()
}

/// Everything that a container may leave behind on the host, as sorted lines.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Traces(Vec<String>);

impl Traces {
    /// What there is now.
    pub(crate) fn now() -> Self {
        let mut lines = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let name = entry.file_name().into_string().unwrap();
            if name.parse::<u32>().is_ok()
                && let Ok(comm) = fs::read_to_string(entry.path().join("comm"))
                && (comm.starts_with("caisson") || comm.starts_with("runc"))
            {
                let args = fs::read(entry.path().join("cmdline")).unwrap_or_default();
                let args = String::from_utf8_lossy(&args).replace('\0', " ");
                lines.push(format!("process {name} {} {args}", comm.trim()));
            }
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        lines.extend(mounts.lines().map(|line| {
            // Ids of mounts change when others come and go.
            let fields: Vec<&str> = line.split(' ').skip(2).collect();
            format!("mount {}", fields.join(" "))
        }));
        let sockets = fs::read_to_string("/proc/net/unix").unwrap();
        let paths = sockets
            .lines()
            .filter_map(|line| line.split_whitespace().nth(7));
        lines.extend(
            paths
                .filter(|path| path.contains("caisson"))
                .map(|path| format!("socket {path}")),
        );
        tree("/sys/fs/cgroup".as_ref(), true, &mut lines);
        tree("/run/caisson".as_ref(), false, &mut lines);
        tree("/run/runc".as_ref(), false, &mut lines);
        tree("/var/lib/caisson".as_ref(), false, &mut lines);
        lines.sort();
        Self(lines)
    }

    /// Waits until there is nothing that was not there `before`.
    pub(crate) fn wait_until_gone(before: &Self) {
        let mut left = Vec::new();
        let start = Instant::now();
        loop {
            let now = Self::now();
            left.clear();
            left.extend(now.0.into_iter().filter(|line| !before.0.contains(line)));
            if left.is_empty() {
                return;
            }
            assert!(start.elapsed() < DEADLINE, "left behind: {left:#?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn tree(dir: &Path, only_dirs: bool, lines: &mut Vec<String>) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_dir || !only_dirs {
            lines.push(format!("path {}", entry.path().display()));
        }
        if is_dir {
            tree(&entry.path(), only_dirs, lines);
        }
    }
}

/// Children of a process.
pub(crate) fn children(pid: i32) -> Vec<i32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace()
        .map(|word| word.parse().unwrap())
        .collect()
}

/// SHA-256 of a file by coreutils, so that the tool checked is not the tool used.
pub(crate) fn sha256(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().unwrap();
    assert!(output.status.success(), "{}", show(&output));
    String::from_utf8(output.stdout)
        .unwrap()
        .split(' ')
        .next()
        .unwrap()
        .to_owned()
}

fn busybox_path() -> &'static Path {
    Path::new("/bin/busybox")
}

/// What `runc spec` writes, without a terminal and for root.
fn default_spec() -> Value {
    let caps = json!([
        "CAP_AUDIT_WRITE",
        "CAP_KILL",
        "CAP_NET_BIND_SERVICE",
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_FSETID",
        "CAP_MKNOD",
        "CAP_SETGID",
        "CAP_SETUID"
    ]);
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": ["true"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true
        },
        "root": {"path": "rootfs", "readonly": false},
        "hostname": "e2e",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}
        ],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"},
                           {"type": "mount"}, {"type": "cgroup"}],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                            "/proc/sched_debug", "/sys/firmware", "/proc/scsi"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
        }
    })
}
