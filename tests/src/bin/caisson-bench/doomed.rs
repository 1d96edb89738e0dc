// SPDX-License-Identifier: Apache-2.0

//! A guest whose agent can be made to die from outside.
//!
//! PID 1 cannot be killed by the processes of its own machine, not even with SIGKILL. It dies of a fault of its own.
//! So this very program is in the guest's initramfs, and the kernel begins with it (`rdinit=`): it leaves a tracer
//! behind, which waits for one byte on vsock, and becomes the agent. The tracer makes it jump to where there is nothing.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::mem::offset_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use caisson_testbed::installed::config_with;
use nix::unistd::{ForkResult, fork, pipe, setsid};

use crate::setup::{self, Setup};

/// Where this program is in the guest.
const PLACE: &str = "/doomed";
/// The port on which the order is awaited; none of the agent's.
const PORT: u32 = 7777;
/// What the kernel says of an init that died so (the 11 is SIGSEGV).
pub(crate) const PANIC: &str = "Attempted to kill init! exitcode=0x0000000b";
/// How long the guest may take to answer a connection.
const LIMIT: Duration = Duration::from_secs(10);

/// A configuration for such guests.
pub(crate) fn config(setup: &Setup) -> Result<PathBuf> {
    let this = std::env::current_exe().context("failed to find this program")?;
    let file = setup.dir().join("doomed.cpio");
    let mut extra = this.clone().into_os_string();
    extra.push(":");
    extra.push(PLACE);
    let mut builder = Command::new("caisson-rootfs-builder");
    builder.arg("initramfs").arg("--agent").arg(&this);
    setup::output(builder.arg("--extra").arg(extra).arg("--output").arg(&file))?;
    // The kernel unpacks one archive after another: the installed one's /init, the agent, is the one that stays.
    let installed = &setup.images.initramfs;
    let mut archive = fs::read(&file).context("failed to read the initramfs")?;
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(
        fs::read(installed).with_context(|| format!("failed to read {}", installed.display()))?,
    );
    fs::write(&file, archive).context("failed to write the initramfs")?;
    let changes = format!("[vm]\ninitramfs = {file:?}\nkernel_params = \"rdinit={PLACE}\"\n");
    config_with(setup.dir(), "doomed", &changes).context("failed to write a configuration")
}

/// A way to have the agent of a guest die.
#[derive(Debug)]
pub(crate) struct Order(UnixStream);

impl Order {
    /// Reaches the tracer in the guest of a container.
    pub(crate) fn prepare(id: &str) -> Result<Self> {
        let socket = setup::state_path(id, "vsock/vsock.sock");
        let mut stream = UnixStream::connect(&socket)
            .with_context(|| format!("failed to connect to {}", socket.display()))?;
        stream
            .set_read_timeout(Some(LIMIT))
            .context("failed to set a limit")?;
        let mut answer = [0; 3];
        stream
            .write_all(format!("CONNECT {PORT}\n").as_bytes())
            .and_then(|()| stream.read_exact(&mut answer))
            .context("the doomed guest does not answer")?;
        ensure!(&answer == b"OK ", "the doomed guest answers {answer:?}");
        Ok(Self(stream))
    }

    /// Has it die.
    pub(crate) fn give(&mut self) -> Result<()> {
        self.0.write_all(b"!").context("failed to give the order")
    }
}

/// What this program does as the guest's first process: it becomes the agent. Returns in the tracer.
pub(crate) fn init() -> Result<()> {
    let (wait, ready) = pipe().context("no pipe")?;
    // SAFETY: this process has no other thread that could hold a lock in the child.
    match unsafe { fork() }.context("failed to fork")? {
        ForkResult::Child => {
            drop(wait);
            return trace(ready);
        }
        ForkResult::Parent { .. } => drop(ready),
    }
    // Until the tracer listens, or has ended: that it does not listen is seen from outside.
    File::from(wait)
        .read_to_end(&mut Vec::new())
        .context("failed to wait for the tracer")?;
    let error = Command::new("/init")
        .args(std::env::args_os().skip(1))
        .exec();
    Err(error).context("failed to become the agent")
}

/// Waits for the order and carries it out.
fn trace(ready: OwnedFd) -> Result<()> {
    setsid().context("no session")?;
    let listener = listen().context("failed to listen on vsock")?;
    drop(ready);
    let mut order = File::from(accept(&listener).context("failed to accept")?);
    order.read_exact(&mut [0]).context("no order came")?;
    ptrace(libc::PTRACE_SEIZE, 0, 0).context("failed to seize PID 1")?;
    ptrace(libc::PTRACE_INTERRUPT, 0, 0).context("failed to interrupt PID 1")?;
    // SAFETY: null stands for not wanting the status.
    let stopped = unsafe { libc::waitpid(1, std::ptr::null_mut(), libc::__WALL) };
    done(stopped).context("failed to wait for PID 1")?;
    // Else a system call that was interrupted is made again, from another address.
    ptrace(
        libc::PTRACE_POKEUSER,
        offset_of!(libc::user, regs.orig_rax),
        -1,
    )
    .and_then(|()| ptrace(libc::PTRACE_POKEUSER, offset_of!(libc::user, regs.rip), 8))
    .context("failed to divert PID 1")?;
    ptrace(libc::PTRACE_DETACH, 0, 0).context("failed to let PID 1 go")
}

/// A request for PID 1 that takes numbers.
fn ptrace(request: libc::c_uint, address: usize, data: libc::c_long) -> io::Result<()> {
    // SAFETY: none of the requests above reads or writes memory of this process.
    let result = unsafe { libc::ptrace(request, 1, address, data) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn listen() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    // SAFETY: no memory is passed.
    let socket = owned(unsafe { libc::socket(libc::AF_VSOCK, kind, 0) })?;
    // SAFETY: all zeroes is a sockaddr_vm.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).unwrap_or_default();
    address.svm_cid = libc::VMADDR_CID_ANY;
    address.svm_port = PORT;
    let length = libc::socklen_t::try_from(size_of_val(&address)).unwrap_or_default();
    let fd = socket.as_raw_fd();
    // SAFETY: the address is alive, and as long as is said.
    done(unsafe { libc::bind(fd, (&raw const address).cast(), length) })?;
    // SAFETY: no memory is passed.
    done(unsafe { libc::listen(fd, 1) })?;
    Ok(socket)
}

fn accept(listener: &OwnedFd) -> io::Result<OwnedFd> {
    let none = std::ptr::null_mut();
    // SAFETY: null stands for not wanting the peer's address.
    owned(unsafe { libc::accept(listener.as_raw_fd(), none, std::ptr::null_mut()) })
}

fn owned(fd: i32) -> io::Result<OwnedFd> {
    done(fd)?;
    // SAFETY: the kernel has just made it, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn done(result: i32) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
