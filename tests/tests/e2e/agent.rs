// SPDX-License-Identifier: Apache-2.0

//! The agent inside the guest killed: while idle, while it starts a container, and in an exec.
//!
//! PID 1 cannot be killed by the processes of its own machine, not even with SIGKILL. It dies of a fault of its own. So
//! the guest of these tests begins with a program that leaves a tracer behind and becomes the agent; the tracer makes
//! it jump to where there is nothing.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use caisson_testbed::installed::path_of;

use crate::faults::{TRUTH, stopped_then_gone};
use crate::parts::{Config, compiled, initramfs_with_init};
use crate::support::{Bundle, Container, Traces, count, new_id, show, wait_for, wait_within};

/// PID 1 that is to die: of `KILL_AT_CALL=N` on the kernel's command line when it is about to make its N-th system
/// call as the agent, else as soon as a process has the argument 77777 ([`TRIGGER`]).
const DOOMED_INIT: &str = r#"
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

static void seize(void) {
    ptrace(PTRACE_SEIZE, 1, 0, PTRACE_O_TRACESYSGOOD);
    ptrace(PTRACE_INTERRUPT, 1, 0, 0);
    waitpid(1, 0, __WALL);
}

static void crash(void) {
    struct user_regs_struct regs;
    ptrace(PTRACE_GETREGS, 1, 0, &regs);
    regs.rip = 8;
    regs.orig_rax = -1;
    ptrace(PTRACE_SETREGS, 1, 0, &regs);
    ptrace(PTRACE_DETACH, 1, 0, 0);
}

static int triggered(void) {
    for (int pid = 2; pid < 2000; pid++) {
        char path[64], text[256];
        snprintf(path, sizeof path, "/doom/%d/cmdline", pid);
        int fd = open(path, O_RDONLY);
        if (fd < 0)
            continue;
        ssize_t size = read(fd, text, sizeof text);
        close(fd);
        if (size > 0 && memmem(text, size, "77777", 5))
            return 1;
    }
    return 0;
}

static void follow(long calls) {
    int status, signal = 0, entering = 0;
    for (;;) {
        ptrace(PTRACE_SYSCALL, 1, 0, signal);
        if (waitpid(1, &status, __WALL) != 1)
            _exit(1);
        int call = WSTOPSIG(status) == (SIGTRAP | 0x80);
        if (call && (entering = !entering) && calls-- == 0)
            return;
        // A stop that is no event and no call is a signal on its way.
        signal = call || status >> 16 ? 0 : WSTOPSIG(status);
    }
}

int main(int argc, char **argv) {
    if (getpid() != 1) {
        execv("/real", argv);
        return 127;
    }
    int ready[2];
    char byte;
    const char *calls = getenv("KILL_AT_CALL");
    if (pipe(ready) == 0 && fork() == 0) {
        setsid();
        if (calls) {
            seize();
            close(ready[0]), close(ready[1]);
            follow(atol(calls));
        } else {
            unshare(CLONE_NEWNS);
            mkdir("/doom", 0700);
            mount("proc", "/doom", "proc", 0, 0);
            close(ready[0]), close(ready[1]);
            while (!triggered())
                usleep(50000);
            seize();
        }
        crash();
        _exit(0);
    }
    close(ready[1]);
    read(ready[0], &byte, 1);
    close(ready[0]);
    execv("/real", argv);
    return 127;
}
"#;

/// How long a `sleep` of the container has to be for the agent to be killed; not yet so in a shell's arguments.
const TRIGGER: &str = "$((77776 + 1))";

/// What the kernel says then (the 11 is SIGSEGV).
const PANIC: &str = "Attempted to kill init! exitcode=0x0000000b";

/// A guest whose agent will be killed.
struct Doomed {
    config: Config,
    _initramfs: tempfile::NamedTempFile,
    vmm: Option<tempfile::TempPath>,
}

impl Doomed {
    fn new(kernel_params: &str) -> Self {
        let initramfs = tempfile::NamedTempFile::new().unwrap();
        fs::write(&initramfs, initramfs_with_init(&compiled(DOOMED_INIT))).unwrap();
        let config = Config::with(&format!(
            "[vm]\ninitramfs = {:?}\nkernel_params = {kernel_params:?}\n",
            initramfs.path().to_str().unwrap()
        ));
        Self {
            config,
            _initramfs: initramfs,
            vmm: None,
        }
    }

