// SPDX-License-Identifier: Apache-2.0

//! Builds with cargo and says where the result is.

use std::env;
use std::io::{BufReader, IsTerminal};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use cargo_metadata::Message;

use crate::tree;

/// The target of static binaries. It is named, so that build scripts and procedural macros, which cannot be
/// static, are built for the host without the flag.
const STATIC_TARGET: &str = "x86_64-unknown-linux-gnu";

/// A static binary moves itself to where it is loaded, and a list of what to mend then is a third of a megabyte
/// unless it is packed (glibc 2.36 and later unpack it).
const STATIC_FLAGS: &str = "-C target-feature=+crt-static -C link-arg=-Wl,-z,pack-relative-relocs";

/// What to build.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Build<'a> {
    pub(crate) kind: Kind,
    /// Packages of this workspace.
    pub(crate) packages: &'a [&'a str],
    /// Names of the executables' targets in those packages.
    pub(crate) targets: &'a [&'a str],
    pub(crate) profile: Profile,
    /// Linked without a dynamic loader.
    pub(crate) is_static: bool,
}

/// Profiles of the workspace's Cargo.toml.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    Dev,
    Release,
    /// Small, for what is in every guest.
    Guest,
}

/// Kind of cargo target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Binary,
    IntegrationTest,
}

impl Build<'_> {
    /// Builds and answers the paths of the executables, in the order of `targets`.
    pub(crate) fn run(&self) -> Result<Vec<PathBuf>> {
        let mut command = cargo();
        let (verb, flag): (&[&str], &str) = match self.kind {
            Kind::Binary => (&["build"], "--bin"),
            Kind::IntegrationTest => (&["test", "--no-run"], "--test"),
        };
        command
            .args(verb)
            .arg("--message-format=json-render-diagnostics");
        for package in self.packages {
            command.args(["--package", package]);
        }
        for target in self.targets {
            command.args([flag, target]);
        }
        // Where nobody watches, only what goes wrong: stderr may be that of a command in the testbed.
        if !std::io::stderr().is_terminal() {
            command.arg("--quiet");
        }
        match self.profile {
            Profile::Dev => {}
            Profile::Release => drop(command.arg("--release")),
            Profile::Guest => drop(command.args(["--profile", "guest"])),
        }
        if self.is_static {
            command.args(["--target", STATIC_TARGET]);
            command.env("RUSTFLAGS", STATIC_FLAGS);
            command.env("LIBSECCOMP_LINK_TYPE", "static");
            command.env("LIBSECCOMP_LIB_PATH", "/usr/lib/x86_64-linux-gnu");
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().context("failed to start cargo")?;
        let stdout = child.stdout.take().context("cargo has no stdout")?;
        let mut found = vec![None; self.targets.len()];
        for message in Message::parse_stream(BufReader::new(stdout)) {
            let Message::CompilerArtifact(artifact) =
                message.context("failed to read what cargo says")?
            else {
                continue;
            };
            let place = self
                .targets
                .iter()
                .position(|&name| name == artifact.target.name);
            if let (Some(path), Some(place)) = (artifact.executable, place) {
                found[place] = Some(path.into_std_path_buf());
            }
        }
        let status = child.wait().context("failed to wait for cargo")?;
        let names = self.targets.join(", ");
        if !status.success() {
            bail!("failed to build {names}");
        }
        let missing = || format!("cargo made not all of {names}");
        found
            .into_iter()
            .collect::<Option<Vec<_>>>()
            .with_context(missing)
    }
}

/// The cargo that runs this, in the tree's root, without what it set for this program alone.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(tree());
    // `cargo run` describes the package xtask to its process: not what a build of others should see.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}

/// The testbed's init.
pub(crate) fn testbed_init() -> Result<PathBuf> {
    let build = Build {
        kind: Kind::Binary,
        packages: &["caisson-testbed"],
        targets: &["testbed-init"],
        profile: Profile::Dev,
        is_static: true,
    };
    build.run()?.pop().context("cargo made no testbed-init")
}
