// SPDX-License-Identifier: Apache-2.0

//! A command whose processes are killed exactly at one of the system calls by which they change something.
//!
//! The command and all that it starts are traced (ptrace(2)). The calls of one of them, chosen by its place in the
//! family, are counted as it is about to make them; at the call asked for it is killed, so that every call before it
//! was made and this one was not. Then all others are let go and live on as if nobody had watched.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::support::runtime;

/// Whose calls are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kin {
    /// The command itself.
    Itself,
    /// What it starts.
    Child,
    /// What that starts.
    Grandchild,
}

/// What was seen of a traced command.
#[derive(Debug)]
pub(crate) struct Seen {
    /// The calls of the process that was watched, in their order, the one at which it was killed last.
    pub(crate) calls: Vec<String>,
    /// Whether it was killed.
    pub(crate) killed: bool,
    /// How the command ended.
    pub(crate) status: ExitStatus,
}

/// Runs the runtime under test with `arguments`; its `kin` is killed when it is about to make its call number `at`
/// (from 0), if that is ever. Its `stdout` and `stderr` go to files in `output`, standard input is at its end.
pub(crate) fn run(arguments: &[&str], output: &Path, kin: Kin, at: Option<usize>) -> Seen {
    std::thread::scope(|scope| {
        // What a thread traces is let go when that thread ends.
        let tracer = scope.spawn(|| Tracer::start(arguments, output, kin, at).follow());
        tracer.join().unwrap()
    })
}

struct Tracer {
    command: Child,
    kin: Kin,
    at: Option<usize>,
    /// Processes, by their place in the family.
    family: BTreeMap<i32, Option<Kin>>,
    /// The shell that waited for the tracer has become the command.
    begun: bool,
    calls: Vec<String>,
    killed: bool,
}

impl Tracer {
    /// Starts the command by way of a shell that waits for a line, so that not one call of it is missed.
    fn start(arguments: &[&str], output: &Path, kin: Kin, at: Option<usize>) -> Self {
        let file = |name| fs::File::create(output.join(name)).unwrap();
        let mut shell = Command::new("sh");
        shell
            .args(["-c", "read go; exec \"$@\"", "sh"])
            .arg(runtime().get_program())
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(file("stdout"))
            .stderr(file("stderr"));
        let mut child = shell.spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let options = Options::PTRACE_O_TRACESYSGOOD
            | Options::PTRACE_O_TRACEFORK
            | Options::PTRACE_O_TRACEVFORK
            | Options::PTRACE_O_TRACECLONE
            | Options::PTRACE_O_TRACEEXEC;
        ptrace::seize(Pid::from_raw(pid), options).unwrap();
        child.stdin.take().unwrap().write_all(b"go\n").unwrap();
        Self {
            command: child,
            kin,
            at,
            family: BTreeMap::from([(pid, Some(Kin::Itself))]),
            begun: false,
            calls: Vec::new(),
            killed: false,
        }
    }

    /// Until the command has ended.
    fn follow(mut self) -> Seen {
        loop {
            let event = waitpid(None, Some(WaitPidFlag::__WALL)).unwrap();
            let Some(pid) = event.pid() else { continue };
            match event {
                WaitStatus::Exited(..) | WaitStatus::Signaled(..) => {
                    if i64::from(pid.as_raw()) == i64::from(self.command.id()) {
                        return Seen {
                            calls: self.calls,
                            killed: self.killed,
                            status: status_of(&event),
                        };
                    }
                }
                WaitStatus::PtraceSyscall(_) => self.at_call(pid),
                WaitStatus::PtraceEvent(_, _, libc::PTRACE_EVENT_EXEC) => {
                    // The shell's own beginning may still be seen.
                    let name = fs::read_to_string(format!("/proc/{pid}/comm"));
                    self.begun |= name.is_ok_and(|name| name != "sh\n");
                    self.resume(pid, None);
                }
                // A new thread or process, before its first instruction, and all stops that mean nothing here.
                WaitStatus::PtraceEvent(..) => self.resume(pid, None),
                WaitStatus::Stopped(_, signal) => self.resume(pid, Some(signal)),
                _ => {}
            }
        }
    }

    fn resume(&mut self, pid: Pid, signal: Option<Signal>) {
        let watched = !self.killed && self.begun && self.kin_of(pid.as_raw()) == Some(self.kin);
        // A thread that was killed meanwhile cannot be resumed; its end is told next.
        let _ = if watched || !self.begun {
            ptrace::syscall(pid, signal)
        } else {
            ptrace::cont(pid, signal)
        };
    }

    /// A thread of the watched process enters or leaves a call.
    fn at_call(&mut self, pid: Pid) {
        let enters =
            ptrace::syscall_info(pid).is_ok_and(|info| info.op == libc::PTRACE_SYSCALL_INFO_ENTRY);
        if enters
            && self.begun
            && !self.killed
            && let Some(call) = change(pid)
        {
            let number = self.calls.len();
            self.calls.push(call);
            if self.at == Some(number) {
                self.killed = true;
                kill(Pid::from_raw(thread_group(pid.as_raw()).0), Signal::SIGKILL).unwrap();
                return;
            }
        }
        self.resume(pid, None);
    }

