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

use oci_spec::runtime::Spec;

use crate::confined::ConfinedRoot;
use crate::image::oci_layout::ImageError;
use crate::image::platform::Platform;
use crate::image::store::{Store, StoreError};
use crate::image::unpack::{UnpackError, unpack};
use crate::image::{ImageParts, docker_archive, oci_layout};
use crate::limits::Limits;
use crate::source::busybox::{self, BusyboxError};
use crate::source::directory::{self, CopyError};
use crate::spec::{
    Privileges, SpecError, SpecOverrides, apply_image, apply_overrides, base_spec, resolve_user,
    set_root_path, set_user, to_json, user_of,
};
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
    /// The directory could not be copied.
    #[error("failed to copy the root file system")]
    Copy(#[from] CopyError),
    /// The directory to use in place cannot be used.
    #[error("root file system {path} cannot be used in place")]
    InPlace {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The image could not be opened.
    #[error("failed to open the image")]
    Store(#[from] StoreError),
    /// The image is not in what was opened, or is broken.
    #[error("failed to find the image in {path}")]
    Image {
        /// The layout or archive.
        path: PathBuf,
        /// Why.
        source: ImageError,
    },
    /// The image could not be unpacked.
    #[error("failed to unpack the image in {path}")]
    Unpack {
        /// The layout or archive.
        path: PathBuf,
        /// Why.
        source: UnpackError,
    },
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
    /// A directory of the host.
    Directory {
        /// The directory.
        path: PathBuf,
        /// Point at it instead of copying it.
        in_place: bool,
    },
    /// An OCI image layout: a directory, or a tar of one.
    OciLayout(ImageName),
    /// A docker-archive.
    DockerArchive(ImageName),
}

/// An image among those that a layout or archive holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageName {
    /// The layout or archive.
    pub path: PathBuf,
    /// The image's tag, needed where there are several.
    pub tag: Option<String>,
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
    /// The machine that an image must be for.
    pub platform: Platform,
    /// What an image may use up.
    pub limits: Limits,
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
    let mut spec = fill(request, &rootfs)?;
    apply_overrides(&mut spec, &request.overrides)?;
    write_config(staged.path(), &to_json(&spec)?)?;
    staged.publish()?;
    Ok(())
}

/// Fills `rootfs` from the request's source (or removes it, where another is used in place), and says
/// how to run what is in it.
fn fill(request: &BundleRequest, rootfs: &Path) -> Result<Spec, BundleError> {
    let mut spec = match &request.source {
        RootfsSource::Busybox { binary } => {
            let binary = match binary {
                Some(binary) => binary.clone(),
                None => busybox::find()?,
            };
            busybox::populate(&binary, rootfs)?;
            base_spec(Privileges::Runc)?
        }
        RootfsSource::Directory {
            path,
            in_place: false,
        } => {
            directory::copy(path, rootfs)?;
            base_spec(Privileges::Runc)?
        }
        RootfsSource::Directory {
            path,
            in_place: true,
        } => return in_place(request, path, rootfs),
        RootfsSource::OciLayout(name) => from_image(request, name, rootfs, oci_layout::find)?,
        RootfsSource::DockerArchive(name) => {
            from_image(request, name, rootfs, docker_archive::find)?
        }
    };
    if let Some(user) = &request.overrides.user {
        set_user_by_name(&mut spec, user, rootfs)?;
    }
    Ok(spec)
}

fn in_place(request: &BundleRequest, path: &Path, rootfs: &Path) -> Result<Spec, BundleError> {
    let unusable = |source| BundleError::InPlace {
        path: path.to_path_buf(),
        source,
    };
    let real = path.canonicalize().map_err(unusable)?;
    if !real.is_dir() {
        return Err(unusable(io::ErrorKind::NotADirectory.into()));
    }
    fs::remove_dir(rootfs).map_err(|source| BundleError::Write {
        path: rootfs.to_path_buf(),
        source,
    })?;
    let mut spec = base_spec(Privileges::Runc)?;
    set_root_path(&mut spec, &real);
    if let Some(user) = &request.overrides.user {
        set_user_by_name(&mut spec, user, &real)?;
    }
    Ok(spec)
}

/// Finds one image in a layout or archive.
type Finder = fn(&Store, Option<&str>, &Platform, &Limits) -> Result<ImageParts, ImageError>;

fn from_image(
    request: &BundleRequest,
    name: &ImageName,
    rootfs: &Path,
    find: Finder,
) -> Result<Spec, BundleError> {
    let store = Store::open(&name.path, &request.limits)?;
    let image = find(
        &store,
        name.tag.as_deref(),
        &request.platform,
        &request.limits,
    )
    .map_err(|source| BundleError::Image {
        path: name.path.clone(),
        source,
    })?;
    unpack(&store, &image, rootfs, &request.limits).map_err(|source| BundleError::Unpack {
        path: name.path.clone(),
        source,
    })?;
    let mut spec = base_spec(Privileges::Docker)?;
    apply_image(&mut spec, &image.configuration);
    if request.overrides.user.is_none() {
        set_user_by_name(&mut spec, &user_of(&image.configuration), rootfs)?;
    }
    Ok(spec)
}

fn set_user_by_name(spec: &mut Spec, user: &str, rootfs: &Path) -> Result<(), BundleError> {
    let root = ConfinedRoot::open(rootfs).map_err(|source| BundleError::InPlace {
        path: rootfs.to_path_buf(),
        source,
    })?;
    set_user(spec, &resolve_user(user, &root).map_err(SpecError::from)?)?;
    Ok(())
}

fn write_config(bundle: &Path, text: &str) -> Result<(), BundleError> {
    let path = bundle.join("config.json");
    fs::write(&path, text)
        .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(0o644)))
        .map_err(|source| BundleError::Write { path, source })
}

#[cfg(test)]
#[path = "bundle_tests.rs"]
mod tests;
