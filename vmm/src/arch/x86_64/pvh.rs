// SPDX-License-Identifier: Apache-2.0

//! What a kernel entered by PVH reads (Xen's "x86/HVM direct boot ABI"): start info, memory map, module list.

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::layout::{
    COMMAND_LINE, HIGH_RAM_START, LOW_RAM_END, MEMORY_MAP, MODULE_LIST, START_INFO,
};
use crate::memory;

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;
/// The version with a memory map.
const VERSION: u32 = 1;
/// `XEN_HVM_MEMMAP_TYPE_RAM`.
const RAM: u32 = 1;

/// Boot parameters that cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("failed to write the boot parameters")]
pub struct PvhError(#[source] linux_loader::configurator::Error);

/// Where the initramfs is in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Module {
    /// First address.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

/// Writes the start info with all that it points to, except the command line.
///
/// # Errors
/// When guest memory ends too early.
pub fn write(memory: &GuestMemoryMmap, bytes: u64, initramfs: Module) -> Result<(), PvhError> {
    let map = memory_map(bytes);
    let start_info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: COMMAND_LINE,
        nr_modules: 1,
        modlist_paddr: MODULE_LIST,
        memmap_paddr: MEMORY_MAP,
        // Three at most.
        memmap_entries: u32::try_from(map.len()).unwrap_or(u32::MAX),
        ..Default::default()
    };
    let module = hvm_modlist_entry {
        paddr: initramfs.address,
        size: initramfs.size,
        ..Default::default()
    };
    let mut params = BootParams::new(&start_info, GuestAddress(START_INFO));
    params.set_sections(&map, GuestAddress(MEMORY_MAP));
    params.set_modules(&[module], GuestAddress(MODULE_LIST));
    PvhBootConfigurator::write_bootparams(&params, memory).map_err(PvhError)
}

/// The RAM that the kernel may use: everything but the legacy space below 1 MiB.
fn memory_map(bytes: u64) -> Vec<hvm_memmap_table_entry> {
    let mut map = vec![entry(0, LOW_RAM_END)];
    for (start, size) in memory::ranges(bytes) {
        let end = start + size;
        let start = start.max(HIGH_RAM_START);
        if end > start {
            map.push(entry(start, end - start));
        }
    }
    map
}

fn entry(addr: u64, size: u64) -> hvm_memmap_table_entry {
    hvm_memmap_table_entry {
        addr,
        size,
        type_: RAM,
        reserved: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    fn pairs(bytes: u64) -> Vec<(u64, u64)> {
        memory_map(bytes)
            .iter()
            .map(|entry| (entry.addr, entry.size))
            .collect()
    }

    #[test]
    fn the_legacy_space_and_the_hole_are_left_out() {
        assert_eq!(
            pairs(32 << 20),
            [(0, LOW_RAM_END), (0x10_0000, (32 << 20) - 0x10_0000)]
        );
        assert_eq!(
            pairs(5 << 30),
            [
                (0, LOW_RAM_END),
                (0x10_0000, (3 << 30) - 0x10_0000),
                (4 << 30, 2 << 30)
            ]
        );
    }

    #[test]
    fn the_start_info_points_to_its_parts() {
        let bytes = 64 << 20;
        let memory = memory::allocate(bytes).unwrap();
        let module = Module {
            address: 0x300_0000,
            size: 12345,
        };
        write(&memory, bytes, module).unwrap();
        let info: hvm_start_info = memory.read_obj(GuestAddress(START_INFO)).unwrap();
        assert_eq!((info.magic, info.version), (MAGIC, VERSION));
        assert_eq!((info.nr_modules, info.memmap_entries), (1, 2));
        let read: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!((read.paddr, read.size), (module.address, module.size));
    }
}
