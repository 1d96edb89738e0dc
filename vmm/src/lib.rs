// SPDX-License-Identifier: Apache-2.0

//! One microVM in one process: the library behind `caisson-vmm`.
//!
//! It knows nothing of OCI, pods or containers: [`caisson_protocol::vm::VmConfig`] goes in, a running machine
//! comes out, and what comes from the guest is treated as an attack.

pub mod devices;
pub mod worker;
