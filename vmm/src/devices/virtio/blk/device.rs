// SPDX-License-Identifier: Apache-2.0

//! The virtio face of the block device (virtio 1.2, 5.2).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use caisson_protocol::vm::BlkConfig;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::backend::Disk;
use super::request::{RANGE_SECTORS_MAX, RANGES_MAX};
use super::worker::{BlkWorker, Counters, Engine, Shared};
use super::{BlkError, SECTOR_LEN};
use crate::devices::virtio::device::{
    ActivateError, Activation, QueueSnapshot, SnapshotError, VirtioDevice,
};
use crate::devices::virtio::service::{Service, check_version};

/// Size of a queue, and so most requests under way in it.
const QUEUE_SIZE: u16 = 256;
/// Most queues.
const QUEUES_MAX: u16 = 8;
/// Most data segments of a request: a ring without header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Length of configuration space (struct virtio_blk_config up to the zeroes' fields), bytes.
const CONFIG_LEN: usize = 60;

/// A virtio-blk device.
#[derive(Debug)]
pub struct BlkDevice {
    config: BlkConfig,
    config_space: [u8; CONFIG_LEN],
    queue_sizes: Vec<u16>,
    shared: Arc<Shared>,
    service: Service<BlkWorker>,
    /// For tests: never io_uring.
    pub(super) calls_only: bool,
}

/// What a restore needs.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BlkState {
    /// Of this structure.
    version: u32,
    /// As configured; the restored device must have the same.
    serial: String,
    /// Likewise.
    read_only: bool,
    /// Size of the disk in sectors; likewise.
    sectors: u64,
    /// One for each queue; `None` where it is not active.
    queues: Vec<Option<QueueSnapshot>>,
}

impl BlkState {
    const VERSION: u32 = 1;
}

impl BlkDevice {
    /// A device for `config`; its image is open and locked from now on.
    ///
    /// # Errors
    /// When the configuration is out of its bounds or the image cannot be used.
    pub fn new(config: &BlkConfig) -> Result<Self, BlkError> {
        let mut serial = [0; VIRTIO_BLK_ID_BYTES as usize];
        let given = config.serial.as_bytes();
        if given.is_empty() || given.len() > serial.len() || given.contains(&0) {
            return Err(BlkError::Serial {
                serial: config.serial.clone(),
            });
        }
        serial
            .iter_mut()
            .zip(given)
            .for_each(|(to, from)| *to = *from);
        if config.queues == 0 || config.queues > QUEUES_MAX {
            return Err(BlkError::Queues {
                queues: config.queues,
            });
        }
        let disk = Disk::open(&config.path, config.read_only)?;
        Ok(Self {
            config_space: config_space(&disk, config.queues),
            config: config.clone(),
            queue_sizes: vec![QUEUE_SIZE; usize::from(config.queues)],
            shared: Arc::new(Shared {
                disk,
                serial,
                counters: Counters::default(),
            }),
            service: Service::default(),
            calls_only: false,
        })
    }
}

/// Configuration space (virtio 1.2, 5.2.4), fields that are not offered as zero.
fn config_space(disk: &Disk, queues: u16) -> [u8; CONFIG_LEN] {
    let mut space = [0; CONFIG_LEN];
    let mut put = |at: usize, bytes: &[u8]| {
        let field = space.iter_mut().skip(at);
        field.zip(bytes).for_each(|(to, from)| *to = *from);
    };
    put(0, &disk.sectors().to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &(SECTOR_LEN as u32).to_le_bytes());
    put(34, &queues.to_le_bytes());
    if !disk.is_read_only() {
        // DISCARD: most sectors, most ranges, alignment in sectors.
        put(36, &RANGE_SECTORS_MAX.to_le_bytes());
        put(40, &RANGES_MAX.to_le_bytes());
        put(44, &8u32.to_le_bytes());
        // WRITE_ZEROES: most sectors, most ranges, may give space back.
        put(48, &RANGE_SECTORS_MAX.to_le_bytes());
        put(52, &RANGES_MAX.to_le_bytes());
        put(56, &[1]);
    }
    space
}

impl VirtioDevice for BlkDevice {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn name(&self) -> &'static str {
        "blk"
    }

    fn features(&self) -> u64 {
        let writable = if self.config.read_only {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        writable
            | 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_MQ
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let space = usize::try_from(offset)
            .ok()
            .and_then(|offset| self.config_space.get(offset..))
            .unwrap_or_default();
        data.iter_mut()
            .zip(space)
            .for_each(|(to, from)| *to = *from);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.reset();
        activation.check_queues(self.queue_sizes.len())?;
        let durable = activation.features & 1 << VIRTIO_BLK_F_FLUSH == 0;
        let workers = activation
            .queues
            .into_iter()
            .enumerate()
            .filter_map(|(index, queue)| Some((index, queue?)))
            .map(|(index, queue)| {
                let engine = if self.calls_only {
                    Engine::Calls
                } else {
                    Engine::Any
                };
                let guest = (activation.memory.clone(), activation.interrupt.clone());
                BlkWorker::new(index, queue, self.shared.clone(), guest, engine, durable)
            })
            .collect();
        self.service.start(workers, activation.interrupt)
    }

    fn reset(&mut self) {
        self.service.stop();
    }

    fn pause(&mut self) {
        self.service.pause();
    }

    fn resume(&mut self) -> Result<(), ActivateError> {
        self.service.resume()
    }

    fn save(&self) -> Result<serde_json::Value, SnapshotError> {
        let state = BlkState {
            version: BlkState::VERSION,
            serial: self.config.serial.clone(),
            read_only: self.config.read_only,
            sectors: self.shared.disk.sectors(),
            queues: self.service.snapshots(self.queue_sizes.len())?,
        };
        Ok(serde_json::to_value(state)?)
    }

    fn restore(&mut self, state: serde_json::Value) -> Result<(), SnapshotError> {
        let bad = |what: &str| Err(SnapshotError::BadState(what.to_owned()));
        let state: BlkState = serde_json::from_value(state)?;
        check_version(state.version, BlkState::VERSION)?;
        if state.serial != self.config.serial || state.read_only != self.config.read_only {
            return bad("another serial number, or not writable as before");
        }
        if state.sectors != self.shared.disk.sectors() {
            return bad("the disk is of another size");
        }
        self.service.check(&state.queues, &self.queue_sizes)
    }

    fn metrics(&self, out: &mut Vec<(&'static str, u64)>) {
        let counters = &self.shared.counters;
        for (name, counter) in [
            ("requests", &counters.requests),
            ("errors", &counters.errors),
            ("malformed", &counters.malformed),
        ] {
            out.push((name, counter.load(Ordering::Relaxed)));
        }
    }
}

impl Drop for BlkDevice {
    fn drop(&mut self) {
        self.reset();
    }
}
