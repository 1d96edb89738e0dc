// SPDX-License-Identifier: Apache-2.0

//! Virtual machine monitors, started by hand with the same guest and the same kind of devices.

use std::fs::File;
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use serde_json::json;

use crate::setup::{self, Setup};

/// Who is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Monitor {
    Caisson,
    Qemu,
    Firecracker,
}

impl Monitor {
    /// Those that are there, in the order of their turns: Firecracker, which Debian does not have, only where its
    /// program was given.
    pub(crate) fn all(setup: &Setup) -> Vec<Self> {
        let mut all = vec![Self::Caisson, Self::Qemu];
        all.extend(setup.firecracker.as_ref().map(|_| Self::Firecracker));
        all
    }

    /// What it is called in tables.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Caisson => "caisson-vmm",
            Self::Qemu => "qemu microvm",
            Self::Firecracker => "firecracker",
        }
    }
}

/// What all boot.
#[derive(Debug)]
pub(crate) struct Guest<'a> {
    setup: &'a Setup,
    memory_mib: u64,
    /// The kernel's command line as a guest of the runtime sees it, without the words for devices.
    cmdline: String,
    /// Of this, those that the runtime gives to the VMM.
    own_cmdline: String,
    protocol: u64,
}

/// A VMM that is killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    _dir: tempfile::TempDir,
}

impl Running {
    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself: the agent finds nobody to talk to.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl<'a> Guest<'a> {
    /// Finds out how the runtime starts its guests, from one that it has started.
    pub(crate) fn new(setup: &'a Setup, memory_mib: u64) -> Result<Self> {
        let bundle = setup.bundle("cmdline", &["cat", "/proc/cmdline"])?;
        let all = setup::output(
            Command::new("caisson")
                .args(["run", "--bundle"])
                .arg(bundle)
                .arg("bench-cmdline"),
        )?;
        let words = all.split_whitespace();
        let words = words.filter(|word| !word.starts_with("virtio_mmio."));
        let cmdline = words.collect::<Vec<_>>().join(" ");
        let own: Vec<_> = cmdline
            .split(' ')
            .filter(|word| word.starts_with("caisson."))
            .collect();
        let protocol = own
            .iter()
            .find_map(|word| word.strip_prefix("caisson.protocol="));
        let protocol = protocol.context("the guest's command line has no caisson.protocol=")?;
        Ok(Self {
            setup,
            memory_mib,
            protocol: protocol.parse().context("bad caisson.protocol=")?,
            own_cmdline: own.join(" "),
            cmdline,
        })
    }

    /// Starts it.
    pub(crate) fn start(&self, monitor: Monitor) -> Result<Running> {
        let dir = tempfile::tempdir_in(self.setup.dir()).context("failed to make a directory")?;
        let (mut command, stdin) = match monitor {
            Monitor::Caisson => self.caisson(dir.path())?,
            Monitor::Qemu => (self.qemu(), Stdio::null()),
            Monitor::Firecracker => (self.firecracker(dir.path())?, Stdio::null()),
        };
        let log = dir.path().join("log");
        let log =
            File::create(&log).with_context(|| format!("failed to make {}", log.display()))?;
        let child = command
            .stdin(stdin)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .with_context(|| format!("failed to start {}", monitor.name()))?;
        Ok(Running { child, _dir: dir })
    }

    fn caisson(&self, dir: &Path) -> Result<(Command, Stdio)> {
        let sub = |name: &str| -> Result<PathBuf> {
            let path = dir.join(name);
            std::fs::create_dir(&path).context("failed to make a directory")?;
            Ok(path)
        };
        let config = json!({
            "protocol_version": self.protocol,
            "id": "bench",
            "kernel": self.setup.images.kernel,
            "initramfs": self.setup.images.initramfs,
            "cmdline": self.own_cmdline,
            "vcpus": 1,
            "memory_mib": self.memory_mib,
            "control_socket": dir.join("control.sock"),
            "vsock": { "guest_cid": 3, "socket_dir": sub("vsock")? },
            "fs": [{ "tag": "bench", "directory": sub("shared")? }],
        });
        let mut file = tempfile::tempfile_in(dir).context("failed to make a file")?;
        file.write_all(config.to_string().as_bytes())
            .and_then(|()| file.rewind())
            .context("failed to write the VM's configuration")?;
        let mut command = Command::new(&self.setup.images.vmm);
        command.args(["--config-fd", "stdin"]);
        Ok((command, file.into()))
    }

    /// The machine type that is nearest to ours, with all that it has and the guest does not use off, and a
    /// console, entropy and vsock as ours has them. It has no file system: QEMU's is a process of its own.
    fn qemu(&self) -> Command {
        let mut command = Command::new("qemu-system-x86_64");
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ]);
        command.args([
            "-M",
            "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=off,auto-kernel-cmdline=on",
        ]);
        command.args(["-accel", "kvm", "-cpu", "host", "-smp", "1"]);
        command.args(["-m", &self.memory_mib.to_string()]);
        command.arg("-kernel").arg(&self.setup.images.kernel);
        command.arg("-initrd").arg(&self.setup.images.initramfs);
        command.args(["-append", &self.cmdline]);
        command.args([
            "-chardev",
            "null,id=console",
            "-device",
            "virtio-serial-device",
        ]);
        command.args(["-device", "virtconsole,chardev=console"]);
        command.args(["-device", "virtio-rng-device"]);
        command.args(["-device", "vhost-vsock-device,guest-cid=4"]);
        command
    }

    /// With its system call filters on, as it comes. It adds the words for its devices to the command line by itself.
    /// It has neither a virtio console (its serial port is there always) nor a file system.
    fn firecracker(&self, dir: &Path) -> Result<Command> {
        let program = self.setup.firecracker.as_ref();
        let config = json!({
            "boot-source": {
                "kernel_image_path": self.setup.images.kernel,
                "initrd_path": self.setup.images.initramfs,
                "boot_args": self.cmdline,
            },
            "drives": [],
            "machine-config": { "vcpu_count": 1, "mem_size_mib": self.memory_mib },
            "vsock": { "guest_cid": 3, "uds_path": dir.join("vsock.sock") },
            "entropy": {},
        });
        let file = dir.join("firecracker.json");
        std::fs::write(&file, config.to_string())
            .with_context(|| format!("failed to write {}", file.display()))?;
        let mut command = Command::new(program.context("no firecracker was given")?);
        command.args(["--no-api", "--config-file"]).arg(file);
        Ok(command)
    }
}
