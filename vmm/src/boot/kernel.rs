// SPDX-License-Identifier: Apache-2.0

//! Kernel and initramfs into guest memory.
//!
//! The kernel is an uncompressed ELF `vmlinux` with a PVH entry note; its segments go where it says. The
//! initramfs goes to the end of the memory below the hole. Both are read straight into guest memory.
//!
//! They are copied, not mapped privately from their files. Linux patches itself at its start (alternatives, returns,
//! retpolines): of the 2,317 pages of our kernel's text it writes 2,282, of the whole image 2,608 of 3,101.
//! Mapped, nearly every page would be copied all the same, but by a fault and an exit each, in pieces of 4 KiB
//! where the host could give huge pages (128 MiB guest, exits until init: 569 with huge pages, 6,039 without).
//! And whoever truncated the file of a running VM would end it by SIGBUS. Sharing between pods comes from a template
//! of a machine that is already patched.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};

use linux_loader::loader::elf::{Elf, Error as ElfError, PvhBootCapability};
use linux_loader::loader::{Error as LoaderError, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion};

use crate::arch::layout::{HIGH_RAM_START, MMIO_HOLE_START};
use crate::arch::pvh::Module;

/// Room for what the kernel needs beside itself and its initramfs before it can unpack it, bytes.
const KERNEL_HEADROOM: u64 = 4 << 20;
const PAGE: u64 = 4096;

/// A kernel or initramfs that cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// open(2), fstat(2) or read(2).
    #[error("failed to read {what} {path}")]
    Read {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A directory, device or socket.
    #[error("{what} {path} is not a regular file")]
    NotAFile {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// Which file.
        path: PathBuf,
    },
    /// No ELF magic.
    #[error("kernel {path} is not an ELF file ({looks_like}); an uncompressed vmlinux is needed")]
    NotElf {
        /// Which file.
        path: PathBuf,
        /// What it is.
        looks_like: &'static str,
    },
    /// ELF, and not to be loaded.
    #[error("kernel {path} is truncated or damaged ({reason})")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What the loader said.
        reason: String,
    },
    /// An ELF file that is no kernel for us.
    #[error("kernel {0} has no PVH entry note (CONFIG_PVH is needed)")]
    NoPvhEntry(PathBuf),
    /// The entry is not in what was loaded.
    #[error("kernel {path} has its PVH entry at {entry:#x}, outside of its segments")]
    BadEntry {
        /// Which file.
        path: PathBuf,
        /// Where its note says.
        entry: u64,
    },
    /// More than the guest's memory.
    #[error(
        "kernel {path} does not fit into the guest's memory ({memory} bytes below the device hole)"
    )]
    KernelTooLarge {
        /// Which file.
        path: PathBuf,
        /// Bytes of memory.
        memory: u64,
    },
    /// Nothing in it.
    #[error("initramfs {0} is empty")]
    InitramfsEmpty(PathBuf),
    /// More than what the kernel leaves.
    #[error(
        "initramfs {path} of {size} bytes does not fit into the guest's memory beside the kernel ({room} bytes)"
    )]
    InitramfsTooLarge {
        /// Which file.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// What there is.
        room: u64,
    },
    /// The file changed while it was read, or memory ends.
    #[error("failed to load initramfs {path}")]
    InitramfsLoad {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: GuestMemoryError,
    },
}

/// A kernel in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadedKernel {
    /// The PVH entry.
    pub entry: u64,
    /// First address after all of its segments.
    pub end: u64,
}

