// SPDX-License-Identifier: Apache-2.0

//! Layers: tar archives that are laid over one another to make a root file system.
//!
//! In: the (decompressed) bytes of each layer, bottom first. Out: the files, in a directory that nothing
//! gets out of. [`reader`] turns bytes into [`entry::Entry`]s, [`apply`] turns those into files, and
//! `whiteout` takes away what an upper layer deletes from lower ones.
//!
//! Specification: <https://github.com/opencontainers/image-spec/blob/main/layer.md>.

pub mod apply;
mod directories;
pub mod entry;
pub mod error;
mod numeric;
pub mod pax;
pub mod reader;
mod sparse;
#[cfg(test)]
pub(crate) mod test_tar;
mod whiteout;
