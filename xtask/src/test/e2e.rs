// SPDX-License-Identifier: Apache-2.0

//! The end-to-end tests: one program, built natively, run in the testbed once per test.
//!
//! Each testbed takes the next test from one queue, the longest (by the durations of earlier runs) first. A
//! test that fails or hangs is shown with its output and what the testbed knows, and the testbed is replaced,
//! so that what it left behind meets no other test.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command as HostCommand;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use caisson_testbed::cleanup::RunDir;
use caisson_testbed::frame::Exit;
use caisson_testbed::{Command, Event, LinkError, Options, Share, Testbed, cache};

use super::Tally;
use crate::build::{self, Build, Kind, Profile};
use crate::install::{self, Stage};
use crate::print;

/// Environment variable that names another runtime to run the tests against.
const RUNTIME: &str = "CAISSON_RUNTIME";
/// Most bytes of a test's output that are kept, its newest.
const KEPT: usize = 256 * 1024;
/// Durations of earlier runs, seconds by name, in the cache.
const DURATIONS: &str = "e2e-durations.json";
/// Assumed for a test that has never run.
const UNKNOWN_SECONDS: f64 = 30.0;
/// What is asked of a testbed in which a test hung.
const DIAGNOSIS: &str =
    "ps -eo pid,ppid,stat,wchan:24,etimes,args --forest | grep -v '\\[.*\\]$' | tail -n 60
find /run /tmp -xdev -name '*.log' -size +0 2>/dev/null | head -n 20 | while read -r log; do
    echo \"--- $log\"; tail -n 30 \"$log\"
done
echo '--- kernel log'; dmesg | tail -n 20";

/// The built test program.
pub(super) struct Suite {
    program: PathBuf,
    names: Vec<String>,
}

/// How tests are to be run.
#[derive(Debug, Clone)]
pub(super) struct How {
    /// With full counts.
    pub(super) soak: bool,
    /// After this a test counts as hung.
    pub(super) limit: Duration,
    pub(super) testbeds: usize,
    /// An installation that is there already.
    pub(super) installed: Option<PathBuf>,
}

/// How one test ended.
struct Outcome {
    passed: bool,
    /// One word or line.
    verdict: String,
    output: Vec<u8>,
    /// What is known besides, of a failed one.
    diagnosis: String,
}

/// What the testbeds' threads share.
struct Run<'a> {
    options: Options,
    queue: Mutex<VecDeque<&'a str>>,
    limit: Duration,
    environment: Vec<(String, String)>,
    tally: Mutex<Tally>,
    durations: Mutex<BTreeMap<String, f64>>,
    failed: Mutex<Vec<&'a str>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Suite {
    /// Builds the program and lists its tests.
    pub(super) fn build() -> Result<Self> {
        let program = Build {
            kind: Kind::IntegrationTest,
            packages: &["caisson-testbed"],
            targets: &["e2e"],
            profile: Profile::Dev,
            is_static: false,
        }
        .run()?
        .pop()
        .context("cargo made no end-to-end tests")?;
        let list =
            install::output_of(HostCommand::new(&program).args(["--list", "--format", "terse"]))?;
        let names = list.lines().filter_map(|line| line.strip_suffix(": test"));
        let names = names.map(str::to_owned).collect();
        Ok(Self { program, names })
    }

    /// The test of exactly this name, or else all whose names contain it.
    pub(super) fn choose(&self, filter: Option<&str>) -> Vec<&str> {
        let names = || self.names.iter().map(String::as_str);
        let Some(filter) = filter else {
            return names().collect();
        };
        match names().find(|&name| name == filter) {
            Some(name) => vec![name],
            None => names().filter(|name| name.contains(filter)).collect(),
        }
    }

    /// Runs tests to their end.
    pub(super) fn run(&self, names: &[&str], how: &How) -> Result<Tally> {
        let share = RunDir::new().context("failed to make a directory for the tests")?;
        let program = share.path().join("e2e");
        fs::copy(&self.program, &program).context("failed to copy the end-to-end tests")?;
        let mut options = Options::new(build::testbed_init()?);
        options.shares.push(Share {
            dir: share.path().to_owned(),
            path: "/share".to_owned(),
            read_only: true,
        });
        let mut environment = vec![("RUST_BACKTRACE".to_owned(), "1".to_owned())];
        if how.soak {
            environment.push(("CAISSON_SOAK".to_owned(), "1".to_owned()));
        }
        // Another runtime comes from the testbed's root.
        let stage = match std::env::var(RUNTIME) {
            Ok(name) => {
                environment.push((RUNTIME.to_owned(), name));
                None
            }
            Err(_) => Some(Stage::new(how.installed.as_deref())?),
        };
        options.install = stage.as_ref().map(|stage| stage.root());

        let durations_file = cache::dir()?.join(DURATIONS);
        let durations = read_durations(&durations_file);
        let run = Run {
            options,
            queue: Mutex::new(longest_first(names, &durations).into()),
            limit: how.limit,
            environment,
            tally: Mutex::default(),
            durations: Mutex::new(durations),
            failed: Mutex::default(),
        };
        print(&format!(
            "running {} end-to-end tests in {} testbeds",
            names.len(),
            how.testbeds
        ));
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..how.testbeds)
                .map(|_| scope.spawn(|| run.work()))
                .collect();
            workers
                .into_iter()
                .try_for_each(|worker| match worker.join() {
                    Ok(result) => result,
                    Err(panic) => std::panic::resume_unwind(panic),
                })
        })?;
        let text = serde_json::to_string_pretty(&*lock(&run.durations))?;
        fs::write(&durations_file, text).context("failed to keep the tests' durations")?;
        for name in lock(&run.failed).iter() {
            print(&format!("failed: {name}"));
        }
        let tally = *lock(&run.tally);
        Ok(tally)
    }
}

