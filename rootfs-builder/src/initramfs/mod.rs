// SPDX-License-Identifier: Apache-2.0

//! The guest image: an initramfs that holds the agent and nothing else.
//!
//! In: a static program, and on request further files. Out: one file in the kernel's `newc` cpio format
//! (`Documentation/driver-api/early-userspace/buffer-format.rst`). The same inputs give the same
//! bytes: entries are sorted, inode numbers count up from 1, owners and times are 0, and of a file's
//! mode only "may it be executed" is kept. The host's names, times and umask do not get in.

mod cpio;
mod tree;

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use flate2::GzBuilder;
use sha2::{Digest as _, Sha256};

pub use self::cpio::CpioError;
pub use self::tree::TreeError;
use self::tree::{Node, Tree};
use crate::executable::{ExecutableError, read_static_executable};
use crate::staging::{StagedFile, StagingError};

/// Directories of every image, with their modes: mount points, and places that programs take for granted.
const DIRECTORIES: &[(&str, u32)] = &[
    ("dev", 0o755),
    ("etc", 0o755),
    ("mnt", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("var", 0o755),
];

/// Character devices of every image: name, mode, major, minor (`Documentation/admin-guide/devices.txt`).
/// The kernel opens `/dev/console` for PID 1 before anything is mounted.
const DEVICES: &[(&str, u32, u32, u32)] =
    &[("dev/console", 0o600, 5, 1), ("dev/null", 0o666, 1, 3)];

/// Why no image was made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InitramfsError {
    /// The agent cannot be PID 1 of a guest with nothing else in it.
    #[error("the agent cannot be used as /init")]
    Agent(#[source] ExecutableError),
    /// An extra file or directory cannot be taken in.
    #[error("failed to collect the files of the image")]
    Tree(#[from] TreeError),
    /// The archive cannot be written.
    #[error("failed to write the archive {path}")]
    Archive {
        /// The output.
        path: PathBuf,
        /// What went wrong.
        source: CpioError,
    },
    /// The output cannot be put in place.
    #[error(transparent)]
    Output(#[from] StagingError),
}

/// How the image is packed. The kernel must have the matching `CONFIG_RD_*` option.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// As it is: the quickest to boot when memory copies are cheap.
    #[default]
    None,
    /// gzip at its best level.
    Gzip,
    /// zstd at level 19.
    Zstd,
}

/// A file or directory to take into the image besides the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extra {
    /// A regular file, a symbolic link or a directory (with all it holds) on the host.
    pub source: PathBuf,
    /// Absolute path in the image; directories above it are made.
    pub destination: PathBuf,
}

/// What goes into an image and where it is written.
#[derive(Debug, Clone)]
pub struct InitramfsRequest {
    /// The static program that becomes `/init`.
    pub agent: PathBuf,
    /// Further files.
    pub extras: Vec<Extra>,
    /// How to pack it.
    pub compression: Compression,
    /// Where the image goes; a file there is replaced.
    pub output: PathBuf,
}

/// What was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InitramfsReport {
    /// Size of the file, in bytes.
    pub bytes: u64,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
    /// Number of entries (directories, devices and files).
    pub entries: usize,
}

/// Makes the image.
///
/// # Errors
/// Any [`InitramfsError`]; the output is then as it was before.
pub fn build(request: &InitramfsRequest) -> Result<InitramfsReport, InitramfsError> {
    let agent = read_static_executable(&request.agent).map_err(InitramfsError::Agent)?;
    let mut tree = Tree::new();
    for &(path, mode) in DIRECTORIES {
        tree.insert(Path::new(path), Node::Directory { mode })?;
    }
    for &(path, mode, major, minor) in DEVICES {
        tree.insert(Path::new(path), Node::Device { mode, major, minor })?;
    }
    tree.insert(
        Path::new("init"),
        Node::Bytes {
            executable: true,
            data: agent,
        },
    )?;
    for extra in &request.extras {
        tree.add_from_host(&extra.source, &extra.destination)?;
    }

    let mut staged = StagedFile::create(&request.output)?;
    let report = write_packed(&tree, request.compression, staged.file_mut()).map_err(|source| {
        InitramfsError::Archive {
            path: request.output.clone(),
            source,
        }
    })?;
    staged.publish(0o644)?;
    Ok(report)
}

