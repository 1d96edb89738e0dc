// SPDX-License-Identifier: Apache-2.0

//! What a config.json must be for Caisson to run it: a list of named rules, of which the first violated one wins.
//!
//! <https://github.com/opencontainers/runtime-spec/blob/main/config.md>. Looks at the host (is the rootfs
//! there?), changes nothing.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDevice, LinuxNamespaceType, Mount, Spec};

use super::load::Bundle;

/// Which rule a spec breaks.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpecError {
    /// Not a version of the runtime-spec that is known here.
    #[error("ociVersion {0:?} is not supported (1.x is)")]
    Version(String),
    /// A part that must be there.
    #[error("config.json: {0} is missing")]
    Missing(&'static str),
    /// A value that cannot be right.
    #[error("config.json: {field}: {problem}")]
    Invalid {
        /// Which.
        field: String,
        /// What is wrong.
        problem: String,
    },
    /// Something that this version does not do.
    #[error("config.json: {0} is not supported")]
    Unsupported(String),
    /// A directory or file on the host is not there.
    #[error("{what} {path}: {problem}")]
    Host {
        /// The rootfs, or which mount's source.
        what: String,
        /// Where it should be.
        path: PathBuf,
        /// What the system says.
        problem: String,
    },
}

type Rule = fn(&Bundle) -> Result<(), SpecError>;

/// All rules, in the order in which they are looked at.
const RULES: &[(&str, Rule)] = &[
    ("oci version", oci_version),
    ("linux container", linux_container),
    ("process", process),
    ("no hooks", no_hooks),
    ("own namespaces", own_namespaces),
    ("virtual devices", virtual_devices),
    ("guest features", guest_features),
    ("mounts", mounts),
    ("rootfs", rootfs),
];

/// Checks `bundle` against every rule.
///
/// # Errors
/// The first violated rule.
pub fn validate(bundle: &Bundle) -> Result<(), SpecError> {
    RULES.iter().try_for_each(|(name, rule)| {
        rule(bundle).inspect_err(|error| log::debug!("rule {name:?}: {error}"))
    })
}

fn invalid(field: impl Into<String>, problem: impl Into<String>) -> SpecError {
    SpecError::Invalid {
        field: field.into(),
        problem: problem.into(),
    }
}

fn oci_version(bundle: &Bundle) -> Result<(), SpecError> {
    let version = bundle.spec.version();
    match version.split_once('.') {
        Some(("1", rest)) if rest.starts_with(|c: char| c.is_ascii_digit()) => Ok(()),
        _ => Err(SpecError::Version(version.chars().take(64).collect())),
    }
}

fn linux_container(bundle: &Bundle) -> Result<(), SpecError> {
    let spec = &bundle.spec;
    for (present, section) in [
        (spec.windows().is_some(), "windows"),
        (spec.solaris().is_some(), "solaris"),
        (spec.vm().is_some(), "vm"),
    ] {
        if present {
            return Err(SpecError::Unsupported(format!("section {section:?}")));
        }
    }
    Ok(())
}

fn process(bundle: &Bundle) -> Result<(), SpecError> {
    let process = bundle.spec.process().as_ref();
    let process = process.ok_or(SpecError::Missing("process"))?;
    check_process(process, "process")
}

/// The rules for a `process` object, of a container or of an exec.
///
/// # Errors
/// When it has no arguments, or a working directory that is not absolute.
pub fn check_process(process: &oci_spec::runtime::Process, field: &str) -> Result<(), SpecError> {
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(invalid(format!("{field}.args"), "must not be empty"));
    }
    if !process.cwd().is_absolute() {
        return Err(invalid(format!("{field}.cwd"), "must be an absolute path"));
    }
    Ok(())
}

