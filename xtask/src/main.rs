// SPDX-License-Identifier: Apache-2.0

//! Caisson: xtask.

fn main() {}
