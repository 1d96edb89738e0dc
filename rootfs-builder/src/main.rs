// SPDX-License-Identifier: Apache-2.0

//! Caisson: rootfs-builder.

fn main() {}
