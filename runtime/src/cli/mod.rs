// SPDX-License-Identifier: Apache-2.0

//! runc's command line, verb for verb: flags that callers pass and that mean nothing here are accepted, those that
//! would mean something and are not done are refused.

mod check;
mod create;
mod delete;
mod exec;
mod features;
mod hidden;
mod kill;
mod list;
mod logging;
mod pause;
mod pid_file;
mod ps;
mod run;
mod spec;
mod start;
mod state;
mod update;

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use caisson_runtime::config::Config;
use caisson_runtime::error::{RuntimeError, chain};
use caisson_runtime::sandbox::id::ContainerId;
use caisson_runtime::sandbox::store::{StateDir, Store};
use clap::{Args, Parser, Subcommand, ValueEnum};

/// Where state is kept when nobody says otherwise.
const DEFAULT_ROOT: &str = "/run/caisson";
/// Version of the runtime-spec that is followed.
pub(crate) const OCI_VERSION: &str = "1.2.0";

const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\nspec: 1.2.0");

/// Runs OCI containers, each pod in a KVM microVM of its own.
#[derive(Debug, Parser)]
#[command(name = "caisson", version = VERSION)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

/// Options before the verb.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// Directory of the containers' state.
    #[arg(long, default_value = DEFAULT_ROOT)]
    root: PathBuf,
    /// File to which errors and warnings are appended (stderr, if none).
    #[arg(long)]
    log: Option<PathBuf>,
    /// Format of the log.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    /// Log more.
    #[arg(long)]
    debug: bool,
    /// Accepted: `slice:prefix:name` cgroup paths are always understood.
    #[arg(long)]
    systemd_cgroup: bool,
    /// Accepted, only "auto" and "false" have a meaning here.
    #[arg(long, hide = true)]
    rootless: Option<String>,
    /// Accepted and ignored.
    #[arg(long, hide = true)]
    criu: Option<PathBuf>,
    /// Configuration file instead of /etc/caisson/config.toml.
    #[arg(long)]
    config: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Create a container
    Create(create::CreateArgs),
    /// Start a created container
    Start(start::StartArgs),
    /// Create and start a container, and wait for it
    Run(run::RunArgs),
    /// Print a container's state
    State(state::StateArgs),
    /// Send a signal to a container
    Kill(kill::KillArgs),
    /// Delete a stopped container
    Delete(delete::DeleteArgs),
    /// Run another process in a container
    Exec(exec::ExecArgs),
    /// List a container's processes
    Ps(ps::PsArgs),
    /// List containers
    List(list::ListArgs),
    /// Freeze a container
    Pause(pause::PauseArgs),
    /// Let a frozen container go on
    Resume(pause::ResumeArgs),
    /// Change a container's limits
    Update(update::UpdateArgs),
    /// Write a config.json to begin with
    Spec(spec::SpecArgs),
    /// Print what this runtime can do (runtime-spec's features document)
    Features,
    /// Can this machine run Caisson?
    Check(check::CheckArgs),
    /// Not supported
    Events(Refused),
    /// Not supported
    Checkpoint(Refused),
    /// Not supported
    Restore(Refused),
    #[command(name = hidden::MONITOR, hide = true)]
    Monitor(hidden::MonitorArgs),
    #[command(name = hidden::EXEC_MONITOR, hide = true)]
    ExecMonitor(hidden::ExecMonitorArgs),
    #[command(name = caisson_runtime::vm::launch::HELPER_COMMAND, hide = true)]
    LaunchHelper,
}

/// Whatever is given to a verb that is not done.
#[derive(Debug, Args)]
struct Refused {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    _arguments: Vec<OsString>,
}

/// Parses, runs, reports.
pub(crate) fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Nothing can be done if not even this can be written.
            error.print().unwrap_or_default();
            return ExitCode::from(if error.use_stderr() { 1 } else { 0 });
        }
    };
    if let Err(error) = logging::init(&cli.global) {
        logging::last_words(&error.to_string());
        return ExitCode::FAILURE;
    }
    match dispatch(&cli.global, cli.verb) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            logging::fatal(&cli.global, &chain(&error));
            ExitCode::from(error.exit_status())
        }
    }
}

