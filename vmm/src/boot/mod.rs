// SPDX-License-Identifier: Apache-2.0

//! What is put into guest memory before the first instruction: kernel, initramfs and command line.

pub mod cmdline;
pub mod kernel;
