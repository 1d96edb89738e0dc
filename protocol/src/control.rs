// SPDX-License-Identifier: Apache-2.0

//! The VMM's control socket and status pipe: newline-delimited JSON.
//!
//! **Control socket** (a Unix stream socket): the client sends one [`Request`] per line and reads one
//! [`Response`] line for each, in order. A line is at most [`MAX_LINE`] bytes; a longer one, or one that is no
//! request, is answered with an error and the connection is closed. At most 16 connections at once.
//!
//! **Status pipe** (an inherited descriptor named by `--status-fd`): [`VmEvent`] lines from the VMM to who
//! started it. The last one is always [`VmEvent::Exited`], unless the VMM was killed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Longest line either way, bytes, with its newline.
pub const MAX_LINE: usize = 1 << 20;

/// What a client asks of the VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "method", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// State of the machine. Answered by [`Response::Status`].
    Status {},
    /// Stops the vCPUs and then the devices; a second time it does nothing.
    Pause {},
    /// Goes on after [`Request::Pause`].
    Resume {},
    /// Ends the VM: `force` at once, otherwise as an orderly stop of devices (what they have taken is finished).
    /// Answered before the VMM ends.
    Stop {
        /// Without waiting for requests in flight.
        force: bool,
    },
    /// The newest console output. Answered by [`Response::Console`].
    Console {},
    /// Counters. Answered by [`Response::Metrics`].
    Metrics {},
}

/// What the VMM answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Response {
    /// Done.
    Ok {},
    /// Not done, and why.
    Error {
        /// For people.
        message: String,
    },
    /// See [`Request::Status`].
    Status {
        /// What the machine does.
        state: VmState,
        /// Number of vCPUs.
        vcpus: u32,
        /// Guest memory, MiB.
        memory_mib: u64,
    },
    /// See [`Request::Console`].
    Console {
        /// Newest output, not longer than the ring; bytes that are not UTF-8 are replaced.
        text: String,
        /// Bytes that were written before it and are lost.
        dropped_bytes: u64,
    },
    /// See [`Request::Metrics`].
    Metrics {
        /// Counter name (`vcpu.exits.mmio`, `fs.requests`, `vsock.connections`, …) → value since the start.
        counters: BTreeMap<String, u64>,
    },
}

/// What a machine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VmState {
    /// vCPUs run.
    Running,
    /// vCPUs and devices stand still.
    Paused,
    /// On its way out.
    Stopping,
}

/// A line on the status pipe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case", deny_unknown_fields)]
pub enum VmEvent {
    /// The machine is made, the control socket listens, the vCPUs are about to run.
    Started {
        /// CLOCK_MONOTONIC, nanoseconds, when the VMM process began.
        exec_ns: u64,
        /// CLOCK_MONOTONIC, nanoseconds, just before the first KVM_RUN.
        run_ns: u64,
    },
    /// The VMM ends.
    Exited {
        /// Why.
        cause: ExitCause,
        /// Tail of the console: at most 4 KiB.
        console_tail: String,
    },
}

/// Why a VMM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cause", rename_all = "kebab-case", deny_unknown_fields)]
pub enum ExitCause {
    /// The guest powered off or asked for a reset (`reboot`), which ends a microVM.
    GuestReset {},
    /// A client of the control socket asked for it.
    Stopped {},
    /// The guest's kernel panicked.
    GuestPanic {
        /// The panic line of the console, or empty when none was seen.
        line: String,
    },
    /// A triple fault on a vCPU.
    TripleFault {},
    /// KVM gave up on a vCPU: KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_FAIL_ENTRY or an error of KVM_RUN.
    Kvm {
        /// Reason in words, with the numbers.
        reason: String,
        /// The guest's instruction pointer.
        rip: u64,
        /// Which vCPU.
        vcpu: u32,
    },
    /// The machine could not be made: the configuration, a file, KVM.
    Setup {
        /// Chain of causes.
        message: String,
    },
    /// The VMM itself failed.
    Vmm {
        /// Chain of causes.
        message: String,
    },
}

impl std::fmt::Display for ExitCause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::GuestReset {} => write!(f, "the guest powered off"),
            Self::Stopped {} => write!(f, "the VM was stopped"),
            Self::GuestPanic { line } if line.is_empty() => write!(f, "the guest kernel panicked"),
            Self::GuestPanic { line } => write!(f, "the guest kernel panicked: {line}"),
            Self::TripleFault {} => write!(f, "the guest made a triple fault"),
            Self::Kvm { reason, rip, vcpu } => {
                write!(
                    f,
                    "KVM cannot run the guest: {reason} (vCPU {vcpu}, rip {rip:#x})"
                )
            }
            Self::Setup { message } => write!(f, "the VM could not be made: {message}"),
            Self::Vmm { message } => write!(f, "the VMM failed: {message}"),
        }
    }
}
