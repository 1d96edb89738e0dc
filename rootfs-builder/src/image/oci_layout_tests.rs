// SPDX-License-Identifier: Apache-2.0

//! Tests of finding an image in a layout, and of what a broken one is answered with.

use std::fs;

use serde_json::{Value, json};

use super::super::test_image::{INDEX, LAYER, MANIFEST, TestLayout, plain, tagged, with};
use super::*;

fn find_in(layout: &TestLayout, tag: Option<&str>) -> Result<ImageParts, ImageError> {
    let store = Store::open(layout.path(), &Limits::default()).unwrap();
    find(&store, tag, &Platform::of_host(), &Limits::default())
}

/// The command of the image found, by which the tests tell images apart.
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

fn image(layout: &TestLayout, name: &str) -> Value {
    layout.image(&[plain(name.as_bytes())], &json!({"Cmd": [name]}))
}

fn platform(descriptor: Value, os: &str, architecture: &str) -> Value {
    with(
        descriptor,
        json!({"platform": {"os": os, "architecture": architecture}}),
    )
}

fn host_architecture() -> String {
    Platform::of_host()
        .to_string()
        .split_once('/')
        .unwrap()
        .1
        .to_owned()
}

#[test]
fn single_image_needs_no_tag() {
    let mut layout = TestLayout::new();
    layout.list(image(&layout, "only"));
    let found = find_in(&layout, None).unwrap();
    assert_eq!(found.layers.len(), 1);
    assert_eq!(found.layers[0].blob.as_ref().unwrap().size, Some(4));
    assert_eq!(command(Ok(found)), "only");
}

#[test]
fn tag_chooses_among_several_and_must_exist() {
    let mut layout = TestLayout::new();
    layout.list(tagged(image(&layout, "one"), "1.0"));
    layout.list(tagged(image(&layout, "two"), "example.org/app:2.0"));
    layout.list(with(
        image(&layout, "three"),
        json!({"annotations": {"io.containerd.image.name": "example.org/app:3.0"}}),
    ));
    assert_eq!(command(find_in(&layout, Some("1.0"))), "one");
    assert_eq!(command(find_in(&layout, Some("2.0"))), "two");
    assert_eq!(
        command(find_in(&layout, Some("example.org/app:2.0"))),
        "two"
    );
    assert_eq!(command(find_in(&layout, Some("3.0"))), "three");
    let error = find_in(&layout, None).unwrap_err();
    assert!(
        matches!(&error, ImageError::Ambiguous(names) if names.len() == 3),
        "{error}"
    );
    let error = find_in(&layout, Some("4.0")).unwrap_err();
    assert!(error.to_string().contains("example.org/app:2.0"), "{error}");
}

#[test]
fn platform_chooses_through_nested_indexes_and_attestations_are_passed_over() {
    let mut layout = TestLayout::new();
    let attestation = with(
        platform(image(&layout, "attestation"), "unknown", "unknown"),
        json!({"annotations": {"vnd.docker.reference.type": "attestation-manifest"}}),
    );
    let nested = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [
        attestation,
        platform(image(&layout, "other"), "linux", "s390x"),
        platform(image(&layout, "mine"), "linux", &host_architecture()),
        platform(image(&layout, "windows"), "windows", &host_architecture()),
    ]});
    let nested = layout.json_blob(INDEX, &nested);
    layout.list(tagged(nested, "latest"));
    assert_eq!(command(find_in(&layout, Some("latest"))), "mine");
    let store = Store::open(layout.path(), &Limits::default()).unwrap();
    let riscv: Platform = "linux/riscv64".parse().unwrap();
    let error = find(&store, None, &riscv, &Limits::default()).unwrap_err();
    assert!(matches!(&error, ImageError::NoSuchPlatform { available, .. } if available.len() == 3));
    assert!(error.to_string().contains("linux/s390x"), "{error}");
}

#[test]
fn index_without_end_is_refused() {
    let mut layout = TestLayout::new();
    let mut descriptor = image(&layout, "deep");
    for _ in 0..5 {
        let index = json!({"schemaVersion": 2, "manifests": [descriptor]});
        descriptor = layout.json_blob(INDEX, &index);
    }
    layout.list(descriptor);
    assert!(matches!(find_in(&layout, None), Err(ImageError::Nesting)));
}

#[test]
fn configuration_of_another_platform_is_refused() {
    let mut layout = TestLayout::new();
    layout.list(image(&layout, "mine"));
    let store = Store::open(layout.path(), &Limits::default()).unwrap();
    let riscv: Platform = "linux/riscv64".parse().unwrap();
    let error = find(&store, None, &riscv, &Limits::default()).unwrap_err();
    assert!(matches!(error, ImageError::NoSuchPlatform { .. }));
}

#[test]
fn changed_manifest_or_configuration_is_refused_with_both_digests() {
    for key in ["manifest", "config"] {
        let mut layout = TestLayout::new();
        let manifest = image(&layout, "x");
        let changed = if key == "manifest" {
            manifest["digest"].clone()
        } else {
            let text = fs::read(layout.blob_path(&manifest["digest"])).unwrap();
            let parsed: Value = serde_json::from_slice(&text).unwrap();
            parsed["config"]["digest"].clone()
        };
        let path = layout.blob_path(&changed);
        let text = fs::read_to_string(&path).unwrap();
        // Of the same length, and still JSON.
        let text = text
            .replace("\"schemaVersion\":2", "\"schemaVersion\":1")
            .replace("\"x\"", "\"y\"");
        fs::write(&path, text).unwrap();
        layout.list(manifest);
        let error = find_in(&layout, None).unwrap_err();
        assert!(
            matches!(&error, ImageError::Store(StoreError::Mismatch { expected, .. })
                if *expected == changed.as_str().unwrap()),
            "{error}"
        );
    }
}