    fn kin_of(&mut self, pid: i32) -> Option<Kin> {
        let (group, parent) = thread_group(pid);
        if let Some(kin) = self.family.get(&group) {
            return *kin;
        }
        let kin = match self.family.get(&parent) {
            Some(Some(Kin::Itself)) => Some(Kin::Child),
            Some(Some(Kin::Child)) => Some(Kin::Grandchild),
            _ => None,
        };
        self.family.insert(group, kin);
        kin
    }
}

fn status_of(event: &WaitStatus) -> ExitStatus {
    let raw = match event {
        WaitStatus::Exited(_, code) => code << 8,
        WaitStatus::Signaled(_, signal, _) => *signal as i32,
        _ => unreachable!(),
    };
    ExitStatus::from_raw(raw)
}

/// The process that a thread belongs to, and that one's parent.
fn thread_group(pid: i32) -> (i32, i32) {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|value| value.trim().parse().ok())
            .unwrap_or(0)
    };
    (field("Tgid:"), field("PPid:"))
}

/// The call that a thread is about to make, in words, if it changes something that others can see.
fn change(pid: Pid) -> Option<String> {
    let regs = ptrace::getregs(pid).ok()?;
    let arguments = [regs.rdi, regs.rsi, regs.rdx, regs.r10];
    let number = i64::try_from(regs.orig_rax).ok()?;
    let path = |index: usize| text_at(pid, arguments[index]);
    let file = || {
        let link = fs::read_link(format!("/proc/{pid}/fd/{}", arguments[0]));
        link.map_or(String::new(), |link| link.display().to_string())
    };
    let writes = |flags: u64| {
        let flags = i32::try_from(flags).unwrap_or(0);
        flags & (libc::O_CREAT | libc::O_WRONLY | libc::O_RDWR) != 0
    };
    let call = match number {
        libc::SYS_open if writes(arguments[1]) => format!("open {}", path(0)),
        libc::SYS_openat if writes(arguments[2]) => format!("open {}", path(1)),
        libc::SYS_mkdir => format!("mkdir {}", path(0)),
        libc::SYS_mkdirat => format!("mkdir {}", path(1)),
        libc::SYS_rmdir => format!("rmdir {}", path(0)),
        libc::SYS_unlink => format!("unlink {}", path(0)),
        libc::SYS_unlinkat => format!("unlink {}", path(1)),
        libc::SYS_rename => format!("rename {}", path(0)),
        libc::SYS_renameat | libc::SYS_renameat2 => format!("rename {}", path(1)),
        libc::SYS_chmod => format!("chmod {}", path(0)),
        libc::SYS_fchmod | libc::SYS_fchmodat => "chmod".to_owned(),
        libc::SYS_write | libc::SYS_pwrite64 | libc::SYS_writev => {
            let file = file();
            // Nobody else sees it.
            if file.starts_with("/memfd:") || file.contains("[event") {
                return None;
            }
            format!("write {file}")
        }
        libc::SYS_fsync | libc::SYS_fdatasync => format!("sync {}", file()),
        libc::SYS_ftruncate => format!("truncate {}", file()),
        libc::SYS_sendto | libc::SYS_sendmsg => "send".to_owned(),
        libc::SYS_flock => format!("lock {}", file()),
        libc::SYS_bind => "bind".to_owned(),
        libc::SYS_listen => "listen".to_owned(),
        libc::SYS_connect => "connect".to_owned(),
        libc::SYS_mount => format!("mount {}", path(1)),
        libc::SYS_move_mount => format!("move mount to {}", path(3)),
        libc::SYS_open_tree => format!("open tree {}", path(1)),
        libc::SYS_mount_setattr => "change mount".to_owned(),
        libc::SYS_unshare => "unshare".to_owned(),
        libc::SYS_setns => "setns".to_owned(),
        libc::SYS_setsid => "setsid".to_owned(),
        libc::SYS_clone | libc::SYS_clone3 | libc::SYS_fork | libc::SYS_vfork => "fork".to_owned(),
        libc::SYS_execve => format!("exec {}", path(0)),
        libc::SYS_kill | libc::SYS_tgkill | libc::SYS_pidfd_send_signal => "kill".to_owned(),
        libc::SYS_exit_group => "exit".to_owned(),
        _ => return None,
    };
    Some(call)
}

/// A C string of a tracee, at most 200 bytes of it.
fn text_at(pid: Pid, address: u64) -> String {
    let mut bytes = [0; 200];
    let memory = fs::File::open(format!("/proc/{pid}/mem"));
    let count = memory.and_then(|memory| memory.read_at(&mut bytes, address));
    let bytes = &bytes[..count.unwrap_or(0)];
    let end = bytes.iter().position(|byte| *byte == 0);
    String::from_utf8_lossy(&bytes[..end.unwrap_or(bytes.len())]).into_owned()
}
