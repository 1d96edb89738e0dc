// SPDX-License-Identifier: Apache-2.0

//! A machine from its start to its end: pause, resume, what it does, and taking it apart.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use caisson_protocol::control::{ExitCause, VmState};
use kvm_ioctls::VcpuFd;

use crate::devices::console_ring::ConsoleRing;
use crate::devices::virtio::device::{ActivateError, GuestMemory};
use crate::devices::virtio::mmio::MmioTransport;
use crate::ending::Ending;
use crate::plan::VmPlan;
use crate::vcpu::{ExitCounts, VcpuContext, VcpuThread, install_kick_handler};
use crate::vm::Vm;

/// A machine that does not do what it is asked for.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A vCPU's thread.
    #[error("failed to start vCPU {vcpu}")]
    Vcpu {
        /// Which one.
        vcpu: usize,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kick signal.
    #[error("failed to install the vCPUs' signal handler")]
    Signal(#[source] io::Error),
    /// It is on its way out.
    #[error("the machine is stopping")]
    Stopping,
    /// A device does not go on.
    #[error("failed to resume a device")]
    Resume(#[source] ActivateError),
}

/// What a machine is made of.
#[derive(Debug)]
pub(crate) struct MachineParts {
    pub(crate) plan: VmPlan,
    pub(crate) vm: Vm,
    pub(crate) memory: GuestMemory,
    pub(crate) vcpus: Vec<VcpuFd>,
    pub(crate) context: VcpuContext,
    pub(crate) transports: Vec<Arc<MmioTransport>>,
    pub(crate) ring: ConsoleRing,
}

/// See the module.
#[derive(Debug)]
pub struct Machine {
    plan: VmPlan,
    // Kept for as long as vCPUs may run, in this order.
    waiting: Vec<VcpuFd>,
    running: Vec<VcpuThread>,
    /// Of all vCPUs that were ever started.
    counts: Vec<Arc<ExitCounts>>,
    context: VcpuContext,
    transports: Vec<Arc<MmioTransport>>,
    ring: ConsoleRing,
    paused: bool,
    _vm: Vm,
    _memory: GuestMemory,
}

impl Machine {
    pub(crate) fn new(parts: MachineParts) -> Self {
        Self {
            plan: parts.plan,
            waiting: parts.vcpus,
            running: Vec::new(),
            counts: Vec::new(),
            context: parts.context,
            transports: parts.transports,
            ring: parts.ring,
            paused: false,
            _vm: parts.vm,
            _memory: parts.memory,
        }
    }

    /// Lets the vCPUs run.
    ///
    /// # Errors
    /// When a thread cannot be had; the machine is to be taken apart then.
    pub fn start(&mut self) -> Result<(), MachineError> {
        install_kick_handler().map_err(MachineError::Signal)?;
        for (id, fd) in (0u32..).zip(std::mem::take(&mut self.waiting)) {
            let thread = VcpuThread::spawn(id, fd, self.context.clone()).map_err(|source| {
                MachineError::Vcpu {
                    vcpu: self.running.len(),
                    source,
                }
            })?;
            self.counts.push(thread.counts().clone());
            self.running.push(thread);
        }
        Ok(())
    }

    /// Where its end is reported.
    pub fn ending(&self) -> &Ending {
        &self.context.ending
    }

    /// Its console output.
    pub fn console(&self) -> &ConsoleRing {
        &self.ring
    }

    /// What it was made from.
    pub fn plan(&self) -> &VmPlan {
        &self.plan
    }

    /// What it does.
    pub fn state(&self) -> VmState {
        if self.ending().cause().is_some() {
            VmState::Stopping
        } else if self.paused {
            VmState::Paused
        } else {
            VmState::Running
        }
    }

    /// Stops the vCPUs, then the devices. Nothing touches guest memory afterwards.
    ///
    /// # Errors
    /// When the machine is on its way out.
    pub fn pause(&mut self) -> Result<(), MachineError> {
        if self.paused {
            return Ok(());
        }
        let gate = &self.context.gate;
        if !gate.shut() {
            return Err(MachineError::Stopping);
        }
        self.running.iter().for_each(VcpuThread::kick);
        gate.wait_until_all_stand();
        self.transports
            .iter()
            .for_each(|transport| transport.pause());
        self.paused = true;
        Ok(())
    }

    /// Goes on after a pause: devices, then vCPUs.
    ///
    /// # Errors
    /// When a device does not; the machine stays paused then.
    pub fn resume(&mut self) -> Result<(), MachineError> {
        if !self.paused {
            return Ok(());
        }
        for transport in &self.transports {
            transport.resume().map_err(MachineError::Resume)?;
        }
        self.paused = false;
        self.context.gate.open();
        Ok(())
    }

    /// Counters of vCPUs and devices since the start.
    pub fn metrics(&self) -> BTreeMap<String, u64> {
        let mut counters = BTreeMap::new();
        for counts in &self.counts {
            for (name, value) in counts.read() {
                *counters.entry(format!("vcpu.exits.{name}")).or_default() += value;
            }
        }
        counters.insert("console.ring.bytes".into(), self.ring.total());
        counters.insert("bus.missed.mmio".into(), self.context.mmio.missed());
        counters.insert("bus.missed.pio".into(), self.context.ports.missed());
        for transport in &self.transports {
            for (name, value) in transport.metrics() {
                *counters.entry(name).or_default() += value;
            }
        }
        counters
    }

    /// Takes the machine apart after its end was reported, and says why it ended. Devices finish what they have
    /// taken, unless `force`.
    pub fn shut_down(&mut self, force: bool) -> ExitCause {
        let fallback = ExitCause::Stopped {};
        self.ending().report(fallback.clone());
        self.running.drain(..).for_each(VcpuThread::join);
        if !force {
            self.transports
                .iter()
                .for_each(|transport| transport.stop());
        }
        let cause = self.ending().cause().unwrap_or(fallback);
        with_panic_line(cause, &self.ring)
    }
}

/// A kernel that panics resets the machine (or faults); its console says that it was a panic.
fn with_panic_line(cause: ExitCause, ring: &ConsoleRing) -> ExitCause {
    match (&cause, ring.panic_line()) {
        (
            ExitCause::GuestReset {} | ExitCause::TripleFault {} | ExitCause::GuestPanic { .. },
            Some(line),
        ) => ExitCause::GuestPanic { line },
        _ => cause,
    }
}

#[cfg(test)]
mod tests;
