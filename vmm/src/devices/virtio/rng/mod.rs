// SPDX-License-Identifier: Apache-2.0

//! virtio-rng: entropy of the host.
