// SPDX-License-Identifier: Apache-2.0

//! `caisson spec`: a config.json to begin with, as runc's is.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

use caisson_runtime::error::RuntimeError;
use clap::Args;

/// runc's default, without what a microVM has no use for.
const CONFIG: &str = include_str!("../../config/spec.json");

#[derive(Debug, Args)]
pub(crate) struct SpecArgs {
    /// Directory of the bundle.
    #[arg(long, short, default_value = ".")]
    bundle: PathBuf,
    /// Not supported: a VM needs no user namespace.
    #[arg(long)]
    rootless: bool,
}

pub(crate) fn run(args: &SpecArgs) -> Result<u8, RuntimeError> {
    if args.rootless {
        return Err(RuntimeError::Unsupported("spec --rootless".to_owned()));
    }
    let path = args.bundle.join("config.json");
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&path)
        .and_then(|mut file| file.write_all(CONFIG.as_bytes()));
    written.map_err(RuntimeError::file("create", &path))?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use caisson_runtime::bundle::load::Bundle;
    use caisson_runtime::bundle::validate::validate;

    use super::*;

    #[test]
    fn the_written_config_is_one_that_this_runtime_takes() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("rootfs")).unwrap();
        let args = SpecArgs {
            bundle: dir.path().to_owned(),
            rootless: false,
        };
        assert_eq!(run(&args).unwrap(), 0);
        assert!(run(&args).is_err(), "an existing file is not replaced");
        let bundle = Bundle::load(dir.path()).unwrap();
        assert_eq!(validate(&bundle), Ok(()));
        assert_eq!(bundle.spec.version(), super::super::OCI_VERSION);
    }
}