fn read_durations(path: &Path) -> BTreeMap<String, f64> {
    // A damaged or missing file costs some order, nothing else.
    let text = fs::read(path).unwrap_or_default();
    serde_json::from_slice(&text).unwrap_or_default()
}

fn longest_first<'a>(names: &[&'a str], durations: &BTreeMap<String, f64>) -> Vec<&'a str> {
    let seconds = |name: &str| durations.get(name).copied().unwrap_or(UNKNOWN_SECONDS);
    let mut names = names.to_vec();
    names.sort_by(|a, b| seconds(b).total_cmp(&seconds(a)).then_with(|| a.cmp(b)));
    names
}

impl<'a> Run<'a> {
    /// Takes tests from the queue until it is empty.
    fn work(&self) -> Result<()> {
        let mut testbed = None;
        loop {
            let Some(name) = lock(&self.queue).pop_front() else {
                break;
            };
            let current = match testbed.take() {
                Some(testbed) => testbed,
                None => Testbed::start(&self.options)?,
            };
            let start = Instant::now();
            let outcome = self.run_test(&current, name);
            let seconds = start.elapsed().as_secs_f64();
            self.report(name, &outcome, seconds);
            if outcome.passed {
                testbed = Some(current);
            }
        }
        Ok(())
    }

    fn run_test(&self, testbed: &Testbed, name: &str) -> Outcome {
        let mut command = Command::new([
            "/share/e2e",
            "--exact",
            name,
            "--nocapture",
            "--test-threads=1",
        ]);
        command.env.clone_from(&self.environment);
        command.cwd = Some("/tmp".to_owned());
        let mut output = Vec::new();
        let mut diagnosis = String::new();
        let ended = self.follow(testbed, &command, &mut output, &mut diagnosis);
        let (passed, verdict) = match &ended {
            // libtest also succeeds when it has found no such test.
            Ok(exit) if exit.success() && contains(&output, b"test result: ok. 1 passed") => {
                (true, "ok".to_owned())
            }
            Ok(Exit::Code(code)) => (false, format!("FAILED (status {code})")),
            Ok(Exit::Signal(number)) => (false, format!("FAILED (signal {number})")),
            Err(LinkError::Timeout(_)) => (
                false,
                format!("FAILED (hung: no end after {} s)", self.limit.as_secs()),
            ),
            Err(error) => (false, format!("FAILED ({error})")),
        };
        if !passed && diagnosis.is_empty() {
            diagnosis = testbed.console_tail();
        }
        Outcome {
            passed,
            verdict,
            output,
            diagnosis,
        }
    }

