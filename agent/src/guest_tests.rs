// SPDX-License-Identifier: Apache-2.0

//! Containers for real, in a guest whose PID 1 is this test: everything but vsock and ttRPC.
//!
//! Not part of an ordinary run. The static test binary becomes `/init` of an initramfs that has the agent
//! itself as `/agent` and a static busybox as `/busybox`; any machine that boots the guest's kernel will do,
//! with `-- --ignored --nocapture guest_tests` at the end of the kernel's command line.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use caisson_protocol::agent::agent::{CreateSandboxRequest, Stdio};
use caisson_protocol::error::ErrorCode;
use caisson_protocol::ports::Stream;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use crate::container::spec::parse;
use crate::container::{ContainerError, NewContainer, NewExec, Status};
use crate::helper::chain;
use crate::id::Id;
use crate::process::Process;
use crate::reaper::{Exit, Reaper};
use crate::sandbox::Sandbox;

const ROOT: &str = "/run/caisson/rootfs";

fn make_root() {
    for directory in ["bin", "proc", "dev", "sys", "tmp", "etc"] {
        fs::create_dir_all(format!("{ROOT}/{directory}")).unwrap();
    }
    fs::copy("/busybox", format!("{ROOT}/bin/busybox")).unwrap();
    fs::set_permissions(
        format!("{ROOT}/bin/busybox"),
        fs::Permissions::from_mode(0o755),
    )
    .unwrap();
    symlink("busybox", format!("{ROOT}/bin/sh")).unwrap();
    fs::write(format!("{ROOT}/etc/plain"), "text").unwrap();
    fs::write(format!("{ROOT}/bin/orphan"), "#!/no/such/interpreter\n").unwrap();
    fs::set_permissions(
        format!("{ROOT}/bin/orphan"),
        fs::Permissions::from_mode(0o755),
    )
    .unwrap();
}

fn process(arguments: &[&str]) -> Value {
    json!({
        "cwd": "/", "user": {"uid": 0, "gid": 0}, "args": arguments,
        "env": ["PATH=/bin", "B=1", "A=2"],
        "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]},
        "noNewPrivileges": true,
    })
}

fn spec(arguments: &[&str]) -> Value {
    json!({
        "ociVersion": "1.0.2", "root": {"path": ROOT}, "hostname": "inside",
        "process": process(arguments),
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
        ],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"},
                           {"type": "network"}, {"type": "cgroup"}],
            "resources": {"memory": {"limit": 32 << 20, "swap": 32 << 20}, "pids": {"limit": 30}},
            "seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
                        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]},
            "maskedPaths": ["/proc/kcore"], "readonlyPaths": ["/proc/sys"],
        },
    })
}

struct Guest {
    sandbox: Arc<Sandbox>,
}

fn all_streams() -> Stdio {
    Stdio {
        stdin: true,
        stdout: true,
        stderr: true,
        ..Default::default()
    }
}

impl Guest {
    async fn create(&self, name: &str, spec: Value, stdio: Stdio) -> Result<i32, ContainerError> {
        let spec = parse("spec", spec.to_string().as_bytes()).unwrap();
        let make = |id, number, pod_pid_namespace, events| NewContainer {
            id,
            number,
            spec,
            storages: Vec::new(),
            stdio,
            pod_pid_namespace,
            events,
        };
        self.sandbox.create(id(name), make).await
    }

    async fn exec(
        &self,
        name: &str,
        exec: &str,
        arguments: &[&str],
    ) -> Result<i32, ContainerError> {
        let new = NewExec {
            id: id(exec),
            process: serde_json::from_value(process(arguments)).unwrap(),
            stdio: all_streams(),
        };
        let container = self.sandbox.container(&id(name))?;
        container.exec(self.sandbox.launcher(), new).await
    }

    fn attach(&self, name: &str, exec: Option<&str>, stream: Stream) -> tokio::net::UnixStream {
        let exec = exec.map(id);
        let process: Arc<Process> = self.sandbox.process(&id(name), exec.as_ref()).unwrap();
        let (ours, host) = UnixStream::pair().unwrap();
        let taken = process.take_stream(stream).unwrap();
        let attached = process.attach(stream, taken, ours.into(), Vec::new());
        attached.unwrap();
        host.set_nonblocking(true).unwrap();
        tokio::net::UnixStream::from_std(host).unwrap()
    }

    async fn start(&self, name: &str) -> Result<(), ContainerError> {
        self.sandbox.container(&id(name))?.start().await
    }

    async fn wait(&self, name: &str, exec: Option<&str>) -> (Exit, bool) {
        let container = self.sandbox.container(&id(name)).unwrap();
        let exec = exec.map(id);
        let waited = timeout(Duration::from_secs(60), container.wait(exec.as_ref())).await;
        let (finished, oom) = waited.unwrap().unwrap();
        (finished.exit, oom)
    }

