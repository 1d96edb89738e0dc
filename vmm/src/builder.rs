// SPDX-License-Identifier: Apache-2.0

//! The recipe: from a plan to a machine that is ready to run, one step after the other.

use std::io;
use std::sync::Arc;

use kvm_ioctls::{Cap, VcpuFd};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::cpuid::{self, CpuidError, CpuidPlan};
use crate::arch::layout::{
    FIRST_IRQ, I8042_PORT, LAST_IRQ, SERIAL_PORT, VIRTIO_MMIO_SIZE, VIRTIO_MMIO_START,
};
use crate::arch::mptable::{self, MpTableError};
use crate::arch::pvh::{self, PvhError};
use crate::arch::registers::{self, RegistersError};
use crate::boot::cmdline::{self, CmdlineError, MmioDevice};
use crate::boot::kernel::{self, KernelError};
use crate::bus::{Bus, BusError};
use crate::devices::console_ring::ConsoleRing;
use crate::devices::i8042::{self, I8042};
use crate::devices::serial::{self, EarlyConsole};
use crate::devices::virtio::blk::BlkDevice;
use crate::devices::virtio::console::ConsoleDevice;
use crate::devices::virtio::device::{GuestMemory, Interrupt, VirtioDevice};
use crate::devices::virtio::fs::FsDevice;
use crate::devices::virtio::mmio::MmioTransport;
use crate::devices::virtio::mmio::registers::QUEUE_NOTIFY_OFFSET;
use crate::devices::virtio::rng::RngDevice;
use crate::devices::virtio::vsock::VsockDevice;
use crate::ending::Ending;
use crate::gate::Gate;
use crate::machine::{Machine, MachineParts};
use crate::memory::{self, MemoryError};
use crate::plan::VmPlan;
use crate::vcpu::VcpuContext;
use crate::vm::{Vm, VmError, open_kvm};

