// SPDX-License-Identifier: Apache-2.0

//! Finds an image in a docker-archive (what `docker save` and `podman save` write).
//!
//! `manifest.json` lists images with their tags, the name of the configuration and the names of the
//! layers. There are no descriptors, so what can be checked is what a name says (many are digests), and each
//! layer's diff id.
//!
//! Format: <https://github.com/moby/docker-image-spec/blob/main/v1.2.md>.

use oci_spec::image::ImageConfiguration;
use serde::Deserialize;

use super::digest::Sha256Hex;
use super::oci_layout::{ImageError, check_platform, diff_ids, name_matches, read_json};
use super::platform::Platform;
use super::store::Store;
use super::{BlobIdentity, ImageParts, LayerSource};
use crate::limits::Limits;

const MANIFEST_FILE: &str = "manifest.json";

/// One image in `manifest.json`. Other keys (`Parent`, `LayerSources`) are Docker's own business.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ArchivedImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

impl ArchivedImage {
    fn tags(&self) -> &[String] {
        self.repo_tags.as_deref().unwrap_or_default()
    }
}

/// Finds the image with this tag (`name:tag`, or the tag alone). Without one there must be but one image.
///
/// # Errors
/// Any [`ImageError`].
pub fn find(
    store: &Store,
    tag: Option<&str>,
    platform: &Platform,
    limits: &Limits,
) -> Result<ImageParts, ImageError> {
    if !store.contains(MANIFEST_FILE) {
        return Err(ImageError::OtherKind {
            missing: MANIFEST_FILE,
            wanted: "a docker-archive",
            hint: if store.contains("oci-layout") {
                " but an OCI image layout: use --oci-layout"
            } else {
                ""
            },
        });
    }
    let images: Vec<ArchivedImage> =
        read_json(store, MANIFEST_FILE, None, "list of images", limits)?;
    let image = choose(&images, tag)?;
    let identity = identity_from_name(&image.config);
    let configuration: ImageConfiguration = read_json(
        store,
        &image.config,
        identity.as_ref(),
        "image configuration",
        limits,
    )?;
    check_platform(&configuration, platform)?;
    let paths = image.layers.as_deref().unwrap_or_default();
    let layers = paths
        .iter()
        .zip(diff_ids(&configuration, paths.len())?)
        .map(|(path, diff_id)| LayerSource {
            path: path.clone(),
            blob: identity_from_name(path).filter(|_| path.starts_with("blobs/")),
            diff_id,
        })
        .collect();
    Ok(ImageParts {
        configuration,
        layers,
    })
}

fn choose<'a>(
    images: &'a [ArchivedImage],
    tag: Option<&str>,
) -> Result<&'a ArchivedImage, ImageError> {
    let available = || {
        images
            .iter()
            .flat_map(ArchivedImage::tags)
            .cloned()
            .collect()
    };
    let Some(wanted) = tag else {
        return match images {
            [image] => Ok(image),
            _ => Err(ImageError::Ambiguous(available())),
        };
    };
    let exact: Vec<_> = images
        .iter()
        .filter(|image| image.tags().iter().any(|name| name == wanted))
        .collect();
    let by_tag: Vec<_> = images
        .iter()
        .filter(|image| image.tags().iter().any(|name| name_matches(name, wanted)))
        .collect();
    match (exact.as_slice(), by_tag.as_slice()) {
        ([image, ..], _) | ([], [image]) => Ok(image),
        ([], []) => Err(ImageError::NoSuchTag {
            wanted: wanted.to_owned(),
            available: available(),
        }),
        ([], [_, _, ..]) => Err(ImageError::Ambiguous(available())),
    }
}

/// The digest in a name such as `blobs/sha256/DIGEST`, `DIGEST.json` or `DIGEST.tar`.
fn identity_from_name(name: &str) -> Option<BlobIdentity> {
    let file = name.rsplit('/').next()?;
    let stem = file.split('.').next()?;
    Sha256Hex::from_hex(stem).map(|digest| BlobIdentity { digest, size: None })
}

#[cfg(test)]
#[path = "docker_archive_tests.rs"]
mod tests;