    /// Output, errors and exit of a container that runs `script`.
    async fn run(&self, name: &str, script: &str) -> (String, String, u32) {
        let spec = spec(&["sh", "-c", script]);
        self.create(name, spec, all_streams()).await.unwrap();
        let mut out = self.attach(name, None, Stream::Stdout);
        let mut err = self.attach(name, None, Stream::Stderr);
        self.start(name).await.unwrap();
        let (mut text, mut errors) = (String::new(), String::new());
        let read = async {
            tokio::try_join!(
                out.read_to_string(&mut text),
                err.read_to_string(&mut errors)
            )
        };
        timeout(Duration::from_secs(60), read)
            .await
            .unwrap()
            .unwrap();
        let (exit, _) = self.wait(name, None).await;
        self.remove(name).await;
        (text, errors, exit.status)
    }

    async fn remove(&self, name: &str) {
        self.sandbox.remove(&id(name), true).await.unwrap();
        assert_eq!(left_over(), Vec::<PathBuf>::new());
    }
}

fn id(text: &str) -> Id {
    Id::parse(text).unwrap()
}

fn left_over() -> Vec<PathBuf> {
    let mut left = Vec::new();
    for directory in ["/sys/fs/cgroup/caisson", "/run/caisson/containers"] {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        let directories = entries.filter(|entry| entry.file_type().unwrap().is_dir());
        left.extend(directories.map(|entry| entry.path()));
    }
    left
}

#[test]
#[ignore = "runs as PID 1 of a guest only"]
fn containers_in_a_guest() {
    crate::boot::bring_up().unwrap();
    make_root();
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().build().unwrap();
    runtime.block_on(async {
        let reaper = Arc::new(Reaper::default());
        let signals = Reaper::signals().unwrap();
        let sandbox = Sandbox::new("/agent".into(), reaper.clone());
        tokio::spawn(async move { reaper.run(signals).await });
        let request = CreateSandboxRequest {
            hostname: "pod".into(),
            entropy: vec![7; 64],
            shm_size_bytes: 1 << 20,
            sysctls: HashMap::from([("kernel.pid_max".into(), "30000".into())]),
            ..Default::default()
        };
        sandbox.set_up(&request).unwrap();
        let guest = Guest {
            sandbox: Arc::new(sandbox),
        };
        output_and_status(&guest).await;
        failures(&guest).await;
        life(&guest).await;
        terminal(&guest).await;
        limits(&guest).await;
    });
}

async fn output_and_status(guest: &Guest) {
    let (out, err, status) = guest
        .run("one", "echo out; echo err >&2; busybox hostname; exit 42")
        .await;
    assert_eq!(
        (out.as_str(), err.as_str(), status),
        ("out\ninside\n", "err\n", 42)
    );
    let (out, _, status) = guest.run("two", "echo $$; echo $B$A; kill -9 $$").await;
    // The first process of a pid namespace does not take SIGKILL from itself.
    assert_eq!((out.as_str(), status), ("1\n12\n", 0));
    let script = "busybox mkdir /tmp/x 2>&1; busybox grep -c . /proc/self/cgroup; \
                  busybox cat /proc/self/oom_score_adj; busybox ls /proc/self/fd";
    let (out, ..) = guest.run("three", script).await;
    assert!(out.contains("not permitted"), "seccomp: {out}");
    assert!(out.ends_with("1\n0\n0\n1\n2\n3\n"), "descriptors: {out}");
    let script = "(trap '' HUP; busybox sleep 1000) & busybox head -c 3000000 /dev/zero; exit 5";
    let (out, _, status) = guest.run("four", script).await;
    assert_eq!((out.len(), status), (3_000_000, 5));
    // A reader that is gone ends the writer by SIGPIPE.
    let yes = spec(&["sh", "-c", "busybox yes; echo $? >/tmp/status"]);
    guest.create("five", yes, all_streams()).await.unwrap();
    let mut out = guest.attach("five", None, Stream::Stdout);
    guest.start("five").await.unwrap();
    out.read_exact(&mut [0; 10]).await.unwrap();
    drop(out);
    guest.wait("five", None).await;
    let status = fs::read_to_string(format!("{ROOT}/tmp/status")).unwrap();
    assert_eq!(status, "141\n");
    guest.remove("five").await;
}

async fn failures(guest: &Guest) {
    let mut bad_mount = spec(&["sh"]);
    bad_mount["mounts"][0]["type"] = json!("nofs");
    for (spec, code, text) in [
        (
            spec(&["nope"]),
            ErrorCode::CommandNotFound,
            "executable file not found in $PATH",
        ),
        (
            spec(&["/etc/plain"]),
            ErrorCode::CommandNotExecutable,
            "permission denied",
        ),
        (bad_mount, ErrorCode::Internal, "ENODEV"),
    ] {
        let error = guest.create("bad", spec, all_streams()).await.unwrap_err();
        let message = chain(&error);
        assert_eq!(error.code(), code, "{message}");
        assert!(message.contains(text), "{message}");
        assert_eq!(left_over(), Vec::<PathBuf>::new());
    }
    // A script without its interpreter is found out only by its execution.
    let orphan = spec(&["orphan"]);
    guest.create("orphan", orphan, all_streams()).await.unwrap();
    let error = guest.start("orphan").await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::CommandNotFound, "{error}");
    assert_eq!(guest.wait("orphan", None).await.0.status, 127);
    guest.remove("orphan").await;
}

