// SPDX-License-Identifier: Apache-2.0

//! The agent's log: lines in the kernel's log, so that they stand in order with the kernel's own and the
//! host has both in one ring. Each line is bounded, and the kernel limits their rate.

use std::fs::File;
use std::io::{self, Write};

use caisson_protocol::boot::LogLevel;
use log::{LevelFilter, Log, Metadata, Record};

/// Longest line, bytes; the rest is cut. (The kernel's own bound is 1 KiB with its prefix.)
const MAX_LINE: usize = 900;

struct Kmsg {
    file: File,
}

/// Sends the `log` crate's records to `/dev/kmsg` from now on.
///
/// # Errors
/// When the device cannot be opened or another logger is installed.
pub(crate) fn install(level: LogLevel) -> io::Result<()> {
    let file = File::options().write(true).open("/dev/kmsg")?;
    log::set_boxed_logger(Box::new(Kmsg { file })).map_err(io::Error::other)?;
    set_level(level);
    Ok(())
}

/// Changes how much is logged.
pub(crate) fn set_level(level: LogLevel) {
    log::set_max_level(match level {
        LogLevel::Error => LevelFilter::Error,
        LogLevel::Warn => LevelFilter::Warn,
        LogLevel::Debug => LevelFilter::Debug,
    });
}

impl Log for Kmsg {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("caisson") || metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            // A log that cannot be written has nowhere to complain.
            let _ = (&self.file).write_all(&line(record));
        }
    }

    fn flush(&self) {}
}

/// One line with its syslog level (Documentation/ABI/testing/dev-kmsg), free of control characters.
fn line(record: &Record<'_>) -> Vec<u8> {
    let level = match record.level() {
        log::Level::Error => 3,
        log::Level::Warn => 4,
        log::Level::Info => 6,
        log::Level::Debug | log::Level::Trace => 7,
    };
    let mut text = format!("<{level}>caisson-agent: {}", record.args());
    if text.len() > MAX_LINE {
        let end = (0..=MAX_LINE).rev().find(|at| text.is_char_boundary(*at));
        text.truncate(end.unwrap_or_default());
    }
    let mut text: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    text.push('\n');
    text.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(level: log::Level, text: &str) -> String {
        let mut record = Record::builder();
        let record = record.level(level).target("caisson_agent");
        let line = line(&record.args(format_args!("{text}")).build());
        String::from_utf8(line).unwrap()
    }

    #[test]
    fn a_line_stays_one_line() {
        assert_eq!(
            written(log::Level::Error, "a\nb\x1b[1m"),
            "<3>caisson-agent: a b [1m\n"
        );
    }

    #[test]
    fn a_long_line_is_cut_at_a_character() {
        let line = written(log::Level::Debug, &"ä".repeat(2000));
        assert!(line.len() <= MAX_LINE + 1 && line.ends_with("ä\n"));
    }
}
