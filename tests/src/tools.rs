// SPDX-License-Identifier: Apache-2.0

//! Programs of the host that the testbed and the builds need, and how they come onto a Debian machine.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::say;

/// A program (or another file) and the Debian package that has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tool {
    /// Any one of these will do: names are looked up in PATH, paths are taken as they are.
    pub any_of: &'static [&'static str],
    /// The first of these that apt knows.
    pub packages: &'static [&'static str],
}

/// QEMU for x86.
pub const QEMU: Tool = Tool {
    any_of: &["qemu-system-x86_64"],
    packages: &["qemu-system-x86"],
};
/// The virtio-fs daemon: part of QEMU's packages in Debian 12, a package of its own in later ones.
pub const VIRTIOFSD: Tool = Tool {
    any_of: &["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"],
    packages: &["virtiofsd", "qemu-system-common"],
};
/// Makes the testbed's root.
pub const MMDEBSTRAP: Tool = Tool {
    any_of: &["mmdebstrap"],
    packages: &["mmdebstrap"],
};

/// Why a tool cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// No apt here.
    #[error("{0} is missing and this is no Debian: install it (Debian's package: {1})")]
    NoApt(&'static str, &'static str),
    /// apt-get did not install it.
    #[error("{0} is missing and `{1}` did not install it: {2}")]
    NotInstalled(&'static str, String, String),
}

impl Tool {
    /// Where it is, if it is there.
    pub fn find(&self) -> Option<PathBuf> {
        let path = env::var_os("PATH").unwrap_or_default();
        // A user's PATH often lacks the places of administration.
        let dirs: Vec<PathBuf> = env::split_paths(&path)
            .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from))
            .collect();
        self.any_of.iter().find_map(|name| {
            let candidates: Vec<PathBuf> = match name.starts_with('/') {
                true => vec![PathBuf::from(name)],
                false => dirs.iter().map(|dir| dir.join(name)).collect(),
            };
            candidates.into_iter().find(|path| path.is_file())
        })
    }

    /// Where it is; installs its package first if it is not there.
    ///
    /// # Errors
    /// If it is missing and cannot be installed; the text says what to do.
    pub fn ensure(&self) -> Result<PathBuf, ToolError> {
        if let Some(path) = self.find() {
            return Ok(path);
        }
        install(&[*self])?;
        let name = self.any_of.first().copied().unwrap_or_default();
        self.find().ok_or_else(|| {
            ToolError::NotInstalled(name, "apt-get install".into(), "still missing".into())
        })
    }
}

/// Installs the packages of those of `tools` that are missing, all in one go.
///
/// # Errors
/// If apt-get is missing or fails.
pub fn install(tools: &[Tool]) -> Result<(), ToolError> {
    let missing: Vec<&Tool> = tools.iter().filter(|tool| tool.find().is_none()).collect();
    let Some(first) = missing.first() else {
        return Ok(());
    };
    let name = first.any_of.first().copied().unwrap_or_default();
    let package = first.packages.first().copied().unwrap_or_default();
    if !Path::new("/usr/bin/apt-get").exists() {
        return Err(ToolError::NoApt(name, package));
    }
    update_lists()?;
    let packages: Vec<&str> = missing
        .iter()
        .filter_map(|tool| known_package(tool))
        .collect();
    let arguments = [
        &["install", "-y", "--no-install-recommends"],
        packages.as_slice(),
    ]
    .concat();
    apt_get(name, &arguments)
}

/// Fetches what the archives offer now.
///
/// # Errors
/// If apt-get is missing or fails.
pub fn update_lists() -> Result<(), ToolError> {
    apt_get("the list of packages", &["update"])
}

/// Runs apt-get, as root. `what` is what fails if it does.
fn apt_get(what: &'static str, arguments: &[&str]) -> Result<(), ToolError> {
    let mut command = match rustix::process::geteuid().is_root() {
        true => Command::new("env"),
        false => {
            let mut sudo = Command::new("sudo");
            sudo.args(["-n", "env"]);
            sudo
        }
    };
    let line = format!("apt-get {}", arguments.join(" "));
    say(&format!("$ {line}"));
    command
        .args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "-q"])
        .args(arguments)
        .stdin(Stdio::null())
        // apt's own words go to stderr: stdout may be somebody's data.
        .stdout(Stdio::from(std::io::stderr()));
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(ToolError::NotInstalled(what, line, status.to_string())),
        Err(error) => Err(ToolError::NotInstalled(what, line, error.to_string())),
    }
}

/// The first of the tool's packages that apt has a version of.
fn known_package(tool: &Tool) -> Option<&'static str> {
    let known = |package: &&&'static str| {
        let shown = Command::new("apt-cache")
            .args(["show", "--no-all-versions", package])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        shown.is_ok_and(|status| status.success())
    };
    tool.packages
        .iter()
        .find(known)
        .or(tool.packages.first())
        .copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_is_found_by_name_or_by_path_and_the_first_that_is_there_wins() {
        let by_name = Tool {
            any_of: &["no-such-program", "sh"],
            packages: &[],
        };
        assert!(by_name.find().unwrap().ends_with("sh"));
        let by_path = Tool {
            any_of: &["/no/such/file", "/proc/version"],
            packages: &[],
        };
        assert_eq!(by_path.find().unwrap(), Path::new("/proc/version"));
        let neither = Tool {
            any_of: &["no-such-program", "/"],
            packages: &[],
        };
        assert_eq!(neither.find(), None);
    }
}
