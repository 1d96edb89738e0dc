// SPDX-License-Identifier: Apache-2.0

//! Reads a bundle's `config.json`: <https://github.com/opencontainers/runtime-spec/blob/main/bundle.md>.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Process, Spec};
use serde::de::DeserializeOwned;

/// Largest config.json or process.json, bytes.
const MAX_SPEC: u64 = 4 << 20;

/// Why there is no bundle.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The bundle's directory is not there.
    #[error("failed to open bundle {path}")]
    Bundle {
        /// As it was given.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file is not there. The text begins as runc's does.
    #[error("JSON specification file {path} not found")]
    Missing {
        /// Which.
        path: PathBuf,
        /// The system's words for it.
        source: io::Error,
    },
    /// A file cannot be read.
    #[error("failed to read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file is too large to be one.
    #[error("{path} is larger than {MAX_SPEC} bytes")]
    TooLarge {
        /// Which.
        path: PathBuf,
    },
    /// A file is not such JSON; the source names line and column.
    #[error("failed to parse {path}")]
    Parse {
        /// Which.
        path: PathBuf,
        /// With line and column.
        source: serde_json::Error,
    },
}

/// A bundle that was read.
#[derive(Debug, Clone)]
pub struct Bundle {
    /// Absolute, without symbolic links.
    pub path: PathBuf,
    /// Its config.json.
    pub spec: Spec,
}

impl Bundle {
    /// Reads the bundle at `path`.
    ///
    /// # Errors
    /// When the directory or its config.json is missing, unreadable, too large or malformed.
    pub fn load(path: &Path) -> Result<Self, LoadError> {
        let absolute = fs::canonicalize(path).map_err(|source| LoadError::Bundle {
            path: path.to_owned(),
            source,
        })?;
        let spec = read(&absolute.join("config.json"))?;
        Ok(Self {
            path: absolute,
            spec,
        })
    }

    /// The root file system on the host; `None` when the spec has none.
    pub fn rootfs(&self) -> Option<PathBuf> {
        let root = self.spec.root().as_ref()?;
        Some(self.path.join(root.path()))
    }
}

/// Reads a `process.json`, as `exec --process` has it.
///
/// # Errors
/// When it is missing, unreadable, too large or malformed.
pub fn process(path: &Path) -> Result<Process, LoadError> {
    read(path)
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T, LoadError> {
    let at = || path.to_owned();
    let file = File::open(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => LoadError::Missing { path: at(), source },
        _ => LoadError::Read { path: at(), source },
    })?;
    let mut text = Vec::new();
    file.take(MAX_SPEC + 1)
        .read_to_end(&mut text)
        .map_err(|source| LoadError::Read { path: at(), source })?;
    if text.len() as u64 > MAX_SPEC {
        return Err(LoadError::TooLarge { path: at() });
    }
    serde_json::from_slice(&text).map_err(|source| LoadError::Parse { path: at(), source })
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use super::*;

    #[test]
    fn malformed_json_is_reported_with_line_and_column() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(
            dir.path().join("config.json"),
            "{\n  \"ociVersion\": 3\n}\n",
        )
        .unwrap();
        let error = Bundle::load(dir.path()).unwrap_err();
        let source = error.source().unwrap().to_string();
        assert!(source.contains("line 2 column 17"), "{source}");
    }

    #[test]
    fn what_is_missing_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = Bundle::load(dir.path()).unwrap_err().to_string();
        assert!(error.starts_with("JSON specification file "), "{error}");
        assert!(error.ends_with("config.json not found"), "{error}");
        let error = Bundle::load(&dir.path().join("no")).unwrap_err();
        assert!(matches!(error, LoadError::Bundle { .. }));
    }

    #[test]
    fn a_config_larger_than_the_limit_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join("config.json")).unwrap();
        file.set_len(MAX_SPEC + 1).unwrap();
        let error = Bundle::load(dir.path()).unwrap_err();
        assert!(matches!(error, LoadError::TooLarge { .. }));
    }
}
