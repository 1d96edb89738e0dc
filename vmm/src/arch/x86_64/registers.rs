// SPDX-License-Identifier: Apache-2.0

//! Registers of a vCPU before its first instruction.
//!
//! The PVH entry is 32-bit protected mode without paging, flat segments, the start info in `ebx`. The kernel
//! loads its own GDT at once, so none is written; the segments are given by their hidden parts.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;

use super::layout::START_INFO;

/// `IA32_MISC_ENABLE`, with fast strings on as every firmware leaves it.
const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// `IA32_MTRR_DEF_TYPE`: MTRRs on, everything write-back.
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE_WRITE_BACK: u64 = (1 << 11) | 6;

/// CR0.PE, and ET which is always set.
const CR0_PROTECTED: u64 = 0x11;
/// EFLAGS with its one fixed bit.
const EFLAGS_RESET: u64 = 2;

/// Selectors as the kernel's own first GDT would have them.
const CODE_SELECTOR: u16 = 0x08;
const DATA_SELECTOR: u16 = 0x10;
const TSS_SELECTOR: u16 = 0x18;
/// Segment types (Intel SDM 3A, 3.4.5.1 and 3.5).
const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
const TYPE_TSS_BUSY: u8 = 0xb;

/// Registers that KVM refused.
#[derive(Debug, thiserror::Error)]
pub enum RegistersError {
    /// KVM_GET_SREGS.
    #[error("failed to read the special registers of vCPU {vcpu}")]
    Read {
        /// Which one.
        vcpu: u32,
        /// Why.
        #[source]
        source: errno::Error,
    },
    /// KVM_SET_*.
    #[error("failed to set {what} of vCPU {vcpu}")]
    Write {
        /// Which one.
        vcpu: u32,
        /// Which registers.
        what: &'static str,
        /// Why.
        #[source]
        source: errno::Error,
    },
    /// More MSRs than a list takes.
    #[error("failed to make a list of {0} MSRs")]
    MsrList(usize),
}

/// Sets the MSRs that firmware would have set. A KVM that has one of them not is passed over: no boot of a
/// kernel depends on them.
///
/// # Errors
/// When the ioctl itself fails.
pub fn set_msrs(fd: &VcpuFd, vcpu: u32) -> Result<(), RegistersError> {
    let entries = [
        (MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
    ]
    .map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    let list = Msrs::from_entries(&entries).map_err(|_| RegistersError::MsrList(entries.len()))?;
    let set = fd.set_msrs(&list).map_err(|source| RegistersError::Write {
        vcpu,
        what: "the MSRs",
        source,
    })?;
    if set < entries.len() {
        log::warn!("vCPU {vcpu}: KVM took {set} of {} MSRs", entries.len());
    }
    Ok(())
}

/// Puts the boot vCPU at the kernel's PVH entry. Other vCPUs wait for the kernel to start them.
///
/// # Errors
/// When KVM refuses.
pub fn set_entry(fd: &VcpuFd, vcpu: u32, entry: u64) -> Result<(), RegistersError> {
    let write = |what| move |source| RegistersError::Write { vcpu, what, source };
    let mut sregs = fd
        .get_sregs()
        .map_err(|source| RegistersError::Read { vcpu, source })?;
    sregs.cs = flat(CODE_SELECTOR, TYPE_CODE);
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = flat(DATA_SELECTOR, TYPE_DATA);
    }
    sregs.tr = kvm_segment {
        base: 0,
        limit: 0x67,
        selector: TSS_SELECTOR,
        type_: TYPE_TSS_BUSY,
        present: 1,
        ..Default::default()
    };
    sregs.cr0 = CR0_PROTECTED;
    sregs.cr4 = 0;
    sregs.efer = 0;
    fd.set_sregs(&sregs)
        .map_err(write("the special registers"))?;
    let regs = kvm_regs {
        rip: entry,
        rbx: START_INFO,
        rflags: EFLAGS_RESET,
        ..Default::default()
    };
    fd.set_regs(&regs).map_err(write("the registers"))
}

fn flat(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        s: 1,
        db: 1,
        g: 1,
        ..Default::default()
    }
}
