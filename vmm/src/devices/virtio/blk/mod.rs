// SPDX-License-Identifier: Apache-2.0

//! virtio-blk: a raw file or block device of the host as a disk of the guest.
