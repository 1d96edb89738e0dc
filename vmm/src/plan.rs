// SPDX-License-Identifier: Apache-2.0

//! From the configuration to a plan that cannot be wrong.
//!
//! [`VmPlan::new`] checks a whole [`VmConfig`] before anything is made of it, and names the first field that is
//! wrong. Files are opened later, by who needs them.

use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use caisson_protocol::PROTOCOL_VERSION;
use caisson_protocol::vm::{
    BlkConfig, FsConfig, MAX_CONFIG_BYTES, MAX_VCPUS, MIN_MEMORY_MIB, VmConfig,
};

/// Longest path of a Unix socket, bytes (`sun_path` without its NUL).
const MAX_SOCKET_PATH: usize = 107;
/// Most virtio-fs devices, and most virtio-blk devices.
const MAX_DEVICES: usize = 8;
/// Longest virtio-fs tag, bytes (virtio 1.2, 5.11.4).
const MAX_TAG: usize = 36;
/// Longest virtio-blk serial number, bytes (virtio 1.2, 5.2.6).
const MAX_SERIAL: usize = 20;
/// Bounds of the console ring, KiB.
const RING_KIB: std::ops::RangeInclusive<u32> = 4..=16384;
/// First context id that is not reserved, and the one that means "any".
const MIN_CID: u32 = 3;

/// A configuration that is refused.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// More bytes than any configuration has.
    #[error("the configuration has more than {MAX_CONFIG_BYTES} bytes")]
    TooLong,
    /// Not a document of this version.
    #[error("the configuration is malformed")]
    Json(#[from] serde_json::Error),
    /// A field with a value that is not allowed.
    #[error("configuration field {field}: {problem}")]
    Field {
        /// Its name, with its place in a list.
        field: String,
        /// What is wrong, with the bounds.
        problem: String,
    },
}

/// A checked configuration.
#[derive(Debug, Clone)]
pub struct VmPlan {
    config: VmConfig,
    memory_bytes: u64,
}

impl VmPlan {
    /// Reads and checks a JSON document.
    ///
    /// # Errors
    /// As [`Self::new`], and when it is no configuration.
    pub fn from_json(json: &[u8], host_memory_bytes: u64) -> Result<Self, PlanError> {
        if json.len() > MAX_CONFIG_BYTES {
            return Err(PlanError::TooLong);
        }
        Self::new(serde_json::from_slice(json)?, host_memory_bytes)
    }

