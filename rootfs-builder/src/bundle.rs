// SPDX-License-Identifier: Apache-2.0

//! An OCI bundle: a directory with `config.json` and, unless it lies elsewhere, `rootfs/`.
//!
//! In: a source of files ([`RootfsSource`]) and what the person asks for. Out: the bundle, whole, or
//! nothing. A bundle belongs to its maker alone (mode 0700), since a root file system holds
//! set-user-ID programs that the host's users have no business running.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use crate::source::busybox::{self, BusyboxError};
use crate::spec::{Privileges, SpecError, SpecOverrides, apply_overrides, base_spec, to_json};
use crate::staging::{StagedDirectory, StagingError};

/// Why no bundle was made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    /// The output cannot be put in place.
    #[error(transparent)]
    Output(#[from] StagingError),
    /// The busybox root could not be made.
    #[error("failed to make a busybox root file system")]
    Busybox(#[from] BusyboxError),
    /// The `config.json` could not be made.
    #[error("failed to make config.json")]
    Spec(#[from] SpecError),
    /// A file of the bundle could not be written.
    #[error("failed to write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Where the root file system comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RootfsSource {
    /// A system made around a static busybox.
    Busybox {
        /// The busybox; looked for in the usual places if none is named.
        binary: Option<PathBuf>,
    },
}

/// What to make.
#[derive(Debug, Clone)]
pub struct BundleRequest {
    /// The bundle's directory; must be absent or empty unless `replace`.
    pub output: PathBuf,
    /// Take the place of a bundle that is there.
    pub replace: bool,
    /// The root file system.
    pub source: RootfsSource,
    /// What `config.json` shall say.
    pub overrides: SpecOverrides,
}

/// Makes the bundle.
///
/// # Errors
/// Any [`BundleError`]; the output is then as it was before.
pub fn build(request: &BundleRequest) -> Result<(), BundleError> {
    let staged = StagedDirectory::create(&request.output, request.replace)?;
    let rootfs = staged.path().join("rootfs");
    fs::create_dir(&rootfs)
        .and_then(|()| fs::set_permissions(&rootfs, Permissions::from_mode(0o755)))
        .map_err(|source| BundleError::Write {
            path: rootfs.clone(),
            source,
        })?;
    let mut spec = match &request.source {
        RootfsSource::Busybox { binary } => {
            let binary = match binary {
                Some(binary) => binary.clone(),
                None => busybox::find()?,
            };
            busybox::populate(&binary, &rootfs)?;
            base_spec(Privileges::Runc)?
        }
    };
    apply_overrides(&mut spec, &request.overrides)?;
    write_config(staged.path(), &to_json(&spec)?)?;
    staged.publish()?;
    Ok(())
}

fn write_config(bundle: &Path, text: &str) -> Result<(), BundleError> {
    let path = bundle.join("config.json");
    fs::write(&path, text)
        .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(0o644)))
        .map_err(|source| BundleError::Write { path, source })
}
