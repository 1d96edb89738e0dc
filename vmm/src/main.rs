// SPDX-License-Identifier: Apache-2.0

//! `caisson-vmm`: one microVM, one process. See `--help`, and the library for the rest.

use std::io::Write;
use std::process::ExitCode;

use caisson_vmm::args::{Arguments, Command, ConfigSource, USAGE};
use caisson_vmm::launch::{self, StatusPipe};
use caisson_vmm::{check, error, logging, sys};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::getppid;

fn main() -> ExitCode {
    let exec_ns = launch::monotonic_ns();
    let arguments = match Arguments::parse(std::env::args_os().skip(1)) {
        Ok(arguments) => arguments,
        Err(error) => return fail(&format!("{error}\n\n{USAGE}"), 2),
    };
    if let Err(error) = logging::init(arguments.log_level) {
        return fail(&error.to_string(), 1);
    }
    match arguments.command {
        Command::Run {
            config,
            status,
            die_with_parent,
        } => run(config, status, die_with_parent, exec_ns),
        Command::Check { json } => {
            let report = check::run();
            let text = if json { report.json() } else { report.text() };
            print(&text, u8::from(!report.ok))
        }
        Command::Version => print(concat!("caisson-vmm ", env!("CARGO_PKG_VERSION"), "\n"), 0),
        Command::Help => print(USAGE, 0),
    }
}

fn run(config: ConfigSource, status: Option<i32>, die_with_parent: bool, exec_ns: u64) -> ExitCode {
    sys::reserve_descriptors();
    if die_with_parent {
        let parent = getppid();
        if let Err(error) = prctl::set_pdeathsig(Signal::SIGKILL) {
            return fail(
                &format!("failed to set the parent death signal: {error}"),
                1,
            );
        }
        if getppid() != parent {
            // It ended before the signal was set.
            return ExitCode::FAILURE;
        }
    }
    let status = match status.map(sys::inherited_file).transpose() {
        Ok(file) => StatusPipe::new(file),
        Err(error) => return fail(&format!("failed to open the status descriptor: {error}"), 1),
    };
    let cause = match config {
        ConfigSource::Stdin => launch::run(std::io::stdin(), status, exec_ns),
        ConfigSource::Fd(fd) => match sys::inherited_file(fd) {
            Ok(file) => launch::run(file, status, exec_ns),
            Err(error) => {
                let text = format!("failed to open the configuration's descriptor: {error}");
                return fail(&text, 1);
            }
        },
    };
    if launch::is_orderly(&cause) {
        ExitCode::SUCCESS
    } else {
        fail(&cause.to_string(), 1)
    }
}

/// One line on standard error.
fn fail(text: &str, code: u8) -> ExitCode {
    // There is nowhere to tell that standard error is gone.
    let _ = writeln!(std::io::stderr(), "caisson-vmm: {text}");
    ExitCode::from(code)
}

fn print(text: &str, code: u8) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::from(code),
        Err(error) => fail(&error::chain(&error), 1),
    }
}