/// Loads the kernel.
///
/// # Errors
/// Each with its own message: unreadable, not ELF (named, when it is a bzImage), truncated, without PVH note,
/// larger than memory.
pub fn load_kernel(memory: &GuestMemoryMmap, path: &Path) -> Result<LoadedKernel, KernelError> {
    let (mut file, size) = open("kernel", path)?;
    check_magic(&mut file, path)?;
    let low = low_memory(memory);
    let loaded = Elf::load(memory, None, &mut file, None).map_err(|source| {
        if matches!(source, LoaderError::Elf(ElfError::ReadKernelImage)) && size > low / 2 {
            KernelError::KernelTooLarge {
                path: path.into(),
                memory: low,
            }
        } else {
            KernelError::Damaged {
                path: path.into(),
                reason: reason(&source),
            }
        }
    })?;
    let entry = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => entry.0,
        PvhBootCapability::PvhEntryNotPresent | PvhBootCapability::PvhEntryIgnored => {
            return Err(KernelError::NoPvhEntry(path.into()));
        }
    };
    if entry < HIGH_RAM_START || entry >= loaded.kernel_end {
        return Err(KernelError::BadEntry {
            path: path.into(),
            entry,
        });
    }
    if loaded.kernel_end > low {
        return Err(KernelError::KernelTooLarge {
            path: path.into(),
            memory: low,
        });
    }
    Ok(LoadedKernel {
        entry,
        end: loaded.kernel_end,
    })
}

/// Loads the initramfs to the end of the memory below the hole.
///
/// # Errors
/// When it cannot be read, is empty, or does not fit beside `kernel`.
pub fn load_initramfs(
    memory: &GuestMemoryMmap,
    path: &Path,
    kernel: LoadedKernel,
) -> Result<Module, KernelError> {
    let (mut file, size) = open("initramfs", path)?;
    if size == 0 {
        return Err(KernelError::InitramfsEmpty(path.into()));
    }
    let low = low_memory(memory);
    let room = low.saturating_sub(kernel.end.saturating_add(KERNEL_HEADROOM));
    let address = low
        .checked_sub(size)
        .map(|address| address & !(PAGE - 1))
        .filter(|address| size <= room && *address >= kernel.end);
    let (Some(address), Ok(count)) = (address, usize::try_from(size)) else {
        return Err(KernelError::InitramfsTooLarge {
            path: path.into(),
            size,
            room,
        });
    };
    memory
        .read_exact_volatile_from(GuestAddress(address), &mut file, count)
        .map_err(|source| KernelError::InitramfsLoad {
            path: path.into(),
            source,
        })?;
    Ok(Module { address, size })
}

/// The innermost words of the loader's error, which repeats itself.
fn reason(error: &LoaderError) -> String {
    let text = error.to_string();
    let last = text.rsplit("Kernel Loader: ").next().unwrap_or_default();
    last.to_lowercase()
}

fn low_memory(memory: &GuestMemoryMmap) -> u64 {
    use vm_memory::GuestMemory;
    memory
        .find_region(GuestAddress(0))
        .map_or(0, |region| region.len().min(MMIO_HOLE_START))
}

fn open(what: &'static str, path: &Path) -> Result<(File, u64), KernelError> {
    let read = |source| KernelError::Read {
        what,
        path: path.into(),
        source,
    };
    let file = File::open(path).map_err(read)?;
    let metadata = file.metadata().map_err(read)?;
    if !metadata.is_file() {
        return Err(KernelError::NotAFile {
            what,
            path: path.into(),
        });
    }
    Ok((file, metadata.len()))
}

