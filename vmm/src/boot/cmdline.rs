// SPDX-License-Identifier: Apache-2.0

//! The kernel command line: what makes the boot short and right, the devices, then the configuration's own words.
//!
//! Later words win in Linux, so the configuration can override every one of ours. The early console is always
//! named: with `quiet` it prints nothing but errors and panics, and it is what tells of a panic before `hvc0`
//! is there. `reboot=k` (keyboard controller) tells a reboot apart from a triple fault.

use std::fmt::Write;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::arch::layout::{COMMAND_LINE, COMMAND_LINE_MAX, SERIAL_PORT};

/// A command line that cannot be given to the kernel.
#[derive(Debug, thiserror::Error)]
pub enum CmdlineError {
    /// Longer than the kernel takes.
    #[error("the kernel command line has {bytes} bytes, the kernel takes {max}")]
    TooLong {
        /// How long it is.
        bytes: usize,
        /// The bound, without the final NUL.
        max: usize,
    },
    /// Not in guest memory.
    #[error("failed to write the kernel command line")]
    Write(#[source] GuestMemoryError),
}

/// A virtio-mmio device, as the kernel is told of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioDevice {
    /// First address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// Interrupt line.
    pub irq: u32,
}

/// Words for every boot.
const BASE: &str = "reboot=k panic=-1 console=hvc0 tsc=reliable no_timer_check rcupdate.rcu_expedited=1 \
                    8250.nr_uarts=0";

/// Puts the command line together.
///
/// `early` leaves out `quiet`: then every message of the boot is written to the early console, an exit per byte.
///
/// # Errors
/// When it is too long.
pub fn build(devices: &[MmioDevice], early: bool, extra: &str) -> Result<String, CmdlineError> {
    let mut line = String::with_capacity(512);
    if !early {
        line.push_str("quiet ");
    }
    // Writing to a String does not fail.
    let _ = write!(line, "earlycon=uart8250,io,{SERIAL_PORT:#x} {BASE}");
    for device in devices {
        let _ = write!(
            line,
            " virtio_mmio.device={}K@{:#x}:{}",
            device.size >> 10,
            device.base,
            device.irq
        );
    }
    if !extra.is_empty() {
        line.push(' ');
        line.push_str(extra);
    }
    let max = COMMAND_LINE_MAX - 1;
    if line.len() > max {
        return Err(CmdlineError::TooLong {
            bytes: line.len(),
            max,
        });
    }
    Ok(line)
}

/// Writes `line` where the start info says.
///
/// # Errors
/// When guest memory ends before it.
pub fn write(memory: &GuestMemoryMmap, line: &str) -> Result<(), CmdlineError> {
    let mut bytes = line.as_bytes().to_vec();
    bytes.push(0);
    memory
        .write_slice(&bytes, GuestAddress(COMMAND_LINE))
        .map_err(CmdlineError::Write)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(n: u64) -> MmioDevice {
        MmioDevice {
            base: 0xd000_0000 + n * 0x1000,
            size: 0x1000,
            irq: 5 + n as u32,
        }
    }

    #[test]
    fn the_configurations_words_come_last_so_that_they_win() {
        let line = build(&[device(0), device(1)], false, "panic=5 loglevel=7").unwrap();
        assert!(line.starts_with("quiet earlycon=uart8250,io,0x3f8 "));
        assert!(line.contains(" virtio_mmio.device=4K@0xd0000000:5 "));
        assert!(line.contains(" virtio_mmio.device=4K@0xd0001000:6 "));
        assert!(line.ends_with(" panic=5 loglevel=7"));
    }

    #[test]
    fn early_messages_are_shown_only_when_asked_for() {
        let is_quiet = |early| {
            let line = build(&[], early, "").unwrap();
            line.split(' ').any(|word| word == "quiet")
        };
        assert!(is_quiet(false));
        assert!(!is_quiet(true));
    }

    #[test]
    fn the_longest_line_is_what_the_kernel_takes() {
        let empty = build(&[], false, "").unwrap().len();
        let room = COMMAND_LINE_MAX - 1 - empty - 1;
        assert!(build(&[], false, &"x".repeat(room)).is_ok());
        let error = build(&[], false, &"x".repeat(room + 1)).unwrap_err();
        assert!(error.to_string().contains("2048 bytes"));
    }
}
