// SPDX-License-Identifier: Apache-2.0

//! virtio-vsock in user space: Unix sockets of the host as streams of the guest.
