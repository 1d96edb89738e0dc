// SPDX-License-Identifier: Apache-2.0

//! The command line, turned into the library's requests.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use anyhow::bail;
use caisson_rootfs_builder::bundle::{BundleRequest, ImageName, RootfsSource};
use caisson_rootfs_builder::image::platform::Platform;
use caisson_rootfs_builder::initramfs::{Compression, Extra, InitramfsRequest};
use caisson_rootfs_builder::limits::Limits;
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
    /// With --from-dir: use the directory where it is instead of copying it
    #[arg(long)]
    rootfs_in_place: bool,
    #[command(flatten)]
    image: ImageOptions,
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
    /// A copy of a directory, with owners, modes, times, attributes, links and special files
    #[arg(long, value_name = "DIR")]
    from_dir: Option<PathBuf>,
    /// An image in an OCI image layout: a directory, or a tar of one
    #[arg(long, value_name = "PATH[:TAG]")]
    oci_layout: Option<OsString>,
    /// An image in a docker-archive, as `docker save` writes it
    #[arg(long, value_name = "FILE[:TAG]")]
    docker_archive: Option<OsString>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Options for images")]
struct ImageOptions {
    /// The machine that the image must be for [default: this one]
    #[arg(long, value_name = "OS/ARCH")]
    platform: Option<Platform>,
    /// How large the image may be once unpacked, in bytes or with K, M, G or T [default: 64G]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    max_size: Option<u64>,
    /// How many files, directories and links its layers may have together [default: 4000000]
    #[arg(long, value_name = "N")]
    max_entries: Option<u64>,
    /// How many layers it may have [default: 512]
    #[arg(long, value_name = "N")]
    max_layers: Option<usize>,
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
    /// User, and group if it shall not be the user's own (names are those of the root file system)
    #[arg(long, value_name = "USER[:GROUP]")]
    user: Option<String>,
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
        let defaults = Limits::default();
        Ok(BundleRequest {
            output: self.output,
            replace: self.replace,
            source: self.source.into_source(self.rootfs_in_place)?,
            overrides: self.process.into_overrides(),
            platform: self.image.platform.unwrap_or_default(),
            limits: Limits {
                max_unpacked_bytes: self.image.max_size.unwrap_or(defaults.max_unpacked_bytes),
                max_entries: self.image.max_entries.unwrap_or(defaults.max_entries),
                max_layers: self.image.max_layers.unwrap_or(defaults.max_layers),
                ..defaults
            },
        })
    }
}

impl SourceOptions {
    fn into_source(self, in_place: bool) -> anyhow::Result<RootfsSource> {
        if in_place && self.from_dir.is_none() {
            bail!("--rootfs-in-place goes with --from-dir DIR, which was not given");
        }
        match self {
            Self {
                busybox: Some(binary),
                ..
            } => Ok(RootfsSource::Busybox { binary }),
            Self {
                from_dir: Some(path),
                ..
            } => Ok(RootfsSource::Directory { path, in_place }),
            Self {
                oci_layout: Some(name),
                ..
            } => Ok(RootfsSource::OciLayout(image_name(&name))),
            Self {
                docker_archive: Some(name),
                ..
            } => Ok(RootfsSource::DockerArchive(image_name(&name))),
            // The command line's own rules ask for one.
            Self {
                busybox: None,
                from_dir: None,
                oci_layout: None,
                docker_archive: None,
            } => {
                bail!("no source was given")
            }
        }
    }
}

