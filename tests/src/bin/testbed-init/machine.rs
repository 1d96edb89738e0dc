// SPDX-License-Identifier: Apache-2.0

//! Makes the machine what a host of containers is after its own init: root, mounts, modules, loopback.
//!
//! The root is an overlay: a tmpfs above, the trees that the host named and the testbed's root below, all
//! shared by virtio-fs, so nothing that a test does outside its shares reaches the host. Overlay does not
//! lie on overlay, so the directories where container engines keep their layers are tmpfs.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use caisson_testbed::frame::Setup;
use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot};
use rustix::process::{Resource, Rlimit, setrlimit};

/// Directories of the initramfs that are mounted on here (see `caisson_testbed::machine`).
const LOWER: &str = "/lower";
const UPPER: &str = "/upper";
const ROOT: &str = "/newroot";

/// What a command gets in its environment, besides its own.
pub(crate) const ENVIRONMENT: [(&str, &str); 4] = [
    (
        "PATH",
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ),
    ("HOME", "/root"),
    ("USER", "root"),
    ("LANG", "C.UTF-8"),
];

const NO_FLAGS: MsFlags = MsFlags::empty();
/// `nosuid,nodev,noexec`.
fn strict() -> MsFlags {
    MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC
}

fn mount_at(kind: &str, source: &str, path: &str, flags: MsFlags, data: &str) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("failed to make {path}"))?;
    mount(Some(source), path, Some(kind), flags, Some(data))
        .with_context(|| format!("failed to mount {kind} {source} at {path}"))
}

/// /proc, /sys and /dev of the initramfs, without which the port cannot be found.
pub(crate) fn mount_first() -> Result<()> {
    mount_at("proc", "proc", "/proc", strict(), "")?;
    mount_at("sysfs", "sysfs", "/sys", strict(), "")?;
    mount_at(
        "devtmpfs",
        "devtmpfs",
        "/dev",
        MsFlags::MS_NOSUID,
        "mode=755",
    )
}

/// The whole machine. What it answers are failures that a test may live with.
pub(crate) fn set_up(setup: &Setup) -> Result<Vec<String>> {
    enter_root(setup)?;
    mount_the_rest(setup)?;
    let mut warnings = Vec::new();
    load_modules(&mut warnings)?;
    write_files()?;
    run("ip", &["link", "set", "lo", "up"], &mut warnings)?;
    for (resource, limit) in [(Resource::Nofile, 1 << 20), (Resource::Core, 0)] {
        setrlimit(
            resource,
            Rlimit {
                current: Some(limit),
                maximum: Some(limit),
            },
        )
        .with_context(|| format!("failed to set the limit {resource:?}"))?;
    }
    Ok(warnings)
}

/// Lays the overlay and makes it this process's (and the kernel's) root.
fn enter_root(setup: &Setup) -> Result<()> {
    mount_at("virtiofs", "root", LOWER, MsFlags::MS_RDONLY, "")?;
    let mut lower = String::new();
    for tag in &setup.layers {
        let path = format!("/layers/{tag}");
        mount_at("virtiofs", tag, &path, MsFlags::MS_RDONLY, "")?;
        lower.push_str(&path);
        lower.push(':');
    }
    lower.push_str(LOWER);
    mount_at("tmpfs", "upper", UPPER, NO_FLAGS, "size=75%,mode=755")?;
    for name in ["data", "work"] {
        fs::create_dir(Path::new(UPPER).join(name)).context("failed to fill the upper layer")?;
    }
    // The module is in the root that needs it.
    let status = Command::new("/proc/self/exe")
        .args(["chroot", LOWER, "/sbin/modprobe", "overlay"])
        .status()
        .context("failed to start modprobe")?;
    if !status.success() {
        bail!("failed to load the module overlay: modprobe: {status}");
    }
    let data = format!("lowerdir={lower},upperdir={UPPER}/data,workdir={UPPER}/work");
    mount_at("overlay", "overlay", ROOT, NO_FLAGS, &data)?;
    for path in ["/proc", "/sys", "/dev"] {
        let target = format!("{ROOT}{path}");
        mount(
            Some(path),
            target.as_str(),
            None::<&str>,
            MsFlags::MS_MOVE,
            None::<&str>,
        )
        .with_context(|| format!("failed to move {path}"))?;
    }
    chdir(ROOT).context("failed to enter the new root")?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .context("failed to move the new root")?;
    // PID 1 shares its root with the kernel's threads: modules asked for by the kernel are found there.
    chroot(".").context("failed to change root")?;
    chdir("/").context("failed to enter /")
}

