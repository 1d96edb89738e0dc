// SPDX-License-Identifier: Apache-2.0

//! What the device counts. Written by its thread, read by the control thread.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counters since the device was made, and the gauge `connections`.
        #[derive(Debug, Default)]
        pub(super) struct Counters {
            $($(#[$doc])* pub(super) $name: AtomicU64,)*
        }

        impl Counters {
            /// Adds all of them to `out`.
            pub(super) fn list(&self, out: &mut Vec<(&'static str, u64)>) {
                $(out.push((stringify!($name), self.$name.load(Ordering::Relaxed)));)*
            }
        }
    };
}

counters! {
    /// Streams that exist now.
    connections,
    /// Events that the thread handled.
    events,
    /// Streams that the guest asked for and got.
    accepted_from_guest,
    /// Streams that the host asked for and got.
    accepted_from_host,
    /// Streams that either asked for and did not get.
    refused,
    /// Packets that the guest sent.
    tx_packets,
    /// Payload that the guest sent and that was taken, bytes.
    tx_bytes,
    /// Packets that the guest got.
    rx_packets,
    /// Payload that the guest got, bytes.
    rx_bytes,
    /// RSTs sent.
    resets,
    /// Chains and packets of the guest that made no sense.
    malformed,
    /// Streams ended because the guest sent more than it had credit for, or out of order.
    violations,
    /// Deadlines that passed: CONNECT lines, unanswered requests, unanswered closes.
    timeouts,
    /// Times that the rings were found broken.
    broken_rings,
}

/// Adds `count` to a counter.
pub(super) fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}
