// SPDX-License-Identifier: Apache-2.0

//! `caisson`: the OCI command line. Parses, dispatches, prints an error's whole chain once, and ends with its status.

#[path = "../cli/mod.rs"]
mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
