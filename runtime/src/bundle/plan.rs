// SPDX-License-Identifier: Apache-2.0

//! What is to be made: everything the per-container process needs, decided before it starts.
//!
//! Written once into the state directory; the per-container process carries it out, and `exec` reads from it what
//! the container's own process was given.

use std::collections::BTreeMap;
use std::path::PathBuf;

use oci_spec::runtime::{Process, Spec};
use serde::{Deserialize, Serialize};

use crate::config::TimeoutSection;
use crate::resources::volume::MountPlan;

/// A container and the VM around it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// The VMM's program.
    pub vmm: PathBuf,
    /// The machine.
    pub vm: VmShape,
    /// What the pod as a whole gets.
    pub sandbox: SandboxPlan,
    /// Host file systems to show to the guest: the root file system first.
    pub mounts: Vec<MountPlan>,
    /// The config.json the guest gets.
    pub guest_spec: Spec,
    /// How long to wait.
    pub timeouts: TimeoutSection,
    /// Cgroup below /sys/fs/cgroup, beginning with `/`.
    pub cgroup: PathBuf,
}

impl Plan {
    /// The container's own process, as the guest gets it.
    pub fn process(&self) -> Process {
        self.guest_spec.process().clone().unwrap_or_default()
    }
}

/// Size and files of the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmShape {
    /// Guest kernel.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initramfs: PathBuf,
    /// Words for the command line, the agent's among them.
    pub cmdline: String,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// virtio-fs queues.
    pub fs_queues: u16,
    /// virtio-fs cache.
    pub fs_cache: caisson_protocol::vm::CachePolicy,
    /// Console ring, KiB.
    pub console_ring_kib: u32,
    /// Serial console.
    pub early_console: bool,
}

/// What the agent sets up before the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SandboxPlan {
    /// Host name of the guest.
    pub hostname: String,
    /// Size of /dev/shm, bytes; 0 for the kernel's default.
    pub shm_size_bytes: u64,
    /// Parameters of the pod's network, `net.*`, by their names.
    pub sysctls: BTreeMap<String, String>,
}
