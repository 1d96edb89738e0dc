// SPDX-License-Identifier: Apache-2.0

//! A root file system in memory with what is measured and nothing else.
//!
//! On the clock that counts instructions, waiting for another process of the host is not free but worse: time
//! jumps to the next timer. The testbed's own root is such a process, and asks it even for names that are not
//! there. So whatever is measured runs from memory.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::pivot_root;

use crate::setup::Images;

/// Where it is made.
const PLACE: &str = "/mnt";
/// Set in the process that runs in it.
const INSIDE: &str = "CAISSON_BENCH_INSIDE";
/// What runs.
const PROGRAMS: [&str; 6] = [
    "caisson",
    "caisson-rootfs-builder",
    "busybox",
    "runc",
    "crun",
    "qemu-system-x86_64",
];
/// Data of those programs.
const DATA: [&str; 6] = [
    "/etc/caisson",
    "/etc/passwd",
    "/etc/group",
    "/etc/ld.so.cache",
    "/usr/share/qemu",
    "/usr/lib/x86_64-linux-gnu/qemu",
];
/// Links of a merged /usr.
const LINKS: [(&str, &str); 4] = [
    ("bin", "usr/bin"),
    ("sbin", "usr/sbin"),
    ("lib", "usr/lib"),
    ("lib64", "usr/lib64"),
];

/// Goes on in a root in memory, as a new process image; returns there. `firecracker` is one more program that runs.
pub(crate) fn enter(firecracker: Option<&Path>) -> Result<()> {
    if std::env::var_os(INSIDE).is_some() {
        return Ok(());
    }
    let this = std::env::current_exe().context("failed to find this program")?;
    unshare(CloneFlags::CLONE_NEWNS).context("failed to make a mount namespace")?;
    change("/", MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
    tmpfs(PLACE)?;
    fill(&this, firecracker)?;
    for dir in ["dev", "proc", "sys"] {
        let to = Path::new(PLACE).join(dir);
        fs::create_dir(&to).with_context(|| format!("failed to make {}", to.display()))?;
        let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
        let from = Path::new("/").join(dir);
        mount(Some(&from), &to, None::<&str>, flags, None::<&str>)
            .with_context(|| format!("failed to bind {}", from.display()))?;
    }
    std::env::set_current_dir(PLACE).context("failed to enter the root in memory")?;
    pivot_root(".", ".").context("failed to change the root")?;
    umount2(".", MntFlags::MNT_DETACH).context("failed to leave the old root")?;
    std::env::set_current_dir("/").context("failed to enter the root in memory")?;
    let error = Command::new(&this)
        .args(std::env::args_os().skip(1))
        .env(INSIDE, "1")
        .exec();
    Err(error).with_context(|| format!("failed to run {}", this.display()))
}

fn fill(this: &Path, firecracker: Option<&Path>) -> Result<()> {
    let root = Path::new(PLACE);
    for dir in ["usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "etc"] {
        fs::create_dir_all(root.join(dir)).context("failed to make a directory")?;
    }
    for dir in ["run", "tmp"] {
        fs::create_dir(root.join(dir)).context("failed to make a directory")?;
    }
    for (name, target) in LINKS {
        symlink(target, root.join(name)).context("failed to make a link")?;
    }
    let images = Images::configured()?;
    let mut files: Vec<OsString> = DATA.iter().map(Into::into).collect();
    files.extend([images.kernel.into(), images.initramfs.into()]);
    let mut programs = vec![this.to_owned(), images.vmm];
    programs.extend(firecracker.map(Path::to_owned));
    for name in PROGRAMS {
        programs.push(find(name)?);
    }
    for program in programs {
        files.extend(libraries(&program)?);
        files.push(program.into());
    }
    files.iter().try_for_each(|file| copy(Path::new(file)))
}

/// Copies a file, or a directory with all in it, to the same place in the new root. Links are followed: what is
/// behind them may lie elsewhere.
fn copy(from: &Path) -> Result<()> {
    let to = Path::new(PLACE).join(from.strip_prefix("/").unwrap_or(from));
    let failed = || format!("failed to copy {}", from.display());
    if from.is_dir() {
        fs::create_dir_all(&to).with_context(failed)?;
        for entry in fs::read_dir(from).with_context(failed)? {
            let path = entry.with_context(failed)?.path();
            // A link to nothing is nothing that is read.
            if path.exists() {
                copy(&path)?;
            }
        }
        return Ok(());
    }
    if let Some(dir) = to.parent() {
        fs::create_dir_all(dir).with_context(failed)?;
    }
    fs::copy(from, &to).map(drop).with_context(failed)
}

/// Where a program is.
fn find(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = std::env::split_paths(&path).map(|dir| dir.join(name));
    places
        .find(|place| place.exists())
        .with_context(|| format!("{name} is not installed"))
}

/// What the loader loads for a program; nothing for a static one.
fn libraries(program: &Path) -> Result<Vec<OsString>> {
    // ldd fails for a static program, in words that differ.
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .context("failed to run ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let paths = text.split_whitespace().filter(|word| word.starts_with('/'));
    Ok(paths.map(OsString::from).collect())
}

fn tmpfs(place: &str) -> Result<()> {
    mount(
        Some("bench"),
        place,
        Some("tmpfs"),
        MsFlags::empty(),
        None::<&str>,
    )
    .with_context(|| format!("failed to mount a tmpfs on {place}"))
}

fn change(place: &str, flags: MsFlags) -> Result<()> {
    mount(None::<&str>, place, None::<&str>, flags, None::<&str>)
        .with_context(|| format!("failed to change the mount {place}"))
}
