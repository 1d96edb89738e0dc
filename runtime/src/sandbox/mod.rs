// SPDX-License-Identifier: Apache-2.0

//! A container's life, one step per file, over the state directory.
//!
//! `create` plans, takes the id and starts the per-container process (`monitor`), which makes the VM and the
//! container and stands for it on the host until it has ended. All other steps are separate processes: they
//! find the container by its state directory, and the agent by the sockets in it.

pub mod control;
pub mod create;
pub mod delete;
pub mod exec;
pub mod id;
pub mod kill;
pub mod monitor;
pub mod process;
pub mod report;
pub mod signals;
pub mod start;
pub mod state;
pub mod store;

mod boot;

use caisson_protocol::error::ErrorCode;
use caisson_protocol::ports::HOST_SOCKET;

use crate::bundle::plan::Plan;
use crate::error::RuntimeError;
use crate::guest::client::{Connector, GuestClient};
use state::Status;
use store::{StateDir, StoreError};

/// Name of the plan in the state directory.
pub(crate) const PLAN_FILE: &str = "plan.json";

/// What a step needs to talk to the guest of a container.
pub(crate) fn connector(state: &StateDir, plan: &Plan) -> Connector {
    Connector {
        socket: state.short_path(&format!("vsock/{HOST_SOCKET}")),
        limit: plan.timeouts.request(),
    }
}

/// Connects to the agent of a container.
pub(crate) async fn guest(state: &StateDir) -> Result<(Plan, GuestClient), RuntimeError> {
    let plan: Plan = state.read_json(PLAN_FILE)?;
    let (guest, _) = GuestClient::connect(&connector(state, &plan)).await?;
    Ok((plan, guest))
}

/// How long a VM whose connections have broken may take to be seen as ended: its memory is given back before that.
const END_LIMIT: std::time::Duration = std::time::Duration::from_secs(5);

/// Whether a step failed with `error` because the container ended meanwhile: nothing can be made in namespaces that
/// end, and a VM that ends forgets its streams and closes its sockets a moment before it counts as ended.
pub(crate) async fn ended_meanwhile(state: &StateDir, error: &RuntimeError) -> bool {
    let record = match state.record() {
        Ok(record) => record,
        Err(error) => return matches!(error, StoreError::NotFound(_)),
    };
    if record.status() == Status::Stopped {
        return true;
    }
    let perhaps = matches!(
        error,
        RuntimeError::Guest(error)
            if error.is_lost_connection() || error.code() == Some(ErrorCode::Internal)
    );
    match record.vmm.filter(|_| perhaps) {
        Some(vmm) => vmm.ends_within(END_LIMIT).await,
        None => false,
    }
}

/// CLOCK_MONOTONIC, nanoseconds.
pub(crate) fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// Now, RFC 3339 with nanoseconds.
pub(crate) fn now_rfc3339() -> String {
    humantime::format_rfc3339_nanos(std::time::SystemTime::now()).to_string()
}
