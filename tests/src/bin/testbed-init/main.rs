// SPDX-License-Identifier: Apache-2.0

//! `testbed-init`: PID 1 of the testbed's machine, a static binary in its initramfs.
//!
//! PID 1 waits for the host on the virtio-serial port, makes the machine ready (`machine`), starts itself
//! again to serve commands (`server`, `command`), and from then on only reaps. When the server ends, the
//! machine ends.

mod command;
mod machine;
mod port;
mod server;

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::{env, fs, io};

use anyhow::{Context, Result, bail};
use caisson_testbed::frame::{Frame, Hello};
use nix::errno::Errno;
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, chroot};

fn main() -> ExitCode {
    let mut arguments = env::args().skip(1);
    let result = match arguments.next().as_deref() {
        Some("serve") => server::serve(),
        Some("chroot") => exec_in(arguments),
        _ if std::process::id() == 1 => {
            let result = be_init();
            if let Err(error) = &result {
                log(&format!("testbed-init: {error:#}"));
            }
            // With -no-reboot a reset ends QEMU, whatever ACPI can do.
            nix::unistd::sync();
            reboot(RebootMode::RB_AUTOBOOT)
                .context("failed to end the machine")
                .map(|never| match never {})
        }
        _ => Err(anyhow::anyhow!(
            "this is PID 1 of Caisson's testbed and nothing else"
        )),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log(&format!("testbed-init: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Writes a line to the console, which is this process's stderr.
fn log(line: &str) {
    use io::Write;
    // Nobody is left to be told when the console itself fails.
    drop(writeln!(io::stderr(), "{line}"));
}

/// `chroot DIR PROGRAM ARGUMENTS…`: becomes that program with DIR as its root.
fn exec_in(mut arguments: impl Iterator<Item = String>) -> Result<()> {
    let (Some(root), Some(program)) = (arguments.next(), arguments.next()) else {
        bail!("chroot needs a directory and a program");
    };
    chroot(root.as_str()).with_context(|| format!("failed to change root to {root}"))?;
    env::set_current_dir("/").context("failed to enter the new root")?;
    let error = Command::new(&program).args(arguments).exec();
    Err(error).with_context(|| format!("failed to run {program}"))
}

/// Makes the machine ready, tells the host, and reaps until the server ends.
fn be_init() -> Result<()> {
    machine::mount_first()?;
    let mut port = port::open()?;
    let setup = match Frame::read_from(&mut port)? {
        (_, Frame::Setup(setup)) => setup,
        (_, other) => bail!("the host's first frame is {other:?}"),
    };
    let warnings = match machine::set_up(&setup) {
        Ok(warnings) => warnings,
        Err(error) => {
            Frame::Failed(format!("{error:#}")).write_to(&mut port, 0)?;
            return Err(error);
        }
    };
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")
        .context("failed to read the kernel's release")?;
    let hello = Hello {
        kernel: kernel.trim().to_owned(),
        kvm: fs::exists("/dev/kvm").unwrap_or(false),
        warnings,
    };
    let server = Command::new("/proc/self/exe")
        .arg("serve")
        .stdin(Stdio::from(
            port.try_clone().context("failed to duplicate the port")?,
        ))
        .spawn()
        .context("failed to start the server of commands")?;
    Frame::Hello(hello).write_to(&mut port, 0)?;
    drop(port);
    let server = Pid::from_raw(i32::try_from(server.id()).context("pid out of range")?);
    reap_until(server)
}

/// Waits for every child, the orphans of the whole machine among them, until `server` is gone.
fn reap_until(server: Pid) -> Result<()> {
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, 0)) if pid == server => return Ok(()),
            Ok(status) if status.pid() == Some(server) => {
                bail!("the server of commands ended: {status:?}")
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("failed to wait for children"),
        }
    }
}
