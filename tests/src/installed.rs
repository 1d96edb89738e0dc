// SPDX-License-Identifier: Apache-2.0

//! The Caisson that is installed in the testbed: its configuration, and others made from it.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Its configuration file.
pub const CONFIG: &str = "/etc/caisson/config.toml";

/// The path that the configuration has for `key` of its table `[vm]`.
///
/// # Errors
/// When there is no such file, or nothing for the key in it.
pub fn path_of(key: &str) -> Result<PathBuf> {
    let text =
        std::fs::read_to_string(CONFIG).with_context(|| format!("failed to read {CONFIG}"))?;
    let table: toml::Table = text
        .parse()
        .with_context(|| format!("failed to read {CONFIG}"))?;
    let value = table.get("vm").and_then(|vm| vm.get(key)?.as_str());
    value
        .map(PathBuf::from)
        .with_context(|| format!("{CONFIG} has no vm.{key}"))
}

/// Makes the configuration file `NAME.toml` in a directory: the installed one, with a drop-in that holds `changes`.
///
/// # Errors
/// When it cannot be written.
pub fn config_with(dir: &Path, name: &str, changes: &str) -> io::Result<PathBuf> {
    let file = dir.join(format!("{name}.toml"));
    let drop_ins = dir.join(format!("{name}.toml.d"));
    std::fs::create_dir_all(&drop_ins)?;
    std::fs::copy(CONFIG, &file)?;
    std::fs::write(drop_ins.join("50-changes.toml"), changes)?;
    Ok(file)
}
