// SPDX-License-Identifier: Apache-2.0

//! A guest of a few instructions, in long mode from its first one.
//!
//! Each program runs in a machine of its own: 2 MiB of memory mapped one to one, a GDT and an IDT, no devices. It
//! ends at `hlt` with [`GOOD`] in `rax`; an exception that it does not expect ends at `hlt` with its vector
//! in `rax`.
//!
//! ```text
//! 0x1000 page tables (three)   0x5000 IDT   0x6000 GDT   0x7000 exception stubs
//! 0xf000 stack (downwards)   0x1_0000 code   0x2_0000 data
//! ```

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap};
use vmm_sys_util::errno;

use super::programs::Program;
use crate::vcpu;

const MEMORY: usize = 2 << 20;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const IDT: u64 = 0x5000;
const GDT: u64 = 0x6000;
const STUBS: u64 = 0x7000;
const STACK: u64 = 0xf000;
const CODE: u64 = 0x1_0000;

/// What `rax` holds when a program did all that it should.
const GOOD: u64 = 0x600d;
/// Marks a vector in `rax`.
const FAULT: u64 = 0xbad_0000;
/// Vectors with a stub, and how far apart stubs are.
const VECTORS: u64 = 32;
const STUB_SIZE: u64 = 16;
/// Most exits of one program before it counts as stuck; none has one before its `hlt`.
const MAX_EXITS: usize = 16;

/// How a program ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// As it should.
    Done,
    /// KVM gave up.
    GaveUp(String),
    /// It ran, with a wrong result.
    Wrong(String),
}

/// A guest that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// An ioctl.
    #[error("failed to {what}")]
    Ioctl {
        /// What it does.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: errno::Error,
    },
    /// Guest memory.
    #[error("failed to map the probe's memory")]
    Map(#[source] vm_memory::mmap::FromRangesError),
    /// Guest memory.
    #[error("failed to write the probe's memory")]
    Write(#[from] GuestMemoryError),
}

fn ioctl(what: &'static str) -> impl FnOnce(errno::Error) -> ProbeError {
    move |source| ProbeError::Ioctl { what, source }
}

/// Runs `program` in a machine of its own.
///
/// # Errors
/// When the machine cannot be made; what the program does wrong is an [`Outcome`].
pub fn run(kvm: &Kvm, program: &Program) -> Result<Outcome, ProbeError> {
    let memory = make_memory(program.code())?;
    let vm = kvm.create_vm().map_err(ioctl("create a virtual machine"))?;
    vm.set_tss_address(crate::arch::layout::KVM_TSS)
        .map_err(ioctl("set the address of KVM's TSS"))?;
    let address = memory.get_host_address(GuestAddress(0))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: address as u64,
    };
    // SAFETY: `memory` maps MEMORY bytes there, read-write, until the end of this function; the machine and its
    // vCPU, declared later, are dropped before it.
    unsafe { vm.set_user_memory_region(region) }.map_err(ioctl("give KVM the probe's memory"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(ioctl("create a vCPU"))?;
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(ioctl("read the CPUID leaves that KVM supports"))?;
    vcpu.set_cpuid2(&cpuid).map_err(ioctl("set the CPUID"))?;
    enter_long_mode(&vcpu)?;
    Ok(run_to_end(&mut vcpu))
}

fn run_to_end(vcpu: &mut VcpuFd) -> Outcome {
    for _ in 0..MAX_EXITS {
        let failure = match vcpu.run() {
            Ok(VcpuExit::Hlt) => return result(vcpu),
            Ok(VcpuExit::InternalError) => None,
            Ok(VcpuExit::Shutdown) => return Outcome::Wrong("it ended in a triple fault".into()),
            Ok(exit) => Some(format!("KVM gave up with exit {exit:?}")),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => continue,
            Err(error) => Some(format!("KVM_RUN failed: {error}")),
        };
        let reason = failure.unwrap_or_else(|| vcpu::internal_error(vcpu));
        let rip = vcpu.get_regs().map_or(0, |regs| regs.rip);
        return Outcome::GaveUp(format!("{reason}, at rip {rip:#x}"));
    }
    Outcome::Wrong("it did not come to its end".into())
}

fn result(vcpu: &VcpuFd) -> Outcome {
    match vcpu.get_regs() {
        Ok(regs) if regs.rax == GOOD => Outcome::Done,
        Ok(regs) if regs.rax & !0xff == FAULT => Outcome::Wrong(format!(
            "it ended in exception {} instead of its result",
            regs.rax & 0xff
        )),
        Ok(regs) => Outcome::Wrong(format!(
            "its result is {:#x} instead of {GOOD:#x}",
            regs.rax
        )),
        Err(error) => Outcome::Wrong(format!("its result cannot be read: {error}")),
    }
}

fn make_memory(code: &[u8]) -> Result<GuestMemoryMmap, ProbeError> {
    let memory =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).map_err(ProbeError::Map)?;
    // Present, writable, for user code too; one page of 2 MiB.
    memory.write_obj(PDPT | 7, GuestAddress(PML4))?;
    memory.write_obj(PD | 7, GuestAddress(PDPT))?;
    memory.write_obj(0x87u64, GuestAddress(PD))?;
    // Kernel code and data, user data and code (in the order that sysret wants).
    let gdt: [u64; 5] = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
    ];
    for (descriptor, at) in gdt.into_iter().zip((GDT..).step_by(8)) {
        memory.write_obj(descriptor, GuestAddress(at))?;
    }
    for vector in 0..VECTORS {
        let stub = STUBS + vector * STUB_SIZE;
        // mov eax, FAULT + vector; hlt
        let value = (FAULT + vector) as u32;
        let [a, b, c, d] = value.to_le_bytes();
        memory.write_slice(&[0xb8, a, b, c, d, 0xf4], GuestAddress(stub))?;
        // An interrupt gate for ring 3 too.
        let gate = (stub & 0xffff) | (0x08 << 16) | (0xee00 << 32) | ((stub >> 16) << 48);
        memory.write_obj(gate, GuestAddress(IDT + vector * 16))?;
        memory.write_obj(0u64, GuestAddress(IDT + vector * 16 + 8))?;
    }
    memory.write_slice(code, GuestAddress(CODE))?;
    Ok(memory)
}

fn enter_long_mode(vcpu: &VcpuFd) -> Result<(), ProbeError> {
    let mut sregs = vcpu.get_sregs().map_err(ioctl("read the registers"))?;
    let segment = |selector, type_, l, db| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        s: 1,
        l,
        db,
        g: 1,
        ..Default::default()
    };
    sregs.cs = segment(0x08, 0xb, 1, 0);
    let data = segment(0x10, 0x3, 0, 1);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        limit: 0x67,
        selector: 0,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 5 * 8 - 1);
    (sregs.idt.base, sregs.idt.limit) = (IDT, (VECTORS * 16 - 1) as u16);
    sregs.cr3 = PML4;
    sregs.cr4 = 0x4_0620; // PAE, OSFXSR, OSXMMEXCPT, OSXSAVE
    sregs.cr0 = 0x8001_0033; // PG, WP, NE, ET, MP, PE
    sregs.efer = 0xd01; // NXE, LMA, LME, SCE
    vcpu.set_sregs(&sregs)
        .map_err(ioctl("put a vCPU into long mode"))?;
    let regs = kvm_regs {
        rip: CODE,
        rsp: STACK,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs)
        .map_err(ioctl("put a vCPU into long mode"))
}
