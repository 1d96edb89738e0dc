// SPDX-License-Identifier: Apache-2.0

//! The KVM virtual machine: its file descriptor, memory slots, interrupt controllers, irqfds and ioeventfds.

use std::io;

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestMemory, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::layout::{KVM_IDENTITY_MAP, KVM_TSS};

/// What every boot uses. (Nothing else is asked for: an unusual KVM may lack it.)
pub const NEEDED_CAPABILITIES: [(Cap, &str); 7] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
];

/// KVM that does not do what it is asked for.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// No /dev/kvm.
    #[error(
        "/dev/kvm does not exist: this machine has no hardware virtualization, or the kvm module is not loaded"
    )]
    NoKvm,
    /// /dev/kvm is not for this user.
    #[error("no permission to open /dev/kvm: add the user to the group that owns it, usually kvm")]
    NoPermission(#[source] io::Error),
    /// /dev/kvm cannot be opened for another reason.
    #[error("failed to open /dev/kvm")]
    Open(#[source] io::Error),
    /// Not the KVM that everybody has.
    #[error("KVM speaks API version {0}, not {KVM_API_VERSION}")]
    ApiVersion(i32),
    /// Without which no boot works.
    #[error("KVM has no {0}")]
    NoCapability(&'static str),
    /// More vCPUs than KVM takes.
    #[error("{want} vCPUs are more than this KVM takes ({max})")]
    TooManyVcpus {
        /// How many were asked for.
        want: u32,
        /// Its bound.
        max: usize,
    },
    /// An ioctl.
    #[error("failed to {what}")]
    Ioctl {
        /// What it does.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: errno::Error,
    },
}

fn ioctl(what: &'static str) -> impl FnOnce(errno::Error) -> VmError {
    move |source| VmError::Ioctl { what, source }
}

/// Opens /dev/kvm and checks that it has what a boot uses.
///
/// # Errors
/// Tells a missing file and a missing permission apart.
pub fn open_kvm() -> Result<Kvm, VmError> {
    let kvm = Kvm::new().map_err(|error| {
        let source = io::Error::from_raw_os_error(error.errno());
        match source.kind() {
            io::ErrorKind::NotFound => VmError::NoKvm,
            io::ErrorKind::PermissionDenied => VmError::NoPermission(source),
            _ => VmError::Open(source),
        }
    })?;
    let version = kvm.get_api_version();
    if i64::from(version) != i64::from(KVM_API_VERSION) {
        return Err(VmError::ApiVersion(version));
    }
    Ok(kvm)
}

/// One virtual machine.
#[derive(Debug)]
pub struct Vm {
    kvm: Kvm,
    fd: VmFd,
}

impl Vm {
    /// Makes a machine without memory or vCPUs, with interrupt controllers and timer in the kernel.
    ///
    /// # Errors
    /// When KVM lacks what a boot uses, or refuses.
    pub fn new(kvm: Kvm, vcpus: u32) -> Result<Self, VmError> {
        for (capability, name) in NEEDED_CAPABILITIES {
            if !kvm.check_extension(capability) {
                return Err(VmError::NoCapability(name));
            }
        }
        let max = kvm.get_max_vcpus();
        if usize::try_from(vcpus).map_or(true, |want| want > max) {
            return Err(VmError::TooManyVcpus { want: vcpus, max });
        }
        let fd = create(&kvm).map_err(ioctl("create a virtual machine"))?;
        fd.set_identity_map_address(KVM_IDENTITY_MAP)
            .map_err(ioctl("set the address of KVM's identity map"))?;
        fd.set_tss_address(KVM_TSS)
            .map_err(ioctl("set the address of KVM's TSS"))?;
        fd.create_irq_chip()
            .map_err(ioctl("create the interrupt controllers"))?;
        // Linux here does without the PIT; kernels that look for it must find one.
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(pit).map_err(ioctl("create the timer"))?;
        Ok(Self { kvm, fd })
    }

    /// Gives the machine its memory. The caller keeps `memory` mapped for as long as the machine exists.
    ///
    /// # Errors
    /// When KVM refuses a slot.
    pub fn set_memory(&self, memory: &GuestMemoryMmap) -> Result<(), VmError> {
        for (slot, region) in (0u32..).zip(memory.iter()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the region is mapped read-write by `memory` for its whole length, slots do not overlap
            // as regions of one GuestMemoryMmap do not, and the machine and its memory end together with the
            // process (`Machine` holds both).
            unsafe { self.fd.set_user_memory_region(region) }
                .map_err(ioctl("give KVM the guest's memory"))?;
        }
        Ok(())
    }

    /// Makes vCPU `id`, which is also its APIC id.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn create_vcpu(&self, id: u32) -> Result<VcpuFd, VmError> {
        self.fd
            .create_vcpu(u64::from(id))
            .map_err(ioctl("create a vCPU"))
    }

    /// The CPUID leaves that this KVM can give a guest.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn supported_cpuid(&self) -> Result<CpuId, VmError> {
        self.kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(ioctl("read the CPUID leaves that KVM supports"))
    }

    /// Whether KVM has `capability`.
    pub fn has(&self, capability: Cap) -> bool {
        self.kvm.check_extension(capability)
    }

    /// Raises interrupt line `irq` (edge) whenever `line` is written.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn connect_irq(&self, line: &EventFd, irq: u32) -> Result<(), VmError> {
        self.fd
            .register_irqfd(line, irq)
            .map_err(ioctl("connect an interrupt line"))
    }

    /// Writes `kick` when the guest writes the 32-bit `value` to `address`, instead of an exit.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn connect_kick(&self, kick: &EventFd, address: u64, value: u32) -> Result<(), VmError> {
        self.fd
            .register_ioevent(kick, &IoEventAddress::Mmio(address), value)
            .map_err(ioctl("connect a queue's notification"))
    }
}

/// KVM_CREATE_VM is interrupted by signals on some kernels: a few times again.
fn create(kvm: &Kvm) -> Result<VmFd, errno::Error> {
    const TRIES: usize = 5;
    let mut result = kvm.create_vm();
    for _ in 1..TRIES {
        match &result {
            Err(error) if error.errno() == libc::EINTR => result = kvm.create_vm(),
            Ok(_) | Err(_) => break,
        }
    }
    result
}