fn dispatch(global: &Global, verb: Verb) -> Result<u8, RuntimeError> {
    let refuse = |verb: &str| Err(RuntimeError::Unsupported(verb.to_owned()));
    match verb {
        Verb::Create(args) => create::run(global, args),
        Verb::Start(args) => start::run(global, &args),
        Verb::Run(args) => run::run(global, args),
        Verb::State(args) => state::run(global, &args),
        Verb::Kill(args) => kill::run(global, &args),
        Verb::Delete(args) => delete::run(global, &args),
        Verb::Exec(args) => exec::run(global, args),
        Verb::Ps(args) => ps::run(global, &args),
        Verb::List(args) => list::run(global, &args),
        Verb::Pause(args) => pause::pause(global, &args),
        Verb::Resume(args) => pause::resume(global, &args),
        Verb::Update(args) => update::run(global, args),
        Verb::Spec(args) => spec::run(&args),
        Verb::Features => features::run(),
        Verb::Check(args) => check::run(global, &args),
        Verb::Events(_) => refuse("events"),
        Verb::Checkpoint(_) => refuse("checkpoint"),
        Verb::Restore(_) => refuse("restore"),
        Verb::Monitor(args) => hidden::monitor(global, args),
        Verb::ExecMonitor(args) => hidden::exec_monitor(global, &args),
        Verb::LaunchHelper => hidden::launch_helper(),
    }
}

impl Global {
    pub(crate) fn store(&self) -> Store {
        // A process that changes its directory must find it again.
        let root = std::path::absolute(&self.root).unwrap_or_else(|_| self.root.clone());
        Store::new(root)
    }

    pub(crate) fn open(&self, id: &str) -> Result<StateDir, RuntimeError> {
        Ok(self.store().open(&ContainerId::new(id)?)?)
    }

    pub(crate) fn configuration(&self) -> Result<Config, RuntimeError> {
        Ok(Config::load(self.config.as_deref())?)
    }

    /// These options again, for a process of ours that runs `verb` for container `id`. It has the container's stderr,
    /// so without a log of the caller's it has one in the state directory.
    pub(crate) fn arguments(&self, verb: &str, id: &ContainerId) -> Vec<OsString> {
        let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
        let mut arguments = vec!["--root".into(), self.store().root().as_os_str().to_owned()];
        let own_log = || self.store().root().join(id).join("monitor.log");
        let log = self.log.as_ref().map_or_else(own_log, absolute);
        arguments.extend(["--log".into(), log.into_os_string()]);
        if self.log_format == LogFormat::Json {
            arguments.extend(["--log-format".into(), "json".into()]);
        }
        if self.debug {
            arguments.push("--debug".into());
        }
        arguments.push(verb.into());
        arguments
    }
}

/// Runs a step that waits for several things at once.
pub(crate) fn block_on<T>(
    step: impl Future<Output = Result<T, RuntimeError>>,
) -> Result<T, RuntimeError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(RuntimeError::system("start the event loop"))?
        .block_on(step)
}

/// Writes to stdout.
pub(crate) fn print(text: &str) -> Result<(), RuntimeError> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(RuntimeError::system("write to stdout"))
}

/// Writes a JSON document, indented as runc does, to stdout.
pub(crate) fn print_json<T: serde::Serialize>(value: &T) -> Result<(), RuntimeError> {
    let text = serde_json::to_string_pretty(value).map_err(std::io::Error::from);
    let text = text.map_err(RuntimeError::system("write JSON"))?;
    print(&format!("{text}\n"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_conmon_and_containerd_pass_is_accepted() {
        for line in [
            "caisson --root /r --log /l --log-format json --systemd-cgroup create --bundle /b \
             --pid-file /p --no-pivot --no-new-keyring id",
            "caisson --log /l --log-format json create -b /b --console-socket /c --pid-file /p id",
            "caisson --root=/r --log-format=json start id",
            "caisson exec --pid-file /p --process /p.json --console-socket /c --detach id",
            "caisson exec -d --process /p.json id",
            "caisson exec -t -e A=B --env C=D -u 1:2 -g 3 --cwd / id sh -c true",
            "caisson kill --all id 9",
            "caisson kill id KILL",
            "caisson kill id",
            "caisson delete --force id",
            "caisson delete -f id",
            "caisson ps --format json id",
            "caisson ps id -- -ef",
            "caisson list -q",
            "caisson list --format json",
            "caisson run -d --pid-file /p id",
            "caisson run --keep --bundle /b id",
            "caisson state id",
            "caisson features",
            "caisson events --stats id",
            "caisson update --resources - id",
            "caisson spec -b /b",
            "caisson check --json",
        ] {
            let words = line.split_whitespace();
            assert!(Cli::try_parse_from(words).is_ok(), "{line}");
        }
    }

    #[test]
    fn the_version_begins_as_runcs_does() {
        let error = Cli::try_parse_from(["caisson", "--version"]).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("caisson "), "{text}");
        assert!(text.contains("\nspec: 1.2.0"), "{text}");
    }

    #[test]
    fn our_own_arguments_are_parsed_to_the_same() {
        let line = "caisson --root /r --log /l --log-format json --debug state x";
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
        let mut again = vec![OsString::from("caisson")];
        again.extend(
            cli.global
                .arguments("state", &ContainerId::new("x").unwrap()),
        );
        again.push("x".into());
        let parsed = Cli::try_parse_from(again).unwrap();
        assert_eq!(format!("{:?}", parsed.global), format!("{:?}", cli.global));
    }
}
