// SPDX-License-Identifier: Apache-2.0

//! Which machine an image is for.

use std::fmt;
use std::str::FromStr;

use oci_spec::image::{Arch, Os};

/// An operating system and an architecture, in the names of Go (`linux/amd64`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    os: String,
    architecture: String,
}

/// Text that names no platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a platform such as linux/amd64")]
pub struct PlatformError(String);

impl Platform {
    /// That of this machine.
    #[must_use]
    pub fn of_host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self {
            os: "linux".to_owned(),
            architecture: architecture.to_owned(),
        }
    }

    /// Is it this one?
    #[must_use]
    pub fn matches(&self, os: &Os, architecture: &Arch) -> bool {
        self.os == os.to_string() && self.architecture == architecture.to_string()
    }
}

impl Default for Platform {
    fn default() -> Self {
        Self::of_host()
    }
}

impl FromStr for Platform {
    type Err = PlatformError;

    fn from_str(text: &str) -> Result<Self, PlatformError> {
        match text.split_once('/') {
            Some((os, architecture))
                if !os.is_empty() && !architecture.is_empty() && !architecture.contains('/') =>
            {
                Ok(Self {
                    os: os.to_owned(),
                    architecture: architecture.to_owned(),
                })
            }
            Some(_) | None => Err(PlatformError(text.to_owned())),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.os, self.architecture)
    }
}
