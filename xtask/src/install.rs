// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask install`: builds everything and lays it out as a package would.
//!
//! | file | from |
//! |---|---|
//! | `PREFIX/bin/caisson`, `PREFIX/bin/caisson-rootfs-builder` | runtime, rootfs-builder |
//! | `PREFIX/libexec/caisson/caisson-vmm` | vmm |
//! | `PREFIX/share/caisson/vmlinux` | guest-kernel, from the cache |
//! | `PREFIX/share/caisson/initramfs.cpio` | the static agent, by rootfs-builder |
//! | `/etc/caisson/config.toml` | runtime/config/default.toml, with PREFIX in its paths |

use std::env;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use caisson_testbed::cache;
use caisson_testbed::cleanup::RunDir;
use caisson_testbed::tools::{self, Tool};
use clap::Args;

use crate::build::{Build, Kind, Profile};
use crate::{say, tree};

/// What the builds of the binaries, and the unit tests, need besides Rust. (The kernel's build looks after
/// itself, and so does the testbed.)
const TOOLS: [Tool; 8] = [
    Tool {
        any_of: &["cc"],
        packages: &["gcc"],
    },
    Tool {
        any_of: &["/usr/include/stdio.h"],
        packages: &["libc6-dev"],
    },
    Tool {
        any_of: &["/usr/include/seccomp.h"],
        packages: &["libseccomp-dev"],
    },
    Tool {
        any_of: &["/usr/include/cap-ng.h"],
        packages: &["libcap-ng-dev"],
    },
    Tool {
        any_of: &["protoc"],
        packages: &["protobuf-compiler"],
    },
    Tool {
        any_of: &["pkg-config"],
        packages: &["pkg-config"],
    },
    Tool {
        any_of: &["busybox"],
        packages: &["busybox-static"],
    },
    Tool {
        any_of: &["cpio"],
        packages: &["cpio"],
    },
];

/// Environment variable that names a vmlinux to install instead of the one that this tree makes.
const KERNEL: &str = "CAISSON_KERNEL";
/// The prefix in the shipped configuration.
const SHIPPED_PREFIX: &str = "/usr";
/// Where the configuration is, whatever the prefix.
const CONFIG: &str = "etc/caisson/config.toml";

/// Options of `install`.
#[derive(Debug, Args)]
pub(crate) struct Install {
    /// Where Caisson will be when it runs
    #[arg(long, value_name = "DIR", default_value = "/usr/local")]
    prefix: PathBuf,
    /// Put in front of every path that is written, as for making a package
    #[arg(long, value_name = "DIR", default_value = "/")]
    destdir: PathBuf,
}

impl Install {
    pub(crate) fn run(self) -> Result<u8> {
        if !self.prefix.is_absolute() {
            bail!(
                "the prefix {} is not an absolute path",
                self.prefix.display()
            );
        }
        install(&self.prefix, &self.destdir)?;
        Ok(0)
    }
}

/// Caisson as it would be installed at /usr/local: in a directory that goes when this is dropped, or in one
/// that was made before by `install --destdir`.
#[derive(Debug)]
pub(crate) enum Stage {
    Made(RunDir),
    Given(PathBuf),
}

impl Stage {
    /// The tree `given`, or else one of what is built now.
    pub(crate) fn new(given: Option<&Path>) -> Result<Self> {
        if let Some(tree) = given {
            let tree = tree
                .canonicalize()
                .with_context(|| format!("no installation {}", tree.display()))?;
            return Ok(Self::Given(tree));
        }
        let stage = RunDir::new().context("failed to make a directory to install to")?;
        let stage = Self::Made(stage);
        install(Path::new("/usr/local"), &stage.root())?;
        Ok(stage)
    }

    /// The tree that is laid over the testbed's root.
    pub(crate) fn root(&self) -> PathBuf {
        match self {
            Self::Made(dir) => dir.path().join("root"),
            Self::Given(tree) => tree.clone(),
        }
    }

    /// Where the prefix is on this machine.
    pub(crate) fn prefix(&self) -> PathBuf {
        self.root().join("usr/local")
    }
}

/// Installs what the builds and the unit tests need, if anything is missing.
pub(crate) fn tools() -> Result<()> {
    tools::install(&TOOLS)?;
    Ok(())
}

/// Builds and installs.
pub(crate) fn install(prefix: &Path, destdir: &Path) -> Result<()> {
    tools()?;
    let programs = Build {
        kind: Kind::Binary,
        packages: &["caisson-runtime", "caisson-vmm", "caisson-rootfs-builder"],
        targets: &["caisson", "caisson-vmm", "caisson-rootfs-builder"],
        profile: Profile::Release,
        is_static: false,
    }
    .run()?;
    let [caisson, vmm, rootfs_builder] = programs.as_slice() else {
        bail!("cargo made {} programs, not three", programs.len());
    };
    let agent = Build {
        kind: Kind::Binary,
        packages: &["caisson-agent"],
        targets: &["caisson-agent"],
        profile: Profile::Guest,
        is_static: true,
    }
    .run()?
    .pop()
    .context("cargo made no caisson-agent")?;
    let kernel = kernel()?;

    let place = Place { prefix, destdir };
    place.copy(caisson, "bin/caisson", 0o755)?;
    place.copy(rootfs_builder, "bin/caisson-rootfs-builder", 0o755)?;
    place.copy(vmm, "libexec/caisson/caisson-vmm", 0o755)?;
    place.copy(&kernel, "share/caisson/vmlinux", 0o644)?;
    let initramfs = place.path("share/caisson/initramfs.cpio")?;
    output_of(
        Command::new(rootfs_builder)
            .args(["initramfs", "--agent"])
            .arg(&agent)
            .arg("--output")
            .arg(&initramfs),
    )?;
    write_config(prefix, &made(destdir.join(CONFIG))?)
}

