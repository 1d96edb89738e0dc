// SPDX-License-Identifier: Apache-2.0

//! Checks and applies an image's layers.
//!
//! A layer passes from its blob through a digest, a decompressor, a second digest (the diff id) and a
//! limit on its size into the files. What is wrong shows at the latest at the layer's end, and the
//! files made until then are the caller's to throw away. A blob that is not what it should be is
//! reported as that, whatever nonsense it contained.

use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use super::compression::decompress;
use super::digest::HashingReader;
use super::store::{Store, StoreError, check_identity};
use super::{ImageParts, LayerSource};
use crate::layer::apply::LayerApplier;
use crate::layer::error::LayerError;
use crate::limits::{Budget, LimitError, Limits};

/// Buffer for compressed bytes.
const BUFFER_BYTES: usize = 256 << 10;

/// Why an image could not be unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnpackError {
    /// The directory to unpack to cannot be used.
    #[error("failed to open {path}")]
    Target {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The image is larger than it may be.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// A layer could not be read, or is not what its digest says.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A layer could not be decompressed.
    #[error("failed to decompress layer {name}")]
    Decompress {
        /// The layer.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// A layer decompresses to something else than the configuration says.
    #[error("layer {name} decompresses to {found}, and the image's configuration says {expected}")]
    DiffId {
        /// The layer.
        name: String,
        /// The digest wanted.
        expected: String,
        /// The digest found.
        found: String,
    },
    /// A layer could not be applied.
    #[error("failed to apply layer {name}")]
    Layer {
        /// The layer.
        name: String,
        /// Why.
        source: LayerError,
    },
}

/// Unpacks the layers of `image` into the empty directory `target`.
///
/// # Errors
/// Any [`UnpackError`]; `target` is then of no use.
pub fn unpack(
    store: &Store,
    image: &ImageParts,
    target: &Path,
    limits: &Limits,
) -> Result<(), UnpackError> {
    let found = image.layers.len();
    if found > limits.max_layers {
        return Err(LimitError::Layers {
            found,
            limit: limits.max_layers,
        }
        .into());
    }
    let mut applier =
        LayerApplier::new(target, Budget::new(*limits)).map_err(|source| UnpackError::Target {
            path: target.to_path_buf(),
            source,
        })?;
    for layer in &image.layers {
        unpack_layer(store, layer, &mut applier)?;
    }
    Ok(())
}

fn unpack_layer(
    store: &Store,
    layer: &LayerSource,
    applier: &mut LayerApplier,
) -> Result<(), UnpackError> {
    let identity = layer.blob.as_ref();
    // No blob is longer than its descriptor says; without one, the archive bounds it.
    let blob_limit = identity
        .and_then(|identity| identity.size)
        .unwrap_or(u64::MAX);
    let mut blob = HashingReader::new(store.open_file(&layer.path)?, blob_limit);
    let applied = apply_blob(&mut blob, layer, applier);
    let drained = blob.drain();
    let size = if blob.exceeded() {
        None
    } else {
        Some(blob.bytes_read())
    };
    if let Some(identity) = identity {
        let Some(size) = size else {
            return Err(StoreError::TooLarge {
                name: layer.path.clone(),
                limit: blob_limit,
            }
            .into());
        };
        check_identity(&layer.path, identity, size, &blob.digest())?;
    }
    applied?;
    drained.map_err(|source| StoreError::File {
        name: layer.path.clone(),
        source,
    })?;
    Ok(())
}

fn apply_blob(
    blob: &mut HashingReader<impl Read>,
    layer: &LayerSource,
    applier: &mut LayerApplier,
) -> Result<(), UnpackError> {
    let name = || layer.path.clone();
    let decompress_error = |source| UnpackError::Decompress {
        name: name(),
        source,
    };
    let room = applier.budget_mut().stream_bytes_left();
    let total = applier.budget_mut().limits().max_unpacked_bytes;
    let decoder =
        decompress(BufReader::with_capacity(BUFFER_BYTES, blob)).map_err(decompress_error)?;
    let mut plain = HashingReader::new(decoder, room);
    let applied = applier.apply(&mut plain);
    if plain.exceeded() {
        return Err(LimitError::Bytes(total).into());
    }
    applied.map_err(|source| UnpackError::Layer {
        name: name(),
        source,
    })?;
    // What follows the archive's end is part of the layer's digest.
    if let Err(error) = plain.drain() {
        return Err(if plain.exceeded() {
            LimitError::Bytes(total).into()
        } else {
            decompress_error(error)
        });
    }
    applier.budget_mut().add_stream_bytes(plain.bytes_read());
    let found = plain.digest();
    if found != layer.diff_id {
        return Err(UnpackError::DiffId {
            name: name(),
            expected: layer.diff_id.to_string(),
            found: found.to_string(),
        });
    }
    Ok(())
}