fn write_packed(
    tree: &Tree,
    compression: Compression,
    file: &mut File,
) -> Result<InitramfsReport, CpioError> {
    let mut output = Measured::new(BufWriter::new(file));
    match compression {
        Compression::None => cpio::write_archive(tree, &mut output)?,
        Compression::Gzip => {
            let mut packer = GzBuilder::new()
                .mtime(0)
                .write(&mut output, flate2::Compression::best());
            cpio::write_archive(tree, &mut packer)?;
            packer.finish().map_err(CpioError::Write)?;
        }
        Compression::Zstd => {
            let mut packer =
                zstd::stream::write::Encoder::new(&mut output, 19).map_err(CpioError::Write)?;
            cpio::write_archive(tree, &mut packer)?;
            packer.finish().map_err(CpioError::Write)?;
        }
    }
    output.flush().map_err(CpioError::Write)?;
    let (bytes, hash) = (output.bytes, output.hash);
    Ok(InitramfsReport {
        bytes,
        sha256: hex::encode(hash.finalize()),
        entries: tree.len(),
    })
}

/// Counts and hashes what passes through to `target`.
struct Measured<W> {
    target: W,
    hash: Sha256,
    bytes: u64,
}

impl<W> Measured<W> {
    fn new(target: W) -> Self {
        Self {
            target,
            hash: Sha256::new(),
            bytes: 0,
        }
    }
}

impl<W: Write> Write for Measured<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = self.target.write(buffer)?;
        if let Some(done) = buffer.get(..written) {
            self.hash.update(done);
        }
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.target.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::executable::tests::tiny_static_elf;

    fn request(place: &Path, output: &str) -> InitramfsRequest {
        let agent = place.join("agent");
        fs::write(&agent, tiny_static_elf()).unwrap();
        InitramfsRequest {
            agent,
            extras: Vec::new(),
            compression: Compression::None,
            output: place.join(output),
        }
    }

    #[test]
    fn same_inputs_give_the_same_bytes_whatever_their_times_and_modes() {
        let place = tempfile::tempdir().unwrap();
        for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
            let mut first = request(place.path(), "first");
            first.compression = compression;
            fs::write(place.path().join("b"), "b").unwrap();
            fs::create_dir_all(place.path().join("extra/sub")).unwrap();
            fs::write(place.path().join("extra/sub/x"), "x").unwrap();
            fs::write(place.path().join("extra/a"), "a").unwrap();
            first.extras = vec![
                Extra {
                    source: place.path().join("extra"),
                    destination: "/opt/extra".into(),
                },
                Extra {
                    source: place.path().join("b"),
                    destination: "/etc/b".into(),
                },
            ];
            let one = build(&first).unwrap();

            // Other order, other times, other modes, other umask leftovers: same image.
            let mut second = first.clone();
            second.output = place.path().join("second");
            second.extras.reverse();
            fs::remove_dir_all(place.path().join("extra")).unwrap();
            fs::create_dir_all(place.path().join("extra/sub")).unwrap();
            fs::write(place.path().join("extra/a"), "a").unwrap();
            fs::write(place.path().join("extra/sub/x"), "x").unwrap();
            fs::set_permissions(place.path().join("b"), fs::Permissions::from_mode(0o600)).unwrap();
            let two = build(&second).unwrap();

            assert_eq!(one, two);
            let bytes = fs::read(&first.output).unwrap();
            assert_eq!(bytes, fs::read(&second.output).unwrap());
            assert_eq!(one.bytes, bytes.len() as u64);
            assert_eq!(one.sha256, hex::encode(Sha256::digest(&bytes)));
        }
    }

    #[test]
    fn image_holds_the_agent_and_nothing_that_was_not_asked_for() {
        let place = tempfile::tempdir().unwrap();
        let request = request(place.path(), "image");
        build(&request).unwrap();
        let entries = cpio::tests::parse(&fs::read(&request.output).unwrap());
        let names: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!(
            names,
            [
                ".",
                "dev",
                "dev/console",
                "dev/null",
                "etc",
                "init",
                "mnt",
                "proc",
                "root",
                "run",
                "sys",
                "tmp",
                "var"
            ]
        );
        let init = entries.iter().find(|entry| entry.name == "init").unwrap();
        assert_eq!(init.data, tiny_static_elf());
        assert_eq!(init.mode, 0o100_755);
        let console = entries
            .iter()
            .find(|entry| entry.name == "dev/console")
            .unwrap();
        assert_eq!((console.mode, console.rdev), (0o020_600, (5, 1)));
    }

    #[test]
    fn refused_agent_leaves_no_output() {
        let place = tempfile::tempdir().unwrap();
        let request = request(place.path(), "image");
        fs::write(&request.agent, "#!/bin/sh\n").unwrap();
        assert!(matches!(build(&request), Err(InitramfsError::Agent(_))));
        assert!(!request.output.exists());
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 1);
    }

    #[test]
    fn extra_cannot_take_the_place_of_the_agent() {
        let place = tempfile::tempdir().unwrap();
        let mut request = request(place.path(), "image");
        request.extras = vec![Extra {
            source: request.agent.clone(),
            destination: "/init".into(),
        }];
        let error = build(&request).unwrap_err();
        assert!(
            matches!(error, InitramfsError::Tree(TreeError::Duplicate(_))),
            "{error}"
        );
    }
}
