// SPDX-License-Identifier: Apache-2.0

//! What depends on the processor: one folder per architecture with the same function names, chosen here.

#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("caisson-vmm runs on x86_64");
