// SPDX-License-Identifier: Apache-2.0

//! Who may depend on whom, checked against what cargo knows. Holds nothing but tests.

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, PackageId};

/// Each of our packages and which others of ours it may depend on, for its tests as well.
const ALLOWED: [(&str, &[&str]); 7] = [
    ("caisson-protocol", &[]),
    ("caisson-runtime", &["caisson-protocol"]),
    ("caisson-vmm", &["caisson-protocol"]),
    ("caisson-agent", &["caisson-protocol"]),
    ("caisson-rootfs-builder", &[]),
    ("caisson-testbed", &[]),
    ("xtask", &["caisson-testbed"]),
];

/// Crates that must not be linked into a package, directly or through others.
const FORBIDDEN: [(&str, &[&str]); 3] = [
    // The host side holds no KVM and no device code.
    (
        "caisson-runtime",
        &[
            "kvm-bindings",
            "kvm-ioctls",
            "virtio-queue",
            "virtiofsd",
            "vm-memory",
        ],
    ),
    // One microVM knows nothing of OCI.
    ("caisson-vmm", &["libcontainer", "oci-spec"]),
    // The guest knows nothing of the host.
    (
        "caisson-agent",
        &["kvm-bindings", "kvm-ioctls", "vm-memory"],
    ),
];

fn metadata() -> Metadata {
    let manifest = crate::tree().join("Cargo.toml");
    MetadataCommand::new()
        .manifest_path(manifest)
        .exec()
        .unwrap()
}

#[test]
fn our_packages_depend_on_one_another_only_as_the_architecture_says() {
    let metadata = metadata();
    let ours: BTreeSet<&str> = metadata
        .workspace_packages()
        .iter()
        .map(|package| package.name.as_str())
        .collect();
    let allowed = BTreeMap::from(ALLOWED);
    assert_eq!(
        ours,
        allowed.keys().copied().collect(),
        "packages of the workspace"
    );
    for package in metadata.workspace_packages() {
        let name = package.name.as_str();
        for dependency in &package.dependencies {
            let to = dependency.name.as_str();
            assert!(
                !ours.contains(to) || allowed[name].contains(&to),
                "{name} must not depend on {to} ({})",
                dependency.kind
            );
        }
    }
}

#[test]
fn no_package_links_what_belongs_to_another_side() {
    let metadata = metadata();
    for (name, forbidden) in FORBIDDEN {
        let linked = linked_into(&metadata, name);
        assert!(
            linked.len() > 5,
            "{name} links {linked:?}, which cannot be all"
        );
        for crate_name in forbidden {
            assert!(!linked.contains(*crate_name), "{name} links {crate_name}");
        }
    }
}

/// Names of all packages that end up in `name`'s binaries: normal dependencies, all the way.
fn linked_into<'a>(metadata: &'a Metadata, name: &str) -> BTreeSet<&'a str> {
    let names: BTreeMap<&PackageId, &str> = metadata
        .packages
        .iter()
        .map(|package| (&package.id, package.name.as_str()))
        .collect();
    let nodes: BTreeMap<&PackageId, _> = metadata
        .resolve
        .as_ref()
        .unwrap()
        .nodes
        .iter()
        .map(|node| (&node.id, &node.deps))
        .collect();
    let start = metadata
        .workspace_packages()
        .into_iter()
        .find(|package| package.name == name);
    let mut open = vec![&start.unwrap().id];
    let mut seen = BTreeSet::new();
    while let Some(id) = open.pop() {
        for dependency in nodes[id] {
            let linked = dependency
                .dep_kinds
                .iter()
                .any(|info| info.kind == DependencyKind::Normal);
            if linked && seen.insert(&dependency.pkg) {
                open.push(&dependency.pkg);
            }
        }
    }
    seen.into_iter().map(|id| names[id]).collect()
}
