// SPDX-License-Identifier: Apache-2.0

//! Is this file a program that runs with nothing else around it?
//!
//! The guest image holds one program and no loader, and a busybox root holds no libraries either, so a
//! file that is not ELF, is for another machine or asks for a loader would only be found out by a
//! kernel panic or an `ENOENT` inside a guest. It is found out here instead, by name.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use elf::ElfBytes;
use elf::abi::{DT_NEEDED, EM_X86_64, ET_DYN, ET_EXEC, PT_INTERP};
use elf::endian::AnyEndian;
use elf::file::Class;

/// Largest program accepted, in bytes.
pub const MAX_PROGRAM_BYTES: u64 = 512 << 20;

/// Why a file cannot serve as a program on its own.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExecutableError {
    /// The file could not be opened or read.
    #[error("failed to read program {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The path names a directory, a device or the like.
    #[error("program {0} is not a regular file")]
    NotAFile(PathBuf),
    /// The file is beyond [`MAX_PROGRAM_BYTES`].
    #[error("program {0} is larger than {MAX_PROGRAM_BYTES} bytes")]
    TooLarge(PathBuf),
    /// The file does not begin as ELF files do.
    #[error("program {0} is not an ELF file (a script cannot be used here, build a static binary)")]
    NotElf(PathBuf),
    /// The file begins as ELF but its headers do not hold together.
    #[error("program {path} has broken ELF headers")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        source: elf::ParseError,
    },
    /// The file is for another machine, or is an object file or a core dump.
    #[error("program {path} is not a 64-bit x86-64 executable ({what})")]
    WrongKind {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        what: String,
    },
    /// The file needs a loader or shared libraries.
    #[error(
        "program {path} is dynamically linked ({what}); build it static, for example with RUSTFLAGS=-Ctarget-feature=+crt-static"
    )]
    Dynamic {
        /// The file.
        path: PathBuf,
        /// What it asks for.
        what: String,
    },
}