/// `PATH[:TAG]`: a path that exists is one, whatever is in it; otherwise the tag follows the colon after which
/// no name of a file is left (tags may have colons and slashes in them, as whole names of images do).
fn image_name(text: &OsStr) -> ImageName {
    let bytes = text.as_bytes();
    let whole = ImageName {
        path: PathBuf::from(text),
        tag: None,
    };
    if whole.path.exists() {
        return whole;
    }
    let colons = bytes.iter().enumerate().filter(|(_, byte)| **byte == b':');
    for (colon, _) in colons {
        let (path, rest) = bytes.split_at(colon);
        let path = Path::new(OsStr::from_bytes(path));
        let tag = rest.get(1..).and_then(|tag| std::str::from_utf8(tag).ok());
        if let Some(tag) = tag.filter(|tag| !tag.is_empty() && path.exists()) {
            return ImageName {
                path: path.to_path_buf(),
                tag: Some(tag.to_owned()),
            };
        }
    }
    whole
}

fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        Some(b'T' | b't') => (&text[..text.len() - 1], 40),
        Some(_) | None => (text, 0),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| "expected a number of bytes".to_owned())?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "too large".to_owned())
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
            user: self.user,
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
    parse_pair(text)
        .map(|(name, value)| EnvVar { name, value })
        .map_err(|_| "expected NAME=VALUE".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn bundle(arguments: &[&str]) -> anyhow::Result<BundleRequest> {
        let words = ["builder", "bundle", "--output", "out"]
            .iter()
            .chain(arguments);
        match Arguments::try_parse_from(words)?.task {
            Task::Bundle(options) => options.into_request(),
            Task::Initramfs(_) => bail!("parsed as something else"),
        }
    }

    #[test]
    fn definition_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn exactly_one_source_is_needed() {
        assert!(bundle(&[]).is_err());
        assert!(bundle(&["--busybox", "--from-dir", "/"]).is_err());
        assert!(bundle(&["--busybox", "--rootfs-in-place"]).is_err());
        let request = bundle(&["--from-dir", "/", "--rootfs-in-place"]).unwrap();
        assert!(matches!(
            request.source,
            RootfsSource::Directory { in_place: true, .. }
        ));
        let request = bundle(&["--busybox", "--tty"]).unwrap();
        assert_eq!(request.source, RootfsSource::Busybox { binary: None });
    }

    #[test]
    fn command_comes_after_two_dashes_or_by_arg_and_not_both() {
        let args = |words: &[&str]| bundle(words).unwrap().overrides.args;
        let expected = Some(vec!["sh".to_owned(), "-c".to_owned()]);
        assert_eq!(args(&["--busybox", "--", "sh", "-c"]), expected);
        assert_eq!(args(&["--busybox", "--arg", "sh", "--arg", "-c"]), expected);
        assert_eq!(args(&["--busybox"]), None);
        assert!(bundle(&["--busybox", "--arg", "sh", "--", "ls"]).is_err());
    }

    #[test]
    fn tag_follows_the_colon_after_a_path_that_exists() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("a:b");
        std::fs::create_dir(&path).unwrap();
        let name = |suffix: &str| {
            let mut text = path.clone().into_os_string();
            text.push(suffix);
            image_name(&text)
        };
        assert_eq!(
            name(""),
            ImageName {
                path: path.clone(),
                tag: None
            }
        );
        let tag = Some("example.org:5000/app:1".to_owned());
        assert_eq!(
            name(":example.org:5000/app:1"),
            ImageName {
                path: path.clone(),
                tag
            }
        );
        // What does not exist is named as it was given.
        let missing = image_name(OsStr::new("/no/such:tag"));
        assert_eq!(
            missing,
            ImageName {
                path: "/no/such:tag".into(),
                tag: None
            }
        );
    }

    #[test]
    fn sizes_and_pairs_are_read_or_refused() {
        assert_eq!(parse_size("12"), Ok(12));
        assert_eq!(parse_size("3k"), Ok(3072));
        assert_eq!(parse_size("64G"), Ok(64 << 30));
        for bad in ["", "G", "-1", "1.5G", "99999999999T", "1é"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert!(parse_extra("a:/b:/c").is_ok_and(|extra| extra.source == Path::new("a:/b")));
        for bad in ["a", "a:b", ":/b", "a:"] {
            assert!(parse_extra(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_pair("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        assert!(parse_pair("=b").is_err());
    }
}
