// SPDX-License-Identifier: Apache-2.0

use serde_json::{Value, json};

use super::super::validate::tests::bundle;
use super::*;

fn translated(patch: impl FnOnce(&mut Value)) -> Result<Translation, TranslateError> {
    let dir = tempfile::tempdir().unwrap();
    let bundle = bundle(dir.path(), patch);
    let host = HostFacts {
        memory_mib: 4096,
        file_system_size: &|_| Some(12345),
    };
    let id = ContainerId::new("c1").unwrap();
    translate(&id, &bundle, &Config::default(), &host)
}

fn mount(mount: Value) -> Result<(Value, Vec<MountPlan>), TranslateError> {
    let translation = translated(|c| c["mounts"] = json!([mount]))?;
    let spec = serde_json::to_value(&translation.plan.guest_spec).unwrap();
    Ok((spec["mounts"][0].clone(), translation.plan.mounts))
}

#[test]
fn the_rootfs_becomes_a_guest_path_and_a_host_mount() {
    let plan = translated(|c| c["root"]["readonly"] = json!(true))
        .unwrap()
        .plan;
    let root = plan.guest_spec.root().clone().unwrap();
    assert_eq!(root.path(), Path::new("/run/caisson/shared/c1/rootfs"));
    assert_eq!(root.readonly(), Some(true));
    assert!(plan.mounts[0].source.ends_with("rootfs"));
    assert_eq!(plan.mounts[0].name, "rootfs");
}

#[test]
fn a_bind_is_read_only_on_the_host_and_keeps_its_options_in_the_guest() {
    let bind = json!({"destination": "/data", "type": "bind", "source": "/tmp",
        "options": ["rbind", "ro", "nosuid", "rprivate"]});
    let (guest, plans) = mount(bind).unwrap();
    assert_eq!(guest["source"], "/run/caisson/shared/c1/m0");
    assert_eq!(
        guest["options"],
        json!(["rbind", "ro", "nosuid", "rprivate"])
    );
    assert_eq!(plans[1].source, Path::new("/tmp"));
    assert!(plans[1].recursive);
    let expected = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID;
    assert_eq!(plans[1].attributes, expected);
    assert_eq!(plans[1].recursive_attributes, 0);
}

#[test]
fn of_ro_and_rw_the_last_one_counts_and_rro_goes_down() {
    let options = |list: &[&str]| list.iter().map(|o| (*o).to_owned()).collect::<Vec<_>>();
    assert_eq!(attributes(&options(&["ro", "rw"]), ""), 0);
    assert_eq!(
        attributes(&options(&["rw", "ro"]), ""),
        libc::MOUNT_ATTR_RDONLY
    );
    assert_eq!(attributes(&options(&["rro"]), "r"), libc::MOUNT_ATTR_RDONLY);
    assert_eq!(attributes(&options(&["rro"]), ""), 0);
}

#[test]
fn kernel_file_systems_stay_the_guests_own() {
    let own = json!({"destination": "/proc", "type": "proc", "source": "proc"});
    let (guest, plans) = mount(own.clone()).unwrap();
    assert_eq!(guest, own);
    assert_eq!(plans.len(), 1, "only the rootfs comes from the host");

    let sys = json!({"destination": "/sys", "type": "bind", "source": "/sys",
        "options": ["rbind", "ro"]});
    let (guest, plans) = mount(sys).unwrap();
    assert_eq!(guest["type"], "sysfs");
    assert_eq!(guest["options"], json!(["ro"]));
    assert_eq!(plans.len(), 1);

    let host_proc = json!({"destination": "/host", "type": "bind", "source": "/proc/sys"});
    assert!(matches!(
        mount(host_proc),
        Err(TranslateError::HostKernel { .. })
    ));
}

#[test]
fn a_bind_on_dev_shm_becomes_a_tmpfs_of_its_size() {
    let shm = json!({"destination": "/dev/shm", "type": "bind", "source": "/tmp",
        "options": ["bind"]});
    let translation = translated(|c| c["mounts"] = json!([shm])).unwrap();
    assert_eq!(translation.plan.sandbox.shm_size_bytes, 12345);
    assert_eq!(translation.plan.mounts.len(), 1);
    let spec = serde_json::to_value(&translation.plan.guest_spec).unwrap();
    assert_eq!(spec["mounts"][0]["type"], "tmpfs");
}

#[test]
fn sizes_of_tmpfs_have_units() {
    for (text, bytes) in [
        ("size=65536k", Some(64 << 20)),
        ("size=1m", Some(1 << 20)),
        ("size=5", Some(5)),
        ("size=99999999999g", None),
        ("size=", None),
        ("mode=1777", None),
    ] {
        let mut mount = Mount::default();
        mount.set_options(Some(vec![text.to_owned()]));
        assert_eq!(tmpfs_size(&mount), bytes, "{text}");
    }
}