/// Tells what is not ELF, by name where it is known.
fn check_magic(file: &mut File, path: &Path) -> Result<(), KernelError> {
    let read = |source| KernelError::Read {
        what: "kernel",
        path: path.into(),
        source,
    };
    let mut start = Vec::with_capacity(0x206);
    file.by_ref()
        .take(0x206)
        .read_to_end(&mut start)
        .map_err(read)?;
    file.rewind().map_err(read)?;
    if start.starts_with(b"\x7fELF") {
        return Ok(());
    }
    let looks_like = if start.is_empty() {
        "it is empty"
    } else if start.get(0x202..0x206) == Some(b"HdrS") {
        "it is a bzImage"
    } else if start.starts_with(&[0x1f, 0x8b]) {
        "it is compressed by gzip"
    } else if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        "it is compressed by zstd"
    } else {
        "its format is unknown"
    };
    Err(KernelError::NotElf {
        path: path.into(),
        looks_like,
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::memory;

    /// An ELF file with one segment at 1 MiB that holds `code`, and a PVH note if asked for.
    pub(crate) fn elf(code: &[u8], pvh: bool) -> Vec<u8> {
        const CODE_OFFSET: usize = 0x1000;
        let note_offset = 64 + 2 * 56;
        let mut file = vec![0; CODE_OFFSET];
        file[..16].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(16, &2u16.to_le_bytes()); // ET_EXEC
        put(18, &62u16.to_le_bytes()); // EM_X86_64
        put(24, &0x10_0000u64.to_le_bytes());
        put(32, &64u64.to_le_bytes()); // program headers
        put(54, &56u16.to_le_bytes());
        put(56, &2u16.to_le_bytes());
        // PT_LOAD
        put(64, &1u32.to_le_bytes());
        put(64 + 8, &(CODE_OFFSET as u64).to_le_bytes());
        put(64 + 24, &0x10_0000u64.to_le_bytes());
        put(64 + 32, &(code.len() as u64).to_le_bytes());
        put(64 + 40, &(code.len() as u64 + 0x1000).to_le_bytes());
        // PT_NOTE
        put(120, &4u32.to_le_bytes());
        put(120 + 8, &(note_offset as u64).to_le_bytes());
        put(120 + 32, &20u64.to_le_bytes());
        put(note_offset, &4u32.to_le_bytes());
        put(note_offset + 4, &4u32.to_le_bytes());
        put(
            note_offset + 8,
            &(if pvh { 18u32 } else { 1 }).to_le_bytes(),
        );
        put(note_offset + 12, b"Xen\0");
        put(note_offset + 16, &0x10_0000u32.to_le_bytes());
        file.extend_from_slice(code);
        file
    }

    fn load(bytes: &[u8]) -> Result<LoadedKernel, KernelError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        load_kernel(&memory::allocate(32 << 20).unwrap(), file.path())
    }

    #[test]
    fn a_kernel_is_put_where_it_says() {
        let kernel = load(&elf(&[0x90; 100], true)).unwrap();
        assert_eq!(kernel.entry, 0x10_0000);
        assert_eq!(kernel.end, 0x10_0000 + 100 + 0x1000);
    }

    #[test]
    fn what_is_no_kernel_is_refused_with_its_own_reason() {
        let message = |bytes: &[u8]| load(bytes).unwrap_err().to_string();
        assert!(message(b"").contains("it is empty"));
        assert!(message(b"hello").contains("its format is unknown"));
        let mut bzimage = vec![0; 0x300];
        bzimage[0x202..0x206].copy_from_slice(b"HdrS");
        assert!(message(&bzimage).contains("it is a bzImage"));
        assert!(message(&elf(&[0x90; 100], false)).contains("no PVH entry note"));
        let whole = elf(&[0x90; 100], true);
        for cut in [10, 70, 130, 0x1000 + 50] {
            let text = message(&whole[..cut]);
            assert!(text.contains("truncated or damaged ("), "{cut}: {text}");
            assert!(!text.contains("Kernel Loader"), "{text}");
        }
        assert!(message(&elf(&vec![0; 40 << 20], true)).contains("does not fit"));
    }

    #[test]
    fn a_missing_file_and_a_directory_are_named() {
        let memory = memory::allocate(32 << 20).unwrap();
        let error = load_kernel(&memory, Path::new("/nowhere/vmlinux")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "failed to read kernel /nowhere/vmlinux".to_owned()
        );
        let error = load_kernel(&memory, Path::new("/")).unwrap_err();
        assert!(error.to_string().contains("not a regular file"));
    }

    #[test]
    fn an_initramfs_goes_to_the_end_and_must_fit() {
        let memory = memory::allocate(32 << 20).unwrap();
        let kernel = LoadedKernel {
            entry: 0x10_0000,
            end: 0x40_0000,
        };
        let file = tempfile::NamedTempFile::new().unwrap();
        let load = |size: u64| {
            file.as_file().set_len(size).unwrap();
            load_initramfs(&memory, file.path(), kernel)
        };
        assert!(matches!(load(0), Err(KernelError::InitramfsEmpty(_))));
        let module = load(5000).unwrap();
        assert_eq!(module.address, (32 << 20) - 8192);
        assert_eq!(module.size, 5000);
        assert!(load(24 << 20).is_ok());
        assert!(matches!(
            load((24 << 20) + 1),
            Err(KernelError::InitramfsTooLarge { .. })
        ));
        assert!(load(1 << 40).is_err());
    }
}
