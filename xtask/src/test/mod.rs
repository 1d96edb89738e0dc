// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask test`: the unit tests natively, then the end-to-end tests in two testbeds side by side.
//!
//! Every test is shown with its outcome and duration as it ends. The last line is `N passed, N failed`, of
//! both kinds together; the exit status is 0 only if some test ran and none failed.

mod e2e;
mod unit;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;

use crate::print;
use crate::{install, say};

/// Options of `test`.
#[derive(Debug, Args)]
pub(crate) struct Test {
    /// The end-to-end test of this name, or else those whose name contains it, or else such unit tests
    name: Option<String>,
    /// Full counts instead of those that fit into half an hour
    #[arg(long)]
    soak: bool,
    /// Seconds after which an end-to-end test counts as hung (900, with --soak 7200)
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Use what `install --destdir DIR` made before, instead of building
    #[arg(long, value_name = "DIR")]
    installed: Option<PathBuf>,
    /// How many testbeds to use at once, each with one processor
    #[arg(long, value_name = "N", default_value_t = 2)]
    testbeds: usize,
}

/// How many tests ended how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) ignored: u64,
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }
}

impl Test {
    pub(crate) fn run(self) -> Result<u8> {
        if self.testbeds == 0 {
            bail!("no test can run in 0 testbeds");
        }
        install::tools()?;
        let filter = self.name.as_deref();
        let suite = e2e::Suite::build()?;
        let chosen = suite.choose(filter);
        let mut tally = Tally::default();
        if filter.is_none() || chosen.is_empty() {
            tally.add(unit::run(filter)?);
        }
        if !chosen.is_empty() {
            let limit = self.timeout.unwrap_or(if self.soak { 7200 } else { 900 });
            let how = e2e::How {
                soak: self.soak,
                limit: Duration::from_secs(limit),
                testbeds: self.testbeds.min(chosen.len()),
                installed: self.installed.clone(),
            };
            tally.add(suite.run(&chosen, &how)?);
        }
        if tally.ignored > 0 {
            say(&format!("{} ignored", tally.ignored));
        }
        print(&format!("{} passed, {} failed", tally.passed, tally.failed));
        if tally.passed + tally.failed == 0 {
            say("no test ran");
            return Ok(1);
        }
        Ok(u8::from(tally.failed > 0))
    }
}