#[test]
fn limits_raise_the_size_of_the_vm_and_never_lower_it() {
    let shape =
        |resources: Value| translated(|c| c["linux"]["resources"] = resources).map(|t| t.plan.vm);
    let plain = shape(json!({})).unwrap();
    assert_eq!((plain.memory_mib, plain.vcpus), (256, 1));
    let small = shape(json!({"memory": {"limit": 1 << 20}, "cpu": {"quota": 1}})).unwrap();
    assert_eq!((small.memory_mib, small.vcpus), (256, 1));
    let large = json!({"memory": {"limit": (512 << 20) + 1},
        "cpu": {"quota": 250_000, "period": 100_000}});
    let large = shape(large).unwrap();
    assert_eq!((large.memory_mib, large.vcpus), (513 + 64, 3));
    let unlimited = shape(json!({"memory": {"limit": -1}, "cpu": {"quota": -1}})).unwrap();
    assert_eq!((unlimited.memory_mib, unlimited.vcpus), (256, 1));
    let many = shape(json!({"cpu": {"quota": i64::MAX, "period": 1}})).unwrap();
    assert_eq!(many.vcpus, MAX_VCPUS);
    let huge = shape(json!({"memory": {"limit": 1_i64 << 60}}));
    assert!(matches!(huge, Err(TranslateError::TooMuchMemory { .. })));
}

#[test]
fn the_guest_has_its_own_namespaces_and_no_network_one() {
    let spec = |namespaces: Value| {
        let plan = translated(|c| c["linux"]["namespaces"] = namespaces).unwrap();
        let spec = serde_json::to_value(&plan.plan.guest_spec).unwrap();
        let list = spec["linux"]["namespaces"].as_array().unwrap().clone();
        assert!(list.iter().all(|n| n.get("path").is_none()));
        let types = list.iter().map(|n| n["type"].as_str().unwrap().to_owned());
        types.collect::<Vec<_>>()
    };
    assert_eq!(spec(json!([])), ["mount", "pid", "ipc", "uts"]);
    let all = json!([{"type": "cgroup"}, {"type": "pid"},
        {"type": "network", "path": "/run/netns/x"}]);
    assert_eq!(spec(all), ["mount", "pid", "ipc", "uts", "cgroup"]);
}

#[test]
fn what_the_guest_lacks_is_dropped_with_a_warning() {
    let translation = translated(|c| {
        c["process"]["apparmorProfile"] = json!("docker-default");
        c["process"]["selinuxLabel"] = json!("system_u");
        c["linux"]["mountLabel"] = json!("system_u");
        c["linux"]["resources"] = json!({"cpu": {"cpus": "2-3", "shares": 512}});
        c["linux"]["cgroupsPath"] = json!("machine.slice:libpod:c1");
    })
    .unwrap();
    assert_eq!(translation.warnings.len(), 4);
    let spec = serde_json::to_value(&translation.plan.guest_spec).unwrap();
    assert_eq!(spec["process"].get("apparmorProfile"), None);
    assert_eq!(spec["process"].get("selinuxLabel"), None);
    assert_eq!(spec["linux"].get("mountLabel"), None);
    assert_eq!(spec["linux"]["resources"]["cpu"], json!({"shares": 512}));
    assert_eq!(spec["linux"]["cgroupsPath"], "/c1");
    assert_eq!(
        translation.plan.cgroup,
        Path::new("/machine.slice/libpod-c1.scope")
    );
}

#[test]
fn a_plan_survives_its_way_through_the_state_directory() {
    let plan = translated(|c| c["hostname"] = json!("h")).unwrap().plan;
    let text = serde_json::to_vec(&plan).unwrap();
    let back: Plan = serde_json::from_slice(&text).unwrap();
    assert_eq!(back.guest_spec, plan.guest_spec);
    assert_eq!(back.vm, plan.vm);
    assert_eq!(back.sandbox.hostname, "h");
    assert!(back.vm.cmdline.contains("caisson.protocol="));
}

#[test]
fn parameters_of_an_own_network_go_to_the_pod_and_others_stay() {
    let with = |namespaces: Value| {
        let plan = translated(|c| {
            c["linux"]["namespaces"] = namespaces;
            c["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1", "net/core/somaxconn": "9",
                "kernel.msgmax": "1"});
        });
        let plan = plan.unwrap().plan;
        let left = plan.guest_spec.linux().as_ref().unwrap().sysctl().clone();
        let mut left: Vec<_> = left.unwrap_or_default().into_keys().collect();
        left.sort();
        (plan.sandbox.sysctls.into_keys().collect::<Vec<_>>(), left)
    };
    let (pod, container) = with(json!([{"type": "network"}]));
    assert_eq!(pod, ["net.ipv4.ip_forward", "net/core/somaxconn"]);
    assert_eq!(container, ["kernel.msgmax"]);
    let (pod, container) = with(json!([]));
    assert!(pod.is_empty());
    assert_eq!(container.len(), 3);
}
