// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask bench`: measures in the testbed, on a clock that counts instructions, and makes tables and a picture.
//!
//! What is measured, and how, is `caisson-bench`'s (package `caisson-testbed`), which runs in the testbed. Here its
//! samples are kept as they come and become a report.

mod report;
mod stats;
mod timeline;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use caisson_testbed::bench::Line;
use caisson_testbed::{Command, Event, Options, Share, Testbed};
use clap::Args;

use crate::build::{Build, Kind, Profile};
use crate::install::{self, Stage};
use crate::{build, print, say, tree};
use report::Report;

/// A measurement takes seconds. Who says nothing for so long stands still (docs/status.md).
const STILL: Duration = Duration::from_secs(300);

/// Options of `bench`.
#[derive(Debug, Args)]
pub(crate) struct Bench {
    /// Parts to measure: boot, exits, start, stages, memory, truth; without them, all
    #[arg(value_name = "PART")]
    parts: Vec<String>,
    /// How often each is measured
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Where the raw samples, the tables and the picture go
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    output: PathBuf,
    /// Also put the tables and the picture into docs/; only with all parts
    #[arg(long, conflicts_with = "parts")]
    docs: bool,
    /// Also measure this Firecracker program (a release build, static) in the parts boot, exits and memory
    #[arg(long, value_name = "FILE")]
    firecracker: Option<PathBuf>,
    /// Use what `install --destdir DIR` made before, instead of building
    #[arg(long, value_name = "DIR")]
    installed: Option<PathBuf>,
}

impl Bench {
    pub(crate) fn run(self) -> Result<u8> {
        let output = tree().join(&self.output);
        fs::create_dir_all(&output)
            .with_context(|| format!("failed to make {}", output.display()))?;
        let samples = output.join("samples.jsonl");
        // Kept as they come: what was measured before an interruption is there.
        let file = fs::File::create(&samples)
            .with_context(|| format!("failed to make {}", samples.display()))?;
        let text = self.measure(file)?;
        let lines = text
            .lines()
            .map(|line| serde_json::from_str(line).with_context(|| format!("bad line {line:?}")))
            .collect::<Result<Vec<Line>>>()?;
        let report = Report::new(lines, &revision());
        write(&output.join("benchmarks.md"), &report.markdown())?;
        let picture = report.timeline();
        if let Some(picture) = &picture {
            write(&output.join("timeline.svg"), picture)?;
        }
        if self.docs {
            let docs = tree().join("docs");
            write(&docs.join("benchmarks.md"), &report.markdown())?;
            write(&docs.join("timeline.svg"), &picture.unwrap_or_default())?;
        }
        print(&report.markdown());
        say(&format!("raw samples: {}", samples.display()));
        Ok(0)
    }

    /// The lines of `caisson-bench`, which go into `samples` as well.
    fn measure(&self, mut samples: fs::File) -> Result<String> {
        let program = Build {
            kind: Kind::Binary,
            packages: &["caisson-testbed"],
            targets: &["caisson-bench"],
            // It is in the memory of a guest, too.
            profile: Profile::Release,
            is_static: true,
        }
        .run()?
        .pop()
        .context("cargo made no caisson-bench")?;
        let dir = program.parent().context("caisson-bench has no directory")?;
        let stage = Stage::new(self.installed.as_deref())?;
        let mut options = Options::new(build::testbed_init()?);
        options.instruction_count = true;
        options.install = Some(stage.root());
        options.shares.push(Share {
            dir: dir.to_owned(),
            path: "/bench".to_owned(),
            read_only: true,
        });
        let mut argv = vec![
            "/bench/caisson-bench".to_owned(),
            "--runs".to_owned(),
            self.runs.to_string(),
        ];
        if let Some(file) = &self.firecracker {
            let (share, path) = shared(file)?;
            options.shares.push(share);
            argv.extend(["--firecracker".to_owned(), path]);
        }
        let testbed = Testbed::start(&options)?;
        argv.extend(self.parts.iter().cloned());
        say(&format!(
            "measuring in the testbed, {} times each (some minutes)",
            self.runs
        ));
        let mut running = testbed.spawn(&Command::new(argv))?;
        drop(running.take_stdin());
        let mut text = Vec::new();
        loop {
            let event = running
                .next_event_within(STILL)
                .with_context(|| format!("nothing was measured for {} s", STILL.as_secs()))?;
            match event {
                Event::Stdout(bytes) => {
                    samples
                        .write_all(&bytes)
                        .context("failed to keep the samples")?;
                    text.extend(bytes);
                }
                Event::Stderr(bytes) => say(String::from_utf8_lossy(&bytes).trim_end()),
                Event::Exited(exit) if exit.shell_status() == 0 => break,
                Event::Exited(exit) => {
                    bail!(
                        "caisson-bench ended with {}{}",
                        exit.shell_status(),
                        testbed.console_tail()
                    )
                }
            }
        }
        testbed.shutdown();
        String::from_utf8(text).context("caisson-bench wrote something else than text")
    }
}

/// The directory of a program, to be shared, and the program's path in the testbed.
fn shared(file: &Path) -> Result<(Share, String)> {
    const PLACE: &str = "/firecracker";
    let file = fs::canonicalize(file).with_context(|| format!("no {}", file.display()))?;
    let name = file.file_name().and_then(|name| name.to_str());
    let name = name.with_context(|| format!("{} has no plain name", file.display()))?;
    let dir = file.parent().context("a program has no directory")?;
    let share = Share {
        dir: dir.to_owned(),
        path: PLACE.to_owned(),
        read_only: true,
    };
    Ok((share, format!("{PLACE}/{name}")))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("failed to write {}", path.display()))
}

/// What was measured: the commit, and whether the tree differs from it.
fn revision() -> String {
    let mut git = std::process::Command::new("git");
    git.current_dir(tree())
        .args(["describe", "--always", "--dirty", "--abbrev=12"]);
    // A tree without its history can be measured, too.
    install::output_of(&mut git).map_or("unknown".to_owned(), |text| text.trim().to_owned())
}
