// SPDX-License-Identifier: Apache-2.0

//! The MP table (Intel MultiProcessor Specification 1.4): how a kernel without ACPI learns of its processors and
//! of the wiring of the interrupt lines.
//!
//! One floating pointer, then the configuration table: every processor, one ISA bus, one I/O APIC, the interrupt
//! lines in use one to one (edge-triggered, active high as the ISA bus has them) and the two local interrupts.
//! Lines that nobody uses are left out: the kernel programs each that it is told of, by a dozen exits.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout::{IO_APIC, LOCAL_APIC, LOW_RAM_END, MP_TABLE_MAX};

/// Version of the local and I/O APICs (0x14: integrated).
const APIC_VERSION: u8 = 0x14;
/// The only bus.
const ISA_BUS: u8 = 0;
/// Processor flag: usable.
const CPU_ENABLED: u8 = 1;
/// Processor flag: the one that boots.
const CPU_BOOTSTRAP: u8 = 2;
/// Interrupt entries: a vectored interrupt, NMI, ExtINT (MP specification, table 4-10).
const INT_VECTORED: u8 = 0;
const INT_NMI: u8 = 1;
const INT_EXTINT: u8 = 3;
/// The PIT's line.
const TIMER_IRQ: u32 = 0;
/// Every local APIC.
const ALL_APICS: u8 = 0xff;

/// An MP table that cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum MpTableError {
    /// More processors than there is room for.
    #[error("an MP table for {0} vCPUs does not fit")]
    TooManyVcpus(u32),
    /// Not in guest memory.
    #[error("failed to write the MP table")]
    Write(#[source] GuestMemoryError),
}

/// Writes the MP table for `vcpus` processors, APIC ids 0 to `vcpus - 1`, and devices on the interrupt lines
/// `irqs`.
///
/// # Errors
/// When it does not fit its room or guest memory.
pub fn write(memory: &GuestMemoryMmap, vcpus: u32, irqs: &[u32]) -> Result<(), MpTableError> {
    let table = encode(vcpus, irqs).ok_or(MpTableError::TooManyVcpus(vcpus))?;
    memory
        .write_slice(&table, GuestAddress(LOW_RAM_END))
        .map_err(MpTableError::Write)
}

/// The whole table, or `None` when it does not fit.
fn encode(vcpus: u32, irqs: &[u32]) -> Option<Vec<u8>> {
    let vcpus = u8::try_from(vcpus).ok()?;
    let table_address = u32::try_from(LOW_RAM_END + 16).ok()?;
    let (entries, count) = entries(vcpus, irqs)?;

    let mut header = Vec::with_capacity(44);
    header.extend_from_slice(b"PCMP");
    header.extend_from_slice(&u16::try_from(44 + entries.len()).ok()?.to_le_bytes());
    header.push(4); // revision 1.4
    header.push(0); // checksum, below
    header.extend_from_slice(b"CAISSON microVM     "); // OEM id (8) and product id (12)
    header.extend_from_slice(&[0; 6]); // no OEM table
    header.extend_from_slice(&count.to_le_bytes());
    header.extend_from_slice(&LOCAL_APIC.to_le_bytes());
    header.extend_from_slice(&[0; 4]); // no extended table

    let mut table = header;
    table.extend_from_slice(&entries);
    let sum = checksum(&table);
    *table.get_mut(7)? = sum;

    let mut pointer = Vec::with_capacity(16);
    pointer.extend_from_slice(b"_MP_");
    pointer.extend_from_slice(&table_address.to_le_bytes());
    pointer.extend_from_slice(&[1, 4, 0, 0, 0, 0, 0, 0]); // 16 bytes, 1.4, checksum, no features
    let sum = checksum(&pointer);
    *pointer.get_mut(10)? = sum;

    pointer.extend_from_slice(&table);
    (pointer.len() <= MP_TABLE_MAX).then_some(pointer)
}

fn entries(vcpus: u8, irqs: &[u32]) -> Option<(Vec<u8>, u16)> {
    let mut bytes = Vec::new();
    let mut count = 0u16;
    let mut add = |entry: &[u8]| {
        bytes.extend_from_slice(entry);
        count += 1;
    };
    for id in 0..vcpus {
        let flags = CPU_ENABLED | if id == 0 { CPU_BOOTSTRAP } else { 0 };
        let mut entry = vec![0, id, APIC_VERSION, flags];
        entry.extend_from_slice(&0x600u32.to_le_bytes()); // family 6; the kernel asks CPUID
        entry.extend_from_slice(&0x201u32.to_le_bytes()); // FPU, APIC
        entry.extend_from_slice(&[0; 8]);
        add(&entry);
    }
    let mut bus = vec![1, ISA_BUS];
    bus.extend_from_slice(b"ISA   ");
    add(&bus);
    let io_apic_id = vcpus;
    let mut io_apic = vec![2, io_apic_id, APIC_VERSION, 1];
    io_apic.extend_from_slice(&IO_APIC.to_le_bytes());
    add(&io_apic);
    for irq in [TIMER_IRQ].iter().chain(irqs) {
        let irq = u8::try_from(*irq).ok()?;
        add(&[3, INT_VECTORED, 0, 0, ISA_BUS, irq, io_apic_id, irq]);
    }
    add(&[4, INT_EXTINT, 0, 0, ISA_BUS, 0, 0, 0]);
    add(&[4, INT_NMI, 0, 0, ISA_BUS, 0, ALL_APICS, 1]);
    Some((bytes, count))
}

/// What makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::layout::{FIRST_IRQ, LAST_IRQ};
    use caisson_protocol::vm::MAX_VCPUS;

    #[test]
    fn every_allowed_number_of_vcpus_fits_and_adds_up() {
        let irqs: Vec<u32> = (FIRST_IRQ..=LAST_IRQ).collect();
        for vcpus in 1..=MAX_VCPUS {
            let table = encode(vcpus, &irqs).unwrap();
            assert!(table.len() <= MP_TABLE_MAX);
            assert_eq!(checksum(&table[..16]), 0);
            assert_eq!(checksum(&table[16..]), 0);
            let length = u16::from_le_bytes([table[20], table[21]]);
            assert_eq!(usize::from(length), table.len() - 16);
            let processors = (0..vcpus as usize).map(|i| table[16 + 44 + i * 20 + 1]);
            assert!(processors.eq(0..vcpus as u8));
        }
    }

    #[test]
    fn only_the_first_processor_boots() {
        let table = encode(3, &[]).unwrap();
        let flags: Vec<u8> = (0..3).map(|i| table[16 + 44 + i * 20 + 3]).collect();
        assert_eq!(flags, [3, 1, 1]);
    }

    #[test]
    fn only_lines_in_use_are_told_of() {
        let lines = |irqs: &[u32]| -> Vec<u8> {
            let table = encode(1, irqs).unwrap();
            // After one processor, bus and I/O APIC come entries of eight bytes.
            let entries = table[16 + 44 + 20 + 8 + 8..].chunks(8);
            let vectored = entries.filter(|entry| entry[..2] == [3, INT_VECTORED]);
            vectored.map(|entry| entry[7]).collect()
        };
        assert_eq!(lines(&[]), [0]);
        assert_eq!(lines(&[5, 23]), [0, 5, 23]);
    }

    #[test]
    fn a_table_that_does_not_fit_is_refused() {
        assert!(encode(100, &[]).is_none());
        assert!(encode(300, &[]).is_none());
    }
}
