// SPDX-License-Identifier: Apache-2.0

//! The specification that everything starts from: that of `runc spec`.
//!
//! Two things differ, since a bundle is made to be run by a program and not typed at: no terminal and a
//! writable root unless asked for otherwise. What a process may do is one of two sets ([`Privileges`]).

use oci_spec::runtime::{
    Capability, LinuxBuilder, LinuxCapabilitiesBuilder, LinuxDeviceCgroupBuilder,
    LinuxResourcesBuilder, ProcessBuilder, RootBuilder, Spec, SpecBuilder, get_default_maskedpaths,
    get_default_mounts, get_default_namespaces, get_default_readonly_paths,
};

use super::SpecError;

/// Version of the runtime specification that the bundle follows.
const OCI_VERSION: &str = "1.0.2";

/// What the process may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Privileges {
    /// As `runc spec`: three capabilities, and no new ones by set-user-ID programs.
    Runc,
    /// As Docker and containerd give to images: fourteen capabilities, set-user-ID programs work.
    Docker,
}

impl Privileges {
    fn capabilities(self) -> &'static [Capability] {
        match self {
            Self::Runc => &[
                Capability::AuditWrite,
                Capability::Kill,
                Capability::NetBindService,
            ],
            Self::Docker => &[
                Capability::AuditWrite,
                Capability::Chown,
                Capability::DacOverride,
                Capability::Fowner,
                Capability::Fsetid,
                Capability::Kill,
                Capability::Mknod,
                Capability::NetBindService,
                Capability::NetRaw,
                Capability::Setfcap,
                Capability::Setgid,
                Capability::Setpcap,
                Capability::Setuid,
                Capability::SysChroot,
            ],
        }
    }

    /// Gives the process of `spec` these privileges and no others.
    ///
    /// # Errors
    /// When the library that models the specification refuses the set.
    pub fn apply(self, spec: &mut Spec) -> Result<(), SpecError> {
        let set: std::collections::HashSet<Capability> =
            self.capabilities().iter().copied().collect();
        let mut capabilities = LinuxCapabilitiesBuilder::default()
            .bounding(set.clone())
            .effective(set.clone())
            .permitted(set)
            .build()?;
        // The library's own default would fill these with three capabilities.
        capabilities.set_inheritable(None);
        capabilities.set_ambient(None);
        if let Some(process) = spec.process_mut() {
            process.set_capabilities(Some(capabilities));
            process.set_no_new_privileges(Some(self == Self::Runc));
        }
        Ok(())
    }
}

/// The specification of `runc spec` (with a writable root and no terminal), with `privileges`.
///
/// # Errors
/// When the library that models the specification refuses a value.
pub fn base_spec(privileges: Privileges) -> Result<Spec, SpecError> {
    let no_devices = LinuxDeviceCgroupBuilder::default()
        .allow(false)
        .access("rwm".to_owned())
        .build()?;
    let linux = LinuxBuilder::default()
        .resources(
            LinuxResourcesBuilder::default()
                .devices(vec![no_devices])
                .build()?,
        )
        .namespaces(get_default_namespaces())
        .masked_paths(get_default_maskedpaths())
        .readonly_paths(get_default_readonly_paths())
        .build()?;
    let mut spec = SpecBuilder::default()
        .version(OCI_VERSION)
        .process(ProcessBuilder::default().terminal(false).build()?)
        .root(
            RootBuilder::default()
                .path("rootfs")
                .readonly(false)
                .build()?,
        )
        .hostname("caisson")
        .mounts(get_default_mounts())
        .linux(linux)
        .build()?;
    spec.set_annotations(None);
    privileges.apply(&mut spec)?;
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::spec::to_json;

    /// `runc spec` of runc 1.1 on a host with cgroup v2, but for the host name, the version's suffix,
    /// `terminal` and `readonly`.
    fn runc_spec() -> Value {
        let capabilities = json!(["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
        json!({
            "ociVersion": "1.0.2",
            "process": {
                "terminal": false,
                "user": {"uid": 0, "gid": 0},
                "args": ["sh"],
                "env": [
                    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                    "TERM=xterm"
                ],
                "cwd": "/",
                "capabilities": {
                    "bounding": capabilities,
                    "effective": capabilities,
                    "permitted": capabilities
                },
                "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
                "noNewPrivileges": true
            },
            "root": {"path": "rootfs", "readonly": false},
            "hostname": "caisson",
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
                "resources": {"devices": [{"allow": false, "access": "rwm"}]},
                "namespaces": [
                    {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"},
                    {"type": "mount"}, {"type": "cgroup"}
                ],
                "maskedPaths": [
                    "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                    "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware",
                    "/proc/scsi"
                ],
                "readonlyPaths": [
                    "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"
                ]
            }
        })
    }

    #[test]
    fn default_is_what_runc_spec_writes() {
        let text = to_json(&base_spec(Privileges::Runc).unwrap()).unwrap();
        let json: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json, runc_spec());
    }

    #[test]
    fn docker_privileges_are_fourteen_capabilities_and_setuid_works() {
        let text = to_json(&base_spec(Privileges::Docker).unwrap()).unwrap();
        let json: Value = serde_json::from_str(&text).unwrap();
        for set in ["bounding", "effective", "permitted"] {
            assert_eq!(
                json["process"]["capabilities"][set]
                    .as_array()
                    .unwrap()
                    .len(),
                14
            );
        }
        assert_eq!(json["process"]["noNewPrivileges"], false);
    }
}
