// SPDX-License-Identifier: Apache-2.0

//! Images for tests: an OCI layout in a directory, made of any layers and with any part replaced.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::digest::Sha256Hex;
use super::platform::Platform;

pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// A layout in the making.
pub(crate) struct TestLayout {
    place: tempfile::TempDir,
    manifests: Vec<Value>,
}

impl TestLayout {
    pub(crate) fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        fs::create_dir_all(place.path().join("blobs/sha256")).unwrap();
        fs::write(
            place.path().join("oci-layout"),
            r#"{"imageLayoutVersion": "1.0.0"}"#,
        )
        .unwrap();
        Self {
            place,
            manifests: Vec::new(),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.place.path()
    }

    pub(crate) fn blob_path(&self, digest: &Value) -> PathBuf {
        let hex = digest.as_str().unwrap().strip_prefix("sha256:").unwrap();
        self.place.path().join("blobs/sha256").join(hex)
    }

    /// Stores a blob and returns its descriptor.
    pub(crate) fn blob(&self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = Sha256Hex::of(bytes);
        fs::write(
            self.place.path().join("blobs/sha256").join(digest.hex()),
            bytes,
        )
        .unwrap();
        json!({"mediaType": media_type, "digest": digest.to_string(), "size": bytes.len()})
    }

    pub(crate) fn json_blob(&self, media_type: &str, value: &Value) -> Value {
        self.blob(media_type, value.to_string().as_bytes())
    }

    /// Stores an image of these layers (each as stored, and its media type and diff id) and returns
    /// its manifest's descriptor.
    pub(crate) fn image(&self, layers: &[(Vec<u8>, &str, String)], config: &Value) -> Value {
        let layer = |(bytes, media_type, _): &(Vec<u8>, &str, String)| self.blob(media_type, bytes);
        let descriptors: Vec<Value> = layers.iter().map(layer).collect();
        let diff_ids: Vec<&String> = layers.iter().map(|(_, _, diff_id)| diff_id).collect();
        let host = Platform::of_host().to_string();
        let architecture = host.split_once('/').unwrap().1;
        let configuration = json!({
            "architecture": architecture, "os": "linux", "config": config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let configuration =
            self.json_blob("application/vnd.oci.image.config.v1+json", &configuration);
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": configuration,
            "layers": descriptors,
        });
        self.json_blob(MANIFEST, &manifest)
    }

    /// Puts a descriptor into the index.
    pub(crate) fn list(&mut self, descriptor: Value) {
        self.manifests.push(descriptor);
        let index = json!({"schemaVersion": 2, "manifests": self.manifests});
        fs::write(self.place.path().join("index.json"), index.to_string()).unwrap();
    }
}

/// A plain layer, its type and its diff id.
pub(crate) fn plain(tar: &[u8]) -> (Vec<u8>, &'static str, String) {
    (tar.to_vec(), LAYER, Sha256Hex::of(tar).to_string())
}

/// A descriptor with further keys.
pub(crate) fn with(mut descriptor: Value, more: Value) -> Value {
    for (key, value) in more.as_object().unwrap() {
        descriptor[key] = value.clone();
    }
    descriptor
}

/// The descriptor's tag annotation.
pub(crate) fn tagged(descriptor: Value, tag: &str) -> Value {
    with(
        descriptor,
        json!({"annotations": {"org.opencontainers.image.ref.name": tag}}),
    )
}
