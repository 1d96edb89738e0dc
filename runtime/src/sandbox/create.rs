// SPDX-License-Identifier: Apache-2.0

//! `create`: everything is decided and checked first, then the id is taken, then the per-container process makes it.
//!
//! What fails before the id is taken leaves nothing; what fails after it is undone by the same code that
//! `delete --force` uses.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Child;

use super::id::ContainerId;
use super::process::ProcessRef;
use super::report::Channel;
use super::state::{Phase, RECORD_VERSION, Record};
use super::store::{StateDir, Store, StoreError};
use super::{PLAN_FILE, delete, monotonic_ns, now_rfc3339};
use crate::bundle::load::Bundle;
use crate::bundle::plan::Plan;
use crate::bundle::translate::{HostFacts, Translation, translate};
use crate::bundle::validate::{has_terminal, validate};
use crate::config::Config;
use crate::error::{OrderError, RuntimeError};
use crate::resources::cgroup::Cgroup;

/// What a caller asks for.
#[derive(Debug, Clone)]
pub struct CreateRequest {
    /// The new container's id.
    pub id: ContainerId,
    /// Directory of the bundle.
    pub bundle: PathBuf,
    /// Where to send the terminal's master.
    pub console_socket: Option<PathBuf>,
    /// The caller stays, and its own terminal can be used: `run` in the foreground.
    pub foreground: bool,
    /// Arguments with which the program runs as [`super::monitor`], up to the id.
    pub monitor_arguments: Vec<OsString>,
}

/// Creates a container. The child is its per-container process.
///
/// # Errors
/// Whatever stands in the way; nothing is left behind then.
pub fn create(
    store: &Store,
    config: &Config,
    request: &CreateRequest,
) -> Result<Child, RuntimeError> {
    let called_ns = monotonic_ns();
    let bundle = Bundle::load(&request.bundle)?;
    validate(&bundle)?;
    check_terminal(&bundle, request)?;
    let Translation { plan, warnings } = translate(&request.id, &bundle, config, &host_facts())?;
    for warning in warnings {
        log::warn!("{warning}");
    }
    for (operation, path) in [
        ("open the VMM", &plan.vmm),
        ("open the guest kernel", &plan.vm.kernel),
        ("open the guest's initramfs", &plan.vm.initramfs),
    ] {
        std::fs::File::open(path).map_err(RuntimeError::file(operation, path))?;
    }
    let mut record = new_record(&request.id, &bundle, &plan);
    record.timings_ns.insert("called".to_owned(), called_ns);

    let state = store.create(&request.id)?;
    make(&state, &record, &plan, request).map_err(|error| match delete::destroy(&state) {
        Ok(()) => error,
        Err(RuntimeError::Store(StoreError::NotFound(_))) => OrderError::DeletedMeanwhile.into(),
        Err(left) => {
            log::warn!("failed to clean up: {}", crate::error::chain(&left));
            error
        }
    })
}

fn make(
    state: &StateDir,
    record: &Record,
    plan: &Plan,
    request: &CreateRequest,
) -> Result<Child, RuntimeError> {
    let lock = state.lock()?;
    lock.write_json(PLAN_FILE, plan)?;
    lock.write_record(record)?;
    drop(lock);
    let mut arguments = request.monitor_arguments.clone();
    if let Some(socket) = &request.console_socket {
        let socket = std::path::absolute(socket)
            .map_err(RuntimeError::file("find console socket", socket))?;
        arguments.push("--console-socket".into());
        arguments.push(socket.into());
    }
    arguments.push(request.id.as_str().into());
    let (channel, mut child) = Channel::spawn(&arguments)?;
    if let Err(error) = channel.outcome(&mut child) {
        // It has undone what it made before it told, and is about to end; no longer than this.
        child.kill().unwrap_or_default();
        child.wait().map(drop).unwrap_or_default();
        return Err(error);
    }
    Ok(child)
}

fn check_terminal(bundle: &Bundle, request: &CreateRequest) -> Result<(), OrderError> {
    match (
        has_terminal(&bundle.spec),
        &request.console_socket,
        request.foreground,
    ) {
        (true, None, false) => Err(OrderError::DetachedTerminal),
        (false, Some(_), _) | (true, Some(_), true) => {
            Err(OrderError::ConsoleSocketWithoutTerminal)
        }
        (true, None, true) | (true, Some(_), false) | (false, None, _) => Ok(()),
    }
}

fn new_record(id: &ContainerId, bundle: &Bundle, plan: &Plan) -> Record {
    let cgroup = Cgroup::available().then(|| plan.cgroup.clone());
    if cgroup.is_none() {
        // `caisson check` tells; said at every create it would only be in the way.
        log::debug!("cgroup v2 is not mounted on /sys/fs/cgroup: the pod has no cgroup of its own");
    }
    Record {
        version: RECORD_VERSION,
        id: id.clone(),
        oci_version: bundle.spec.version().clone(),
        bundle: bundle.path.clone(),
        rootfs: bundle.rootfs().unwrap_or_default(),
        created: now_rfc3339(),
        owner_uid: rustix::process::getuid().as_raw(),
        annotations: bundle.spec.annotations().clone().unwrap_or_default(),
        terminal: has_terminal(&bundle.spec),
        phase: Phase::Creating,
        paused: false,
        cgroup,
        creator: ProcessRef::current(),
        monitor: None,
        vmm: None,
        exit: None,
        timings_ns: BTreeMap::new(),
    }
}

fn host_facts() -> HostFacts<'static> {
    HostFacts {
        memory_mib: memory_mib(),
        file_system_size: &file_system_size,
    }
}

fn memory_mib() -> u64 {
    let info = rustix::system::sysinfo();
    #[expect(
        clippy::useless_conversion,
        reason = "the field's type is that of the C library's unsigned long"
    )]
    let total = u64::from(info.totalram);
    total.saturating_mul(info.mem_unit.into()) >> 20
}

fn file_system_size(path: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(path).ok()?;
    stat.f_blocks
        .checked_mul(stat.f_frsize)
        .filter(|size| *size > 0)
}
