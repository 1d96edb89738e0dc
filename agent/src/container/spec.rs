// SPDX-License-Identifier: Apache-2.0

//! The host's specification, checked and made ours.

use std::path::PathBuf;

use nix::unistd::Pid;
use oci_spec::runtime::{
    LinuxIdMapping, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType, Process, Spec,
};

/// Largest specification, process or resources object, bytes.
pub(crate) const MAX_JSON: usize = 4 << 20;

/// Why a specification was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpecError {
    /// Larger than 4 MiB.
    #[error("{what} is larger than {MAX_JSON} bytes")]
    TooLarge {
        /// Which of the objects.
        what: &'static str,
    },
    /// Not JSON, or not of the runtime-spec's shape.
    #[error("failed to parse {what}")]
    Json {
        /// Which of the objects.
        what: &'static str,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A part without which nothing can be made.
    #[error("{0} is missing in the specification")]
    Missing(&'static str),
    /// Something that the agent does not do.
    #[error("{0} is not supported in the guest")]
    Unsupported(&'static str),
    /// A namespace type that libcontainer lacks.
    #[error("failed to build a namespace")]
    Namespace(#[source] oci_spec::OciSpecError),
}

/// Parses one of the host's JSON objects, of at most 4 MiB.
///
/// # Errors
/// When it is larger or malformed.
pub(crate) fn parse<T: serde::de::DeserializeOwned>(
    what: &'static str,
    json: &[u8],
) -> Result<T, SpecError> {
    if json.len() > MAX_JSON {
        return Err(SpecError::TooLarge { what });
    }
    serde_json::from_slice(json).map_err(|source| SpecError::Json { what, source })
}

/// Checks a container's specification, and makes it join the pod's pid namespace if there is one.
///
/// # Errors
/// When a part is missing or cannot be done here.
pub(crate) fn adapt(mut spec: Spec, pod_pid_namespace: Option<Pid>) -> Result<Spec, SpecError> {
    if spec.root().is_none() {
        return Err(SpecError::Missing("root"));
    }
    let hooks = spec.hooks().as_ref();
    if hooks.is_some_and(|hooks| *hooks != Default::default()) {
        return Err(SpecError::Unsupported("running hooks"));
    }
    spec.set_hooks(None);
    let process = spec.process_mut().as_mut();
    adapt_process(process.ok_or(SpecError::Missing("process"))?)?;
    let linux = spec.linux_mut().as_mut();
    let linux = linux.ok_or(SpecError::Missing("linux"))?;
    linux.set_cgroups_path(None);
    if linux.intel_rdt().is_some() {
        return Err(SpecError::Unsupported("linux.intelRdt"));
    }
    let namespaces = linux.namespaces_mut().get_or_insert_default();
    if !{ namespaces.iter() }.any(|namespace| namespace.typ() == LinuxNamespaceType::Mount) {
        // libcontainer would make its mounts in the agent's own namespace.
        return Err(SpecError::Missing("a mount namespace"));
    }
    if let Some(pid) = pod_pid_namespace {
        let pids = { namespaces.iter_mut() }.filter(|one| one.typ() == LinuxNamespaceType::Pid);
        for namespace in pids.filter(|namespace| namespace.path().is_none()) {
            namespace.set_path(Some(format!("/proc/{pid}/ns/pid").into()));
        }
    }
    Ok(spec)
}

fn adapt_process(process: &mut Process) -> Result<(), SpecError> {
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(SpecError::Missing("process.args"));
    }
    Ok(())
}

/// The specification of `process` executed in the container of `spec` whose first process is `pid`: the
/// container's seccomp profile, and its namespaces as they are. (libcontainer's own builder for this drops
/// the profile.)
///
/// # Errors
/// When the process has no arguments.
pub(crate) fn of_exec(spec: &Spec, mut process: Process, pid: i32) -> Result<Spec, SpecError> {
    adapt_process(&mut process)?;
    if process.oom_score_adj().is_none() {
        let first = spec.process().as_ref();
        process.set_oom_score_adj(first.and_then(|first| first.oom_score_adj()));
    }
    let mut spec = spec.clone();
    spec.set_process(Some(process)).set_mounts(None);
    let linux = spec.linux_mut().as_mut();
    let linux = linux.ok_or(SpecError::Missing("linux"))?;
    let joined: Result<Vec<_>, _> = { linux.namespaces().iter().flatten() }
        .map(|namespace| join(namespace, pid))
        .collect();
    linux
        .set_namespaces(Some(joined?))
        .set_resources(None)
        .set_devices(None)
        .set_net_devices(None)
        .set_sysctl(None)
        .set_uid_mappings(None)
        .set_gid_mappings(None)
        .set_time_offsets(None);
    Ok(spec)
}

fn join(namespace: &LinuxNamespace, pid: i32) -> Result<LinuxNamespace, SpecError> {
    let name = match namespace.typ() {
        LinuxNamespaceType::Mount => "mnt",
        LinuxNamespaceType::Cgroup => "cgroup",
        LinuxNamespaceType::Uts => "uts",
        LinuxNamespaceType::Ipc => "ipc",
        LinuxNamespaceType::User => "user",
        LinuxNamespaceType::Pid => "pid",
        LinuxNamespaceType::Network => "net",
        LinuxNamespaceType::Time => "time",
    };
    let path: PathBuf = format!("/proc/{pid}/ns/{name}").into();
    LinuxNamespaceBuilder::default()
        .typ(namespace.typ())
        .path(path)
        .build()
        .map_err(SpecError::Namespace)
}

/// Who the process's pipes belong to, in the agent's user namespace.
pub(crate) fn owner(spec: &Spec, process: &Process) -> (u32, u32) {
    let linux = spec.linux().as_ref();
    let map = |id: u32, mappings: Option<&Vec<LinuxIdMapping>>| {
        let mappings = mappings.into_iter().flatten();
        let mut outside = mappings.filter_map(|mapping| {
            let offset = id.checked_sub(mapping.container_id())?;
            (offset < mapping.size()).then(|| mapping.host_id().checked_add(offset))?
        });
        outside.next().unwrap_or(id)
    };
    (
        map(
            process.user().uid(),
            linux.and_then(|l| l.uid_mappings().as_ref()),
        ),
        map(
            process.user().gid(),
            linux.and_then(|l| l.gid_mappings().as_ref()),
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(extra: &str) -> Spec {
        let json = format!(
            r#"{{"ociVersion": "1.0.2", "root": {{"path": "/r"}},
                "process": {{"cwd": "/", "user": {{"uid": 5, "gid": 6}}, "args": ["sh"], "oomScoreAdj": 7}},
                "linux": {{"cgroupsPath": "/elsewhere", "namespaces": [{{"type": "mount"}}, {{"type": "pid"}}],
                    "seccomp": {{"defaultAction": "SCMP_ACT_ALLOW"}},
                    "uidMappings": [{{"containerID": 0, "hostID": 1000, "size": 6}}] }} {extra} }}"#
        );
        parse("spec_json", json.as_bytes()).unwrap()
    }

    fn paths(spec: &Spec) -> Vec<Option<PathBuf>> {
        let linux = spec.linux().as_ref().unwrap();
        let namespaces = linux.namespaces().as_ref().unwrap();
        namespaces.iter().map(|one| one.path().clone()).collect()
    }

    #[test]
    fn hooks_are_refused_and_an_empty_object_is_not() {
        let hooks = r#", "hooks": {"prestart": [{"path": "/bin/true"}]}"#;
        assert!(matches!(
            adapt(spec(hooks), None),
            Err(SpecError::Unsupported(_))
        ));
        assert!(adapt(spec(r#", "hooks": {}"#), None).is_ok());
    }

    #[test]
    fn a_container_needs_arguments_and_a_mount_namespace() {
        let mut no_arguments = spec("");
        let process = no_arguments.process_mut().as_mut().unwrap();
        process.set_args(Some(Vec::new()));
        assert!(matches!(
            adapt(no_arguments, None),
            Err(SpecError::Missing("process.args"))
        ));
        let mut no_namespace = spec("");
        no_namespace
            .linux_mut()
            .as_mut()
            .unwrap()
            .set_namespaces(None);
        assert!(adapt(no_namespace, None).is_err());
    }

    #[test]
    fn a_shared_pid_namespace_is_joined_and_the_hosts_cgroup_is_not() {
        let adapted = adapt(spec(""), Some(Pid::from_raw(9))).unwrap();
        assert_eq!(paths(&adapted), [None, Some("/proc/9/ns/pid".into())]);
        assert!(adapted.linux().as_ref().unwrap().cgroups_path().is_none());
    }

    #[test]
    fn an_exec_joins_the_containers_namespaces_and_keeps_its_seccomp_profile() {
        let process: Process = parse(
            "process",
            br#"{"cwd": "/", "user": {"uid": 0, "gid": 0}, "args": ["id"]}"#,
        )
        .unwrap();
        let exec = of_exec(&spec(""), process, 44).unwrap();
        let want = ["/proc/44/ns/mnt", "/proc/44/ns/pid"].map(|path| Some(path.into()));
        assert_eq!(paths(&exec), want);
        assert!(exec.linux().as_ref().unwrap().seccomp().is_some());
        assert_eq!(exec.process().as_ref().unwrap().oom_score_adj(), Some(7));
    }

    #[test]
    fn pipes_belong_to_the_mapped_user() {
        let spec = spec("");
        let process = spec.process().as_ref().unwrap();
        assert_eq!(owner(&spec, process), (1005, 6));
    }

    #[test]
    fn malformed_and_oversized_json_is_refused_by_name() {
        let error = parse::<Spec>("spec_json", b"{").unwrap_err();
        assert_eq!(error.to_string(), "failed to parse spec_json");
        let large = vec![b' '; MAX_JSON + 1];
        assert!(matches!(
            parse::<Spec>("spec_json", &large),
            Err(SpecError::TooLarge { .. })
        ));
    }
}
