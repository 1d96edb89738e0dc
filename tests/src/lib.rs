// SPDX-License-Identifier: Apache-2.0

//! Caisson's testbed: a machine of its own with KVM, containerd, Podman and Docker, on any machine.
//!
//! [`Testbed::start`] boots a QEMU machine from a Debian root that is made once per machine ([`root`], kept in
//! the [`cache`]); [`Testbed::spawn`] and [`Testbed::output`] run commands in it as root, any number at once;
//! dropping it ends it. Directories of the host are shared into it by virtio-fs, and nothing else of the host
//! is: it has no network card, and what is written outside a share is gone with it.
//!
//! The machine's processor is emulated (QEMU's TCG) with AMD's SVM, so that KVM inside is real, unless the
//! host's own KVM can run such a machine with nested virtualization, which is found out by doing it
//! ([`accel`]).

pub mod frame;

pub mod accel;
pub mod bench;
pub mod cache;
pub mod cleanup;
mod cpio;
pub mod installed;
mod link;
mod machine;
pub mod root;
mod testbed;
pub mod tools;

pub use link::{Event, LinkError, Running, Stdin};
pub use testbed::{Command, Options, Output, Share, Testbed, TestbedError};

/// Tells the person who waits; a terminal that is gone is no failure.
fn say(line: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{line}");
}
