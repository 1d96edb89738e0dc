// SPDX-License-Identifier: Apache-2.0

//! virtio-console: the kernel log into a bounded ring.
