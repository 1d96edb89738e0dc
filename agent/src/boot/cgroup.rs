// SPDX-License-Identifier: Apache-2.0

//! The cgroups of the guest: the agent in a leaf of its own, whose memory is protected, and the parent of
//! all containers' cgroups with every controller enabled.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::mounts::CGROUP_ROOT;

/// Parent of the containers' cgroups, below the mount point.
pub(crate) const CONTAINERS: &str = "caisson";
const AGENT: &str = "agent";
/// Memory that the agent keeps whatever the containers use, bytes.
const AGENT_MEMORY: u64 = 16 << 20;

/// A file that could not be written.
#[derive(Debug, thiserror::Error)]
#[error("failed to set up the cgroup file {}", path.display())]
pub(crate) struct CgroupError {
    path: PathBuf,
    source: io::Error,
}

/// Makes both, and moves PID 1 into its own.
///
/// # Errors
/// With the file that could not be used.
pub(crate) fn set_up() -> Result<(), CgroupError> {
    let root = Path::new(CGROUP_ROOT);
    let write = |path: PathBuf, text: &str| {
        fs::write(&path, text).map_err(|source| CgroupError { path, source })
    };
    let agent = root.join(AGENT);
    let containers = root.join(CONTAINERS);
    for path in [&agent, &containers] {
        fs::create_dir(path).map_err(|source| CgroupError {
            path: path.clone(),
            source,
        })?;
    }
    write(agent.join("cgroup.procs"), "0")?;
    for parent in [root, &containers] {
        let path = parent.join("cgroup.controllers");
        let list = fs::read_to_string(&path).map_err(|source| CgroupError { path, source })?;
        let enable: Vec<String> = list
            .split_whitespace()
            .map(|one| format!("+{one}"))
            .collect();
        write(parent.join("cgroup.subtree_control"), &enable.join(" "))?;
    }
    write(agent.join("memory.min"), &AGENT_MEMORY.to_string())
}
