// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask shell`: one command, or a prompt, in a testbed.

use std::io::{self, IsTerminal};
use std::path::PathBuf;

use anyhow::{Context, Result};
use caisson_testbed::{Command, Options, Share, Testbed};
use clap::Args;

use crate::install::Stage;
use crate::session::Session;
use crate::{build, say};

/// Options of `shell`.
#[derive(Debug, Args)]
pub(crate) struct Shell {
    /// Run this line with `bash -c` instead of giving a prompt
    #[arg(short, long, value_name = "LINE")]
    command: Option<String>,
    /// A directory of the host, read-write at /share
    #[arg(long, value_name = "DIR")]
    share: Option<PathBuf>,
    /// Without building and installing Caisson
    #[arg(long)]
    no_install: bool,
    /// Use what `install --destdir DIR` made before, instead of building
    #[arg(long, value_name = "DIR", conflicts_with = "no_install")]
    installed: Option<PathBuf>,
    /// Memory of the machine
    #[arg(long, value_name = "MIB", default_value_t = 6144)]
    memory: u32,
    /// Processors of the machine; more than one is only for hunting races by hand, as QEMU's emulated
    /// virtualization then goes wrong now and then
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// Count instructions instead of time: every run takes the same virtual time
    #[arg(long)]
    icount: bool,
    /// Keep the output of the machine's console in this file
    #[arg(long, value_name = "FILE")]
    console_log: Option<PathBuf>,
}

impl Shell {
    pub(crate) fn run(self) -> Result<u8> {
        let mut options = Options::new(build::testbed_init()?);
        options.memory_mib = self.memory;
        options.cpus = self.cpus;
        options.instruction_count = self.icount;
        options.console_log = self.console_log;
        if let Some(dir) = self.share {
            let dir = dir
                .canonicalize()
                .with_context(|| format!("no directory {}", dir.display()))?;
            options.shares.push(Share {
                dir,
                path: "/share".to_owned(),
                read_only: false,
            });
        }
        let stage = match self.no_install {
            true => None,
            false => Some(Stage::new(self.installed.as_deref())?),
        };
        options.install = stage.as_ref().map(|stage| stage.root());

        let session = Session::new(self.command.is_none() && io::stdin().is_terminal())?;
        let testbed = Testbed::start(&options)?;
        for warning in &testbed.hello().warnings {
            say(&format!("testbed: {warning}"));
        }
        let command = match &self.command {
            Some(line) => Command::new(["bash", "-c", line]),
            None => Command::new(["bash", "-l"]),
        };
        let ended = session.run(&testbed, command)?;
        testbed.shutdown();
        Ok(ended.status)
    }
}