/// Reads the program at `path` and checks that it is a static x86-64 ELF executable
/// (position-independent or not). Returns its bytes.
///
/// # Errors
/// Any [`ExecutableError`]; each names the file.
pub fn read_static_executable(path: &Path) -> Result<Vec<u8>, ExecutableError> {
    let read_error = |source| ExecutableError::Read {
        path: path.to_path_buf(),
        source,
    };
    let file = File::open(path).map_err(read_error)?;
    let metadata = file.metadata().map_err(read_error)?;
    if !metadata.is_file() {
        return Err(ExecutableError::NotAFile(path.to_path_buf()));
    }
    let mut bytes = Vec::new();
    file.take(MAX_PROGRAM_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(read_error)?;
    if bytes.len() as u64 > MAX_PROGRAM_BYTES {
        return Err(ExecutableError::TooLarge(path.to_path_buf()));
    }
    check_static(path, &bytes)?;
    Ok(bytes)
}

/// Checks the ELF headers in `bytes`; `path` is for messages only.
fn check_static(path: &Path, bytes: &[u8]) -> Result<(), ExecutableError> {
    if !bytes.starts_with(b"\x7fELF") {
        return Err(ExecutableError::NotElf(path.to_path_buf()));
    }
    let malformed = |source| ExecutableError::Malformed {
        path: path.to_path_buf(),
        source,
    };
    let wrong = |what: String| ExecutableError::WrongKind {
        path: path.to_path_buf(),
        what,
    };
    let dynamic = |what: String| ExecutableError::Dynamic {
        path: path.to_path_buf(),
        what,
    };

    let elf = ElfBytes::<AnyEndian>::minimal_parse(bytes).map_err(malformed)?;
    if elf.ehdr.class != Class::ELF64 {
        return Err(wrong("it is a 32-bit file".into()));
    }
    if elf.ehdr.e_machine != EM_X86_64 {
        return Err(wrong(format!("ELF machine {}", elf.ehdr.e_machine)));
    }
    if elf.ehdr.e_type != ET_EXEC && elf.ehdr.e_type != ET_DYN {
        return Err(wrong(format!("ELF type {}", elf.ehdr.e_type)));
    }
    let Some(segments) = elf.segments() else {
        return Err(wrong("it has no program headers".into()));
    };
    if let Some(interpreter) = segments.iter().find(|segment| segment.p_type == PT_INTERP) {
        let name = elf.segment_data(&interpreter).map_err(malformed)?;
        let name = String::from_utf8_lossy(name)
            .trim_end_matches('\0')
            .to_owned();
        return Err(dynamic(format!("it asks for the loader {name}")));
    }
    if let Some(entries) = elf.dynamic().map_err(malformed)?
        && entries.iter().any(|entry| entry.d_tag == DT_NEEDED)
    {
        return Err(dynamic("it needs shared libraries".into()));
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The smallest file that counts as a static program: an ELF header and one load segment.
    pub(crate) fn tiny_static_elf() -> Vec<u8> {
        tiny_elf(EM_X86_64, ET_EXEC, elf::abi::PT_LOAD, b"")
    }

    fn tiny_elf(machine: u16, kind: u16, segment: u32, tail: &[u8]) -> Vec<u8> {
        let mut file = Vec::from(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        file.extend(kind.to_le_bytes());
        file.extend(machine.to_le_bytes());
        file.extend(1u32.to_le_bytes());
        file.extend(0x40_0000u64.to_le_bytes()); // entry
        file.extend(64u64.to_le_bytes()); // program headers
        file.extend(0u64.to_le_bytes()); // section headers
        file.extend(0u32.to_le_bytes());
        for half in [64u16, 56, 1, 64, 0, 0] {
            file.extend(half.to_le_bytes());
        }
        file.extend(segment.to_le_bytes());
        file.extend(5u32.to_le_bytes());
        file.extend(120u64.to_le_bytes()); // offset
        file.extend([0; 16]);
        file.extend((tail.len() as u64).to_le_bytes());
        file.extend((tail.len() as u64).to_le_bytes());
        file.extend(1u64.to_le_bytes());
        file.extend(tail);
        file
    }

    fn check(bytes: &[u8]) -> Result<(), ExecutableError> {
        check_static(Path::new("/some/agent"), bytes)
    }

    #[test]
    fn static_program_passes() {
        check(&tiny_static_elf()).unwrap();
    }

    #[test]
    fn script_is_refused_by_name() {
        let error = check(b"#!/bin/sh\n").unwrap_err();
        assert!(matches!(error, ExecutableError::NotElf(_)));
        assert!(error.to_string().contains("/some/agent"));
    }

    #[test]
    fn program_with_a_loader_is_refused_and_the_loader_named() {
        let bytes = tiny_elf(
            EM_X86_64,
            ET_DYN,
            PT_INTERP,
            b"/lib64/ld-linux-x86-64.so.2\0",
        );
        let error = check(&bytes).unwrap_err();
        assert!(matches!(error, ExecutableError::Dynamic { .. }));
        assert!(
            error.to_string().contains("/lib64/ld-linux-x86-64.so.2"),
            "{error}"
        );
    }

    #[test]
    fn other_machine_and_object_file_are_refused() {
        let arm = tiny_elf(elf::abi::EM_AARCH64, ET_EXEC, elf::abi::PT_LOAD, b"");
        assert!(matches!(
            check(&arm),
            Err(ExecutableError::WrongKind { .. })
        ));
        let object = tiny_elf(EM_X86_64, elf::abi::ET_REL, elf::abi::PT_LOAD, b"");
        assert!(matches!(
            check(&object),
            Err(ExecutableError::WrongKind { .. })
        ));
    }

    #[test]
    fn truncated_headers_are_an_error_at_every_length() {
        let whole = tiny_static_elf();
        for length in 0..whole.len() {
            assert!(
                check(&whole[..length]).is_err(),
                "{length} bytes were accepted"
            );
        }
    }

    #[test]
    fn directory_is_refused() {
        let error = read_static_executable(Path::new("/")).unwrap_err();
        assert!(matches!(error, ExecutableError::NotAFile(_)), "{error}");
    }

    #[test]
    fn this_test_program_is_found_to_be_dynamic_or_static_as_it_was_built() {
        let path = std::env::current_exe().unwrap();
        let verdict = read_static_executable(&path);
        if cfg!(target_feature = "crt-static") {
            verdict.unwrap();
        } else {
            assert!(
                matches!(verdict, Err(ExecutableError::Dynamic { .. })),
                "{verdict:?}"
            );
        }
    }
}