async fn life(guest: &Guest) {
    let sleep = || spec(&["busybox", "sleep", "1000"]);
    guest.create("c", sleep(), all_streams()).await.unwrap();
    let again = guest.create("c", sleep(), all_streams()).await.unwrap_err();
    assert_eq!(again.code(), ErrorCode::AlreadyExists);
    let container = guest.sandbox.container(&id("c")).unwrap();
    assert_eq!(container.status().await, Status::CREATED);
    container.start().await.unwrap();
    assert_eq!(
        container.start().await.unwrap_err().code(),
        ErrorCode::AlreadyExists
    );
    assert_eq!(container.status().await, Status::RUNNING);
    assert!(guest.sandbox.remove(&id("c"), false).await.is_err());

    let script = "busybox cat; busybox mkdir /tmp/y; busybox hostname; exit 9";
    guest.exec("c", "e", &["sh", "-c", script]).await.unwrap();
    let mut stdin = guest.attach("c", Some("e"), Stream::Stdin);
    let mut out = guest.attach("c", Some("e"), Stream::Stdout);
    let mut err = guest.attach("c", Some("e"), Stream::Stderr);
    let listed = container.processes();
    assert!(
        listed.iter().any(|process| process.exec_id == "e"),
        "{listed:?}"
    );
    stdin.write_all(b"through\n").await.unwrap();
    stdin.shutdown().await.unwrap();
    let (mut text, mut errors) = (String::new(), String::new());
    out.read_to_string(&mut text).await.unwrap();
    err.read_to_string(&mut errors).await.unwrap();
    assert_eq!(text, "through\ninside\n");
    assert!(
        errors.contains("not permitted"),
        "seccomp in an exec: {errors}"
    );
    assert_eq!(guest.wait("c", Some("e")).await.0.status, 9);
    container.remove_exec(&id("e")).unwrap();
    let missing = guest.exec("c", "e", &["nope"]).await.unwrap_err();
    assert_eq!(missing.code(), ErrorCode::CommandNotFound);

    container.pause(true).await.unwrap();
    assert_eq!(container.status().await, Status::PAUSED);
    assert!(guest.exec("c", "p", &["sh"]).await.is_err());
    container.pause(false).await.unwrap();
    assert!(container.statistics()["memory.max"].starts_with("33554432"));
    let resources = parse("resources", br#"{"pids": {"limit": 77}}"#).unwrap();
    container.update(resources).await.unwrap();
    assert_eq!(container.statistics()["pids.max"], "77\n");

    guest
        .exec("c", "s", &["busybox", "sleep", "1000"])
        .await
        .unwrap();
    container.signal(Some(&id("s")), 15).unwrap();
    let exit = guest.wait("c", Some("s")).await.0;
    assert_eq!((exit.status, exit.signal), (143, 15));
    container.signal_all(9).await.unwrap();
    assert_eq!(guest.wait("c", None).await.0.status, 137);
    assert_eq!(container.status().await, Status::STOPPED);
    assert!(container.signal(None, 9).is_err());
    guest.remove("c").await;
}

async fn terminal(guest: &Guest) {
    let mut spec = spec(&[
        "sh",
        "-c",
        "busybox stty size; busybox cat; busybox tty; busybox id -u",
    ]);
    spec["process"]["terminal"] = json!(true);
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let stdio = Stdio {
        terminal: true,
        rows: 10,
        columns: 20,
        ..all_streams()
    };
    guest.create("t", spec, stdio).await.unwrap();
    let process = guest.sandbox.process(&id("t"), None).unwrap();
    process.resize(33, 44).unwrap();
    let mut out = guest.attach("t", None, Stream::Stdout);
    let mut stdin = guest.attach("t", None, Stream::Stdin);
    guest.start("t").await.unwrap();
    stdin.write_all(b"typed\n\x04").await.unwrap();
    let mut text = String::new();
    out.read_to_string(&mut text).await.unwrap();
    assert!(
        text.contains("33 44\r\n") && text.contains("typed\r\n"),
        "{text:?}"
    );
    assert!(text.contains("/dev/pts/0\r\n1000\r\n"), "{text:?}");
    guest.wait("t", None).await;
    guest.remove("t").await;
}

async fn limits(guest: &Guest) {
    let eater = spec(&["sh", "-c", "busybox tail /dev/zero; echo $?"]);
    guest.create("m", eater, all_streams()).await.unwrap();
    let mut out = guest.attach("m", None, Stream::Stdout);
    guest.start("m").await.unwrap();
    let mut text = String::new();
    out.read_to_string(&mut text).await.unwrap();
    assert_eq!(
        (text.as_str(), guest.wait("m", None).await.1),
        ("137\n", true)
    );
    guest.remove("m").await;
    // Many forks end with the limit, not with the guest.
    let bomb = spec(&["sh", "-c", "f() { f | f & }; f; busybox sleep 1000"]);
    guest.create("b", bomb, Stdio::default()).await.unwrap();
    guest.start("b").await.unwrap();
    guest.remove("b").await;
    let (out, ..) = guest.run("after", "echo alive").await;
    assert_eq!(out, "alive\n");
}
