// SPDX-License-Identifier: Apache-2.0

//! `caisson ps`: the container's processes, with the guest's pids.

use caisson_protocol::agent::agent::ProcessInfo;
use caisson_runtime::error::RuntimeError;
use caisson_runtime::sandbox::control;
use clap::Args;

use super::list::{Format, table};
use super::{Global, block_on, print, print_json};

#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// The container's id.
    id: String,
    /// How to print.
    #[arg(long, short, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Options of ps(1): of them -ef, which is the default, is known.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    options: Vec<String>,
}

pub(crate) fn run(global: &Global, args: &PsArgs) -> Result<u8, RuntimeError> {
    let known = |option: &String| matches!(option.as_str(), "--" | "-ef" | "-e" | "-f" | "-fe");
    if let Some(other) = args.options.iter().find(|option| !known(option)) {
        return Err(RuntimeError::Unsupported(format!("ps option {other:?}")));
    }
    let mut processes = block_on(control::processes(&global.open(&args.id)?))?;
    processes.sort_by_key(|process| process.pid);
    match args.format {
        Format::Json => {
            print_json(
                &processes
                    .iter()
                    .map(|process| process.pid)
                    .collect::<Vec<_>>(),
            )?;
        }
        Format::Table => print(&render(&processes))?,
    }
    Ok(0)
}

fn render(processes: &[ProcessInfo]) -> String {
    let header = ["UID", "PID", "PPID", "TTY", "TIME", "CMD"].map(str::to_owned);
    let rows = processes.iter().map(|process| {
        let seconds = process.cpu_time_ns / 1_000_000_000;
        let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
        let terminal = if process.terminal.is_empty() {
            "?"
        } else {
            &process.terminal
        };
        [
            process.uid.to_string(),
            process.pid.to_string(),
            process.parent_pid.to_string(),
            terminal.to_owned(),
            format!("{hours:02}:{minutes:02}:{:02}", seconds % 60),
            process.command.clone(),
        ]
    });
    table(std::iter::once(header).chain(rows).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_one_line_with_its_time_in_hours() {
        let process = ProcessInfo {
            pid: 7,
            cpu_time_ns: 3_723_000_000_000,
            command: "sleep 1".to_owned(),
            ..Default::default()
        };
        let text = render(&[process]);
        assert_eq!(text.lines().count(), 2);
        assert!(text.contains("01:02:03"), "{text}");
        assert!(text.trim_end().ends_with("sleep 1"));
    }
}
