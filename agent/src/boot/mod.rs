// SPDX-License-Identifier: Apache-2.0

//! Brings the guest up: everything that must be there before the first request.

pub(crate) mod cgroup;
pub(crate) mod mounts;
mod root;

use std::io;

use caisson_protocol::boot::{BootParams, BootParamsError, LogLevel};
use libcontainer::network::link::LinkClient;
use libcontainer::network::wrapper::create_network_client;
use nix::sys::resource::{Resource, setrlimit};

use crate::kmsg;

/// Most open files of the agent and, where the specification does not say otherwise, of containers.
const MAX_FILES: u64 = 1 << 20;
/// The kernel's OOM killer passes over what has this score.
const OOM_SCORE: &str = "-1000";

/// Why the guest did not come up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    /// The root.
    #[error("failed to set up the root")]
    Root(#[from] root::RootError),
    /// A file system.
    #[error("failed to set up the file systems")]
    Mount(#[from] mounts::MountError),
    /// The cgroups.
    #[error("failed to set up the cgroups")]
    Cgroup(#[from] cgroup::CgroupError),
    /// The log.
    #[error("failed to open the kernel's log")]
    Log(#[source] io::Error),
    /// /proc.
    #[error("failed to read the kernel's command line")]
    Cmdline(#[source] io::Error),
    /// Protection from the OOM killer.
    #[error("failed to protect the agent from the OOM killer")]
    OomScore(#[source] io::Error),
}

/// Does all of it. What merely limits some containers (the loopback interface, resource limits) is logged
/// and not fatal.
///
/// # Errors
/// When no container could run.
pub(crate) fn bring_up() -> Result<(), BootError> {
    root::enter()?;
    mounts::mount_all()?;
    kmsg::install(LogLevel::Warn).map_err(BootError::Log)?;
    read_parameters()?;
    std::fs::write("/proc/self/oom_score_adj", OOM_SCORE).map_err(BootError::OomScore)?;
    cgroup::set_up()?;
    raise_limits();
    loopback_up();
    Ok(())
}

/// A host of another version is told so by the ready line and the handshake, which is clearer to it than a
/// guest that does not come up.
fn read_parameters() -> Result<(), BootError> {
    let cmdline = std::fs::read_to_string("/proc/cmdline").map_err(BootError::Cmdline)?;
    match BootParams::from_cmdline(&cmdline) {
        Ok(parameters) => {
            kmsg::set_level(parameters.log);
            if parameters.protocol_version != caisson_protocol::PROTOCOL_VERSION {
                log::error!(
                    "the host speaks protocol version {}, this agent {}",
                    parameters.protocol_version,
                    caisson_protocol::PROTOCOL_VERSION
                );
            }
        }
        Err(error @ (BootParamsError::Unknown(_) | BootParamsError::BadValue(_))) => {
            log::error!("{error}");
        }
        Err(error @ BootParamsError::NoVersion) => log::warn!("{error}"),
    }
    Ok(())
}

fn raise_limits() {
    let unlimited = nix::libc::RLIM_INFINITY;
    for (resource, limit) in [
        (Resource::RLIMIT_NOFILE, MAX_FILES),
        (Resource::RLIMIT_NPROC, unlimited),
        (Resource::RLIMIT_CORE, unlimited),
    ] {
        if let Err(errno) = setrlimit(resource, limit, limit) {
            log::warn!("failed to raise the limit {resource:?}: {errno}");
        }
    }
}

fn loopback_up() {
    let set_up = || {
        let mut client = LinkClient::new(create_network_client())?;
        let index = client.get_by_name("lo")?.header.index;
        client.set_up(index)
    };
    if let Err(error) = set_up() {
        log::error!("failed to set the loopback interface up: {error}");
    }
}