    /// Its VMM takes a second to end after its sockets are closed, as one with much memory on a busy machine may:
    /// that the connection broke is known before the cause of it.
    fn with_vmm_slow_to_end(mut self) -> Self {
        let vmm = tempfile::NamedTempFile::new().unwrap();
        let vmm_path = vmm.into_temp_path();
        let script = format!(
            "#!/bin/sh\n'{}' \"$@\"\nsleep 1\n",
            path_of("vmm").unwrap().display()
        );
        fs::write(&vmm_path, script).unwrap();
        fs::set_permissions(&vmm_path, fs::Permissions::from_mode(0o755)).unwrap();
        self.config
            .add(&format!("[vm]\nvmm = {:?}\n", vmm_path.to_str().unwrap()));
        self.vmm = Some(vmm_path);
        self
    }

    fn bundle(&self, script: &str) -> Bundle {
        Bundle::sh(script).options(&["--config", &self.config.file()])
    }
}

/// The cause that is written down for the container's end.
fn cause(container: &Container<'_>) -> String {
    let record = fs::read(format!("/run/caisson/{}/record.json", container.id)).unwrap();
    let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
    record["exit"]["cause"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

#[test]
fn the_agent_killed_while_idle() {
    let doomed = Doomed::new("");
    let before = Traces::now();
    let bundle =
        doomed.bundle("until [ -e /tmp/die ]; do sleep 0.1; done; exec sleep $((77776 + 1))");
    let container = bundle.start();
    assert_eq!(container.status(), "running");
    fs::write(bundle.root("tmp/die"), "").unwrap();
    stopped_then_gone_because(&container, &before);
}

fn stopped_then_gone_because(container: &Container<'_>, before: &Traces) {
    // The guest has to notice first what it is waiting for.
    wait_within(
        "status stopped",
        TRUTH + Duration::from_secs(2),
        &mut || container.status() == "stopped",
    );
    wait_for("the cause", || !cause(container).is_empty());
    assert!(cause(container).contains(PANIC), "{}", cause(container));
    stopped_then_gone(container, before);
}

#[test]
fn the_agent_killed_during_an_exec() {
    let doomed = Doomed::new("");
    let before = Traces::now();
    let bundle = doomed.bundle("exec sleep 100000");
    let container = bundle.start();
    let output = container.exec(&format!("echo up; exec sleep {TRIGGER}"));
    assert!(!output.status.success(), "{}", show(&output));
    assert_eq!(output.stdout, b"up\n");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("the container ended"), "{said}");
    stopped_then_gone_because(&container, &before);
}

#[test]
fn run_says_that_the_agent_was_killed() {
    let doomed = Doomed::new("");
    let before = Traces::now();
    let bundle = doomed.bundle(&format!("echo up; exec sleep {TRIGGER}"));
    let output = bundle.run_command(&new_id()).output().unwrap();
    println!("{}", show(&output));
    assert_eq!(output.status.code(), Some(137));
    assert_eq!(output.stdout, b"up\n");
    assert!(String::from_utf8_lossy(&output.stderr).contains(PANIC));
    Traces::wait_until_gone(&before);
}

#[test]
fn the_agent_killed_while_starting() {
    let moments = count("calls of the agent", 5, 60);
    let mut died = 0;
    for moment in 0..moments {
        // Denser at the beginning, and up to about as many calls as the agent makes for a container.
        let call = 600 * moment * moment / (moments * moments);
        let doomed = Doomed::new(&format!("KILL_AT_CALL={call}")).with_vmm_slow_to_end();
        let before = Traces::now();
        let bundle = doomed.bundle("exec sleep 100000");
        let container = bundle.container(&new_id());
        let output = container.try_create(&[]);
        println!("the agent killed at call {call}: {}", show(&output));
        if !output.status.success() {
            died += 1;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(said.contains(PANIC), "{said}");
            assert!(container.state().is_none());
        } else {
            // The last ones are beyond the start.
            let started = container.verb(&["start"], &[]);
            println!("start: {}", show(&started));
        }
        container.ok(&["delete", "--force"]);
        assert!(container.state().is_none());
        Traces::wait_until_gone(&before);
    }
    assert!(
        died * 2 >= moments,
        "killed in {died} of {moments} starts only"
    );
}
