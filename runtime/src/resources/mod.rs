// SPDX-License-Identifier: Apache-2.0

//! What a pod holds on the host besides its VMM: a cgroup, and mounts that only the VMM sees.

pub mod cgroup;
pub mod volume;
