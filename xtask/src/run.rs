// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask run`: a container in a microVM, on this machine if it can, else in the testbed.

use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command as HostCommand, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use caisson_testbed::cleanup::RunDir;
use caisson_testbed::{Command, Options, Share, Testbed};
use clap::Args;

use crate::install::{self, Stage};
use crate::session::{Ended, Session};
use crate::{build, say};

/// What the container does if nobody says.
const GREETING: &str =
    "echo 'Hello from a container in a microVM.'; echo \"Its kernel: $(uname -r)\"";

/// Options of `run`.
#[derive(Debug, Args)]
pub(crate) struct Run {
    /// A bundle of one's own instead of a small system around busybox
    #[arg(long, value_name = "DIR", conflicts_with = "command")]
    bundle: Option<PathBuf>,
    /// In the testbed, even if this machine could
    #[arg(long)]
    testbed: bool,
    /// Use what `install --destdir DIR` made before, instead of building
    #[arg(long, value_name = "DIR")]
    installed: Option<PathBuf>,
    /// What to run in the container; without it, a greeting
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl Run {
    pub(crate) fn run(self) -> Result<u8> {
        let stage = Stage::new(self.installed.as_deref())?;
        let work = RunDir::new().context("failed to make a directory for the bundle")?;
        let terminal = self.bundle.is_none()
            && !self.command.is_empty()
            && io::stdin().is_terminal()
            && io::stdout().is_terminal();
        let bundle = match &self.bundle {
            Some(dir) => dir
                .canonicalize()
                .with_context(|| format!("no bundle {}", dir.display()))?,
            None => self.make_bundle(&stage, &work, terminal)?,
        };
        let native = Native::new(&stage, &work)?;
        let can = !self.testbed && native.check();
        let ended = match can {
            true => native.run(&bundle, terminal)?,
            false => {
                if !self.testbed {
                    say(
                        "this machine's KVM cannot run the guest (`caisson check` says why): using the testbed",
                    );
                }
                run_in_testbed(&stage, bundle, terminal)?
            }
        };
        if let Some(time) = ended.first_output.filter(|_| !terminal) {
            let place = if can {
                ""
            } else {
                " (in the testbed, where times mean little)"
            };
            say(&format!(
                "first output after {} ms{place}",
                time.as_millis()
            ));
        }
        Ok(ended.status)
    }

    fn make_bundle(&self, stage: &Stage, work: &RunDir, terminal: bool) -> Result<PathBuf> {
        let bundle = work.path().join("bundle");
        let mut builder = HostCommand::new(stage.prefix().join("bin/caisson-rootfs-builder"));
        builder
            .args(["bundle", "--output"])
            .arg(&bundle)
            .arg("--busybox");
        if terminal {
            builder.arg("--tty");
        }
        builder.arg("--");
        match self.command.is_empty() {
            true => builder.args(["sh", "-c", GREETING]),
            false => builder.args(&self.command),
        };
        install::output_of(&mut builder)?;
        Ok(bundle)
    }
}

/// The id of the container.
fn id() -> String {
    format!("xtask-run-{}", std::process::id())
}

/// The staged installation, run where it lies.
struct Native {
    caisson: PathBuf,
    config: PathBuf,
}

impl Native {
    fn new(stage: &Stage, work: &RunDir) -> Result<Self> {
        let config = work.path().join("native.toml");
        install::write_config(&stage.prefix(), &config)?;
        Ok(Self {
            caisson: stage.prefix().join("bin/caisson"),
            config,
        })
    }

    fn command(&self) -> HostCommand {
        let mut command = HostCommand::new(&self.caisson);
        command.arg("--config").arg(&self.config);
        command
    }

    /// What `caisson check` says of this machine.
    fn check(&self) -> bool {
        let check = self
            .command()
            .arg("check")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        check.is_ok_and(|status| status.success())
    }

    fn run(&self, bundle: &Path, terminal: bool) -> Result<Ended> {
        let start = Instant::now();
        let mut command = self.command();
        command.args(["run", "--bundle"]).arg(bundle).arg(id());
        let failed = || format!("failed to run {}", self.caisson.display());
        if terminal {
            let status = command.status().with_context(failed)?;
            return Ok(Ended {
                status: shell_status(status),
                first_output: None,
            });
        }
        let mut child = command
            .stdout(Stdio::piped())
            .spawn()
            .with_context(failed)?;
        let first_output = match child.stdout.take() {
            Some(stdout) => pass_on(stdout, start)?,
            None => None,
        };
        let status = child.wait().context("failed to wait for caisson")?;
        Ok(Ended {
            status: shell_status(status),
            first_output,
        })
    }
}

/// Copies to stdout; when the first byte came.
fn pass_on(mut from: impl Read, start: Instant) -> Result<Option<Duration>> {
    let mut buffer = vec![0; 32 * 1024];
    let mut first = None;
    loop {
        let length = from
            .read(&mut buffer)
            .context("failed to read the container's output")?;
        if length == 0 {
            return Ok(first);
        }
        first.get_or_insert_with(|| start.elapsed());
        let mut stdout = io::stdout().lock();
        stdout
            .write_all(buffer.get(..length).unwrap_or_default())
            .and_then(|()| stdout.flush())
            .context("failed to pass on the container's output")?;
    }
}

fn shell_status(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .or(status.signal().map(|number| number.saturating_add(128)));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(255)
}

fn run_in_testbed(stage: &Stage, bundle: PathBuf, terminal: bool) -> Result<Ended> {
    let mut options = Options::new(build::testbed_init()?);
    options.install = Some(stage.root());
    options.shares.push(Share {
        dir: bundle,
        path: "/share".to_owned(),
        read_only: false,
    });
    let session = Session::new(terminal)?;
    let testbed = Testbed::start(&options)?;
    let command = Command::new(["caisson", "run", "--bundle", "/share", &id()]);
    let ended = session.run(&testbed, command)?;
    testbed.shutdown();
    Ok(ended)
}
