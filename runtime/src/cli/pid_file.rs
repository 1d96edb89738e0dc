// SPDX-License-Identifier: Apache-2.0

//! Writes a pid file: whole or not at all, since callers read it as soon as it is there.

use std::fs;
use std::path::Path;

use caisson_runtime::error::RuntimeError;

/// Writes `pid` into `path`.
pub(crate) fn write(path: &Path, pid: u32) -> Result<(), RuntimeError> {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    let temporary = path.with_file_name(name);
    let written =
        fs::write(&temporary, pid.to_string()).and_then(|()| fs::rename(&temporary, path));
    written
        .inspect_err(|_| fs::remove_file(&temporary).unwrap_or_default())
        .map_err(RuntimeError::file("write pid file", path))
}
