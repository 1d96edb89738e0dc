// SPDX-License-Identifier: Apache-2.0

//! `caisson-rootfs-builder`: the library's two products from the command line.
//!
//! Parses, calls, and prints one line: what was made, or the whole chain of what went wrong.

mod arguments;

use std::io::{self, Write as _};
use std::process::ExitCode;

use anyhow::Context as _;
use caisson_rootfs_builder::{bundle, initramfs};
use clap::Parser as _;

use self::arguments::{Arguments, Task};

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing is left to tell if standard error is gone.
            let _ = writeln!(io::stderr(), "caisson-rootfs-builder: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let line = match arguments.task {
        Task::Initramfs(options) => {
            let request = options.into_request();
            let report = initramfs::build(&request).with_context(|| {
                format!("cannot make the initramfs {}", request.output.display())
            })?;
            format!(
                "{}: {} bytes, {} entries, sha256 {}",
                request.output.display(),
                report.bytes,
                report.entries,
                report.sha256
            )
        }
        Task::Bundle(options) => {
            let request = options.into_request()?;
            bundle::build(&request)
                .with_context(|| format!("cannot make the bundle {}", request.output.display()))?;
            format!("{}: bundle made", request.output.display())
        }
    };
    writeln!(io::stdout(), "{line}").context("failed to write to standard output")
}
