// SPDX-License-Identifier: Apache-2.0

//! `caisson list`.

use std::fmt::Write;

use caisson_runtime::error::RuntimeError;
use caisson_runtime::sandbox::state::Record;
use clap::{Args, ValueEnum};

use super::{Global, print, print_json};

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// How to print.
    #[arg(long, short, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Only the ids.
    #[arg(long, short)]
    quiet: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
}

pub(crate) fn run(global: &Global, args: &ListArgs) -> Result<u8, RuntimeError> {
    let store = global.store();
    let mut records = Vec::new();
    for id in store.list()? {
        // One that was deleted meanwhile, or is only half made, is not listed.
        match store.open(&id).and_then(|state| state.record()) {
            Ok(record) => records.push(record),
            Err(error) => log::debug!("{}", caisson_runtime::error::chain(&error)),
        }
    }
    if args.quiet {
        let ids = records.iter().map(|record| format!("{}\n", record.id));
        print(&ids.collect::<String>())?;
        return Ok(0);
    }
    let states = records.iter().map(|record| {
        let mut state = record.oci_state();
        state.owner = owner(record);
        state
    });
    match args.format {
        Format::Json => print_json(&states.collect::<Vec<_>>())?,
        Format::Table => {
            let header = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned);
            let rows = states.map(|state| {
                [
                    state.id.to_string(),
                    state.pid.to_string(),
                    state.status.to_string(),
                    state.bundle.display().to_string(),
                    state.created.clone(),
                    state.owner.clone(),
                ]
            });
            print(&table(std::iter::once(header).chain(rows).collect()))?;
        }
    }
    Ok(0)
}

/// The owner's name from /etc/passwd, `#uid` without one.
fn owner(record: &Record) -> String {
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let uid = record.owner_uid.to_string();
    let name = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid).then(|| name.to_owned())
    });
    name.unwrap_or_else(|| format!("#{uid}"))
}

/// Columns at least 12 wide with three blanks between them, as runc prints them.
pub(crate) fn table<const N: usize>(rows: Vec<[String; N]>) -> String {
    let mut widths = [9; N];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(row) {
            // Writing to a string does not fail.
            write!(line, "{cell:<width$}   ", width = *width).unwrap_or_default();
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_begin_below_one_another() {
        let rows = vec![
            ["ID".to_owned(), "PID".to_owned()],
            ["a-long-container-id".to_owned(), "1".to_owned()],
        ];
        let text = table(rows);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0].find("PID"), lines[1].rfind('1'));
    }
}