#[test]
fn wrong_size_missing_blob_and_oversized_document_are_refused() {
    let mut layout = TestLayout::new();
    layout.list(with(image(&layout, "x"), json!({"size": 5})));
    let error = find_in(&layout, None).unwrap_err();
    assert!(
        matches!(error, ImageError::Store(StoreError::Mismatch { .. })),
        "{error}"
    );

    let mut layout = TestLayout::new();
    let manifest = image(&layout, "x");
    fs::remove_file(layout.blob_path(&manifest["digest"])).unwrap();
    layout.list(manifest);
    let error = find_in(&layout, None).unwrap_err();
    assert!(
        matches!(error, ImageError::Store(StoreError::File { .. })),
        "{error}"
    );

    let mut layout = TestLayout::new();
    layout.list(image(&layout, "x"));
    let limits = Limits {
        max_json_bytes: 20,
        ..Limits::default()
    };
    let store = Store::open(layout.path(), &limits).unwrap();
    let error = find(&store, None, &Platform::of_host(), &limits).unwrap_err();
    assert!(
        matches!(error, ImageError::Store(StoreError::TooLarge { .. })),
        "{error}"
    );
}

#[test]
fn broken_json_is_shown_with_its_place() {
    let mut layout = TestLayout::new();
    layout.list(image(&layout, "x"));
    fs::write(
        layout.path().join("index.json"),
        "{\n \"schemaVersion\": 2,\n oops }",
    )
    .unwrap();
    let error = find_in(&layout, None).unwrap_err();
    let chain = format!("{error}: {}", std::error::Error::source(&error).unwrap());
    assert!(
        chain.contains("index.json") && chain.contains("line 3"),
        "{chain}"
    );
}

#[test]
fn other_layouts_media_types_and_digests_are_refused_by_name() {
    let mut layout = TestLayout::new();
    layout.list(image(&layout, "x"));
    fs::write(
        layout.path().join("oci-layout"),
        r#"{"imageLayoutVersion": "2.0.0"}"#,
    )
    .unwrap();
    assert!(matches!(
        find_in(&layout, None),
        Err(ImageError::LayoutVersion(_))
    ));

    let mut layout = TestLayout::new();
    let artifact = with(
        image(&layout, "x"),
        json!({"mediaType": "application/vnd.cncf.helm"}),
    );
    layout.list(artifact);
    let error = find_in(&layout, None).unwrap_err();
    assert!(error.to_string().contains("helm"), "{error}");

    let mut layout = TestLayout::new();
    let (bytes, _, diff_id) = plain(b"x");
    let encrypted = "application/vnd.oci.image.layer.v1.tar+encrypted";
    layout.list(layout.image(&[(bytes, encrypted, diff_id)], &json!({})));
    assert!(matches!(
        find_in(&layout, None),
        Err(ImageError::LayerType { .. })
    ));

    let mut layout = TestLayout::new();
    let sha512 = format!("sha512:{}", "a".repeat(128));
    layout.list(json!({"mediaType": MANIFEST, "digest": sha512, "size": 1}));
    assert!(matches!(find_in(&layout, None), Err(ImageError::Digest(_))));
}

#[test]
fn docker_archive_is_recognised_and_the_right_option_named() {
    let layout = TestLayout::new();
    fs::remove_file(layout.path().join("oci-layout")).unwrap();
    assert!(matches!(
        find_in(&layout, None),
        Err(ImageError::OtherKind { hint: "", .. })
    ));
    fs::write(layout.path().join("manifest.json"), "[]").unwrap();
    let error = find_in(&layout, None).unwrap_err();
    assert!(error.to_string().contains("--docker-archive"), "{error}");
}

#[test]
fn number_of_layers_and_diff_ids_must_agree() {
    let mut layout = TestLayout::new();
    let manifest = image(&layout, "x");
    let text = fs::read(layout.blob_path(&manifest["digest"])).unwrap();
    let mut parsed: Value = serde_json::from_slice(&text).unwrap();
    let extra = layout.blob(LAYER, b"y");
    parsed["layers"].as_array_mut().unwrap().push(extra);
    layout.list(layout.json_blob(MANIFEST, &parsed));
    let error = find_in(&layout, None).unwrap_err();
    assert!(
        matches!(
            error,
            ImageError::LayerCount {
                layers: 2,
                diff_ids: 1
            }
        ),
        "{error}"
    );
}

#[test]
fn blob_that_is_a_link_out_of_the_layout_is_not_followed() {
    let mut layout = TestLayout::new();
    let manifest = image(&layout, "x");
    let path = layout.blob_path(&manifest["digest"]);
    let outside = tempfile::tempdir().unwrap();
    fs::rename(&path, outside.path().join("blob")).unwrap();
    std::os::unix::fs::symlink(outside.path().join("blob"), &path).unwrap();
    layout.list(manifest);
    let error = find_in(&layout, None).unwrap_err();
    assert!(
        matches!(error, ImageError::Store(StoreError::File { .. })),
        "{error}"
    );
}