/// A machine that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// KVM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel or initramfs.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Command line.
    #[error(transparent)]
    Cmdline(#[from] CmdlineError),
    /// MP table.
    #[error(transparent)]
    MpTable(#[from] MpTableError),
    /// Start info.
    #[error(transparent)]
    Pvh(#[from] PvhError),
    /// CPUID.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// Registers.
    #[error(transparent)]
    Registers(#[from] RegistersError),
    /// The bus.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// CPUID was refused.
    #[error("failed to set the CPUID of vCPU {vcpu}")]
    SetCpuid {
        /// Which one.
        vcpu: u32,
        /// Why.
        #[source]
        source: vmm_sys_util::errno::Error,
    },
    /// An eventfd.
    #[error("failed to make an eventfd for {0}")]
    EventFd(&'static str, #[source] io::Error),
    /// More devices than interrupt lines.
    #[error("{count} devices are more than the {max} that have an interrupt line")]
    TooManyDevices {
        /// How many.
        count: usize,
        /// Lines.
        max: u32,
    },
    /// A device's host side.
    #[error("failed to make the {device} device {name:?}")]
    Device {
        /// Its kind.
        device: &'static str,
        /// Which one.
        name: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Makes the machine of `plan`. Its vCPUs run when it is started.
///
/// # Errors
/// Names what could not be had.
pub fn build(plan: VmPlan) -> Result<Machine, BuildError> {
    let config = plan.config();

    // 1. The KVM machine and its memory.
    let vm = Vm::new(open_kvm()?, config.vcpus)?;
    let mmap = memory::allocate(plan.memory_bytes())?;
    vm.set_memory(&mmap)?;

    // 2. Kernel and initramfs.
    let kernel = kernel::load_kernel(&mmap, &config.kernel)?;
    let initramfs = kernel::load_initramfs(&mmap, &config.initramfs, kernel)?;
    let memory = GuestMemory::new(mmap.clone());

    // 3. Devices.
    let gate = Arc::new(Gate::new());
    let ending =
        Ending::new(gate.clone()).map_err(|error| BuildError::EventFd("the end", error))?;
    let ring = ConsoleRing::new(ring_bytes(config.console.ring_kib));
    let ports = make_ports(&ring, &ending)?;
    let (mmio, transports, on_cmdline) =
        attach(&vm, &memory, virtio_devices(&plan, ring.clone())?)?;

    // 4. What the kernel reads at its start.
    let line = cmdline::build(&on_cmdline, config.console.early, &config.cmdline)?;
    cmdline::write(&mmap, &line)?;
    let irqs: Vec<u32> = on_cmdline.iter().map(|device| device.irq).collect();
    mptable::write(&mmap, config.vcpus, &irqs)?;
    pvh::write(&mmap, plan.memory_bytes(), initramfs)?;

    // 5. vCPUs.
    let vcpus = make_vcpus(&vm, config.vcpus, kernel.entry)?;
    let context = VcpuContext {
        ports: Arc::new(ports),
        mmio: Arc::new(mmio),
        gate,
        ending,
    };
    Ok(Machine::new(MachineParts {
        plan,
        vm,
        memory,
        vcpus,
        context,
        transports,
        ring,
    }))
}

fn ring_bytes(kib: u32) -> usize {
    usize::try_from(kib).unwrap_or(0).saturating_mul(1024)
}

fn make_ports(ring: &ConsoleRing, ending: &Ending) -> Result<Bus, BusError> {
    let mut ports = Bus::default();
    ports.insert(
        SERIAL_PORT.into(),
        serial::PORTS,
        Arc::new(EarlyConsole::new(ring.clone())),
    )?;
    ports.insert(
        I8042_PORT.into(),
        i8042::PORTS,
        Arc::new(I8042::new(ending.clone())),
    )?;
    Ok(ports)
}

/// All virtio devices, in the order in which the kernel finds them: the console first, so that it takes over from
/// the early console as soon as it can.
fn virtio_devices(
    plan: &VmPlan,
    ring: ConsoleRing,
) -> Result<Vec<Box<dyn VirtioDevice>>, BuildError> {
    let config = plan.config();
    let mut devices: Vec<Box<dyn VirtioDevice>> = vec![
        Box::new(ConsoleDevice::new(ring)),
        Box::new(RngDevice::new()),
    ];
    let vsock = VsockDevice::new(&config.vsock)
        .map_err(|error| device_error("vsock", &config.id, error))?;
    devices.push(Box::new(vsock));
    for fs in &config.fs {
        let device = FsDevice::new(fs).map_err(|error| device_error("fs", &fs.tag, error))?;
        devices.push(Box::new(device));
    }
    for blk in &config.blk {
        let device =
            BlkDevice::new(blk).map_err(|error| device_error("blk", &blk.serial, error))?;
        devices.push(Box::new(device));
    }
    Ok(devices)
}

fn device_error(
    device: &'static str,
    name: &str,
    source: impl std::error::Error + Send + Sync + 'static,
) -> BuildError {
    BuildError::Device {
        device,
        name: name.to_owned(),
        source: Box::new(source),
    }
}

type Attached = (Bus, Vec<Arc<MmioTransport>>, Vec<MmioDevice>);

/// Puts the devices on the bus and connects their interrupts and notifications.
fn attach(
    vm: &Vm,
    memory: &GuestMemory,
    devices: Vec<Box<dyn VirtioDevice>>,
) -> Result<Attached, BuildError> {
    let count = devices.len();
    let mut bus = Bus::default();
    let mut transports = Vec::with_capacity(count);
    let mut on_cmdline = Vec::with_capacity(count);
    let places =
        (FIRST_IRQ..=LAST_IRQ).zip((VIRTIO_MMIO_START..).step_by(VIRTIO_MMIO_SIZE as usize));
    let max = LAST_IRQ - FIRST_IRQ + 1;
    if u32::try_from(count).map_or(true, |count| count > max) {
        return Err(BuildError::TooManyDevices { count, max });
    }
    for (device, (irq, base)) in devices.into_iter().zip(places) {
        let line = event_fd("an interrupt line")?;
        vm.connect_irq(&line, irq)?;
        let mut kicks = Vec::new();
        for (index, _) in (0u32..).zip(device.queue_sizes()) {
            let kick = event_fd("a queue")?;
            vm.connect_kick(&kick, base + QUEUE_NOTIFY_OFFSET, index)?;
            kicks.push(kick);
        }
        let interrupt = Arc::new(Interrupt::new(line));
        let transport = MmioTransport::new(device, memory.clone(), interrupt, kicks);
        let transport = Arc::new(transport);
        bus.insert(base, VIRTIO_MMIO_SIZE, transport.clone())?;
        transports.push(transport);
        on_cmdline.push(MmioDevice {
            base,
            size: VIRTIO_MMIO_SIZE,
            irq,
        });
    }
    Ok((bus, transports, on_cmdline))
}

fn event_fd(what: &'static str) -> Result<EventFd, BuildError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
        .map_err(|error| BuildError::EventFd(what, error))
}

fn make_vcpus(vm: &Vm, count: u32, entry: u64) -> Result<Vec<VcpuFd>, BuildError> {
    let supported = vm.supported_cpuid()?;
    let mut plan = None;
    let mut vcpus = Vec::new();
    for id in 0..count {
        let fd = vm.create_vcpu(id)?;
        // One frequency for all: the first vCPU knows it.
        let plan = *plan.get_or_insert_with(|| CpuidPlan {
            vcpus: count,
            tsc_khz: fd.get_tsc_khz().ok().filter(|khz| *khz > 0),
            tsc_deadline: vm.has(Cap::TscDeadlineTimer),
        });
        let cpuid = cpuid::for_vcpu(&supported, plan, id)?;
        fd.set_cpuid2(&cpuid)
            .map_err(|source| BuildError::SetCpuid { vcpu: id, source })?;
        registers::set_msrs(&fd, id)?;
        if id == 0 {
            registers::set_entry(&fd, id, entry)?;
        }
        vcpus.push(fd);
    }
    Ok(vcpus)
}
