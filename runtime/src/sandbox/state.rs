// SPDX-License-Identifier: Apache-2.0

//! What is known about a container: the record on disk, its phases, and the state that clients are told.
//!
//! The record is written by several processes (create, start, the per-container process), each under the lock
//! of [`super::store`], and only along [`Phase::after`]. What clients see is the record *checked against the
//! processes*: a container whose per-container process or VMM is gone is stopped, whatever the file says.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::id::ContainerId;
use super::process::ProcessRef;

/// Version of [`Record`] on disk.
pub const RECORD_VERSION: u32 = 2;

/// Where a container is in its life, as far as it was written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Its VM is being made.
    Creating,
    /// Made; its process waits to be started.
    Created,
    /// Its process runs.
    Running,
    /// Its process has ended, or its VM has.
    Stopped,
}

/// What happens to a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transition {
    /// The agent has made it.
    Made,
    /// The agent has started its process.
    Started,
    /// Its process or its VM ended.
    Ended,
}

impl Phase {
    /// The phase after `transition`; `None` when that cannot happen now (any more).
    pub fn after(self, transition: Transition) -> Option<Self> {
        match (self, transition) {
            (Self::Creating, Transition::Made) => Some(Self::Created),
            (Self::Created, Transition::Started) => Some(Self::Running),
            (_, Transition::Ended) => Some(Self::Stopped),
            (
                Self::Creating | Self::Created | Self::Running | Self::Stopped,
                Transition::Made | Transition::Started,
            ) => None,
        }
    }
}

/// State as the runtime-spec and runc name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// See [`Phase::Creating`].
    Creating,
    /// See [`Phase::Created`].
    Created,
    /// See [`Phase::Running`].
    Running,
    /// Running, and frozen by `pause`.
    Paused,
    /// See [`Phase::Stopped`].
    Stopped,
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExitRecord {
    /// 0 to 255, 128+N after signal N.
    pub status: u8,
    /// The guest's kernel killed a process of it for memory.
    pub oom_killed: bool,
    /// Set when it was not the process that ended but the VM: why.
    pub cause: Option<String>,
    /// When, RFC 3339.
    pub at: String,
}

/// All that is written down about a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// [`RECORD_VERSION`] of who wrote it.
    pub version: u32,
    /// The container's id.
    pub id: ContainerId,
    /// `ociVersion` of its config.json.
    pub oci_version: String,
    /// Absolute path of the bundle.
    pub bundle: PathBuf,
    /// Absolute path of the root file system on the host.
    pub rootfs: PathBuf,
    /// When it was created, RFC 3339.
    pub created: String,
    /// User id of the caller.
    pub owner_uid: u32,
    /// Annotations of its config.json.
    pub annotations: HashMap<String, String>,
    /// Whether its process has a terminal.
    pub terminal: bool,
    /// Where it is in its life.
    pub phase: Phase,
    /// Frozen by `pause`.
    pub paused: bool,
    /// Directory of its cgroup below /sys/fs/cgroup; `None` where there is no usable cgroup v2.
    pub cgroup: Option<PathBuf>,
    /// Who makes it: without a per-container process it comes to nothing when this one has ended.
    pub creator: Option<ProcessRef>,
    /// Its per-container process, once there is one.
    pub monitor: Option<ProcessRef>,
    /// Its VMM, once there is one.
    pub vmm: Option<ProcessRef>,
    /// How it ended.
    pub exit: Option<ExitRecord>,
    /// Stage of its start → CLOCK_MONOTONIC of the host in nanoseconds.
    pub timings_ns: BTreeMap<String, u64>,
}

impl Record {
    /// What clients are told: the record, checked against the processes.
    pub fn status(&self) -> Status {
        let dead = |process: Option<ProcessRef>| process.is_some_and(|p| !p.is_alive());
        match self.phase {
            Phase::Stopped => Status::Stopped,
            _ if dead(self.monitor) || dead(self.vmm) => Status::Stopped,
            _ if self.abandoned() => Status::Stopped,
            Phase::Creating => Status::Creating,
            Phase::Created => Status::Created,
            Phase::Running if self.paused => Status::Paused,
            Phase::Running => Status::Running,
        }
    }

    /// Its maker has ended without a per-container process having been written down. One that was started by then
    /// refuses to go on (see [`super::monitor`]).
    pub(crate) fn abandoned(&self) -> bool {
        let ended = self.creator.is_some_and(|creator| !creator.is_alive());
        self.phase == Phase::Creating && self.monitor.is_none() && ended
    }

