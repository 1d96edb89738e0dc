// SPDX-License-Identifier: Apache-2.0

//! What is put into guest memory before the first instruction: kernel, initramfs and command line.

#![cfg_attr(
    not(test),
    warn(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::indexing_slicing
    )
)]

pub mod cmdline;
pub mod kernel;
