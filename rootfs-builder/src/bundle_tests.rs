// SPDX-License-Identifier: Apache-2.0

//! Whole bundles from whole images, and that nothing is left of those that fail.

use std::os::unix::fs::MetadataExt as _;

use serde_json::{Value, json};

use super::*;
use crate::image::compression::tests::gzip;
use crate::image::digest::Sha256Hex;
use crate::image::test_image::{LAYER, TestLayout, plain};
use crate::layer::test_tar::TestTar;
use crate::limits::LimitError;

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn request(&self, source: RootfsSource) -> BundleRequest {
        BundleRequest {
            output: self.0.path().join("bundle"),
            replace: false,
            source,
            overrides: SpecOverrides::default(),
            platform: Platform::of_host(),
            limits: Limits::default(),
        }
    }

    fn rootfs(&self, path: &str) -> PathBuf {
        self.0.path().join("bundle/rootfs").join(path)
    }

    fn config(&self) -> Value {
        let text = fs::read_to_string(self.0.path().join("bundle/config.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    fn assert_empty(&self) {
        assert_eq!(
            fs::read_dir(self.0.path()).unwrap().count(),
            0,
            "something was left behind"
        );
    }
}

fn layout_source(layout: &TestLayout) -> RootfsSource {
    RootfsSource::OciLayout(ImageName {
        path: layout.path().to_path_buf(),
        tag: None,
    })
}

/// The layers of an image with a user of its own, whiteouts and every compression.
fn layers() -> Vec<(Vec<u8>, &'static str, String)> {
    let base = TestTar::new()
        .directory("etc/")
        .file("etc/passwd", "root:x:0:0::/:\napp:x:7:8::/:\n")
        .file("etc/group", "app:x:8:\nextra:x:9:app\n")
        .file("etc/old", "old")
        .finish();
    let middle = TestTar::new()
        .file("etc/.wh.old", "")
        .file("app", "#!")
        .finish();
    let top = TestTar::new().hard_link("app2", "app").finish();
    let packed = |bytes: Vec<u8>, tar: &[u8]| (bytes, LAYER, Sha256Hex::of(tar).to_string());
    vec![
        plain(&base),
        packed(gzip(&middle), &middle),
        packed(zstd::encode_all(top.as_slice(), 3).unwrap(), &top),
    ]
}

fn config() -> Value {
    json!({"User": "app", "Entrypoint": ["/app"], "Cmd": ["go"], "WorkingDir": "/w", "Env": ["A=1"]})
}

#[test]
fn image_becomes_a_bundle_with_its_files_user_and_command() {
    let mut layout = TestLayout::new();
    layout.list(layout.image(&layers(), &config()));
    let place = Place::new();
    let mut request = place.request(layout_source(&layout));
    request.overrides.hostname = Some("box".into());
    build(&request).unwrap();
    assert!(!place.rootfs("etc/old").exists());
    assert_eq!(
        fs::metadata(place.rootfs("app")).unwrap().ino(),
        fs::metadata(place.rootfs("app2")).unwrap().ino()
    );
    let json = place.config();
    assert_eq!(
        json["process"]["user"],
        json!({"uid": 7, "gid": 8, "additionalGids": [9]})
    );
    assert_eq!(json["process"]["args"], json!(["/app", "go"]));
    assert_eq!(json["process"]["cwd"], "/w");
    assert_eq!(json["root"]["path"], "rootfs");
    assert_eq!(json["hostname"], "box");
    assert_eq!(fs::metadata(&request.output).unwrap().mode() & 0o777, 0o700);
    assert_eq!(fs::read_dir(place.0.path()).unwrap().count(), 1);
}

#[test]
fn user_and_command_of_the_image_can_be_replaced() {
    let mut layout = TestLayout::new();
    layout.list(layout.image(&layers(), &json!({"User": "nobody-there"})));
    let place = Place::new();
    let mut request = place.request(layout_source(&layout));
    let error = build(&request).unwrap_err();
    assert!(
        matches!(error, BundleError::Spec(SpecError::User(_))),
        "{error}"
    );
    place.assert_empty();
    request.overrides.user = Some("app:extra".into());
    let error = build(&request).unwrap_err();
    assert!(
        matches!(error, BundleError::Spec(SpecError::NoCommand)),
        "{error}"
    );
    place.assert_empty();
    request.overrides.args = Some(vec!["sh".into()]);
    build(&request).unwrap();
    assert_eq!(
        place.config()["process"]["user"],
        json!({"uid": 7, "gid": 9})
    );
}

#[test]
fn same_image_gives_the_same_bundle() {
    let mut layout = TestLayout::new();
    layout.list(layout.image(&layers(), &config()));
    let listing = || {
        let place = Place::new();
        build(&place.request(layout_source(&layout))).unwrap();
        let mut lines = vec![place.config().to_string()];
        for entry in walkdir::WalkDir::new(place.rootfs("")).sort_by_file_name() {
            let entry = entry.unwrap();
            let metadata = entry.metadata().unwrap();
            let path = entry
                .path()
                .strip_prefix(place.rootfs(""))
                .unwrap()
                .display()
                .to_string();
            // The root itself has no entry in this image.
            let time = if path.is_empty() { 0 } else { metadata.mtime() };
            lines.push(format!(
                "{path} {:o} {} {time}",
                metadata.mode(),
                metadata.uid()
            ));
        }
        lines
    };
    assert_eq!(listing(), listing());
}

#[test]
fn changed_layer_is_refused_as_such_and_nothing_is_left() {
    for (index, (_, _, _)) in layers().iter().enumerate() {
        let mut layout = TestLayout::new();
        let manifest = layout.image(&layers(), &config());
        layout.list(manifest);
        let digest = json!(Sha256Hex::of(&layers()[index].0).to_string());
        let path = layout.blob_path(&digest);
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, bytes).unwrap();
        let place = Place::new();
        let error = build(&place.request(layout_source(&layout))).unwrap_err();
        let BundleError::Unpack {
            source: UnpackError::Store(error),
            ..
        } = error
        else {
            panic!("layer {index}: {error:?}");
        };
        assert!(
            matches!(&error, StoreError::Mismatch { expected, .. } if digest == json!(expected))
        );
        place.assert_empty();
    }
}

