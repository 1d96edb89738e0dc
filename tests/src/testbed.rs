// SPDX-License-Identifier: Apache-2.0

//! [`Testbed`]: a machine from its start to its end.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::accel::{self, Accel, Verdict};
use crate::cache::{self, CacheError};
use crate::cleanup::RunDir;
use crate::frame::{Exit, Frame, FrameError, GuestMount, Hello, RunRequest, Setup, WindowSize};
use crate::link::{Event, Link, LinkError, Running};
use crate::machine::{Machine, MachineError, Plan, Shared};
use crate::root::{self, RootError};
use crate::tools::{self, ToolError};

/// How long an orderly end may take before it is a forced one.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(10);
/// How long a boot may take: it is 4 to 7 s on an idle machine, more where others build.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// How long the trial of a KVM may take.
const KVM_LIMIT: Duration = Duration::from_secs(30);
/// Bytes of a log that an error carries.
const TAIL: usize = 3000;

/// A directory of the host in the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// The host's directory.
    pub dir: PathBuf,
    /// Where it is in the machine, an absolute path.
    pub path: String,
    /// Mounted read-only in the machine.
    pub read_only: bool,
}

/// What the machine is to be.
#[derive(Debug, Clone)]
pub struct Options {
    /// The `testbed-init` binary, static.
    pub init: PathBuf,
    /// A tree that is laid over the root file system, read-only for the host: an installed Caisson.
    pub install: Option<PathBuf>,
    /// Directories of the host.
    pub shares: Vec<Share>,
    /// Memory, MiB.
    pub memory_mib: u32,
    /// Processors; more than one is for hunting races by hand (QEMU's emulated SVM goes wrong).
    pub cpus: u32,
    /// Count instructions instead of time, for benches.
    pub instruction_count: bool,
    /// Where the console's output is kept; otherwise it is gone with the machine.
    pub console_log: Option<PathBuf>,
}

impl Options {
    /// The usual machine: 6 GiB, one processor, nothing shared.
    pub fn new(init: PathBuf) -> Self {
        Self {
            init,
            install: None,
            shares: Vec::new(),
            memory_mib: 6144,
            cpus: 1,
            instruction_count: false,
            console_log: None,
        }
    }
}

