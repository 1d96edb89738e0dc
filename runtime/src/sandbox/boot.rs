// SPDX-License-Identifier: Apache-2.0

//! From nothing to an agent that answers: the listening socket, the VMM, and the wait for whatever comes first of
//! the agent's greeting, the VMM's end, a signal, and the deadline.

use std::fs::File;
use std::io;
use std::os::unix::fs::PermissionsExt;

use caisson_protocol::PROTOCOL_VERSION;
use caisson_protocol::boot::SHARED_TAG;
use caisson_protocol::control::{Request, Response};
use caisson_protocol::ports::{GUEST_CID, HOST_READY, Ready, guest_to_host_socket};
use caisson_protocol::vm::{ConsoleConfig, FsConfig, VmConfig, VsockConfig};
use rustix::process::getpid;
use tokio::net::UnixListener;
use tokio::sync::mpsc::UnboundedReceiver;

use super::END_LIMIT;
use super::signals::SIGWINCH;
use super::store::StateDir;
use crate::bundle::plan::Plan;
use crate::error::{BootError, ConsoleTail, RuntimeError};
use crate::guest::client::{GuestError, clean, read_line};
use crate::vm::client::{CONTROL_SOCKET, ask};
use crate::vm::launch::{LaunchPlan, LaunchTarget};
use crate::vm::spawn::{Vm, VmEnd};

/// How long the VMM may take to hand out its console when the boot has failed already.
const CONSOLE_LIMIT: std::time::Duration = std::time::Duration::from_secs(2);

/// Makes the socket on which the agent greets.
pub(super) fn listen(state: &StateDir) -> Result<UnixListener, RuntimeError> {
    let name = format!("vsock/{}", guest_to_host_socket(HOST_READY));
    let path = state.short_path(&name);
    let error = || RuntimeError::file("listen on", state.path().join(&name));
    let listener = UnixListener::bind(&path).map_err(error())?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(error())?;
    Ok(listener)
}

/// Starts the VMM.
pub(super) fn spawn(state: &StateDir, plan: &Plan, log: &File) -> Result<Vm, RuntimeError> {
    let launch = LaunchPlan {
        shared: state.path().join("shared"),
        mounts: plan.mounts.clone(),
        target: LaunchTarget::NewVm {
            vmm: plan.vmm.clone(),
            config: Box::new(vm_config(state, plan)),
            parent: getpid().as_raw_pid(),
        },
    };
    Ok(Vm::spawn(&launch, state.path(), log)?)
}

/// Socket paths are relative to the state directory, which is the VMM's working directory: the absolute ones may
/// be longer than a `sockaddr_un`.
fn vm_config(state: &StateDir, plan: &Plan) -> VmConfig {
    VmConfig {
        protocol_version: PROTOCOL_VERSION,
        id: state.id().vm_name(),
        kernel: plan.vm.kernel.clone(),
        initramfs: plan.vm.initramfs.clone(),
        cmdline: plan.vm.cmdline.clone(),
        vcpus: plan.vm.vcpus,
        memory_mib: plan.vm.memory_mib,
        control_socket: CONTROL_SOCKET.into(),
        vsock: VsockConfig {
            guest_cid: GUEST_CID,
            socket_dir: "vsock".into(),
        },
        fs: vec![FsConfig {
            tag: SHARED_TAG.to_owned(),
            directory: state.path().join("shared"),
            queues: plan.vm.fs_queues,
            cache: plan.vm.fs_cache,
        }],
        blk: Vec::new(),
        console: ConsoleConfig {
            ring_kib: plan.vm.console_ring_kib,
            early: plan.vm.early_console,
        },
    }
}

