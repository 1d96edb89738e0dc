// SPDX-License-Identifier: Apache-2.0

//! Which accelerator runs the testbed's machine.
//!
//! KVM is taken only where it has shown that it can: /dev/kvm opens, nested virtualization is on, and this
//! very machine came up with /dev/kvm inside, once since the host was booted. There are KVMs that open, answer
//! every question, and then cannot run an ordinary kernel.

use std::fs::{self, File};
use std::path::Path;

/// How the machine's CPU is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// The host's KVM.
    Kvm,
    /// Emulation.
    Tcg,
    /// Emulation whose clock is the count of instructions: slower to wait for, the same every time.
    InstructionCount,
}

/// What is known about the host's KVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Runs,
    DoesNot,
    /// It may; it has to be tried.
    Unknown,
}

const FILE: &str = "kvm-verdict";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What can be said about the host's KVM without a trial, or from one since this boot.
pub(crate) fn verdict(cache: &Path) -> Verdict {
    let nested = |module: &str| {
        let value = fs::read_to_string(format!("/sys/module/{module}/parameters/nested"));
        value.is_ok_and(|value| matches!(value.trim(), "1" | "Y"))
    };
    let opens = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok();
    if !opens || !(nested("kvm_amd") || nested("kvm_intel")) {
        return Verdict::DoesNot;
    }
    let boot = fs::read_to_string(BOOT_ID).unwrap_or_default();
    read(
        &fs::read_to_string(cache.join(FILE)).unwrap_or_default(),
        boot.trim(),
    )
}

/// Keeps the outcome of a trial for the rest of this boot. A verdict that cannot be kept is found anew.
pub(crate) fn remember(cache: &Path, runs: bool) {
    let boot = fs::read_to_string(BOOT_ID).unwrap_or_default();
    let _ = fs::write(cache.join(FILE), format!("{} {runs}\n", boot.trim()));
}

fn read(kept: &str, boot: &str) -> Verdict {
    match kept.trim().split_once(' ') {
        Some((of, "true")) if of == boot => Verdict::Runs,
        Some((of, "false")) if of == boot => Verdict::DoesNot,
        _ => Verdict::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_verdict_counts_for_its_own_boot_alone() {
        assert_eq!(read("abc true\n", "abc"), Verdict::Runs);
        assert_eq!(read("abc false\n", "abc"), Verdict::DoesNot);
        assert_eq!(read("abc true\n", "abd"), Verdict::Unknown);
        assert_eq!(read("", "abc"), Verdict::Unknown);
        assert_eq!(read("abc maybe", "abc"), Verdict::Unknown);
    }
}
