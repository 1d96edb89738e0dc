// SPDX-License-Identifier: Apache-2.0

//! Finds an image in an OCI image layout.
//!
//! `index.json` lists manifests by tag and platform, perhaps through further indexes; the manifest
//! names the configuration and the layers by digest. Docker's types of the same documents are taken, too.
//!
//! Specification: <https://github.com/opencontainers/image-spec/blob/main/image-layout.md>.

use oci_spec::image::{
    Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType, OciLayout,
};
use serde::de::DeserializeOwned;

use super::digest::{DigestError, Sha256Hex};
use super::platform::Platform;
use super::store::{Store, StoreError};
use super::{BlobIdentity, ImageParts, LayerSource};
use crate::limits::Limits;

const LAYOUT_FILE: &str = "oci-layout";
const INDEX_FILE: &str = "index.json";
const LAYOUT_VERSION: &str = "1.0.0";

/// Annotation that holds a manifest's tag, and the one that containerd writes the whole name to.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
const CONTAINERD_NAME: &str = "io.containerd.image.name";

/// Set by BuildKit on manifests that are about an image and not one.
const REFERENCE_TYPE: &str = "vnd.docker.reference.type";

/// Indexes within indexes that are followed.
const MAX_NESTING: u32 = 4;

const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// Layer types that are tar archives, compressed or not.
const LAYER_TYPES: &[&str] = &[
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
];

/// Why no image was found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// A file of the image could not be read, or is not what it should be.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A document is not the JSON that it should be.
    #[error("{name} of the image is not a valid {what}")]
    Json {
        /// Its name in the image.
        name: String,
        /// What it should be.
        what: &'static str,
        /// What is wrong with it, with line and column.
        source: serde_json::Error,
    },
    /// A digest that cannot be checked.
    #[error(transparent)]
    Digest(#[from] DigestError),
    /// Neither a layout nor an archive of the kind asked for.
    #[error("it holds no {missing}, so it is not {wanted}{hint}")]
    OtherKind {
        /// The file that makes it one.
        missing: &'static str,
        /// What was asked for.
        wanted: &'static str,
        /// What to do instead, if that can be told.
        hint: &'static str,
    },
    /// A layout of another version.
    #[error("the image layout is of version {0:?}, and only {LAYOUT_VERSION} is supported")]
    LayoutVersion(String),
    /// There is no image of that tag.
    #[error("there is no image tagged {wanted:?}; there are: {}", list(available))]
    NoSuchTag {
        /// The tag asked for.
        wanted: String,
        /// The tags that there are.
        available: Vec<String>,
    },
    /// There are several images and none was named.
    #[error("there are several images, so one must be named after a colon; there are: {}", list(.0))]
    Ambiguous(Vec<String>),
    /// No image for the platform.
    #[error("there is no image for {wanted}; there are: {}", list(available))]
    NoSuchPlatform {
        /// The platform asked for.
        wanted: String,
        /// The platforms that there are.
        available: Vec<String>,
    },
    /// Indexes in indexes without end.
    #[error("indexes lie more than {MAX_NESTING} deep in one another")]
    Nesting,
    /// A manifest for something that is not an image.
    #[error("{name} is a {media_type}, which is not an image")]
    MediaType {
        /// Its digest.
        name: String,
        /// Its type.
        media_type: String,
    },
    /// A layer of a type that cannot be unpacked (encrypted, for one).
    #[error("layer {name} is a {media_type}, which is not supported")]
    LayerType {
        /// Its digest.
        name: String,
        /// Its type.
        media_type: String,
    },
    /// Manifest and configuration contradict each other.
    #[error("the manifest has {layers} layers, and the configuration {diff_ids} diff ids")]
    LayerCount {
        /// Layers of the manifest.
        layers: usize,
        /// Diff ids of the configuration.
        diff_ids: usize,
    },
}