/// Why a testbed did not start.
#[derive(Debug, thiserror::Error)]
pub enum TestbedError {
    /// A program is missing.
    #[error("the testbed needs a program")]
    Tool(#[from] ToolError),
    /// The root could not be made.
    #[error("the testbed has no root file system")]
    Root(#[from] RootError),
    /// There is no cache.
    #[error("the testbed has no cache")]
    Cache(#[from] CacheError),
    /// Not root.
    #[error("the testbed must be run by root: its virtio-fs daemons serve files of every owner")]
    NotRoot,
    /// A file operation.
    #[error("failed to {0}")]
    File(&'static str, #[source] std::io::Error),
    /// A process did not start.
    #[error("failed to start the testbed's processes")]
    Machine(#[from] MachineError),
    /// The machine did not get ready.
    #[error("the testbed's machine did not get ready within {limit:?}{logs}")]
    NotReady {
        /// How long it had.
        limit: Duration,
        /// Tails of its logs.
        logs: String,
        /// What came instead of the hello.
        source: FrameError,
    },
    /// The machine came up and could not make itself ready.
    #[error("the testbed's machine could not be set up: {0}{1}")]
    SetUp(String, String),
    /// The connection.
    #[error("failed to talk to the testbed's machine")]
    Link(#[from] LinkError),
}

/// A command for the machine. Runs as root, in `/root`, with the machine's PATH.
#[derive(Debug, Clone, Default)]
pub struct Command {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Variables besides the machine's own.
    pub env: Vec<(String, String)>,
    /// Working directory; `/root` without it.
    pub cwd: Option<String>,
    /// Give it a terminal of this size.
    pub tty: Option<WindowSize>,
}

impl Command {
    /// A program with its arguments.
    pub fn new<S: Into<String>>(argv: impl IntoIterator<Item = S>) -> Self {
        Self {
            argv: argv.into_iter().map(Into::into).collect(),
            ..Self::default()
        }
    }

    /// A line for `sh -c`.
    pub fn shell(line: &str) -> Self {
        Self::new(["sh", "-c", line])
    }

    /// With one more environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }
}

/// What a command wrote and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub exit: Exit,
    /// All of its stdout.
    pub stdout: Vec<u8>,
    /// All of its stderr.
    pub stderr: Vec<u8>,
}

/// A running machine. Dropping it ends it at once.
#[derive(Debug)]
pub struct Testbed {
    link: Link,
    machine: Machine,
    hello: Hello,
    accel: Accel,
    console_log: PathBuf,
    boot_time: Duration,
    /// After the machine, so that it is removed when nothing uses it any more.
    _dir: RunDir,
}

impl Testbed {
    /// Boots a machine and waits until it is ready. Makes its root first if there is none yet.
    ///
    /// # Errors
    /// If a program is missing, the root cannot be made, or the machine does not come up; then the error holds
    /// the tail of its console.
    pub fn start(options: &Options) -> Result<Self, TestbedError> {
        if !rustix::process::geteuid().is_root() {
            return Err(TestbedError::NotRoot);
        }
        tools::install(&[tools::QEMU, tools::VIRTIOFSD, tools::MMDEBSTRAP])?;
        let cache = cache::dir()?;
        let verdict = match options.instruction_count {
            true => Verdict::DoesNot,
            false => accel::verdict(&cache),
        };
        match verdict {
            Verdict::Runs => Self::boot(options, Accel::Kvm, BOOT_LIMIT),
            Verdict::Unknown => {
                let tried = Self::boot(options, Accel::Kvm, KVM_LIMIT);
                let runs = tried.as_ref().is_ok_and(|testbed| testbed.hello.kvm);
                accel::remember(&cache, runs);
                match runs {
                    true => tried,
                    false => Self::boot(options, Accel::Tcg, BOOT_LIMIT),
                }
            }
            Verdict::DoesNot if options.instruction_count => {
                Self::boot(options, Accel::InstructionCount, BOOT_LIMIT)
            }
            Verdict::DoesNot => Self::boot(options, Accel::Tcg, BOOT_LIMIT),
        }
    }

    fn boot(options: &Options, accel: Accel, limit: Duration) -> Result<Self, TestbedError> {
        let start = Instant::now();
        let root = root::ensure()?;
        let dir = RunDir::new()
            .map_err(|error| TestbedError::File("make a directory for the testbed", error))?;
        let own_log = dir.path().join("console.log");
        let console_log = options.console_log.clone().unwrap_or(own_log);
        let (setup, shared) = shares(options, &root.rootfs);
        let plan = Plan {
            root,
            init: options.init.clone(),
            qemu: tools::QEMU.ensure()?,
            virtiofsd: tools::VIRTIOFSD.ensure()?,
            accel,
            memory_mib: options.memory_mib,
            cpus: options.cpus,
            shared,
            dir: dir.path().to_owned(),
            console_log: console_log.clone(),
        };
        let (machine, port) = Machine::start(plan)?;
        let hello = greet(&port, setup, limit).map_err(|error| {
            let mut logs = tail_of("console", &console_log);
            logs.push_str(&tail_of("qemu", &dir.path().join("qemu.log")));
            match error {
                Greeting::Frame(source) => TestbedError::NotReady {
                    limit,
                    logs,
                    source,
                },
                Greeting::Failed(why) => TestbedError::SetUp(why, logs),
            }
        })?;
        let link = Link::new(port).map_err(|error| TestbedError::File("use the port", error))?;
        let boot_time = start.elapsed();
        Ok(Self {
            link,
            machine,
            hello,
            accel,
            console_log,
            boot_time,
            _dir: dir,
        })
    }

    /// What the machine said of itself.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// What runs it.
    pub fn accel(&self) -> Accel {
        self.accel
    }

    /// From the start of its processes until it was ready.
    pub fn boot_time(&self) -> Duration {
        self.boot_time
    }

    /// The end of what it wrote on its console, at most a few thousand bytes; empty if it wrote nothing.
    pub fn console_tail(&self) -> String {
        tail_of("console", &self.console_log)
    }

    /// Starts a command.
    ///
    /// # Errors
    /// If the machine is gone. That the command cannot be started is told by its first event.
    pub fn spawn(&self, command: &Command) -> Result<Running, LinkError> {
        self.link.run(RunRequest {
            argv: command.argv.clone(),
            env: command.env.clone(),
            cwd: command.cwd.clone(),
            tty: command.tty,
        })
    }

    /// Runs a command to its end, with `input` as its stdin, and collects what it writes.
    ///
    /// # Errors
    /// If it cannot be started or the machine is gone.
    pub fn output(&self, command: &Command, input: &[u8]) -> Result<Output, LinkError> {
        let mut running = self.spawn(command)?;
        let mut stdin = running.take_stdin();
        let mut output = Output {
            exit: Exit::Code(0),
            stdout: Vec::new(),
            stderr: Vec::new(),
        };
        std::thread::scope(|scope| {
            scope.spawn(move || {
                // A command need not read its input to the end.
                let _ = stdin.as_mut().map(|stdin| stdin.write_all(input));
            });
            loop {
                match running.next_event()? {
                    Event::Stdout(bytes) => output.stdout.extend_from_slice(&bytes),
                    Event::Stderr(bytes) => output.stderr.extend_from_slice(&bytes),
                    Event::Exited(exit) => {
                        output.exit = exit;
                        return Ok(output);
                    }
                }
            }
        })
    }

    /// Ends the machine in order (what it wrote to shares is on the host then); by force after some seconds.
    pub fn shutdown(self) {
        if self.link.power_off().is_ok() {
            self.machine.wait(SHUTDOWN_LIMIT);
        }
    }
}

/// What is shared, for the machine's inside and for its outside.
fn shares(options: &Options, rootfs: &Path) -> (Setup, Vec<Shared>) {
    let mut setup = Setup {
        layers: Vec::new(),
        mounts: Vec::new(),
    };
    let mut shared = vec![Shared {
        tag: "root".to_owned(),
        dir: rootfs.to_owned(),
        changes: false,
    }];
    if let Some(dir) = &options.install {
        setup.layers.push("install".to_owned());
        shared.push(Shared {
            tag: "install".to_owned(),
            dir: dir.clone(),
            changes: false,
        });
    }
    for (index, share) in options.shares.iter().enumerate() {
        let tag = format!("share{index}");
        setup.mounts.push(GuestMount {
            tag: tag.clone(),
            path: share.path.clone(),
            read_only: share.read_only,
        });
        shared.push(Shared {
            tag,
            dir: share.dir.clone(),
            changes: true,
        });
    }
    (setup, shared)
}

enum Greeting {
    Frame(FrameError),
    Failed(String),
}

impl From<FrameError> for Greeting {
    fn from(error: FrameError) -> Self {
        Self::Frame(error)
    }
}

/// Tells the machine what it is to be and waits until it says that it is.
fn greet(port: &UnixStream, setup: Setup, limit: Duration) -> Result<Hello, Greeting> {
    let io = |error| FrameError::Io("set the deadline of", error);
    port.set_read_timeout(Some(limit)).map_err(io)?;
    Frame::Setup(setup).write_to(&mut &*port, 0)?;
    let hello = match Frame::read_from(&mut &*port)? {
        (_, Frame::Hello(hello)) => hello,
        (_, Frame::Failed(why)) => return Err(Greeting::Failed(why)),
        (_, other) => return Err(Greeting::Failed(format!("its first frame was {other:?}"))),
    };
    port.set_read_timeout(None).map_err(io)?;
    Ok(hello)
}

/// The end of a log under a heading; nothing if there is none.
fn tail_of(name: &str, path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let tail = bytes
        .get(bytes.len().saturating_sub(TAIL)..)
        .unwrap_or_default();
    let text = String::from_utf8_lossy(tail);
    let text = text.trim();
    if text.is_empty() {
        String::new()
    } else {
        format!("\n--- {name}:\n{text}")
    }
}
