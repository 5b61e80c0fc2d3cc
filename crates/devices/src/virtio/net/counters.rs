//! What a network interface has carried.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// Packets of a network interface since the machine was made, as the guest names the directions. A packet that
/// segmentation offload has not cut yet counts once. Bytes are those of Ethernet frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct NetCounters {
    /// Packets to the guest.
    pub received_packets: u64,
    /// Bytes to the guest.
    pub received_bytes: u64,
    /// Packets to the guest that did not fit into its buffers.
    pub received_drops: u64,
    /// Packets from the guest.
    pub sent_packets: u64,
    /// Bytes from the guest.
    pub sent_bytes: u64,
    /// Packets from the guest that the other end did not take.
    pub sent_drops: u64,
}

/// One direction while queues count.
#[derive(Default)]
pub struct Direction {
    packets: AtomicU64,
    bytes: AtomicU64,
    drops: AtomicU64,
}

impl Direction {
    /// A packet went through.
    pub fn count(&self, bytes: u64) {
        self.packets.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A packet did not.
    pub fn drop_one(&self) {
        self.drops.fetch_add(1, Ordering::Relaxed);
    }
}

/// Both directions.
#[derive(Default)]
pub struct Traffic {
    pub received: Direction,
    pub sent: Direction,
}

impl Traffic {
    /// How it stands.
    pub fn counters(&self) -> NetCounters {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        NetCounters {
            received_packets: of(&self.received.packets),
            received_bytes: of(&self.received.bytes),
            received_drops: of(&self.received.drops),
            sent_packets: of(&self.sent.packets),
            sent_bytes: of(&self.sent.bytes),
            sent_drops: of(&self.sent.drops),
        }
    }
}