    /// `state` as runc prints it.
    pub fn oci_state(&self) -> OciState<'_> {
        let status = self.status();
        let pid = match (status, self.monitor) {
            (Status::Stopped, _) | (_, None) => 0,
            (_, Some(monitor)) => monitor.pid,
        };
        OciState {
            oci_version: self.oci_version.clone(),
            id: self.id.clone(),
            pid,
            status,
            bundle: self.bundle.clone(),
            rootfs: self.rootfs.clone(),
            created: self.created.clone(),
            annotations: self.annotations.iter().collect(),
            owner: String::new(),
        }
    }
}

/// The state document of the runtime-spec, with runc's additions and in its order of fields.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OciState<'a> {
    oci_version: String,
    /// Container id.
    pub id: ContainerId,
    /// The per-container process on the host, 0 when stopped.
    pub pid: i32,
    /// State.
    pub status: Status,
    /// Absolute path of the bundle.
    pub bundle: PathBuf,
    rootfs: PathBuf,
    /// RFC 3339.
    pub created: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<&'a String, &'a String>,
    /// Name of the user who created it, or empty.
    pub owner: String,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn record(id: &str) -> Record {
        Record {
            version: RECORD_VERSION,
            id: ContainerId::new(id).unwrap(),
            oci_version: "1.0.2".into(),
            bundle: "/b".into(),
            rootfs: "/b/rootfs".into(),
            created: "2026-01-01T00:00:00Z".into(),
            owner_uid: 0,
            annotations: HashMap::new(),
            terminal: false,
            phase: Phase::Creating,
            paused: false,
            cgroup: None,
            creator: None,
            monitor: None,
            vmm: None,
            exit: None,
            timings_ns: BTreeMap::new(),
        }
    }

    #[test]
    fn phases_only_go_forward_and_stopped_is_final() {
        use Phase::*;
        let all = [Creating, Created, Running, Stopped];
        for (i, from) in all.into_iter().enumerate() {
            for transition in [Transition::Made, Transition::Started, Transition::Ended] {
                if let Some(to) = from.after(transition) {
                    let j = all.iter().position(|p| *p == to).unwrap();
                    assert!(j > i || (from == Stopped && to == Stopped));
                }
            }
        }
        assert_eq!(Stopped.after(Transition::Started), None);
        assert_eq!(Creating.after(Transition::Started), None);
        assert_eq!(Running.after(Transition::Started), None);
    }

    #[test]
    fn a_running_container_without_its_process_is_stopped() {
        let mut record = record("a");
        record.phase = Phase::Running;
        record.monitor = ProcessRef::current();
        record.vmm = ProcessRef::current();
        assert_eq!(record.status(), Status::Running);
        record.paused = true;
        assert_eq!(record.status(), Status::Paused);
        record.vmm = record.vmm.map(|p| ProcessRef {
            start_time: p.start_time + 1,
            ..p
        });
        assert_eq!(record.status(), Status::Stopped);
        assert_eq!(record.oci_state().pid, 0);
    }

    #[test]
    fn a_container_whose_maker_has_ended_is_stopped_unless_it_left_one_to_go_on() {
        let mut record = record("a");
        record.creator = ProcessRef::current();
        assert_eq!(record.status(), Status::Creating);
        record.creator = record.creator.map(|p| ProcessRef {
            start_time: p.start_time + 1,
            ..p
        });
        assert_eq!(record.status(), Status::Stopped);
        record.monitor = ProcessRef::current();
        assert_eq!(record.status(), Status::Creating);
    }

    #[test]
    fn the_state_document_has_the_names_clients_read() {
        let mut record = record("a");
        record.annotations.insert("k".into(), "v".into());
        record.phase = Phase::Created;
        record.monitor = ProcessRef::current();
        let value = serde_json::to_value(record.oci_state()).unwrap();
        assert_eq!(value["ociVersion"], "1.0.2");
        assert_eq!(value["status"], "created");
        assert_eq!(value["pid"], std::process::id());
        assert_eq!(value["bundle"], "/b");
        assert_eq!(value["rootfs"], "/b/rootfs");
        assert_eq!(value["annotations"]["k"], "v");
        assert_eq!(value["owner"], "");
    }
}