/// What an init system mounts, and the directories of the host.
fn mount_the_rest(setup: &Setup) -> Result<()> {
    // As systemd does: mounts propagate unless somebody says otherwise.
    let shared = MsFlags::MS_SHARED | MsFlags::MS_REC;
    mount(None::<&str>, "/", None::<&str>, shared, None::<&str>)
        .context("failed to make / shared")?;
    let nodev = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let pts = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount_at(
        "devpts",
        "devpts",
        "/dev/pts",
        pts,
        "gid=5,mode=620,ptmxmode=000",
    )?;
    mount_at("tmpfs", "tmpfs", "/dev/shm", nodev, "mode=1777")?;
    mount_at("mqueue", "mqueue", "/dev/mqueue", strict(), "")?;
    mount_at(
        "cgroup2",
        "cgroup2",
        "/sys/fs/cgroup",
        strict(),
        "nsdelegate,memory_recursiveprot",
    )?;
    mount_at("bpf", "bpf", "/sys/fs/bpf", strict(), "mode=700")?;
    mount_at(
        "securityfs",
        "securityfs",
        "/sys/kernel/security",
        strict(),
        "",
    )?;
    mount_at("debugfs", "debugfs", "/sys/kernel/debug", strict(), "")?;
    mount_at("tracefs", "tracefs", "/sys/kernel/tracing", strict(), "")?;
    mount_at("tmpfs", "tmpfs", "/run", nodev, "mode=755")?;
    mount_at("tmpfs", "tmpfs", "/tmp", nodev, "mode=1777,size=75%")?;
    for directory in ["containerd", "containers", "docker"] {
        let path = format!("/var/lib/{directory}");
        mount_at("tmpfs", "tmpfs", &path, NO_FLAGS, "mode=711,size=75%")?;
    }
    for share in &setup.mounts {
        let flags = if share.read_only {
            MsFlags::MS_RDONLY
        } else {
            NO_FLAGS
        };
        mount_at("virtiofs", &share.tag, &share.path, flags, "")?;
    }
    Ok(())
}

/// Modules that something wants as a device node; others are loaded by the kernel when asked for.
fn load_modules(warnings: &mut Vec<String>) -> Result<()> {
    let cpu = fs::read_to_string("/proc/cpuinfo").context("failed to read /proc/cpuinfo")?;
    let flags = cpu
        .lines()
        .find(|line| line.starts_with("flags"))
        .unwrap_or_default();
    let mut modules = vec![
        "-a",
        "tun",
        "loop",
        "vhost_net",
        "vhost_vsock",
        "br_netfilter",
    ];
    if flags.split_whitespace().any(|flag| flag == "svm") {
        modules.push("kvm_amd");
    } else if flags.split_whitespace().any(|flag| flag == "vmx") {
        modules.push("kvm_intel");
    } else {
        warnings.push("this CPU has neither SVM nor VMX".to_owned());
    }
    run("modprobe", &modules, warnings)
}

fn write_files() -> Result<()> {
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")
        .context("failed to read the cgroup controllers")?;
    let controllers: Vec<String> = controllers
        .split_whitespace()
        .map(|name| format!("+{name}"))
        .collect();
    let files: [(&str, &str); 6] = [
        ("/proc/sys/kernel/hostname", "testbed"),
        ("/proc/sys/net/ipv4/ip_forward", "1"),
        (
            "/sys/fs/cgroup/cgroup.subtree_control",
            &controllers.join(" "),
        ),
        ("/etc/hosts", "127.0.0.1 localhost testbed\n::1 localhost\n"),
        ("/etc/resolv.conf", ""),
        ("/etc/machine-id", "00000000000040008000000000000001\n"),
    ];
    for (path, text) in files {
        fs::write(path, text).with_context(|| format!("failed to write {path}"))?;
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        std::os::unix::fs::symlink(target, link)
            .with_context(|| format!("failed to make {link}"))?;
    }
    Ok(())
}

/// Runs a program of the root; what it complains of becomes a warning.
fn run(program: &str, arguments: &[&str], warnings: &mut Vec<String>) -> Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .env_clear()
        .envs(ENVIRONMENT)
        .output()
        .with_context(|| format!("failed to start {program}"))?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    let complaint = complaint.trim();
    if !output.status.success() || !complaint.is_empty() {
        warnings.push(format!("{program}: {}: {complaint}", output.status));
    }
    Ok(())
}