fn no_hooks(bundle: &Bundle) -> Result<(), SpecError> {
    let Some(hooks) = bundle.spec.hooks() else {
        return Ok(());
    };
    for (name, list) in [
        ("prestart", hooks.prestart()),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("startContainer", hooks.start_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ] {
        if list.as_ref().is_some_and(|list| !list.is_empty()) {
            return Err(SpecError::Unsupported(format!("hooks.{name}")));
        }
    }
    Ok(())
}

fn own_namespaces(bundle: &Bundle) -> Result<(), SpecError> {
    let linux = bundle.spec.linux().as_ref();
    let namespaces = linux.and_then(|linux| linux.namespaces().as_ref());
    let mut seen: Vec<LinuxNamespaceType> = Vec::new();
    for namespace in namespaces.into_iter().flatten() {
        let typ = namespace.typ();
        if seen.contains(&typ) {
            return Err(invalid(
                "linux.namespaces",
                format!("namespace {typ} is listed twice"),
            ));
        }
        seen.push(typ);
        let path = namespace.path().as_ref();
        let path = path.filter(|path| !path.as_os_str().is_empty());
        // A network namespace of the host is accepted: networks reach the guest in another way, and until then
        // the guest has loopback only. All others mean to share the host's kernel, which a VM cannot.
        if let Some(path) = path
            && typ != LinuxNamespaceType::Network
        {
            let path = path.display();
            return Err(SpecError::Unsupported(format!(
                "joining the host's {typ} namespace {path}"
            )));
        }
    }
    Ok(())
}

/// Devices that every guest has, by major and minor number: memory devices, terminals, fuse, tun.
fn is_virtual(device: &LinuxDevice) -> bool {
    matches!(
        (device.major(), device.minor()),
        (1, 3 | 5 | 7 | 8 | 9) | (5, 0..=2) | (10, 200 | 229)
    )
}

fn virtual_devices(bundle: &Bundle) -> Result<(), SpecError> {
    let linux = bundle.spec.linux().as_ref();
    let devices = linux.and_then(|linux| linux.devices().as_ref());
    for device in devices.into_iter().flatten() {
        if !is_virtual(device) {
            let (path, major, minor) = (device.path().display(), device.major(), device.minor());
            return Err(SpecError::Unsupported(format!(
                "device {path} ({major}:{minor}) of the host"
            )));
        }
    }
    Ok(())
}

fn guest_features(bundle: &Bundle) -> Result<(), SpecError> {
    let Some(linux) = bundle.spec.linux() else {
        return Ok(());
    };
    let seccomp = linux.seccomp().as_ref();
    for (present, what) in [
        (linux.intel_rdt().is_some(), "linux.intelRdt"),
        (linux.memory_policy().is_some(), "linux.memoryPolicy"),
        (
            linux.net_devices().as_ref().is_some_and(|d| !d.is_empty()),
            "linux.netDevices",
        ),
        (
            seccomp.is_some_and(|seccomp| seccomp.listener_path().is_some()),
            "linux.seccomp.listenerPath",
        ),
    ] {
        if present {
            return Err(SpecError::Unsupported(what.to_owned()));
        }
    }
    Ok(())
}

/// Whether a mount shows a file or directory of the host.
pub fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || mount
            .options()
            .iter()
            .flatten()
            .any(|option| option == "bind" || option == "rbind")
}

/// File systems that the guest mounts by itself.
const GUEST_FILE_SYSTEMS: &[&str] = &[
    "proc", "sysfs", "tmpfs", "mqueue", "devpts", "cgroup", "cgroup2", "ramfs",
];

fn mounts(bundle: &Bundle) -> Result<(), SpecError> {
    for (index, mount) in bundle.spec.mounts().iter().flatten().enumerate() {
        let field = format!("mounts[{index}] ({})", mount.destination().display());
        if !mount.destination().is_absolute() {
            return Err(invalid(field, "destination must be an absolute path"));
        }
        let mapped = mount.uid_mappings().is_some() || mount.gid_mappings().is_some();
        let options = mount.options().iter().flatten();
        if mapped || options.clone().any(|o| o == "idmap" || o == "ridmap") {
            return Err(SpecError::Unsupported(format!(
                "{field}: an id-mapped mount"
            )));
        }
        if is_bind(mount) {
            bind_source(bundle, mount, &field)?;
            continue;
        }
        let typ = mount.typ().as_deref().unwrap_or("none");
        if !GUEST_FILE_SYSTEMS.contains(&typ) {
            return Err(SpecError::Unsupported(format!(
                "{field}: file system type {typ:?}"
            )));
        }
    }
    Ok(())
}

/// The host path of a bind mount, relative ones against the bundle.
pub fn source_of(bundle: &Bundle, mount: &Mount) -> Option<PathBuf> {
    let source = mount.source().as_ref()?;
    (!source.as_os_str().is_empty()).then(|| bundle.path.join(source))
}

fn bind_source(bundle: &Bundle, mount: &Mount, field: &str) -> Result<(), SpecError> {
    let source = source_of(bundle, mount).ok_or_else(|| invalid(field, "a bind needs a source"))?;
    exists(&source, &format!("source of {field}"))
}

fn exists(path: &Path, what: &str) -> Result<(), SpecError> {
    let looked = std::fs::metadata(path);
    looked.map(drop).map_err(|error| SpecError::Host {
        what: what.to_owned(),
        path: path.to_owned(),
        problem: error.to_string(),
    })
}

