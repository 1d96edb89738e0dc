// SPDX-License-Identifier: Apache-2.0

//! Caisson's images: what a guest boots from, and what a container is made of.
//!
//! Two things come out of here, and each comes out whole or not at all:
//!
//! - [`initramfs`]: the guest's first root file system: the agent as `/init`, mount points, two device
//!   nodes. The same inputs give the same bytes.
//! - [`bundle`]: an OCI bundle, for people and tests without a container manager.

#![forbid(unsafe_code)]

pub mod bundle;
pub mod executable;
pub mod initramfs;
pub mod source;
pub mod spec;
pub mod staging;
