// SPDX-License-Identifier: Apache-2.0

//! The OCI bundle: read, checked, and translated into a [`plan::Plan`], all before anything is made.
//!
//! `load` reads config.json; `validate` refuses what cannot be done, one named rule at a time; `translate`
//! turns host paths into guest paths and decides the VM's size. None of them changes anything on the host.

pub mod load;
pub mod plan;
pub mod translate;
pub mod validate;
