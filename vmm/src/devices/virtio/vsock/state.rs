// SPDX-License-Identifier: Apache-2.0

//! What is saved of the device: its queues and what was negotiated.
//!
//! Streams are not saved, as their host ends are sockets of other processes. A restored guest is told so by a transport
//! reset event (virtio 1.2, 5.10.6.6): it drops its streams and reads its context id again.

use serde::{Deserialize, Serialize};

use crate::devices::virtio::device::QueueSnapshot;

/// State of a [`super::VsockDevice`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockState {
    /// The driver had set it going.
    pub active: bool,
    /// Features negotiated; 0 if not active.
    pub features: u64,
    /// The queues in their order (rx, tx, event), `None` where the driver left one unready. Empty if not active.
    pub queues: Vec<Option<QueueSnapshot>>,
    /// A transport reset event is owed to the guest from before.
    pub transport_reset_owed: bool,
}
