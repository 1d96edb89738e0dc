// SPDX-License-Identifier: Apache-2.0

//! One microVM in one process: the library behind `caisson-vmm`.
//!
//! It knows nothing of OCI, pods or containers: [`caisson_protocol::vm::VmConfig`] goes in, a running machine
//! comes out, and what comes from the guest is treated as an attack.
//!
//! In the order in which a machine comes to be: the configuration is checked ([`plan`]), memory is mapped
//! ([`memory`]), the KVM machine made ([`vm`]), devices put on the [`bus`] ([`devices`], each served by a
//! [`worker`] thread), kernel and boot parameters loaded ([`boot`], [`arch`]), and the vCPUs let run
//! ([`vcpu`], [`gate`]) until the machine comes to its [`ending`].

pub mod arch;
pub mod args;
pub mod boot;
pub mod builder;
pub mod bus;
pub mod check;
pub mod control;
pub mod devices;
pub mod ending;
pub mod error;
pub mod gate;
pub mod launch;
pub mod logging;
pub mod machine;
pub mod memory;
pub mod plan;
pub mod sys;
pub mod vcpu;
pub mod vm;
pub mod worker;
