// SPDX-License-Identifier: Apache-2.0

//! The helper between the per-container process and the VMM: it prepares the mount namespace and becomes the VMM.
//!
//! Namespaces are changed by single-threaded processes only, so the program runs itself again as
//! [`HELPER_COMMAND`]. In: a [`LaunchPlan`] on stdin. Out: for [`LaunchTarget::NewVm`] the status pipe on stdout, which
//! becomes the VMM's; a failure before that is reported there as [`VmEvent::Exited`], so that whoever waits for
//! the VMM has one place to look at. For a running VMM: the exit status, and the error on stderr.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use caisson_protocol::control::{ExitCause, VmEvent};
use caisson_protocol::vm::VmConfig;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Signal, set_parent_process_death_signal};
use serde::{Deserialize, Serialize};

use crate::error::chain;
use crate::resources::volume::{self, MountPlan, VolumeError};
use crate::sandbox::process::ProcessRef;

/// The hidden sub-command that a front door over this library must send to [`run_helper`].
pub const HELPER_COMMAND: &str = "launch-helper";

/// Largest plan, bytes.
const MAX_PLAN: u64 = 16 << 20;

/// What the helper is to do.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaunchPlan {
    /// The directory that virtio-fs serves.
    pub shared: PathBuf,
    /// What to show in it.
    pub mounts: Vec<MountPlan>,
    /// Where.
    pub target: LaunchTarget,
}

/// Whose mount namespace.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum LaunchTarget {
    /// One that is made now, for a VMM that the helper becomes.
    NewVm {
        /// The VMM's program.
        vmm: PathBuf,
        /// Its configuration.
        config: Box<VmConfig>,
        /// Pid of the per-container process, with which the VMM ends.
        parent: i32,
    },
    /// That of a running VMM.
    RunningVm {
        /// Which.
        vmm: ProcessRef,
        /// `container/name` of a mount to make read-only.
        seal: Option<(String, String)>,
    },
}

/// Why the helper failed.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The plan on stdin is none.
    #[error("failed to read the launch plan")]
    Plan(#[source] io::Error),
    /// Mounts.
    #[error("failed to prepare the VM's file systems")]
    Volume(#[from] VolumeError),
    /// The VMM's program could not be started.
    #[error("failed to run {program}")]
    Exec {
        /// Which.
        program: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A system call on the way there failed.
    #[error("failed to {operation}")]
    Prepare {
        /// What was tried.
        operation: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The per-container process is gone.
    #[error("the per-container process has ended")]
    Orphaned,
}

/// Carries out the plan on stdin. With a new VM it only returns when that failed, and has then said so on stdout.
///
/// # Errors
/// What failed.
pub fn run_helper() -> Result<(), LaunchError> {
    let mut text = Vec::new();
    let mut stdin = io::stdin().lock().take(MAX_PLAN);
    stdin.read_to_end(&mut text).map_err(LaunchError::Plan)?;
    let plan: LaunchPlan =
        serde_json::from_slice(&text).map_err(|error| LaunchError::Plan(error.into()))?;
    match plan.target {
        LaunchTarget::NewVm {
            vmm,
            config,
            parent,
        } => {
            let Err(error) = become_vmm(&plan.shared, &plan.mounts, vmm, &config, parent);
            report(&error);
            Err(error)
        }
        LaunchTarget::RunningVm { vmm, seal } => {
            let mounts = open_all(&plan.mounts)?;
            volume::enter_namespace_of(vmm)?;
            if !mounts.is_empty() {
                volume::attach(&plan.shared, mounts)?;
            }
            if let Some((container, name)) = seal {
                volume::seal(&plan.shared, &container, &name)?;
            }
            Ok(())
        }
    }
}

fn open_all(plans: &[MountPlan]) -> Result<Vec<volume::DetachedMount>, VolumeError> {
    plans.iter().map(volume::open_detached).collect()
}

fn become_vmm(
    shared: &std::path::Path,
    mounts: &[MountPlan],
    program: PathBuf,
    config: &VmConfig,
    parent: i32,
) -> Result<std::convert::Infallible, LaunchError> {
    let prepare = |operation| {
        move |errno: rustix::io::Errno| LaunchError::Prepare {
            operation,
            source: errno.into(),
        }
    };
    // Kept over the exec; asking for the parent afterwards closes the gap in which it may have ended.
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(prepare("ask for a signal"))?;
    if rustix::process::getppid().map(rustix::process::Pid::as_raw_pid) != Some(parent) {
        return Err(LaunchError::Orphaned);
    }
    let mounts = open_all(mounts)?;
    volume::attach_in_new_namespace(shared, mounts)?;
    let document = memfd_create("vm-config", MemfdFlags::CLOEXEC)
        .map_err(prepare("make the VMM's configuration"))?;
    let mut document = File::from(document);
    // In one piece: a serializer on a file makes a system call of every token.
    let write = serde_json::to_vec(config)
        .map_err(io::Error::from)
        .and_then(|text| document.write_all(&text))
        .and_then(|()| document.rewind());
    write.map_err(|source| LaunchError::Prepare {
        operation: "write the VMM's configuration",
        source,
    })?;
    // A duplicate without close-on-exec: the VMM inherits it. Its own stdout goes where its stderr goes.
    let status =
        rustix::io::dup(rustix::stdio::stdout()).map_err(prepare("keep the status pipe"))?;
    rustix::stdio::dup2_stdout(rustix::stdio::stderr()).map_err(prepare("redirect stdout"))?;
    let source = Command::new(&program)
        .arg0(format!("caisson-vmm {}", config.id))
        .args(["--die-with-parent", "--config-fd", "stdin", "--status-fd"])
        .arg(std::os::fd::AsRawFd::as_raw_fd(&status).to_string())
        .stdin(document)
        .env_clear()
        .exec();
    // For `report`.
    rustix::stdio::dup2_stdout(&status).map_err(prepare("restore stdout"))?;
    Err(LaunchError::Exec { program, source })
}

fn report(error: &LaunchError) {
    let event = VmEvent::Exited {
        cause: ExitCause::Setup {
            message: chain(error),
        },
        console_tail: String::new(),
    };
    let mut line = serde_json::to_vec(&event).unwrap_or_default();
    line.push(b'\n');
    // If nobody listens any more there is nobody to tell.
    io::stdout().write_all(&line).unwrap_or_default();
    io::stdout().flush().unwrap_or_default();
}