fn list(names: &[String]) -> String {
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

/// Finds the image with this tag, for this platform. Without a tag there must be but one.
///
/// # Errors
/// Any [`ImageError`].
pub fn find(
    store: &Store,
    tag: Option<&str>,
    platform: &Platform,
    limits: &Limits,
) -> Result<ImageParts, ImageError> {
    if !store.contains(LAYOUT_FILE) {
        return Err(ImageError::OtherKind {
            missing: LAYOUT_FILE,
            wanted: "an OCI image layout",
            hint: if store.contains("manifest.json") {
                " but a docker-archive: use --docker-archive"
            } else {
                ""
            },
        });
    }
    let layout: OciLayout = read_json(store, LAYOUT_FILE, None, "image layout", limits)?;
    if layout.image_layout_version() != LAYOUT_VERSION {
        return Err(ImageError::LayoutVersion(
            layout.image_layout_version().clone(),
        ));
    }
    let index: ImageIndex = read_json(store, INDEX_FILE, None, "image index", limits)?;
    let candidates = by_tag(index.manifests(), tag)?;
    let descriptor = resolve(store, candidates, platform, limits, 0)?;
    let identity = identity_of(&descriptor)?;
    let manifest: ImageManifest = read_blob(store, &identity, "image manifest", limits)?;
    let config = identity_of(manifest.config())?;
    let configuration: ImageConfiguration =
        read_blob(store, &config, "image configuration", limits)?;
    check_platform(&configuration, platform)?;
    let mut layers = Vec::new();
    for (layer, diff_id) in manifest
        .layers()
        .iter()
        .zip(diff_ids(&configuration, manifest.layers().len())?)
    {
        let media_type = layer.media_type().to_string();
        let blob = identity_of(layer)?;
        if !LAYER_TYPES.contains(&media_type.as_str()) {
            return Err(ImageError::LayerType {
                name: blob.digest.to_string(),
                media_type,
            });
        }
        layers.push(LayerSource {
            path: blob_path(&blob.digest),
            blob: Some(blob),
            diff_id,
        });
    }
    Ok(ImageParts {
        configuration,
        layers,
    })
}

/// The configuration's diff ids, one for each of `layers` layers.
pub(super) fn diff_ids(
    configuration: &ImageConfiguration,
    layers: usize,
) -> Result<Vec<Sha256Hex>, ImageError> {
    let diff_ids = configuration.rootfs().diff_ids();
    if diff_ids.len() != layers {
        return Err(ImageError::LayerCount {
            layers,
            diff_ids: diff_ids.len(),
        });
    }
    Ok(diff_ids
        .iter()
        .map(|text| Sha256Hex::parse(text))
        .collect::<Result<_, _>>()?)
}

/// Is the image for this platform?
pub(super) fn check_platform(
    configuration: &ImageConfiguration,
    platform: &Platform,
) -> Result<(), ImageError> {
    if platform.matches(configuration.os(), configuration.architecture()) {
        return Ok(());
    }
    let found = format!("{}/{}", configuration.os(), configuration.architecture());
    Err(ImageError::NoSuchPlatform {
        wanted: platform.to_string(),
        available: vec![found],
    })
}

pub(super) fn blob_path(digest: &Sha256Hex) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

pub(super) fn read_json<T: DeserializeOwned>(
    store: &Store,
    name: &str,
    identity: Option<&BlobIdentity>,
    what: &'static str,
    limits: &Limits,
) -> Result<T, ImageError> {
    let bytes = store.read_small(name, limits.max_json_bytes, identity)?;
    serde_json::from_slice(&bytes).map_err(|source| ImageError::Json {
        name: name.to_owned(),
        what,
        source,
    })
}

fn read_blob<T: DeserializeOwned>(
    store: &Store,
    identity: &BlobIdentity,
    what: &'static str,
    limits: &Limits,
) -> Result<T, ImageError> {
    read_json(
        store,
        &blob_path(&identity.digest),
        Some(identity),
        what,
        limits,
    )
}

fn identity_of(descriptor: &Descriptor) -> Result<BlobIdentity, ImageError> {
    let digest = Sha256Hex::from_digest(descriptor.digest())?;
    Ok(BlobIdentity {
        digest,
        size: Some(descriptor.size()),
    })
}

fn annotation<'a>(descriptor: &'a Descriptor, key: &str) -> Option<&'a str> {
    descriptor
        .annotations()
        .as_ref()?
        .get(key)
        .map(String::as_str)
}

/// Does `name` (a tag, or a whole name with one) go by `wanted`?
pub(super) fn name_matches(name: &str, wanted: &str) -> bool {
    name == wanted || name.rsplit_once(':').is_some_and(|(_, tag)| tag == wanted)
}

