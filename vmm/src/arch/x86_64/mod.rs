// SPDX-License-Identifier: Apache-2.0

//! The x86_64 machine, in the order in which it is made: the map of its addresses ([`layout`]), what the kernel
//! reads at its start ([`mptable`], [`pvh`]), and its processors ([`cpuid`], [`registers`]).

pub mod cpuid;
pub mod layout;
pub mod mptable;
pub mod pvh;
pub mod registers;
