// SPDX-License-Identifier: Apache-2.0

//! The unit tests: `cargo test --workspace`, shown as it goes and counted from what libtest says.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use super::Tally;
use crate::build::cargo;
use crate::print;

/// Runs the unit tests whose names contain `filter`.
pub(super) fn run(filter: Option<&str>) -> Result<Tally> {
    let mut command = cargo();
    command.args(["test", "--workspace", "--no-fail-fast"]);
    if let Some(filter) = filter {
        command.args(["--", filter]);
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("failed to start cargo test")?;
    let stdout = child.stdout.take().context("cargo test has no stdout")?;
    let mut tally = Tally::default();
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line.context("failed to read what the unit tests say")?;
        let line = String::from_utf8_lossy(&line);
        let part = summary(&line);
        tally.add(part.unwrap_or_default());
        if filter.is_none() || !is_idle(&line, part) {
            print(&line);
        }
    }
    let status = child.wait().context("failed to wait for cargo test")?;
    // A crash of a test program has no summary.
    if !status.success() && tally.failed == 0 {
        bail!("the unit tests ended with {status}, and none says that it failed");
    }
    Ok(tally)
}

/// What programs say in which the filter leaves nothing.
fn is_idle(line: &str, summary: Option<Tally>) -> bool {
    let nothing = summary.is_some_and(|part| part.passed + part.failed + part.ignored == 0);
    nothing || line == "running 0 tests" || line.trim().is_empty()
}

/// The counts in a line such as `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; …`.
fn summary(line: &str) -> Option<Tally> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let mut tally = Tally::default();
    for part in counts.split("; ") {
        let (count, word) = part.split_once(' ')?;
        match word {
            "passed" => tally.passed = count.parse().ok()?,
            "failed" => tally.failed = count.parse().ok()?,
            "ignored" => tally.ignored = count.parse().ok()?,
            _ => {}
        }
    }
    Some(tally)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counts_of_a_test_program_are_read() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; \
                    7 filtered out; finished in 0.01s";
        assert_eq!(
            summary(line),
            Some(Tally {
                passed: 12,
                failed: 3,
                ignored: 1
            })
        );
        assert_eq!(summary("test result: none"), None);
        assert_eq!(summary("test tests::counts ... ok"), None);
    }
}
