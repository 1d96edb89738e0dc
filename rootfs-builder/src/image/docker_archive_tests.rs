// SPDX-License-Identifier: Apache-2.0

//! Tests of finding an image in a docker-archive, old and new.

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::super::compression::tests::gzip;
use super::super::store::StoreError;
use super::*;
use crate::layer::test_tar::TestTar;

fn configuration(command: &str, layers: &[&[u8]]) -> String {
    let diff_ids: Vec<String> = layers
        .iter()
        .map(|layer| Sha256Hex::of(layer).to_string())
        .collect();
    let host = Platform::of_host().to_string();
    json!({
        "architecture": host.split_once('/').unwrap().1, "os": "linux",
        "config": {"Cmd": [command]}, "rootfs": {"type": "layers", "diff_ids": diff_ids},
    })
    .to_string()
}

/// Long names do not fit in a plain header.
fn member(tar: TestTar, name: &str, data: &[u8]) -> TestTar {
    tar.pax(&[("path", name.as_bytes())])
        .member(b'0', b"x", b"", data, |_| {})
}

fn link(tar: TestTar, name: &str, target: &str) -> TestTar {
    tar.symlink(name, target)
}

fn find_in(archive: &[u8], tag: Option<&str>) -> Result<ImageParts, ImageError> {
    let (_place, path) = archived(archive);
    let store = Store::open(&path, &Limits::default())?;
    find(&store, tag, &Platform::of_host(), &Limits::default())
}

fn archived(archive: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("image.tar");
    fs::write(&path, archive).unwrap();
    (place, path)
}

fn command(found: Result<ImageParts, ImageError>) -> String {
    let configuration = found.unwrap().configuration;
    configuration
        .config()
        .as_ref()
        .unwrap()
        .cmd()
        .as_ref()
        .unwrap()
        .join(" ")
}

/// Two images, each of one layer, as Docker wrote them until version 25.
fn two_images() -> TestTar {
    let mut tar = TestTar::new();
    let mut manifest = Vec::new();
    for (name, tags) in [
        ("one", json!(["app:1", "app:first"])),
        ("two", json!(["lib:1"])),
    ] {
        let config = configuration(name, &[name.as_bytes()]);
        let config_name = format!("{}.json", Sha256Hex::of(config.as_bytes()).hex());
        let layer_name = format!("{name}/layer.tar");
        tar = member(tar, &config_name, config.as_bytes());
        tar = member(tar, &layer_name, name.as_bytes());
        manifest.push(json!({"Config": config_name, "RepoTags": tags, "Layers": [layer_name]}));
    }
    member(
        tar,
        "manifest.json",
        Value::from(manifest).to_string().as_bytes(),
    )
}

#[test]
fn tag_chooses_by_whole_name_or_by_tag_where_that_is_clear() {
    let archive = two_images().finish();
    assert_eq!(command(find_in(&archive, Some("app:1"))), "one");
    assert_eq!(command(find_in(&archive, Some("lib:1"))), "two");
    assert_eq!(command(find_in(&archive, Some("first"))), "one");
    assert!(matches!(
        find_in(&archive, Some("1")),
        Err(ImageError::Ambiguous(_))
    ));
    assert!(
        matches!(find_in(&archive, None), Err(ImageError::Ambiguous(names)) if names.len() == 3)
    );
    assert!(matches!(
        find_in(&archive, Some("x")),
        Err(ImageError::NoSuchTag { .. })
    ));
}

#[test]
fn compressed_archive_is_read_like_a_plain_one() {
    let archive = gzip(&two_images().finish());
    assert_eq!(command(find_in(&archive, Some("app:1"))), "one");
    let archive = zstd::encode_all(two_images().finish().as_slice(), 1).unwrap();
    assert_eq!(command(find_in(&archive, Some("app:1"))), "one");
}

#[test]
fn layer_that_is_a_link_to_another_images_layer_is_found() {
    let config = configuration("x", &[b"shared", b"shared"]);
    let manifest = json!([{"Config": "c.json", "Layers": ["a/layer.tar", "b/layer.tar"]}]);
    let mut tar = member(TestTar::new(), "c.json", config.as_bytes());
    tar = member(tar, "a/layer.tar", b"shared");
    tar = link(tar, "b/layer.tar", "../a/layer.tar");
    tar = member(tar, "manifest.json", manifest.to_string().as_bytes());
    let (_place, path) = archived(&tar.finish());
    let store = Store::open(&path, &Limits::default()).unwrap();
    for name in ["a/layer.tar", "b/layer.tar"] {
        assert_eq!(store.read_small(name, 100, None).unwrap(), b"shared");
    }
}

#[test]
fn links_in_a_ring_and_out_of_the_archive_lead_nowhere() {
    let mut tar = link(TestTar::new(), "a", "b");
    tar = link(tar, "b", "a");
    tar = link(tar, "c", "/etc/passwd");
    tar = link(tar, "d", "../../../etc/passwd");
    let (_place, path) = archived(&tar.finish());
    let store = Store::open(&path, &Limits::default()).unwrap();
    for name in ["a", "b", "c", "d", "../x", "missing"] {
        assert!(
            matches!(
                store.read_small(name, 100, None),
                Err(StoreError::File { .. })
            ),
            "{name}"
        );
    }
}

#[test]
fn configuration_that_is_not_what_its_name_says_is_refused() {
    let config = configuration("x", &[]);
    let name = format!("{}.json", Sha256Hex::of(b"something else").hex());
    let manifest = json!([{"Config": name, "RepoTags": null, "Layers": null}]);
    let mut tar = member(TestTar::new(), &name, config.as_bytes());
    tar = member(tar, "manifest.json", manifest.to_string().as_bytes());
    let error = find_in(&tar.finish(), None).unwrap_err();
    assert!(
        matches!(error, ImageError::Store(StoreError::Mismatch { .. })),
        "{error}"
    );
}

#[test]
fn layers_named_by_digest_are_checked_as_stored() {
    let config = configuration("x", &[b"layer"]);
    let config_name = format!("blobs/sha256/{}", Sha256Hex::of(config.as_bytes()).hex());
    let layer_name = format!("blobs/sha256/{}", Sha256Hex::of(b"layer").hex());
    let manifest = json!([{"Config": config_name, "RepoTags": [], "Layers": [layer_name]}]);
    let mut tar = member(TestTar::new(), &config_name, config.as_bytes());
    tar = member(tar, &layer_name, b"layer");
    tar = member(tar, "manifest.json", manifest.to_string().as_bytes());
    let found = find_in(&tar.finish(), None).unwrap();
    assert_eq!(
        found.layers[0].blob.as_ref().unwrap().digest,
        Sha256Hex::of(b"layer")
    );
}

#[test]
fn archive_without_a_manifest_and_with_too_many_members_is_refused() {
    let error = find_in(&TestTar::new().file("x", "").finish(), None).unwrap_err();
    assert!(error.to_string().contains("manifest.json"), "{error}");
    let error = find_in(&TestTar::new().file("oci-layout", "").finish(), None).unwrap_err();
    assert!(error.to_string().contains("--oci-layout"), "{error}");
    let (_place, path) = archived(&TestTar::new().file("a", "").file("b", "").finish());
    let limits = Limits {
        max_archive_members: 1,
        ..Limits::default()
    };
    assert!(matches!(
        Store::open(&path, &limits),
        Err(StoreError::TooManyMembers { .. })
    ));
}
