// SPDX-License-Identifier: Apache-2.0

//! `caisson features`: <https://github.com/opencontainers/runtime-spec/blob/main/features.md>, truthfully.

use caisson_runtime::error::RuntimeError;
use serde_json::{Value, json};

use super::{OCI_VERSION, print_json};

/// Options of bind mounts that the host enforces, and those that the guest's mounts take.
const MOUNT_OPTIONS: &[&str] = &[
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "private",
    "rbind",
    "relatime",
    "ro",
    "rprivate",
    "rro",
    "rshared",
    "rslave",
    "runbindable",
    "rw",
    "shared",
    "slave",
    "strictatime",
    "suid",
    "sync",
    "unbindable",
];

pub(crate) fn run() -> Result<u8, RuntimeError> {
    print_json(&document())?;
    Ok(0)
}

fn document() -> Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": OCI_VERSION,
        "mountOptions": MOUNT_OPTIONS,
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "pid", "uts"],
            "cgroup": {
                "v1": false,
                "v2": true,
                "systemd": false,
                "systemdUser": false,
                "rdma": false
            },
            "seccomp": {
                "enabled": true,
                "archs": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
            },
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": false}},
            "netDevices": {"enabled": false}
        },
        "annotations": {
            "org.caisson.version": env!("CARGO_PKG_VERSION")
        },
        "potentiallyUnsafeConfigAnnotations": []
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_is_one_that_readers_of_the_spec_take() {
        let features: oci_spec::runtime::Features = serde_json::from_value(document()).unwrap();
        let text = serde_json::to_value(features).unwrap();
        assert_eq!(text["ociVersionMax"], OCI_VERSION);
        assert_eq!(text["linux"]["cgroup"]["v2"], true);
    }
}
