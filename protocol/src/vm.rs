// SPDX-License-Identifier: Apache-2.0

//! The microVM's whole configuration: one JSON document, which `caisson-vmm` reads from its standard input.
//!
//! It says what the machine has, never what runs in it. `caisson-vmm` validates it as a whole before it
//! touches KVM and names the field that is wrong.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Largest accepted document, bytes.
pub const MAX_CONFIG_BYTES: usize = 1 << 20;
/// Bounds of [`VmConfig::memory_mib`]; the upper one is what the host's memory allows.
pub const MIN_MEMORY_MIB: u64 = 32;
/// Most vCPUs of a guest.
pub const MAX_VCPUS: u32 = 32;

/// A microVM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// [`crate::PROTOCOL_VERSION`] of who wrote this.
    pub protocol_version: u32,
    /// Names the VM in messages, thread names and `ps`; 1 to 64 bytes of `[A-Za-z0-9_.-]`.
    pub id: String,
    /// Uncompressed ELF `vmlinux` with a PVH entry note.
    pub kernel: PathBuf,
    /// Initial RAM disk, as the kernel takes it.
    pub initramfs: PathBuf,
    /// Words for the kernel command line after those the VMM makes for its devices.
    pub cmdline: String,
    /// 1 to [`MAX_VCPUS`], all present from the start.
    pub vcpus: u32,
    /// Guest memory in MiB, from [`MIN_MEMORY_MIB`].
    pub memory_mib: u64,
    /// The control socket, which the VMM makes with mode 0600.
    pub control_socket: PathBuf,
    /// The vsock device.
    pub vsock: VsockConfig,
    /// virtio-fs devices: 0 to 8.
    #[serde(default)]
    pub fs: Vec<FsConfig>,
    /// virtio-blk devices: 0 to 8.
    #[serde(default)]
    pub blk: Vec<BlkConfig>,
    /// The console and early console.
    #[serde(default)]
    pub console: ConsoleConfig,
}

/// virtio-vsock in user space; see [`crate::ports`] for the sockets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// Context id of the guest, at least 3.
    pub guest_cid: u32,
    /// Directory of the Unix sockets.
    pub socket_dir: PathBuf,
}

/// One virtio-fs device, served in the VMM process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// What the guest mounts it by; 1 to 36 bytes.
    pub tag: String,
    /// The directory served. Mounts below it, also later ones, are seen by the guest.
    pub directory: PathBuf,
    /// Request queues, each with a thread: 1 to 8.
    #[serde(default = "one")]
    pub queues: u16,
    /// How long the guest may cache names and attributes.
    #[serde(default)]
    pub cache: CachePolicy,
}

/// How long the guest may cache what a virtio-fs server said (as virtiofsd's `--cache`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CachePolicy {
    /// Nothing is cached: the host's changes are seen at once.
    Never,
    /// Metadata for one second, data while a file is open.
    #[default]
    Auto,
    /// For ever: only where the host never writes.
    Always,
}

/// One virtio-blk device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlkConfig {
    /// Serial number the guest sees; 1 to 20 bytes.
    pub serial: String,
    /// Raw image or block device.
    pub path: PathBuf,
    /// Opened read-only, and announced so.
    #[serde(default)]
    pub read_only: bool,
    /// Request queues: 1 to 8.
    #[serde(default = "one")]
    pub queues: u16,
}

/// Consoles of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// Size of the ring that keeps the newest console output, KiB: 4 to 16384.
    #[serde(default = "ConsoleConfig::default_ring_kib")]
    pub ring_kib: u32,
    /// Boot messages on the 8250 from the first instruction on: slow (an exit per byte), for debugging.
    #[serde(default)]
    pub early: bool,
}

impl ConsoleConfig {
    fn default_ring_kib() -> u32 {
        256
    }
}

impl Default for ConsoleConfig {
    fn default() -> Self {
        Self {
            ring_kib: Self::default_ring_kib(),
            early: false,
        }
    }
}

fn one() -> u16 {
    1
}
