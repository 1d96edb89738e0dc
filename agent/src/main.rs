// SPDX-License-Identifier: Apache-2.0

//! Caisson: agent.

fn main() {}