    /// Checks `config` as a whole for a host with this much memory.
    ///
    /// # Errors
    /// Names the first field that is wrong.
    pub fn new(config: VmConfig, host_memory_bytes: u64) -> Result<Self, PlanError> {
        check_identity(&config)?;
        let memory_bytes = check_size(&config, host_memory_bytes)?;
        check_socket_path("control_socket", &config.control_socket)?;
        let cid = config.vsock.guest_cid;
        if !(MIN_CID..u32::MAX).contains(&cid) {
            let max = u32::MAX - 1;
            return Err(field(
                "vsock.guest_cid",
                format!("{cid} is not from {MIN_CID} to {max}"),
            ));
        }
        check_fs(&config.fs)?;
        check_blk(&config.blk)?;
        let ring = config.console.ring_kib;
        if !RING_KIB.contains(&ring) {
            let (min, max) = (RING_KIB.start(), RING_KIB.end());
            return Err(field(
                "console.ring_kib",
                format!("{ring} is not from {min} to {max}"),
            ));
        }
        Ok(Self {
            config,
            memory_bytes,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// Size of the guest's memory.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }
}

/// Memory of this host, bytes.
pub fn host_memory_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(u64::from(info.mem_unit))
}

fn field(name: impl Into<String>, problem: impl Into<String>) -> PlanError {
    PlanError::Field {
        field: name.into(),
        problem: problem.into(),
    }
}

fn check_identity(config: &VmConfig) -> Result<(), PlanError> {
    if config.protocol_version != PROTOCOL_VERSION {
        return Err(field(
            "protocol_version",
            format!(
                "{} was written for another version of Caisson, this one speaks {PROTOCOL_VERSION}",
                config.protocol_version
            ),
        ));
    }
    let id_byte = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    if !(1..=64).contains(&config.id.len()) || !config.id.bytes().all(id_byte) {
        return Err(field("id", "it is not 1 to 64 bytes of [A-Za-z0-9_.-]"));
    }
    if !config
        .cmdline
        .bytes()
        .all(|byte| (0x20..0x7f).contains(&byte))
    {
        return Err(field("cmdline", "it has characters other than plain ASCII"));
    }
    Ok(())
}

fn check_size(config: &VmConfig, host_memory_bytes: u64) -> Result<u64, PlanError> {
    if !(1..=MAX_VCPUS).contains(&config.vcpus) {
        return Err(field(
            "vcpus",
            format!("{} is not from 1 to {MAX_VCPUS}", config.vcpus),
        ));
    }
    let host_mib = host_memory_bytes >> 20;
    let mib = config.memory_mib;
    if !(MIN_MEMORY_MIB..=host_mib).contains(&mib) {
        return Err(field(
            "memory_mib",
            format!("{mib} is not from {MIN_MEMORY_MIB} to {host_mib} (this host's memory)"),
        ));
    }
    mib.checked_mul(1 << 20)
        .ok_or_else(|| field("memory_mib", format!("{mib} is too large")))
}

fn check_socket_path(name: &str, path: &Path) -> Result<(), PlanError> {
    let bytes = path.as_os_str().as_bytes().len();
    if bytes == 0 || bytes > MAX_SOCKET_PATH {
        return Err(field(
            name,
            format!("its {bytes} bytes are not from 1 to {MAX_SOCKET_PATH}"),
        ));
    }
    Ok(())
}

fn check_count(name: &str, count: usize) -> Result<(), PlanError> {
    if count > MAX_DEVICES {
        return Err(field(
            name,
            format!("{count} devices are more than {MAX_DEVICES}"),
        ));
    }
    Ok(())
}

fn check_queues(name: &str, queues: u16) -> Result<(), PlanError> {
    if !(1..=8).contains(&queues) {
        return Err(field(name, format!("{queues} is not from 1 to 8")));
    }
    Ok(())
}

fn check_fs(devices: &[FsConfig]) -> Result<(), PlanError> {
    check_count("fs", devices.len())?;
    let mut tags = BTreeSet::new();
    for (index, device) in devices.iter().enumerate() {
        if !(1..=MAX_TAG).contains(&device.tag.len()) || device.tag.contains('\0') {
            return Err(field(
                format!("fs[{index}].tag"),
                format!("it is not 1 to {MAX_TAG} bytes without NUL"),
            ));
        }
        if !tags.insert(&device.tag) {
            return Err(field(
                format!("fs[{index}].tag"),
                format!("{:?} is used twice", device.tag),
            ));
        }
        check_queues(&format!("fs[{index}].queues"), device.queues)?;
    }
    Ok(())
}

fn check_blk(devices: &[BlkConfig]) -> Result<(), PlanError> {
    check_count("blk", devices.len())?;
    let mut serials = BTreeSet::new();
    for (index, device) in devices.iter().enumerate() {
        let printable = device.serial.bytes().all(|byte| byte.is_ascii_graphic());
        if !(1..=MAX_SERIAL).contains(&device.serial.len()) || !printable {
            return Err(field(
                format!("blk[{index}].serial"),
                format!("it is not 1 to {MAX_SERIAL} printable ASCII characters"),
            ));
        }
        if !serials.insert(&device.serial) {
            return Err(field(
                format!("blk[{index}].serial"),
                format!("{:?} is used twice", device.serial),
            ));
        }
        check_queues(&format!("blk[{index}].queues"), device.queues)?;
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use caisson_protocol::vm::{ConsoleConfig, VsockConfig};

    const HOST: u64 = 8 << 30;

    pub(crate) fn config() -> VmConfig {
        VmConfig {
            protocol_version: PROTOCOL_VERSION,
            id: "pod-1".into(),
            kernel: "/k".into(),
            initramfs: "/i".into(),
            cmdline: String::new(),
            vcpus: 1,
            memory_mib: 128,
            control_socket: "/run/c.sock".into(),
            vsock: VsockConfig {
                guest_cid: 3,
                socket_dir: "/run".into(),
            },
            fs: Vec::new(),
            blk: Vec::new(),
            console: ConsoleConfig::default(),
        }
    }

    fn fs(tag: &str) -> FsConfig {
        FsConfig {
            tag: tag.into(),
            directory: "/d".into(),
            queues: 1,
            cache: Default::default(),
        }
    }

    fn blk(serial: &str) -> BlkConfig {
        BlkConfig {
            serial: serial.into(),
            path: "/b".into(),
            read_only: false,
            queues: 1,
        }
    }

    /// The message for a configuration that `change` broke.
    fn refused(change: impl FnOnce(&mut VmConfig)) -> String {
        let mut broken = config();
        change(&mut broken);
        VmPlan::new(broken, HOST).unwrap_err().to_string()
    }

    #[test]
    fn a_right_configuration_passes_unchanged() {
        let mut full = config();
        full.fs = vec![fs("a"), fs("b")];
        full.blk = vec![blk("a"), blk("b")];
        let plan = VmPlan::new(full.clone(), HOST).unwrap();
        assert_eq!(plan.config(), &full);
        assert_eq!(plan.memory_bytes(), 128 << 20);
    }

    #[test]
    fn memory_of_a_mebibyte_and_of_an_exbibyte_are_refused_with_the_bounds() {
        for mib in [0, 1, 31, 8193, 1 << 40, u64::MAX] {
            let message = refused(|config| config.memory_mib = mib);
            assert_eq!(
                message,
                format!(
                    "configuration field memory_mib: {mib} is not from 32 to 8192 (this host's memory)"
                )
            );
        }
    }

    #[test]
    fn each_wrong_field_is_named() {
        let cases = [
            ("protocol_version", refused(|c| c.protocol_version = 99)),
            ("id", refused(|c| c.id = String::new())),
            ("id", refused(|c| c.id = "a/b".into())),
            ("cmdline", refused(|c| c.cmdline = "a\nb".into())),
            ("vcpus", refused(|c| c.vcpus = 0)),
            ("vcpus", refused(|c| c.vcpus = 33)),
            (
                "control_socket",
                refused(|c| c.control_socket = "x".repeat(108).into()),
            ),
            ("vsock.guest_cid", refused(|c| c.vsock.guest_cid = 2)),
            ("vsock.guest_cid", refused(|c| c.vsock.guest_cid = u32::MAX)),
            ("fs", refused(|c| c.fs = vec![fs("x"); 9])),
            ("fs[1].tag", refused(|c| c.fs = vec![fs("x"), fs("x")])),
            ("fs[0].tag", refused(|c| c.fs = vec![fs("")])),
            (
                "fs[0].queues",
                refused(|c| {
                    c.fs = vec![FsConfig {
                        queues: 9,
                        ..fs("x")
                    }]
                }),
            ),
            (
                "blk[0].serial",
                refused(|c| c.blk = vec![blk(&"x".repeat(21))]),
            ),
            (
                "blk[1].serial",
                refused(|c| c.blk = vec![blk("x"), blk("x")]),
            ),
            ("console.ring_kib", refused(|c| c.console.ring_kib = 3)),
        ];
        for (name, message) in cases {
            let start = format!("configuration field {name}: ");
            assert!(message.starts_with(&start), "{name}: {message}");
        }
    }

    #[test]
    fn unknown_fields_and_endless_documents_are_refused() {
        let mut json = serde_json::to_value(config()).unwrap();
        json["memroy_mib"] = 1.into();
        let error = VmPlan::from_json(json.to_string().as_bytes(), HOST).unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("memroy_mib"), "{source}");
        let long = vec![b' '; MAX_CONFIG_BYTES + 1];
        assert!(matches!(
            VmPlan::from_json(&long, HOST),
            Err(PlanError::TooLong)
        ));
    }
}
