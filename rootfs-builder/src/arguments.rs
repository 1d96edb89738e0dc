// SPDX-License-Identifier: Apache-2.0

//! The command line, turned into the library's requests.

use std::path::PathBuf;

use anyhow::bail;
use caisson_rootfs_builder::bundle::{BundleRequest, RootfsSource};
use caisson_rootfs_builder::initramfs::{Compression, Extra, InitramfsRequest};
use caisson_rootfs_builder::spec::{EnvVar, Privileges, SpecOverrides};
use clap::{Args, Parser, Subcommand, ValueEnum};

/// Makes what Caisson boots (an initramfs) and what it runs (OCI bundles).
#[derive(Debug, Parser)]
#[command(name = "caisson-rootfs-builder", version, max_term_width = 100)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) task: Task,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Task {
    /// Makes the guest's initramfs: the agent as /init, mount points, /dev/console and /dev/null
    Initramfs(InitramfsOptions),
    /// Makes an OCI bundle: a directory with config.json and rootfs/
    Bundle(Box<BundleOptions>),
}

#[derive(Debug, Args)]
pub(crate) struct InitramfsOptions {
    /// The static program that becomes /init
    #[arg(long, value_name = "PATH")]
    agent: PathBuf,
    /// The file to write (replaced if there)
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// A further file or directory, and its absolute path in the image (more than one may be given)
    #[arg(long, value_name = "SRC:DST", num_args = 1.., value_parser = clap::builder::ValueParser::new(parse_extra))]
    extra: Vec<Extra>,
    /// How to pack the image; the guest kernel must be able to unpack it
    #[arg(long, value_enum, default_value_t = CompressionName::None)]
    compress: CompressionName,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum CompressionName {
    None,
    Gzip,
    Zstd,
}

impl InitramfsOptions {
    pub(crate) fn into_request(self) -> InitramfsRequest {
        InitramfsRequest {
            agent: self.agent,
            extras: self.extra,
            compression: match self.compress {
                CompressionName::None => Compression::None,
                CompressionName::Gzip => Compression::Gzip,
                CompressionName::Zstd => Compression::Zstd,
            },
            output: self.output,
        }
    }
}

fn parse_extra(text: &str) -> Result<Extra, String> {
    match text.rsplit_once(':') {
        Some((source, destination)) if !source.is_empty() && destination.starts_with('/') => {
            Ok(Extra {
                source: source.into(),
                destination: destination.into(),
            })
        }
        Some(_) | None => Err("expected SRC:DST with an absolute DST".to_owned()),
    }
}

#[derive(Debug, Args)]
pub(crate) struct BundleOptions {
    /// The bundle's directory (must be absent or empty)
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Take the place of a bundle that is there
    #[arg(long)]
    replace: bool,
    #[command(flatten)]
    source: SourceOptions,
    #[command(flatten)]
    process: ProcessOptions,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct SourceOptions {
    /// A small system around a static busybox (the host's if none is named)
    #[arg(long, value_name = "PATH", num_args = 0..=1)]
    #[expect(
        clippy::option_option,
        reason = "clap's way to tell absent, without and with a value"
    )]
    busybox: Option<Option<PathBuf>>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Options for config.json")]
struct ProcessOptions {
    /// One argument of the command (may be repeated; or give the command after --)
    #[arg(
        long,
        value_name = "ARG",
        allow_hyphen_values = true,
        conflicts_with = "command"
    )]
    arg: Vec<String>,
    /// A variable of the environment (may be repeated)
    #[arg(long, value_name = "NAME=VALUE", value_parser = clap::builder::ValueParser::new(parse_variable))]
    env: Vec<EnvVar>,
    /// Working directory
    #[arg(long, value_name = "DIR")]
    cwd: Option<PathBuf>,
    /// Give the process a terminal
    #[arg(long)]
    tty: bool,
    /// Host name
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// Make the root file system read-only
    #[arg(long)]
    readonly: bool,
    /// What the process may do: as `runc spec` gives, or as Docker gives (the default for images)
    #[arg(long, value_enum)]
    privileges: Option<PrivilegesName>,
    /// An annotation (may be repeated)
    #[arg(long, value_name = "KEY=VALUE", value_parser = clap::builder::ValueParser::new(parse_pair))]
    annotation: Vec<(String, String)>,
    /// The whole command
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum PrivilegesName {
    Runc,
    Docker,
}

impl BundleOptions {
    pub(crate) fn into_request(self) -> anyhow::Result<BundleRequest> {
        Ok(BundleRequest {
            output: self.output,
            replace: self.replace,
            source: self.source.into_source()?,
            overrides: self.process.into_overrides(),
        })
    }
}

impl SourceOptions {
    fn into_source(self) -> anyhow::Result<RootfsSource> {
        if let Some(binary) = self.busybox {
            return Ok(RootfsSource::Busybox { binary });
        }
        bail!("no source was given: --busybox")
    }
}

impl ProcessOptions {
    fn into_overrides(self) -> SpecOverrides {
        let args = if self.command.is_empty() {
            self.arg
        } else {
            self.command
        };
        SpecOverrides {
            args: (!args.is_empty()).then_some(args),
            env: self.env,
            cwd: self.cwd,
            terminal: self.tty,
            hostname: self.hostname,
            readonly: self.readonly,
            privileges: self.privileges.map(|name| match name {
                PrivilegesName::Runc => Privileges::Runc,
                PrivilegesName::Docker => Privileges::Docker,
            }),
            annotations: self.annotation,
        }
    }
}

fn parse_pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        Some(_) | None => Err("expected KEY=VALUE".to_owned()),
    }
}

fn parse_variable(text: &str) -> Result<EnvVar, String> {
    parse_pair(text).map(|(name, value)| EnvVar { name, value })
}
