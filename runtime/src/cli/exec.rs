// SPDX-License-Identifier: Apache-2.0

//! `caisson exec`.

use std::path::PathBuf;

use caisson_runtime::bundle::load;
use caisson_runtime::error::RuntimeError;
use caisson_runtime::sandbox::exec::{self, ExecRequest};
use caisson_runtime::sandbox::id::ContainerId;
use caisson_runtime::sandbox::report::Channel;
use caisson_runtime::sandbox::store::StateDir;
use clap::Args;
use oci_spec::runtime::{Capability, LinuxCapabilities, Process};

use super::{Global, block_on, hidden, pid_file};

#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    /// The container's id.
    id: String,
    /// The program and its arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
    /// The runtime-spec's process object in a file, instead of all that is below.
    #[arg(long, short)]
    process: Option<PathBuf>,
    /// With a terminal.
    #[arg(long, short)]
    tty: bool,
    /// Working directory.
    #[arg(long)]
    cwd: Option<PathBuf>,
    /// NAME=VALUE, any number of times.
    #[arg(long, short)]
    env: Vec<String>,
    /// UID[:GID].
    #[arg(long, short)]
    user: Option<String>,
    /// Supplementary group, any number of times.
    #[arg(long, short = 'g')]
    additional_gids: Vec<u32>,
    /// Capability to add, any number of times.
    #[arg(long, short)]
    cap: Vec<String>,
    /// The process can gain no privileges.
    #[arg(long)]
    no_new_privs: bool,
    /// Do not wait for the process.
    #[arg(long, short)]
    detach: bool,
    /// File to write a pid into.
    #[arg(long)]
    pid_file: Option<PathBuf>,
    /// Unix socket to send the terminal's master to.
    #[arg(long)]
    console_socket: Option<PathBuf>,
    /// Accepted: the guest has no AppArmor.
    #[arg(long, hide = true)]
    apparmor: Option<String>,
    /// Accepted: the guest has no SELinux.
    #[arg(long, hide = true)]
    process_label: Option<String>,
    /// Descriptors to pass to the process: none can be.
    #[arg(long, default_value_t = 0)]
    preserve_fds: u32,
    /// Not supported.
    #[arg(long, hide = true)]
    cgroup: Vec<String>,
    /// Not supported.
    #[arg(long, hide = true)]
    ignore_paused: bool,
}

pub(crate) fn run(global: &Global, args: ExecArgs) -> Result<u8, RuntimeError> {
    for (given, what) in [
        (args.preserve_fds > 0, "--preserve-fds"),
        (!args.cgroup.is_empty(), "exec --cgroup"),
        (args.ignore_paused, "exec --ignore-paused"),
    ] {
        if given {
            return Err(RuntimeError::Unsupported(what.to_owned()));
        }
    }
    let state = global.open(&args.id)?;
    let console_socket = match &args.console_socket {
        Some(path) => {
            let absolute = std::path::absolute(path);
            Some(absolute.map_err(RuntimeError::file("find console socket", path))?)
        }
        None => None,
    };
    let request = ExecRequest {
        process: process(&state, &args)?,
        console_socket,
        // A console socket means that nobody uses our own terminal.
        detached: args.detach || args.console_socket.is_some(),
    };
    exec::check(&state, &request)?;
    if args.detach {
        return detach(global, &args, &request);
    }
    if let Some(path) = &args.pid_file {
        pid_file::write(path, std::process::id())?;
    }
    block_on(exec::exec(&state, &request, || {}))
}

fn detach(global: &Global, args: &ExecArgs, request: &ExecRequest) -> Result<u8, RuntimeError> {
    let mut arguments = global.arguments(hidden::EXEC_MONITOR, &ContainerId::new(&args.id)?);
    arguments.push(args.id.clone().into());
    let (mut channel, mut child) = Channel::spawn(&arguments)?;
    channel
        .send(request)
        .map_err(RuntimeError::system("hand over the request"))?;
    channel.outcome(&mut child)?;
    if let Some(path) = &args.pid_file {
        pid_file::write(path, child.id())?;
    }
    Ok(0)
}

