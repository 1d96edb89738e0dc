// SPDX-License-Identifier: Apache-2.0

//! Where a root file system comes from.
//!
//! Each source fills an empty directory (or points at a full one) and says what it knows about how to
//! run what is in it. None writes outside that directory.

pub mod busybox;
pub mod directory;