    /// Follows a test to its end or its deadline; on that it is looked at and then killed.
    fn follow(
        &self,
        testbed: &Testbed,
        command: &Command,
        output: &mut Vec<u8>,
        diagnosis: &mut String,
    ) -> Result<Exit, LinkError> {
        let deadline = Instant::now() + self.limit;
        let mut running = testbed.spawn(command)?;
        drop(running.take_stdin());
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match running.next_event_within(left) {
                Ok(Event::Stdout(bytes) | Event::Stderr(bytes)) => keep(output, &bytes),
                Ok(Event::Exited(exit)) => return Ok(exit),
                Err(error) => {
                    if matches!(error, LinkError::Timeout(_)) {
                        *diagnosis = diagnose(testbed);
                    }
                    return Err(error);
                }
            }
        }
    }

    fn report(&self, name: &'a str, outcome: &Outcome, seconds: f64) {
        // One lock for all lines of one test.
        let mut tally = lock(&self.tally);
        let output = String::from_utf8_lossy(&outcome.output);
        print(&format!(
            "test {name} ... {} ({seconds:.1} s)",
            outcome.verdict
        ));
        if outcome.passed {
            tally.passed += 1;
            for line in output.lines().filter(|line| line.starts_with("count: ")) {
                print(&format!("     {line}"));
            }
            lock(&self.durations).insert(name.to_owned(), (seconds * 10.0).round() / 10.0);
        } else {
            tally.failed += 1;
            print(&format!("--- output of {name}:\n{}", output.trim_end()));
            if !outcome.diagnosis.is_empty() {
                print(outcome.diagnosis.trim_start());
            }
            print("---");
            lock(&self.failed).push(name);
        }
    }
}

fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}

/// Appends, and drops the oldest above [`KEPT`].
fn keep(output: &mut Vec<u8>, bytes: &[u8]) {
    output.extend_from_slice(bytes);
    if output.len() > KEPT.saturating_mul(2) {
        output.drain(..output.len().saturating_sub(KEPT));
    }
}

/// What a testbed knows of the test that hangs in it.
fn diagnose(testbed: &Testbed) -> String {
    let mut said = Vec::new();
    let mut ask = || -> Result<(), LinkError> {
        let mut running = testbed.spawn(&Command::shell(DIAGNOSIS))?;
        drop(running.take_stdin());
        loop {
            match running.next_event_within(Duration::from_secs(60))? {
                Event::Stdout(bytes) | Event::Stderr(bytes) => keep(&mut said, &bytes),
                Event::Exited(_) => return Ok(()),
            }
        }
    };
    let note = match ask() {
        Ok(()) => String::new(),
        Err(error) => format!("\n(the testbed does not answer: {error})"),
    };
    let said = String::from_utf8_lossy(&said).into_owned();
    format!("--- the testbed:\n{said}{note}{}", testbed.console_tail())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_test_is_first_and_unknown_ones_are_in_between() {
        let durations = BTreeMap::from([("short".to_owned(), 1.0), ("long".to_owned(), 300.0)]);
        assert_eq!(
            longest_first(&["short", "new", "long", "also new"], &durations),
            ["long", "also new", "new", "short"]
        );
    }

    #[test]
    fn an_exact_name_chooses_one_test_and_a_part_of_one_all_that_have_it() {
        let names = ["exit::code", "exit::code_again", "tty::code"].map(str::to_owned);
        let suite = Suite {
            program: PathBuf::new(),
            names: names.to_vec(),
        };
        assert_eq!(suite.choose(Some("exit::code")), ["exit::code"]);
        assert_eq!(
            suite.choose(Some("exit")),
            ["exit::code", "exit::code_again"]
        );
        assert_eq!(suite.choose(Some("none")), [""; 0]);
        assert_eq!(suite.choose(None).len(), 3);
    }

    #[test]
    fn of_a_long_output_the_newest_part_is_kept() {
        let mut output = Vec::new();
        for byte in 0..200_u8 {
            keep(&mut output, &[byte; 10_000]);
        }
        assert!(output.len() <= 2 * KEPT && output.len() >= KEPT);
        assert_eq!(output.last(), Some(&199));
    }
}
