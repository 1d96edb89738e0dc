// SPDX-License-Identifier: Apache-2.0

//! The virtio face of the file system device (virtio 1.2, 5.11).
//!
//! Queue 0 is the high priority queue, the rest are request queues; there is no notification queue and no DAX
//! window. Each queue has a thread called `fs-` and its index.

use std::io::{Read, Seek, SeekFrom, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use caisson_protocol::vm::FsConfig;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtiofsd::filesystem::SerializableFileSystem;

use super::FsDeviceError;
use super::passthrough::Host;
use super::server::Server;
use super::worker::FsWorker;
use crate::devices::virtio::device::{
    ActivateError, Activation, QueueSnapshot, SnapshotError, VirtioDevice,
};
use crate::devices::virtio::service::{Service, check_version};

/// Length of the tag in configuration space, bytes.
const TAG_LEN: usize = 36;
/// Configuration space: tag and number of request queues.
const CONFIG_LEN: usize = TAG_LEN + 4;
/// Size of the high priority queue: FORGETs.
const HIGH_PRIORITY_SIZE: u16 = 128;
/// Size of a request queue. Linux puts a request of 1 MiB into 256 pages and some.
const REQUEST_SIZE: u16 = 1024;
/// Most request queues.
const QUEUES_MAX: u16 = 8;

/// A virtio-fs device.
#[derive(Debug)]
pub struct FsDevice {
    config: FsConfig,
    config_space: [u8; CONFIG_LEN],
    queue_sizes: Vec<u16>,
    server: Arc<Server>,
    service: Service<FsWorker>,
}

/// What a restore needs.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FsState {
    /// Of this structure.
    version: u32,
    /// As configured; the restored device must have the same.
    tag: String,
    /// Likewise.
    request_queues: u16,
    /// One for each queue; `None` where it is not active.
    queues: Vec<Option<QueueSnapshot>>,
    /// FUSE_INIT's flags, as agreed on.
    negotiated: u64,
    /// Inodes and open files in virtiofsd's format, by their paths below the directory.
    file_system: Vec<u8>,
}

impl FsState {
    const VERSION: u32 = 1;
    /// Largest accepted [`Self::file_system`], bytes.
    const MAX_BYTES: usize = 256 << 20;
}

impl FsDevice {
    /// A device for `config`; the directory is open from now on.
    ///
    /// Raises the process's soft limit of open files to its hard one.
    ///
    /// # Errors
    /// When the configuration is out of its bounds or the directory cannot be served.
    pub fn new(config: &FsConfig) -> Result<Self, FsDeviceError> {
        let tag = config.tag.as_bytes();
        if tag.is_empty() || tag.len() > TAG_LEN || tag.contains(&0) {
            return Err(FsDeviceError::Tag {
                tag: config.tag.clone(),
            });
        }
        if config.queues == 0 || config.queues > QUEUES_MAX {
            return Err(FsDeviceError::Queues {
                queues: config.queues,
            });
        }
        let mut config_space = [0; CONFIG_LEN];
        let (tag_space, queues_space) = config_space.split_at_mut(TAG_LEN);
        tag_space
            .iter_mut()
            .zip(tag)
            .for_each(|(space, byte)| *space = *byte);
        queues_space.copy_from_slice(&u32::from(config.queues).to_le_bytes());
        let queue_sizes = std::iter::once(HIGH_PRIORITY_SIZE)
            .chain((0..config.queues).map(|_| REQUEST_SIZE))
            .collect();
        Ok(Self {
            config: config.clone(),
            config_space,
            queue_sizes,
            server: Arc::new(Server::new(Host::open(config)?)),
            service: Service::default(),
        })
    }

    /// Inodes and open files, as virtiofsd migrates them.
    fn save_file_system(&self) -> std::io::Result<Vec<u8>> {
        let mut file = memory_file()?;
        let copy = file.try_clone()?;
        let host = &self.server.host;
        host.on_thread(|| {
            host.fs
                .prepare_serialization(Arc::new(AtomicBool::new(false)));
            host.fs.serialize(copy)
        })
        .flatten()?;
        file.seek(SeekFrom::Start(0))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn restore_file_system(&self, bytes: &[u8]) -> std::io::Result<()> {
        let mut file = memory_file()?;
        file.write_all(bytes)?;
        file.seek(SeekFrom::Start(0))?;
        let host = &self.server.host;
        host.on_thread(|| host.fs.deserialize_and_apply(file))
            .flatten()
    }
}

fn memory_file() -> std::io::Result<std::fs::File> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    Ok(rustix::fs::memfd_create("fs-state", flags)?.into())
}

impl VirtioDevice for FsDevice {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn name(&self) -> &'static str {
        "fs"
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
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
        let workers = activation
            .queues
            .into_iter()
            .enumerate()
            .filter_map(|(index, queue)| Some((index, queue?)))
            .map(|(index, queue)| {
                FsWorker::new(
                    index,
                    queue,
                    self.server.clone(),
                    activation.memory.clone(),
                    activation.interrupt.clone(),
                )
            })
            .collect();
        self.service.start(workers, activation.interrupt)
    }

    fn reset(&mut self) {
        // One that was never active since it was made or restored keeps a restored file system for its activation.
        if self.service.stop() {
            self.server.destroy();
        }
    }

    fn pause(&mut self) {
        self.service.pause();
    }

    fn resume(&mut self) -> Result<(), ActivateError> {
        self.service.resume()
    }

    fn save(&self) -> Result<serde_json::Value, SnapshotError> {
        let state = FsState {
            version: FsState::VERSION,
            tag: self.config.tag.clone(),
            request_queues: self.config.queues,
            queues: self.service.snapshots(self.queue_sizes.len())?,
            negotiated: self.server.options().bits(),
            file_system: self
                .save_file_system()
                .map_err(|error| SnapshotError::BadState(format!("inodes: {error}")))?,
        };
        Ok(serde_json::to_value(state)?)
    }

    fn restore(&mut self, state: serde_json::Value) -> Result<(), SnapshotError> {
        let state: FsState = serde_json::from_value(state)?;
        let bad = |what: &str| Err(SnapshotError::BadState(what.to_owned()));
        check_version(state.version, FsState::VERSION)?;
        if state.tag != self.config.tag || state.request_queues != self.config.queues {
            return bad("another tag or number of queues");
        }
        if state.file_system.len() > FsState::MAX_BYTES {
            return bad("too many inodes");
        }
        self.service.check(&state.queues, &self.queue_sizes)?;
        self.restore_file_system(&state.file_system)
            .map_err(|error| SnapshotError::BadState(format!("inodes: {error}")))?;
        self.server.restore_options(state.negotiated);
        Ok(())
    }

    fn metrics(&self, out: &mut Vec<(&'static str, u64)>) {
        let counters = &self.server.counters;
        for (name, counter) in [
            ("requests", &counters.requests),
            ("errors", &counters.errors),
            ("malformed", &counters.malformed),
            ("read_bytes", &counters.read_bytes),
            ("written_bytes", &counters.written_bytes),
        ] {
            out.push((name, counter.load(Ordering::Relaxed)));
        }
    }
}

impl Drop for FsDevice {
    fn drop(&mut self) {
        self.reset();
    }
}
