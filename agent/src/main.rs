// SPDX-License-Identifier: Apache-2.0

//! Caisson's guest side: PID 1 of every microVM.
//!
//! ```text
//! kernel ──> main: boot ──> serve: ttRPC and streams on vsock ──> sandbox ──> containers ──> processes
//!                                                                    │
//!              one helper (this program again) per container or exec ┘
//! ```
//!
//! Everything runs on one thread. What containers do is hostile to it, what the host says is not, but is
//! checked all the same.

mod boot;
mod container;
mod events;
#[cfg(test)]
mod guest_tests;
mod helper;
mod id;
mod kmsg;
mod listen;
mod machine;
mod pod_init;
mod process;
mod reaper;
mod sandbox;
mod server;
mod storage;
mod sys;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use caisson_protocol::agent::agent_ttrpc::create_agent;
use rustix::time::{ClockId, clock_gettime};

/// Where the agent's program is in the guest.
const PROGRAM: &str = "/init";

/// Why the agent ended. The kernel panics when PID 1 ends, and the VMM tells the host.
#[derive(Debug, thiserror::Error)]
enum AgentError {
    #[error("failed to bring the guest up")]
    Boot(#[from] boot::BootError),
    #[error("failed to start the runtime")]
    Runtime(#[source] io::Error),
    #[error("failed to take over SIGCHLD")]
    Signals(#[source] io::Error),
    #[error("failed to listen on vsock")]
    Listen(#[source] io::Error),
    #[error("failed to serve ttRPC")]
    Serve(#[source] ttrpc::Error),
    #[error("failed to tell the host that the guest is ready")]
    Ready(#[source] io::Error),
}

fn main() -> ExitCode {
    let init_ns = monotonic_ns();
    match std::env::args().nth(1).as_deref() {
        Some(helper::ARGUMENT) => return helper::run(),
        Some(pod_init::ARGUMENT) => return pod_init::run(),
        _ if std::process::id() != 1 => {
            complain("this is the agent of Caisson's guests; it runs as their PID 1 only");
            return ExitCode::FAILURE;
        }
        _ => {}
    }
    let Err(error) = run(init_ns);
    let text = helper::chain(&error);
    log::error!("{text}");
    complain(&text);
    ExitCode::FAILURE
}

fn run(init_ns: u64) -> Result<std::convert::Infallible, AgentError> {
    boot::bring_up()?;
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime.enable_all() }
        .build()
        .map_err(AgentError::Runtime)?;
    runtime.block_on(serve(init_ns))
}

async fn serve(init_ns: u64) -> Result<std::convert::Infallible, AgentError> {
    let reaper = Arc::new(reaper::Reaper::default());
    let signals = reaper::Reaper::signals().map_err(AgentError::Signals)?;
    let sandbox = Arc::new(sandbox::Sandbox::new(
        PathBuf::from(PROGRAM),
        reaper.clone(),
    ));
    let ports = listen::bind().map_err(AgentError::Listen)?;
    let service = server::Service::new(sandbox.clone(), init_ns, monotonic_ns());
    let listener = ttrpc::asynchronous::transport::Listener::new(listen::from_host(ports.rpc));
    let mut server = ttrpc::asynchronous::Server::new()
        .add_listener(listener)
        .register_service(create_agent(Arc::new(service)));
    server.start().await.map_err(AgentError::Serve)?;
    tokio::spawn(listen::serve_stdio(ports.stdio, sandbox));
    tokio::spawn(async move { reaper.run(signals).await });
    listen::say_ready().await.map_err(AgentError::Ready)?;
    std::future::pending().await
}

/// Nanoseconds of CLOCK_MONOTONIC.
fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or_default()
}

/// The last resort, when there may be no log: the console.
fn complain(text: &str) {
    // And there is nothing after the last resort.
    let _ = writeln!(io::stderr(), "caisson-agent: {text}");
}
