// SPDX-License-Identifier: Apache-2.0

//! End-to-end tests: they run as root in the testbed, against the installed `caisson` and real KVM.
//!
//! `cargo xtask test` runs each test in a process of its own with a deadline. `CAISSON_RUNTIME=runc` runs them
//! against another OCI runtime, which shows whether a test asks for what the field does; `CAISSON_SOAK=1` takes
//! the full counts.

mod agent;
mod boot;
mod broken;
mod check;
mod confinement;
mod crash;
mod exec;
mod exit;
mod faults;
mod lifecycle;
mod parts;
mod process;
mod races;
mod rootfs;
mod stdio;
mod support;
mod tracer;
mod tty;
mod vmm;
