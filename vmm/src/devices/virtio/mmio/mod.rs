// SPDX-License-Identifier: Apache-2.0

//! The virtio-mmio transport.