/// The manifests with this tag; without a tag, all, if that leaves no choice but of the platform.
fn by_tag(manifests: &[Descriptor], tag: Option<&str>) -> Result<Vec<Descriptor>, ImageError> {
    let name_of = |descriptor: &Descriptor| {
        annotation(descriptor, REF_NAME)
            .or_else(|| annotation(descriptor, CONTAINERD_NAME))
            .map(str::to_owned)
    };
    let mut names: Vec<String> = manifests.iter().filter_map(name_of).collect();
    names.sort();
    names.dedup();
    let Some(wanted) = tag else {
        if names.len() > 1 {
            return Err(ImageError::Ambiguous(names));
        }
        return Ok(manifests.to_vec());
    };
    let goes_by = |descriptor: &&Descriptor, exact: bool| {
        [REF_NAME, CONTAINERD_NAME]
            .iter()
            .filter_map(|key| annotation(descriptor, key))
            .any(|name| {
                if exact {
                    name == wanted
                } else {
                    name_matches(name, wanted)
                }
            })
    };
    let mut found: Vec<Descriptor> = Vec::new();
    for exact in [true, false] {
        found = manifests
            .iter()
            .filter(|item| goes_by(item, exact))
            .cloned()
            .collect();
        if !found.is_empty() {
            break;
        }
    }
    if found.is_empty() {
        return Err(ImageError::NoSuchTag {
            wanted: wanted.to_owned(),
            available: names,
        });
    }
    Ok(found)
}

/// The manifest for `platform` among `candidates`, through indexes.
fn resolve(
    store: &Store,
    candidates: Vec<Descriptor>,
    platform: &Platform,
    limits: &Limits,
    depth: u32,
) -> Result<Descriptor, ImageError> {
    if depth >= MAX_NESTING {
        return Err(ImageError::Nesting);
    }
    let images: Vec<Descriptor> = candidates
        .into_iter()
        .filter(|descriptor| annotation(descriptor, REFERENCE_TYPE).is_none())
        .collect();
    let available: Vec<String> = images.iter().map(platform_of).collect();
    let fits = |descriptor: &Descriptor| match descriptor.platform() {
        Some(of) => platform.matches(of.os(), of.architecture()),
        // The configuration will tell.
        None => true,
    };
    let mut fitting: Vec<Descriptor> = images.into_iter().filter(fits).collect();
    // One that names its platform is the better answer.
    if fitting
        .iter()
        .any(|descriptor| descriptor.platform().is_some())
    {
        fitting.retain(|descriptor| descriptor.platform().is_some());
    }
    fitting.dedup_by(|left, right| left.digest() == right.digest());
    let Some(chosen) = fitting.first() else {
        return Err(ImageError::NoSuchPlatform {
            wanted: platform.to_string(),
            available,
        });
    };
    if fitting.len() > 1 && chosen.platform().is_none() {
        let digests = fitting
            .iter()
            .map(|descriptor| descriptor.digest().to_string());
        return Err(ImageError::Ambiguous(digests.collect()));
    }
    match chosen.media_type() {
        MediaType::ImageManifest => Ok(chosen.clone()),
        MediaType::Other(name) if name == DOCKER_MANIFEST => Ok(chosen.clone()),
        MediaType::ImageIndex => descend(store, chosen, platform, limits, depth),
        MediaType::Other(name) if name == DOCKER_LIST => {
            descend(store, chosen, platform, limits, depth)
        }
        other => Err(ImageError::MediaType {
            name: chosen.digest().to_string(),
            media_type: other.to_string(),
        }),
    }
}

fn descend(
    store: &Store,
    index: &Descriptor,
    platform: &Platform,
    limits: &Limits,
    depth: u32,
) -> Result<Descriptor, ImageError> {
    let identity = identity_of(index)?;
    let index: ImageIndex = read_blob(store, &identity, "image index", limits)?;
    resolve(
        store,
        index.manifests().clone(),
        platform,
        limits,
        depth + 1,
    )
}

fn platform_of(descriptor: &Descriptor) -> String {
    match descriptor.platform() {
        Some(platform) => format!("{}/{}", platform.os(), platform.architecture()),
        None => "one that does not say".to_owned(),
    }
}

#[cfg(test)]
#[path = "oci_layout_tests.rs"]
mod tests;