fn rootfs(bundle: &Bundle) -> Result<(), SpecError> {
    let rootfs = bundle.rootfs().ok_or(SpecError::Missing("root"))?;
    exists(&rootfs, "rootfs")?;
    if !rootfs.is_dir() {
        return Err(SpecError::Host {
            what: "rootfs".to_owned(),
            path: rootfs,
            problem: "not a directory".to_owned(),
        });
    }
    Ok(())
}

/// A spec's terminal flag.
pub fn has_terminal(spec: &Spec) -> bool {
    let process = spec.process().as_ref();
    process.and_then(|p| p.terminal()).unwrap_or(false)
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::{Value, json};

    use super::*;

    pub(crate) fn bundle(dir: &Path, patch: impl FnOnce(&mut Value)) -> Bundle {
        let mut config = json!({
            "ociVersion": "1.0.2",
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["true"], "cwd": "/"},
            "root": {"path": "rootfs"},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]}
        });
        patch(&mut config);
        std::fs::create_dir_all(dir.join("rootfs")).unwrap();
        std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
        Bundle::load(dir).unwrap()
    }

    fn refused(patch: impl FnOnce(&mut Value)) -> String {
        let dir = tempfile::tempdir().unwrap();
        let error = validate(&bundle(dir.path(), patch)).unwrap_err();
        error.to_string()
    }

    #[test]
    fn a_plain_bundle_passes() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(validate(&bundle(dir.path(), |_| {})), Ok(()));
    }

    type Case = (fn(&mut Value), &'static str);

    #[test]
    fn each_rule_refuses_with_a_text_that_names_the_field() {
        let cases: Vec<Case> = vec![
            (|c| c["ociVersion"] = json!("2.0.0"), "ociVersion \"2.0.0\""),
            (|c| c["ociVersion"] = json!(""), "ociVersion"),
            (|c| c["process"]["args"] = json!([]), "process.args"),
            (|c| c["process"]["cwd"] = json!("tmp"), "process.cwd"),
            (
                |c| drop(c.as_object_mut().unwrap().remove("process")),
                "process is missing",
            ),
            (
                |c| drop(c.as_object_mut().unwrap().remove("root")),
                "root is missing",
            ),
            (
                |c| c["root"]["path"] = json!("no"),
                "No such file or directory",
            ),
            (
                |c| c["root"]["path"] = json!("config.json"),
                "not a directory",
            ),
            (
                |c| c["hooks"] = json!({"poststop": [{"path": "/bin/true"}]}),
                "hooks.poststop is not supported",
            ),
            (
                |c| c["linux"]["namespaces"][0]["path"] = json!("/proc/1/ns/pid"),
                "host's pid namespace /proc/1/ns/pid",
            ),
            (
                |c| c["linux"]["namespaces"][1]["type"] = json!("pid"),
                "listed twice",
            ),
            (
                |c| {
                    c["linux"]["devices"] =
                        json!([{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}]);
                },
                "device /dev/sda (8:0)",
            ),
            (|c| c["linux"]["intelRdt"] = json!({}), "linux.intelRdt"),
            (
                |c| c["mounts"][0]["type"] = json!("overlay"),
                "file system type \"overlay\"",
            ),
            (
                |c| c["mounts"][0]["destination"] = json!("proc"),
                "destination must be an absolute path",
            ),
            (
                |c| {
                    c["mounts"][0] =
                        json!({"destination": "/x", "type": "bind", "source": "/nonexistent"});
                },
                "/nonexistent: No such file or directory",
            ),
            (
                |c| c["mounts"][0]["options"] = json!(["rbind", "idmap"]),
                "id-mapped",
            ),
        ];
        for (patch, expected) in cases {
            let error = refused(patch);
            assert!(error.contains(expected), "{error:?} lacks {expected:?}");
        }
    }

    #[test]
    fn a_network_namespace_by_path_is_accepted() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = bundle(dir.path(), |c| {
            c["linux"]["namespaces"] = json!([{"type": "network", "path": "/run/netns/x"}]);
        });
        assert_eq!(validate(&bundle), Ok(()));
    }

    #[test]
    fn devices_that_every_guest_has_are_accepted() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = bundle(dir.path(), |c| {
            c["linux"]["devices"] = json!([
                {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
                {"path": "/dev/null", "type": "c", "major": 1, "minor": 3}
            ]);
        });
        assert_eq!(validate(&bundle), Ok(()));
    }
}
