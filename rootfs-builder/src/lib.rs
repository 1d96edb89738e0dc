// SPDX-License-Identifier: Apache-2.0

//! Caisson's images: what a guest boots from, and what a container is made of.
//!
//! Two things come out of here, and each comes out whole or not at all ([`staging`]):
//!
//! - [`initramfs`]: the guest's first root file system: the agent as `/init`, mount points, two device
//!   nodes. The same inputs give the same bytes.
//! - [`bundle`]: an OCI bundle (`config.json` and `rootfs/`), for people and tests without a container
//!   manager.
//!
//! How a bundle comes about, with the modules in brackets:
//!
//! ```text
//! busybox, directory ──────────────[source]──────────────┐
//!                                                        ├─▶ rootfs/ ─┐
//! layout, archive ─[image]─▶ layers ─[layer]─[confined]──┘            ├─▶ [bundle] ─[staging]─▶ DIR
//!                     └────▶ configuration ─[spec]─▶ config.json ─────┘
//! ```
//!
//! # What is trusted
//!
//! Programs (`--agent`, `--busybox`) and the command line are the caller's own. **Images are not**: an
//! image's documents, names, sizes and layers are taken as an attack. So every blob is checked against its
//! digest in the reading that uses it, every count has a bound ([`limits`]), and files are made only by
//! way of [`confined`], where the kernel resolves each path inside the tree and no existing file is ever
//! opened to be written. Devices and set-user-ID programs of an image are made as the image has them, since
//! the image is to run in a guest; a bundle therefore belongs to its maker alone (mode 0700).
//!
//! # What needs root
//!
//! Owners other than one's own, device nodes, and attributes such as `security.capability`. Where an
//! image has any of these, unpacking it as somebody else fails and says so; nothing is left out silently.
//!
//! # From the command line
//!
//! ```text
//! caisson-rootfs-builder initramfs --agent caisson-agent --output initramfs.cpio
//! caisson-rootfs-builder bundle --output b1 --busybox -- echo hello
//! caisson-rootfs-builder bundle --output b2 --from-dir /srv/root --user www --tty
//! caisson-rootfs-builder bundle --output b3 --oci-layout images/:1.36 --env DEBUG=1
//! caisson-rootfs-builder bundle --output b4 --docker-archive saved.tar.gz:app:latest -- sh -c id
//! ```

#![forbid(unsafe_code)]

pub mod bundle;
pub mod confined;
pub mod executable;
pub mod image;
pub mod initramfs;
pub mod layer;
pub mod limits;
pub mod source;
pub mod spec;
pub mod staging;
