// SPDX-License-Identifier: Apache-2.0

//! The testbed's root file system and kernel: made by `testbed-root/build.sh`, kept in the cache.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::cache::{self, CacheError};
use crate::tools::{self, ToolError};

/// How the root is made. It and the list are the key of the cache's entry, and are kept in it.
const BUILD: &str = include_str!("../testbed-root/build.sh");
const PACKAGES: &str = include_str!("../testbed-root/packages.txt");

/// Where the parts are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Root {
    /// The root file system.
    pub rootfs: PathBuf,
    /// The kernel, an ELF file with a PVH entry.
    pub vmlinux: PathBuf,
}

/// Why there is no root.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// The cache.
    #[error("no root for the testbed")]
    Cache(#[from] CacheError),
    /// mmdebstrap is missing.
    #[error("cannot make the testbed's root")]
    Tool(#[from] ToolError),
    /// Device nodes and owners need root.
    #[error("the testbed's root can only be made by root")]
    NotRoot,
    /// The script could not be run.
    #[error("failed to run {0}")]
    Run(PathBuf, #[source] io::Error),
    /// The script failed; what it wrote is in the log.
    #[error("build.sh ended with {0}: {1}")]
    Failed(std::process::ExitStatus, String),
}

/// The root, made first if need be (a minute or two, some 200 MB from the Debian archives).
///
/// # Errors
/// If it cannot be made.
pub fn ensure() -> Result<Root, RootError> {
    let key = cache::key(&[BUILD.as_bytes(), PACKAGES.as_bytes()]);
    let dir = cache::entry(&cache::dir()?, "testbed-root", &key, make)?;
    Ok(Root {
        rootfs: dir.join("rootfs"),
        vmlinux: dir.join("vmlinux"),
    })
}

fn make(dir: &Path) -> Result<(), RootError> {
    if !rustix::process::geteuid().is_root() {
        return Err(RootError::NotRoot);
    }
    tools::MMDEBSTRAP.ensure()?;
    crate::say("making the testbed's root file system (once; one to three minutes)");
    let script = dir.join("build.sh");
    let run = |error| RootError::Run(script.clone(), error);
    fs::write(&script, BUILD).map_err(run)?;
    fs::write(dir.join("packages.txt"), PACKAGES).map_err(run)?;
    let log = dir.join("log");
    let file = fs::File::create(&log).map_err(run)?;
    let status = Command::new("bash")
        .arg(&script)
        .arg(dir)
        .stdin(Stdio::null())
        .stdout(file.try_clone().map_err(run)?)
        .stderr(file)
        .status()
        .map_err(run)?;
    if status.success() {
        return Ok(());
    }
    let log = fs::read_to_string(&log).unwrap_or_default();
    let lines: Vec<&str> = log.lines().collect();
    let tail = lines
        .get(lines.len().saturating_sub(15)..)
        .unwrap_or_default()
        .join("\n");
    Err(RootError::Failed(status, tail))
}
