// SPDX-License-Identifier: Apache-2.0

//! Leaves the tables for unwinding out of the guest's agent. They are a tenth of it, and every guest would
//! hold them for nothing: in `[profile.guest]` a panic aborts.

use std::env;
use std::path::PathBuf;

const SCRIPT: &str = "no-unwind.ld";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed={SCRIPT}");
    // The guest's profile alone is optimized so; the others (tests) unwind.
    if env::var_os("OPT_LEVEL").is_some_and(|level| level == "z") {
        let directory = env::var_os("CARGO_MANIFEST_DIR").ok_or("CARGO_MANIFEST_DIR is not set")?;
        let script = PathBuf::from(directory).join(SCRIPT);
        println!("cargo:rustc-link-arg-bins=-Wl,-T,{}", script.display());
    }
    Ok(())
}
