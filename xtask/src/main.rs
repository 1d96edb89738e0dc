// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask …`: the commands that a person (or CI) types in this tree.
//!
//! Every command builds what it needs first, so each works from a fresh clone. Their own words go to stderr:
//! stdout is for what the command's subject says.

#[cfg(test)]
mod architecture;
mod bench;
mod build;
mod install;
mod run;
mod session;
mod shell;
mod test;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use nix::sys::stat::Mode;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Commands for working on Caisson")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Measures in the testbed, and makes tables and a picture
    Bench(bench::Bench),
    /// Builds everything and installs it
    Install(install::Install),
    /// Runs a container in a microVM
    Run(run::Run),
    /// Unit tests natively, then end-to-end tests in testbeds
    Test(test::Test),
    /// A prompt, or one command, as root in the testbed with Caisson installed
    Shell(shell::Shell),
}

fn main() -> ExitCode {
    // What is installed is for everybody to read, whatever the caller keeps to itself.
    nix::sys::stat::umask(Mode::from_bits_truncate(0o022));
    // Before any thread is started.
    let prepared = caisson_testbed::cleanup::on_signals();
    let result = prepared
        .map_err(anyhow::Error::new)
        .and_then(|()| run(Arguments::parse().task));
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<u8> {
    match task {
        Task::Bench(bench) => bench.run(),
        Task::Install(install) => install.run(),
        Task::Test(test) => test.run(),
        Task::Run(run) => run.run(),
        Task::Shell(shell) => shell.run(),
    }
}

/// Says something to the person at the terminal. That a terminal is gone stops nothing.
fn say(line: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// A line of a report, on stdout.
fn print(line: &str) {
    use std::io::Write;
    let mut stdout = std::io::stdout().lock();
    // A reader that has gone stops no test.
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
}

/// The root of the tree.
fn tree() -> PathBuf {
    let manifest = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().map_or(manifest.clone(), PathBuf::from)
}
