// SPDX-License-Identifier: Apache-2.0

//! Container images as files: where their blobs are, which image is meant, and how it is unpacked.
//!
//! In: an OCI image layout (a directory or a tar of one) or a docker-archive. [`store`] opens what is
//! in it by name, [`oci_layout`] and [`docker_archive`] find the image in it ([`ImageParts`]), and
//! [`unpack`] checks and applies its layers. Every byte used is checked against its digest in the
//! same reading that uses it.

pub mod compression;
pub mod digest;
pub mod docker_archive;
pub mod oci_layout;
pub mod platform;
pub mod store;
#[cfg(test)]
pub(crate) mod test_image;
pub mod unpack;

use oci_spec::image::ImageConfiguration;

use self::digest::Sha256Hex;

/// An image that was found: its configuration, and its layers from the bottom up.
#[derive(Debug, Clone)]
pub struct ImageParts {
    /// The configuration, read and checked.
    pub configuration: ImageConfiguration,
    /// The layers.
    pub layers: Vec<LayerSource>,
}

/// Where a layer is and what it must turn out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerSource {
    /// Name in the store.
    pub path: String,
    /// Digest and size of the blob as stored, where they are known.
    pub blob: Option<BlobIdentity>,
    /// Digest of the layer once decompressed.
    pub diff_id: Sha256Hex,
}

/// What a blob must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobIdentity {
    /// Its digest.
    pub digest: Sha256Hex,
    /// Its size in bytes, where it is known.
    pub size: Option<u64>,
}