#[test]
fn longer_and_shorter_blobs_are_refused() {
    for change in [&b"more"[..], b""] {
        let mut layout = TestLayout::new();
        layout.list(layout.image(&layers(), &config()));
        let path = layout.blob_path(&json!(Sha256Hex::of(&layers()[0].0).to_string()));
        let mut bytes = fs::read(&path).unwrap();
        if change.is_empty() {
            bytes.truncate(bytes.len() - 512);
        }
        bytes.extend(change);
        fs::write(&path, bytes).unwrap();
        let place = Place::new();
        let error = build(&place.request(layout_source(&layout))).unwrap_err();
        assert!(
            matches!(
                error,
                BundleError::Unpack {
                    source: UnpackError::Store(
                        StoreError::TooLarge { .. } | StoreError::Mismatch { .. }
                    ),
                    ..
                }
            ),
            "{error:?}"
        );
        place.assert_empty();
    }
}

#[test]
fn wrong_diff_id_is_refused() {
    let mut layout = TestLayout::new();
    let tar = TestTar::new().file("a", "").finish();
    let wrong = Sha256Hex::of(b"something else").to_string();
    layout.list(layout.image(&[(gzip(&tar), LAYER, wrong)], &config()));
    let place = Place::new();
    let error = build(&place.request(layout_source(&layout))).unwrap_err();
    assert!(
        matches!(
            error,
            BundleError::Unpack {
                source: UnpackError::DiffId { .. },
                ..
            }
        ),
        "{error:?}"
    );
    place.assert_empty();
}