/// The guest kernel: the file that [`KERNEL`] names, else the cache's, built first if it has none of these
/// inputs (five to twelve minutes).
fn kernel() -> Result<PathBuf> {
    if let Some(path) = env::var_os(KERNEL) {
        return Ok(PathBuf::from(path));
    }
    let scripts = tree().join("guest-kernel");
    let dir = cache::dir()?.join("guest-kernel");
    fs::create_dir_all(&dir).with_context(|| format!("failed to make {}", dir.display()))?;
    // Two builds at once would only take twice as long.
    let lock = dir.join(".lock");
    let lock = File::create(&lock).with_context(|| format!("failed to open {}", lock.display()))?;
    if lock.try_lock().is_err() {
        say("waiting for another process that is building the guest kernel");
        lock.lock()
            .context("failed to lock the cache of guest kernels")?;
    }
    let kernel = || -> Result<PathBuf> {
        let hash = output_of(&mut Command::new(scripts.join("inputs.sh")))?;
        Ok(dir.join(hash.trim()).join("vmlinux"))
    };
    match kernel() {
        Ok(built) if built.is_file() => return Ok(built),
        Ok(_) => {}
        // On a fresh machine apt does not know the source yet.
        Err(_) => tools::update_lists()?,
    }
    say("building the guest kernel (once; five to twelve minutes on two cores)");
    let status = Command::new(scripts.join("build.sh"))
        .stdin(Stdio::null())
        .stdout(io::stderr())
        .status()
        .context("failed to run guest-kernel/build.sh")?;
    let built = kernel()?;
    if !status.success() || !built.is_file() {
        bail!(
            "guest-kernel/build.sh ended with {status} and left no {}",
            built.display()
        );
    }
    Ok(built)
}

/// Runs a program and answers its stdout; what else it says is shown only if it fails.
pub(crate) fn output_of(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("failed to run {name}"))?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    if output.status.success() {
        return Ok(stdout.into_owned());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    bail!("{name} ended with {}:\n{stdout}{stderr}", output.status)
}

/// Where files are put.
struct Place<'a> {
    prefix: &'a Path,
    destdir: &'a Path,
}

impl Place<'_> {
    /// The path of a file below the prefix, its directory made.
    fn path(&self, name: &str) -> Result<PathBuf> {
        let prefix = self.prefix.strip_prefix("/").unwrap_or(self.prefix);
        made(self.destdir.join(prefix).join(name))
    }

    fn copy(&self, from: &Path, name: &str, mode: u32) -> Result<()> {
        replace(
            &self.path(name)?,
            &fs::read(from).with_context(|| format!("no {}", from.display()))?,
            mode,
        )
    }
}

/// Writes the shipped configuration for a Caisson that is installed at `prefix`.
pub(crate) fn write_config(prefix: &Path, path: &Path) -> Result<()> {
    let shipped = tree().join("runtime/config/default.toml");
    let text = fs::read_to_string(&shipped)
        .with_context(|| format!("failed to read {}", shipped.display()))?;
    replace(
        path,
        with_prefix(&text, &prefix.display().to_string()).as_bytes(),
        0o644,
    )
}

/// Writes a file under another name and renames it, so that one in use is left as it is.
fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let write = || -> io::Result<()> {
        let dir = path.parent().unwrap_or(Path::new("/"));
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        file.write_all(bytes)?;
        file.as_file()
            .set_permissions(fs::Permissions::from_mode(mode))?;
        file.persist(path)?;
        Ok(())
    };
    write().with_context(|| format!("failed to write {}", path.display()))
}

fn made(path: PathBuf) -> Result<PathBuf> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).with_context(|| format!("failed to make {}", dir.display()))?;
    }
    Ok(path)
}

/// The shipped configuration with its programs and images below another prefix.
fn with_prefix(text: &str, prefix: &str) -> String {
    let prefix = prefix.trim_end_matches('/');
    ["libexec", "share"]
        .iter()
        .fold(text.to_owned(), |text, dir| {
            text.replace(
                &format!("\"{SHIPPED_PREFIX}/{dir}/"),
                &format!("\"{prefix}/{dir}/"),
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_configuration_follows_the_prefix_in_every_path_of_ours() {
        let shipped = fs::read_to_string(tree().join("runtime/config/default.toml")).unwrap();
        let text = with_prefix(&shipped, "/opt/caisson/");
        for name in ["libexec/caisson/caisson-vmm", "share/caisson/vmlinux"] {
            assert!(
                shipped.contains(&format!("\"/usr/{name}\"")),
                "{name} is not shipped"
            );
            assert!(
                text.contains(&format!("\"/opt/caisson/{name}\"")),
                "{name} in {text}"
            );
        }
        assert!(!text.contains("\"/usr/"), "{text}");
    }

    #[test]
    fn a_file_in_use_is_replaced_and_not_written_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        replace(&path, b"old", 0o644).unwrap();
        let in_use = File::open(&path).unwrap();
        replace(&path, b"new", 0o755).unwrap();
        assert_eq!(io::read_to_string(in_use).unwrap(), "old");
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o755
        );
    }
}