/// Waits until the agent greets.
pub(super) async fn wait_ready(
    state: &StateDir,
    plan: &Plan,
    vm: &mut Vm,
    listener: &UnixListener,
    signals: &mut UnboundedReceiver<i32>,
) -> Result<(), RuntimeError> {
    let limit = plan.timeouts.boot();
    let greeted = tokio::select! {
        greeted = greeting(listener) => greeted,
        end = vm.ended() => Err(ended(stage(vm), &end).into()),
        signal = terminating(signals) => Err(BootError::Interrupted(signal).into()),
        () = tokio::time::sleep(limit) => Err(BootError::Timeout {
            stage: stage(vm),
            limit_ms: plan.timeouts.boot_ms,
            console: console_tail(state).await,
        }.into()),
    };
    match greeted {
        Ok(()) => Ok(()),
        Err(error) => {
            let stage = stage(vm);
            Err(explain(vm, stage, error).await)
        }
    }
}

/// A broken connection is most often the VM's end, which says more.
pub(super) async fn explain(vm: &mut Vm, stage: &'static str, error: RuntimeError) -> RuntimeError {
    if !matches!(&error, RuntimeError::Guest(error) if error.is_lost_connection()) {
        return error;
    }
    match tokio::time::timeout(END_LIMIT, vm.ended()).await {
        Ok(end) => ended(stage, &end).into(),
        Err(_) => error,
    }
}

/// A VM that ended before it was ready, with the stage that it had reached.
pub(super) fn ended(stage: &'static str, end: &VmEnd) -> BootError {
    BootError::Ended {
        stage,
        cause: clean(&end.to_string()),
        console: ConsoleTail::new(&end.console_tail),
    }
}

fn stage(vm: &Vm) -> &'static str {
    match vm.started {
        None => "before its vCPUs ran",
        Some(_) => "after its vCPUs ran and before the agent answered",
    }
}

/// The first signal that means to end us.
pub(super) async fn terminating(signals: &mut UnboundedReceiver<i32>) -> i32 {
    loop {
        match signals.recv().await {
            Some(SIGWINCH | libc::SIGCONT | libc::SIGIO | libc::SIGTSTP) => {}
            Some(signal) => return signal,
            None => std::future::pending().await,
        }
    }
}

async fn console_tail(state: &StateDir) -> ConsoleTail {
    let socket = state.short_path(CONTROL_SOCKET);
    match ask(&socket, &Request::Console {}, CONSOLE_LIMIT).await {
        Ok(Response::Console { text, .. }) => ConsoleTail::new(&text),
        Ok(_) | Err(_) => ConsoleTail::default(),
    }
}

async fn greeting(listener: &UnixListener) -> Result<(), RuntimeError> {
    let failed = |source: io::Error| GuestError::Connect {
        port: HOST_READY,
        source,
    };
    let (mut stream, _) = listener.accept().await.map_err(failed)?;
    let line = read_line(&mut stream).await.map_err(failed)?;
    check_greeting(&line)
}

fn check_greeting(line: &str) -> Result<(), RuntimeError> {
    // First the version alone: another version's greeting may have other fields.
    let value: serde_json::Value =
        serde_json::from_str(line).map_err(|_| BootError::Greeting(clean(line)))?;
    let version = value["protocol_version"].as_u64();
    if let Some(guest) = version.filter(|version| *version != u64::from(PROTOCOL_VERSION)) {
        let guest = u32::try_from(guest).unwrap_or(u32::MAX);
        return Err(GuestError::Version { guest }.into());
    }
    serde_json::from_value::<Ready>(value)
        .map(drop)
        .map_err(|_| BootError::Greeting(clean(line)).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_greeting_of_another_version_is_told_as_such_whatever_else_it_holds() {
        let good = format!("{{\"protocol_version\":{PROTOCOL_VERSION},\"agent_version\":\"1\"}}");
        assert!(check_greeting(&good).is_ok());
        let other = check_greeting("{\"protocol_version\":99,\"news\":1}").unwrap_err();
        assert!(other.to_string().contains("protocol version 99"), "{other}");
        for bad in ["", "hello", "{}", "[]", "{\"protocol_version\":1}"] {
            let error = check_greeting(bad).unwrap_err();
            assert!(error.to_string().contains("no greeting"), "{bad}: {error}");
        }
    }
}
