// SPDX-License-Identifier: Apache-2.0

//! Where things are in the guest's physical address space.
//!
//! ```text
//! 0x0000_0000  RAM; at its start what the kernel reads at boot: start info, memory map, command line
//! 0x0009_fc00  MP table (the "extended BIOS data area", 1 KiB), then legacy space, never reported as RAM
//! 0x0010_0000  RAM: the kernel; the initramfs at its end
//! 0xc000_0000  hole for devices: virtio-mmio from 0xd000_0000, I/O APIC, KVM's private pages, local APIC
//! 0x1_0000_0000  the rest of the RAM
//! ```

/// PVH start info (`struct hvm_start_info`) followed by its module list.
pub const START_INFO: u64 = 0x6000;
/// The module list, one entry: the initramfs.
pub const MODULE_LIST: u64 = 0x6040;
/// The memory map of the start info.
pub const MEMORY_MAP: u64 = 0x7000;
/// The kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Longest command line with its final NUL, bytes (Linux: `COMMAND_LINE_SIZE`).
pub const COMMAND_LINE_MAX: usize = 2048;

/// End of the low RAM that is reported to the kernel, and address of the MP table.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// Room for the MP table, bytes.
pub const MP_TABLE_MAX: usize = 0x400;
/// Where RAM goes on; no part of a kernel may lie lower.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// The hole for devices below 4 GiB.
pub const MMIO_HOLE_START: u64 = 0xc000_0000;
/// First address after the hole.
pub const MMIO_HOLE_END: u64 = 0x1_0000_0000;

/// First virtio-mmio device.
pub const VIRTIO_MMIO_START: u64 = 0xd000_0000;
/// Size of each virtio-mmio device, and the distance to the next.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;

/// I/O APIC (KVM's in-kernel one).
pub const IO_APIC: u32 = 0xfec0_0000;
/// Local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// One page for KVM's identity map on old Intel CPUs (KVM_SET_IDENTITY_MAP_ADDR).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages for KVM's real-mode TSS on old Intel CPUs (KVM_SET_TSS_ADDR).
pub const KVM_TSS: usize = 0xfffb_d000;

/// First interrupt line for devices; lower ones belong to the timer, the cascade, and serial ports.
pub const FIRST_IRQ: u32 = 5;
/// Last input of the I/O APIC.
pub const LAST_IRQ: u32 = 23;

/// The early console (COM1): first port of eight.
pub const SERIAL_PORT: u16 = 0x3f8;
/// The keyboard controller, here only for its reset line: ports 0x60 to 0x64.
pub const I8042_PORT: u16 = 0x60;