fn process(state: &StateDir, args: &ExecArgs) -> Result<Process, RuntimeError> {
    if let Some(path) = &args.process {
        let mut process = load::process(path)?;
        if args.tty {
            process.set_terminal(Some(true));
        }
        return Ok(process);
    }
    let mut process = exec::process_of_container(state)?;
    process.set_args(Some(args.args.clone()));
    process.set_terminal(Some(args.tty));
    if let Some(cwd) = &args.cwd {
        process.set_cwd(cwd.clone());
    }
    let mut env = process.env().clone().unwrap_or_default();
    env.extend(args.env.iter().cloned());
    process.set_env(Some(env));
    if args.no_new_privs {
        process.set_no_new_privileges(Some(true));
    }
    if let Some(user) = &args.user {
        set_user(&mut process, user)?;
    }
    if !args.additional_gids.is_empty() {
        let mut user = process.user().clone();
        user.set_additional_gids(Some(args.additional_gids.clone()));
        process.set_user(user);
    }
    if !args.cap.is_empty() {
        add_capabilities(&mut process, &args.cap)?;
    }
    Ok(process)
}

fn set_user(process: &mut Process, text: &str) -> Result<(), RuntimeError> {
    let bad = || RuntimeError::Unsupported(format!("user {text:?} (UID[:GID] is)"));
    let (uid, gid) = match text.split_once(':') {
        Some((uid, gid)) => (uid, Some(gid)),
        None => (text, None),
    };
    let mut user = process.user().clone();
    user.set_uid(uid.parse().map_err(|_| bad())?);
    if let Some(gid) = gid {
        user.set_gid(gid.parse().map_err(|_| bad())?);
    }
    process.set_user(user);
    Ok(())
}

/// As runc: to all sets but the ambient one.
fn add_capabilities(process: &mut Process, names: &[String]) -> Result<(), RuntimeError> {
    let mut all = process
        .capabilities()
        .clone()
        .unwrap_or_else(no_capabilities);
    for name in names {
        let capability: Capability = serde_json::from_value(name.to_ascii_uppercase().into())
            .map_err(|_| RuntimeError::Unsupported(format!("capability {name:?}")))?;
        let add = |set: &Option<std::collections::HashSet<Capability>>| {
            let mut set = set.clone().unwrap_or_default();
            set.insert(capability);
            Some(set)
        };
        let bounding = add(all.bounding());
        let effective = add(all.effective());
        let permitted = add(all.permitted());
        all.set_bounding(bounding)
            .set_effective(effective)
            .set_permitted(permitted);
    }
    process.set_capabilities(Some(all));
    Ok(())
}

fn no_capabilities() -> LinuxCapabilities {
    let mut none = LinuxCapabilities::default();
    none.set_bounding(None)
        .set_effective(None)
        .set_permitted(None)
        .set_inheritable(None)
        .set_ambient(None);
    none
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_numbers_and_a_missing_group_stays() {
        let mut process = Process::default();
        set_user(&mut process, "5:6").unwrap();
        set_user(&mut process, "7").unwrap();
        assert_eq!((process.user().uid(), process.user().gid()), (7, 6));
        assert!(set_user(&mut process, "root").is_err());
        assert!(set_user(&mut process, "1:x").is_err());
    }

    #[test]
    fn capabilities_are_added_to_what_the_container_has() {
        let mut process = Process::default();
        process.set_capabilities(Some(no_capabilities()));
        add_capabilities(&mut process, &["CAP_NET_ADMIN".into(), "cap_kill".into()]).unwrap();
        let all = process.capabilities().clone().unwrap();
        assert_eq!(all.effective().clone().unwrap().len(), 2);
        assert_eq!(all.ambient(), &None);
        assert!(add_capabilities(&mut process, &["CAP_FLY".into()]).is_err());
    }
}
