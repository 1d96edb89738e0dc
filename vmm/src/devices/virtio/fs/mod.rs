// SPDX-License-Identifier: Apache-2.0

//! virtio-fs: a directory of the host as a file system of the guest, served in this process.
