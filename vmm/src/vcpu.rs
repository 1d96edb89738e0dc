// SPDX-License-Identifier: Apache-2.0

//! vCPU threads: run the guest until it wants something, give it to the bus, go on.
//!
//! The loop knows no devices. It ends when the machine does: KVM gives up, the guest makes a triple fault, or
//! somebody else reports an [`Ending`]. A vCPU inside KVM is brought out by a [`Kick`]: `immediate_exit` makes
//! the next KVM_RUN return, the signal the one that is on its way, so none is missed.

#![cfg_attr(
    not(test),
    warn(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::indexing_slicing
    )
)]

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use caisson_protocol::control::ExitCause;
use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::bus::Bus;
use crate::ending::Ending;
use crate::gate::Gate;

/// Exits to user space by reason, since the start.
#[derive(Debug, Default)]
pub struct ExitCounts {
    mmio: AtomicU64,
    pio: AtomicU64,
    interrupted: AtomicU64,
    other: AtomicU64,
}

impl ExitCounts {
    /// The counters with their names.
    pub fn read(&self) -> [(&'static str, u64); 4] {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        [
            ("mmio", load(&self.mmio)),
            ("pio", load(&self.pio)),
            ("interrupted", load(&self.interrupted)),
            ("other", load(&self.other)),
        ]
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// What vCPUs share.
#[derive(Debug, Clone)]
pub struct VcpuContext {
    /// Port I/O.
    pub ports: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// Where they stand still.
    pub gate: Arc<Gate>,
    /// Where they say why they ended.
    pub ending: Ending,
}

/// The way into a vCPU that is inside KVM.
#[derive(Debug, Default)]
struct Kick(Mutex<Option<KickTarget>>);

#[derive(Debug)]
struct KickTarget {
    /// `kvm_run.immediate_exit` of the vCPU.
    immediate_exit: *const AtomicU8,
    thread: libc::pthread_t,
}

// SAFETY: the pointer goes to memory shared with the kernel, used as an atomic only, and is valid for as long
// as the target is in its `Kick`: the vCPU's thread takes it out before its VcpuFd is dropped.
unsafe impl Send for KickTarget {}

impl Kick {
    fn arm(&self, fd: &mut VcpuFd) {
        let immediate_exit = (&raw mut fd.get_kvm_run().immediate_exit)
            .cast::<AtomicU8>()
            .cast_const();
        // SAFETY: pthread_self has no preconditions.
        let thread = unsafe { libc::pthread_self() };
        *self.lock() = Some(KickTarget {
            immediate_exit,
            thread,
        });
    }

    fn disarm(&self) {
        *self.lock() = None;
    }

    fn kick(&self) {
        if let Some(target) = &*self.lock() {
            // SAFETY: valid while the target is here, see KickTarget; AtomicU8 has the layout of u8.
            unsafe { &*target.immediate_exit }.store(1, Ordering::SeqCst);
            // SAFETY: the thread is alive while the target is here: it takes it out, under this lock,
            // before it ends.
            let result = unsafe { libc::pthread_kill(target.thread, SIGRTMIN()) };
            if result != 0 {
                let error = io::Error::from_raw_os_error(result);
                log::error!("failed to interrupt a vCPU: {error}");
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<KickTarget>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A vCPU and its thread.
pub struct VcpuThread {
    kick: Arc<Kick>,
    counts: Arc<ExitCounts>,
    thread: JoinHandle<()>,
}

impl fmt::Debug for VcpuThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VcpuThread")
            .field("name", &self.thread.thread().name())
            .finish_non_exhaustive()
    }
}

extern "C" fn do_nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Installs the handler of the kick signal: it does nothing, its delivery ends KVM_RUN. Once per process.
///
/// # Errors
/// As sigaction(2).
pub fn install_kick_handler() -> io::Result<()> {
    register_signal_handler(SIGRTMIN(), do_nothing)
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

impl VcpuThread {
    /// Starts vCPU `id` in a thread of its own.
    ///
    /// # Errors
    /// When there is no thread.
    pub fn spawn(id: u32, mut fd: VcpuFd, context: VcpuContext) -> io::Result<Self> {
        let kick = Arc::new(Kick::default());
        let counts = Arc::new(ExitCounts::default());
        let (its_kick, its_counts) = (kick.clone(), counts.clone());
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{id}"))
            .spawn(move || {
                let place = context.gate.enter();
                its_kick.arm(&mut fd);
                let cause = run(id, &mut fd, &context, &its_counts);
                its_kick.disarm();
                if let Some(cause) = cause {
                    context.ending.report(cause);
                }
                drop(place);
            })?;
        Ok(Self {
            kick,
            counts,
            thread,
        })
    }

    /// Brings the vCPU out of KVM, to look at the gate.
    pub fn kick(&self) {
        self.kick.kick();
    }

    /// Its exits so far.
    pub fn counts(&self) -> &Arc<ExitCounts> {
        &self.counts
    }

    /// Waits for the end of the thread. The gate must be stopped.
    pub fn join(self) {
        self.kick.kick();
        if self.thread.join().is_err() {
            log::error!("a vCPU thread panicked");
        }
    }
}

/// What to do after an exit.
enum Step {
    Go,
    End(ExitCause),
    /// KVM gave up: the reason, without the details that only the vCPU's page has.
    GaveUp(Reason),
}

enum Reason {
    InternalError,
    Text(String),
}

/// Runs the vCPU to its end; `None` when somebody else ended the machine.
fn run(id: u32, fd: &mut VcpuFd, context: &VcpuContext, counts: &ExitCounts) -> Option<ExitCause> {
    while context.gate.pass() {
        let step = match fd.run() {
            Ok(exit) => handle(exit, context, counts),
            Err(error) => match error.errno() {
                libc::EINTR => {
                    count(&counts.interrupted);
                    // Cleared before the gate is looked at again: a kick from now on counts.
                    fd.set_kvm_immediate_exit(0);
                    std::sync::atomic::fence(Ordering::SeqCst);
                    Step::Go
                }
                libc::EAGAIN => Step::Go,
                _ => Step::GaveUp(Reason::Text(format!("KVM_RUN failed: {error}"))),
            },
        };
        match step {
            Step::Go => {}
            Step::End(cause) => return Some(cause),
            Step::GaveUp(reason) => return Some(gave_up(id, fd, reason)),
        }
    }
    None
}

fn handle(exit: VcpuExit<'_>, context: &VcpuContext, counts: &ExitCounts) -> Step {
    match exit {
        VcpuExit::MmioRead(address, data) => {
            count(&counts.mmio);
            context.mmio.read(address, data);
            Step::Go
        }
        VcpuExit::MmioWrite(address, data) => {
            count(&counts.mmio);
            context.mmio.write(address, data);
            Step::Go
        }
        VcpuExit::IoIn(port, data) => {
            count(&counts.pio);
            context.ports.read(u64::from(port), data);
            Step::Go
        }
        VcpuExit::IoOut(port, data) => {
            count(&counts.pio);
            context.ports.write(u64::from(port), data);
            Step::Go
        }
        VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen => {
            count(&counts.other);
            Step::Go
        }
        VcpuExit::Shutdown => Step::End(ExitCause::TripleFault {}),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN | KVM_SYSTEM_EVENT_RESET, _) => {
            Step::End(ExitCause::GuestReset {})
        }
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _) => Step::End(ExitCause::GuestPanic {
            line: String::new(),
        }),
        VcpuExit::InternalError => Step::GaveUp(Reason::InternalError),
        VcpuExit::FailEntry(reason, cpu) => Step::GaveUp(Reason::Text(format!(
            "KVM_EXIT_FAIL_ENTRY, hardware reason {reason:#x} on host CPU {cpu}"
        ))),
        other => Step::GaveUp(Reason::Text(format!("unexpected exit {other:?}"))),
    }
}

/// The cause, with the instruction pointer.
fn gave_up(id: u32, fd: &mut VcpuFd, reason: Reason) -> ExitCause {
    let reason = match reason {
        Reason::Text(text) => text,
        Reason::InternalError => internal_error(fd),
    };
    let rip = match fd.get_regs() {
        Ok(regs) => regs.rip,
        Err(error) => {
            log::warn!("failed to read the registers of vCPU {id}: {error}");
            0
        }
    };
    ExitCause::Kvm {
        reason,
        rip,
        vcpu: id,
    }
}

/// KVM_EXIT_INTERNAL_ERROR in words, with its data.
pub(crate) fn internal_error(fd: &mut VcpuFd) -> String {
    // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, for which the kernel fills this member of the union;
    // all of its bit patterns are valid.
    let error = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal };
    let words = match error.suberror {
        KVM_INTERNAL_ERROR_EMULATION => {
            "it could not emulate an instruction (a paravirtual or nested KVM that cannot run ordinary guests \
             does this; see `caisson check`)"
        }
        KVM_INTERNAL_ERROR_SIMUL_EX => "two exceptions at once",
        KVM_INTERNAL_ERROR_DELIVERY_EV => "an event could not be delivered",
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "the processor gave an unknown exit reason",
        _ => "reason unknown to this version",
    };
    let data: Vec<String> = error
        .data
        .iter()
        .take(usize::try_from(error.ndata).unwrap_or(usize::MAX))
        .map(|word| format!("{word:#x}"))
        .collect();
    format!(
        "KVM_EXIT_INTERNAL_ERROR, suberror {}: {words}; data [{}]",
        error.suberror,
        data.join(", ")
    )
}