#[test]
fn decompression_bomb_is_stopped_at_the_limit() {
    let tar = TestTar::new()
        .member(b'0', b"zeros", b"", &vec![0; 8 << 20], |_| {})
        .finish();
    for bomb in [gzip(&tar), zstd::encode_all(tar.as_slice(), 3).unwrap()] {
        assert!(bomb.len() < 64 << 10);
        let mut layout = TestLayout::new();
        let diff_id = Sha256Hex::of(&tar).to_string();
        layout.list(layout.image(&[(bomb, LAYER, diff_id)], &config()));
        let place = Place::new();
        let mut request = place.request(layout_source(&layout));
        request.limits.max_unpacked_bytes = 1 << 20;
        let error = build(&request).unwrap_err();
        assert!(
            matches!(
                error,
                BundleError::Unpack {
                    source: UnpackError::Limit(LimitError::Bytes(_)),
                    ..
                } | BundleError::Unpack {
                    source: UnpackError::Layer { .. },
                    ..
                }
            ),
            "{error:?}"
        );
        place.assert_empty();
    }
    // The same in what follows the archive's end, where no entry would count it.
    let mut tar = TestTar::new().file("a", "").finish();
    tar.resize(8 << 20, 0);
    let mut layout = TestLayout::new();
    layout.list(layout.image(
        &[(gzip(&tar), LAYER, Sha256Hex::of(&tar).to_string())],
        &config(),
    ));
    let place = Place::new();
    let mut request = place.request(layout_source(&layout));
    request.limits.max_unpacked_bytes = 1 << 20;
    let error = build(&request).unwrap_err();
    assert!(
        matches!(
            error,
            BundleError::Unpack {
                source: UnpackError::Limit(LimitError::Bytes(_)),
                ..
            }
        ),
        "{error:?}"
    );
    place.assert_empty();
}

#[test]
fn size_limit_counts_all_layers_together() {
    // The bytes after an archive's end are no file's, so only the stream's own count sees them.
    let padded = |name: &str| {
        let mut tar = TestTar::new().file(name, "").finish();
        tar.resize(700 << 10, 0);
        plain(&tar)
    };
    let mut layout = TestLayout::new();
    layout.list(layout.image(&[padded("a"), padded("b")], &config()));
    let place = Place::new();
    let mut request = place.request(layout_source(&layout));
    request.overrides.user = Some("0".into());
    request.limits.max_unpacked_bytes = 1 << 20;
    let error = build(&request).unwrap_err();
    assert!(
        matches!(
            error,
            BundleError::Unpack {
                source: UnpackError::Limit(_),
                ..
            }
        ),
        "{error:?}"
    );
    place.assert_empty();
    request.limits.max_unpacked_bytes = 2 << 20;
    build(&request).unwrap();
}

#[test]
fn too_many_layers_are_refused() {
    let mut layout = TestLayout::new();
    layout.list(layout.image(&layers(), &config()));
    let place = Place::new();
    let mut request = place.request(layout_source(&layout));
    request.limits.max_layers = 2;
    let error = build(&request).unwrap_err();
    assert!(matches!(
        error,
        BundleError::Unpack {
            source: UnpackError::Limit(LimitError::Layers { found: 3, limit: 2 }),
            ..
        }
    ));
    place.assert_empty();
}

#[test]
fn layer_that_climbs_leaves_no_bundle() {
    let tar = TestTar::new()
        .file("fine", "")
        .file("../../escape", "x")
        .finish();
    let mut layout = TestLayout::new();
    layout.list(layout.image(&[plain(&tar)], &config()));
    let place = Place::new();
    let error = build(&place.request(layout_source(&layout))).unwrap_err();
    assert!(matches!(
        error,
        BundleError::Unpack {
            source: UnpackError::Layer { .. },
            ..
        }
    ));
    place.assert_empty();
}

#[test]
fn directory_in_place_is_pointed_at_and_left_alone() {
    let place = Place::new();
    let system = tempfile::tempdir().unwrap();
    fs::create_dir(system.path().join("etc")).unwrap();
    fs::write(system.path().join("etc/passwd"), "me:x:12:13::/:\n").unwrap();
    let source = RootfsSource::Directory {
        path: system.path().to_path_buf(),
        in_place: true,
    };
    let mut request = place.request(source);
    request.overrides.user = Some("me".into());
    build(&request).unwrap();
    let json = place.config();
    assert_eq!(
        json["root"]["path"],
        json!(system.path().canonicalize().unwrap())
    );
    assert_eq!(json["process"]["user"], json!({"uid": 12, "gid": 13}));
    assert!(!place.rootfs("").exists());
}

#[test]
fn directory_is_copied_into_the_bundle() {
    let place = Place::new();
    let system = tempfile::tempdir().unwrap();
    fs::write(system.path().join("file"), "x").unwrap();
    let source = RootfsSource::Directory {
        path: system.path().to_path_buf(),
        in_place: false,
    };
    build(&place.request(source)).unwrap();
    assert_eq!(fs::read_to_string(place.rootfs("file")).unwrap(), "x");
    assert_eq!(place.config()["root"]["path"], "rootfs");
}
