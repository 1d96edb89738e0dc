// SPDX-License-Identifier: Apache-2.0

//! Can this machine run microVMs? What `caisson-vmm --check` answers.
//!
//! It opens /dev/kvm, asks for the capabilities that a boot uses, and really runs a few dozen instructions of
//! a long-mode guest ([`guest`]), among them ones that a KVM which emulates ring 0 cannot do. Each row says yes or
//! no, what was found and what to do about it.

pub mod guest;
pub mod programs;
pub mod report;

use kvm_ioctls::Kvm;

pub use report::{Report, Row};

use crate::error::chain;
use crate::vm::{NEEDED_CAPABILITIES, VmError, open_kvm};
use guest::Outcome;
use programs::PROGRAMS;

const ADVICE_NO_KVM: &str = "on a virtual machine, switch nested virtualization on; on a physical one, switch \
                             VT-x or SVM on in the firmware; then load kvm_intel or kvm_amd";
const ADVICE_PERMISSION: &str =
    "add this user to the group that owns /dev/kvm (usually kvm), or run as root";
const ADVICE_OLD: &str = "use a host kernel of version 5.10 or newer";
const ADVICE_PVM: &str = "use a machine with hardware virtualization (VT-x or SVM), or configure a guest kernel that is \
                          made for this KVM (such as PVM)";

/// Looks at this machine.
pub fn run() -> Report {
    let mut rows = Vec::new();
    match open_kvm() {
        Ok(kvm) => {
            rows.push(Row::yes("kvm", "/dev/kvm can be opened, API version 12"));
            capabilities(&kvm, &mut rows);
            programs(&kvm, &mut rows);
        }
        Err(error) => {
            let advice = match &error {
                VmError::NoPermission(_) => ADVICE_PERMISSION,
                VmError::ApiVersion(_) => ADVICE_OLD,
                _ => ADVICE_NO_KVM,
            };
            rows.push(Row::no("kvm", chain(&error), advice));
        }
    }
    Report::new(rows)
}

fn capabilities(kvm: &Kvm, rows: &mut Vec<Row>) {
    for (capability, name) in NEEDED_CAPABILITIES {
        rows.push(if kvm.check_extension(capability) {
            Row::yes(name, "there")
        } else {
            Row::no(name, "not there", ADVICE_OLD)
        });
    }
}

/// Runs every program, and says in words what it means when some do not run.
fn programs(kvm: &Kvm, rows: &mut Vec<Row>) {
    let mut ran = 0;
    let mut given_up = 0;
    for program in &PROGRAMS {
        rows.push(match guest::run(kvm, program) {
            Ok(Outcome::Done) => {
                ran += 1;
                Row::yes(program.name, "ran in a guest")
            }
            Ok(Outcome::GaveUp(how)) => {
                given_up += 1;
                Row::no(program.name, how, ADVICE_PVM)
            }
            Ok(Outcome::Wrong(how)) => Row::no(program.name, how, ADVICE_PVM),
            Err(error) => Row::no(program.name, chain(&error), ADVICE_NO_KVM),
        });
    }
    rows.push(if ran == PROGRAMS.len() {
        Row::yes("guests", "this machine's KVM runs ordinary guests")
    } else if given_up > 0 {
        Row::no(
            "guests",
            "this machine's KVM cannot run ordinary guests: it gives up on instructions that every kernel \
             uses, as a paravirtual KVM (PVM) without hardware virtualization does",
            ADVICE_PVM,
        )
    } else {
        Row::no(
            "guests",
            "this machine's KVM cannot run ordinary guests",
            ADVICE_PVM,
        )
    });
}
