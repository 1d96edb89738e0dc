// SPDX-License-Identifier: Apache-2.0

//! Bundles, programs and images that are measured.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use caisson_testbed::installed::{config_with, path_of};

/// Where the measured Caisson keeps containers.
const STATE: &str = "/run/caisson";

/// What the installed Caisson is configured with.
#[derive(Debug)]
pub(crate) struct Images {
    /// Of the guest.
    pub(crate) kernel: PathBuf,
    /// Of the guest.
    pub(crate) initramfs: PathBuf,
    /// `caisson-vmm`.
    pub(crate) vmm: PathBuf,
}

impl Images {
    /// From its configuration file.
    pub(crate) fn configured() -> Result<Self> {
        Ok(Self {
            kernel: path_of("kernel")?,
            initramfs: path_of("initramfs")?,
            vmm: path_of("vmm")?,
        })
    }
}

/// Everything that is measured with. Its directory goes when this is dropped.
#[derive(Debug)]
pub(crate) struct Setup {
    dir: tempfile::TempDir,
    pub(crate) images: Images,
    /// Firecracker's program, if it is to be measured, too.
    pub(crate) firecracker: Option<PathBuf>,
}

impl Setup {
    pub(crate) fn new(firecracker: Option<PathBuf>) -> Result<Self> {
        Ok(Self {
            firecracker,
            images: Images::configured()?,
            dir: tempfile::tempdir().context("failed to make a directory")?,
        })
    }

    /// A directory of the bench's own.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What is measured with, and its version.
    pub(crate) fn facts(&self) -> Result<Vec<(String, String)>> {
        let mut facts = Vec::new();
        let programs = ["caisson", "runc", "crun", "qemu-system-x86_64"];
        let mut programs: Vec<_> = programs.map(|name| (name, Path::new(name))).into();
        programs.extend(
            self.firecracker
                .as_deref()
                .map(|path| ("firecracker", path)),
        );
        for (name, program) in programs {
            let version = output(Command::new(program).arg("--version"))?;
            let line = version.lines().next().unwrap_or_default().to_owned();
            facts.push((name.to_owned(), line));
        }
        for (name, path) in [
            ("vmlinux", &self.images.kernel),
            ("initramfs", &self.images.initramfs),
            ("caisson-vmm", &self.images.vmm),
        ] {
            let size = fs::metadata(path).with_context(|| format!("no {}", path.display()))?;
            facts.push((name.to_owned(), format!("{} bytes", size.len())));
        }
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").context("no osrelease")?;
        facts.push(("testbed kernel".to_owned(), kernel.trim().to_owned()));
        Ok(facts)
    }

    /// A bundle around busybox that runs `command`.
    pub(crate) fn bundle(&self, name: &str, command: &[&str]) -> Result<PathBuf> {
        let bundle = self.dir().join(name);
        if !bundle.exists() {
            let mut builder = Command::new("caisson-rootfs-builder");
            builder.args(["bundle", "--output"]).arg(&bundle);
            output(builder.args(["--busybox", "--"]).args(command))?;
        }
        Ok(bundle)
    }

    /// A configuration file for guests of this size.
    pub(crate) fn config(&self, memory_mib: u64) -> Result<PathBuf> {
        let changes = format!("[vm]\nmemory_mib = {memory_mib}\n");
        config_with(self.dir(), &memory_mib.to_string(), &changes)
            .context("failed to write a configuration")
    }

    /// A file in the state directory of a container, as JSON.
    pub(crate) fn state_file(&self, id: &str, name: &str) -> Result<serde_json::Value> {
        let path = state_path(id, name);
        let text = fs::read(&path).with_context(|| format!("failed to read {}", path.display()))?;
        Ok(serde_json::from_slice(&text)?)
    }
}

/// Where a file in the state directory of a container is; with an empty name, the directory.
pub(crate) fn state_path(id: &str, name: &str) -> PathBuf {
    Path::new(STATE).join(id).join(name)
}

/// Runs a program to its end and gives back its stdout.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("failed to run {name}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{name} ended with {}: {said}", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A container that is deleted by force when this is dropped.
#[derive(Debug)]
pub(crate) struct Container<'a> {
    pub(crate) runtime: &'a str,
    pub(crate) id: &'a str,
}

impl<'a> Container<'a> {
    /// Starts a container in the background.
    pub(crate) fn start(
        runtime: &'a str,
        id: &'a str,
        bundle: &Path,
        config: Option<&Path>,
    ) -> Result<Self> {
        let mut command = Command::new(runtime);
        if let Some(config) = config {
            command.arg("--config").arg(config);
        }
        command
            .args(["run", "--detach", "--bundle"])
            .arg(bundle)
            .arg(id);
        // Not piped: the container would hold the pipe open.
        let status = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .status()
            .with_context(|| format!("failed to run {runtime}"))?;
        ensure!(status.success(), "{runtime} run ended with {status}");
        Ok(Self { runtime, id })
    }

    /// Deletes it by force.
    pub(crate) fn delete(&self) -> Result<()> {
        output(Command::new(self.runtime).args(["delete", "--force", self.id])).map(drop)
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        // It may be deleted already; what is left of it is gone with the testbed.
        let _ = self.delete();
    }
}
