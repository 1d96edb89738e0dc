// SPDX-License-Identifier: Apache-2.0

//! The log as runc's callers read it: logrus text or JSON lines, in `--log`'s file or on stderr.
//!
//! conmon, containerd and Podman show the last `"level":"error"` line of the JSON file to their users.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::sync::Mutex;

use log::{Level, LevelFilter, Log, Metadata, Record};

use super::{Global, LogFormat};

struct Logger {
    file: Option<Mutex<File>>,
    format: LogFormat,
}

/// Sets up the log.
pub(crate) fn init(global: &Global) -> io::Result<()> {
    let file = match &global.log {
        None => None,
        Some(path) => {
            let file = OpenOptions::new().append(true).create(true).open(path);
            Some(Mutex::new(file.map_err(|error| {
                io::Error::new(
                    error.kind(),
                    format!("failed to open log {}: {error}", path.display()),
                )
            })?))
        }
    };
    let logger = Logger {
        file,
        format: global.log_format,
    };
    log::set_max_level(if global.debug {
        LevelFilter::Debug
    } else {
        LevelFilter::Warn
    });
    log::set_boxed_logger(Box::new(logger)).map_err(io::Error::other)
}

/// The one error that ends this process: into the log, and for a person on stderr.
pub(crate) fn fatal(global: &Global, message: &str) {
    log::error!("{message}");
    if global.log.is_some() {
        last_words(message);
    }
}

/// A line on stderr. There is nobody to tell if that fails.
pub(crate) fn last_words(message: &str) {
    writeln!(io::stderr(), "{message}").unwrap_or_default();
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Libraries' own debug output is not what --debug asks for.
        metadata.level() <= Level::Warn || metadata.target().starts_with("caisson")
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let time = humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string();
        let line = format_line(
            self.format,
            record.level(),
            &record.args().to_string(),
            &time,
        );
        match &self.file {
            Some(file) => {
                if let Ok(mut file) = file.lock() {
                    file.write_all(line.as_bytes()).unwrap_or_default();
                }
            }
            None if io::stderr().is_terminal() => last_words(&record.args().to_string()),
            None => io::stderr().write_all(line.as_bytes()).unwrap_or_default(),
        }
    }

    fn flush(&self) {}
}

fn format_line(format: LogFormat, level: Level, message: &str, time: &str) -> String {
    let level = match level {
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info => "info",
        Level::Debug | Level::Trace => "debug",
    };
    match format {
        LogFormat::Json => {
            let line = serde_json::json!({"level": level, "msg": message, "time": time});
            format!("{line}\n")
        }
        LogFormat::Text => format!("time=\"{time}\" level={level} msg={message:?}\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_those_that_clients_parse() {
        let time = "2026-01-01T00:00:00Z";
        let line = format_line(LogFormat::Json, Level::Error, "a \"b\"\nc", time);
        assert_eq!(line.lines().count(), 1);
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["level"], "error");
        assert_eq!(value["msg"], "a \"b\"\nc");
        assert_eq!(value["time"], time);
        assert_eq!(
            format_line(LogFormat::Text, Level::Warn, "x \"y\"", time),
            "time=\"2026-01-01T00:00:00Z\" level=warning msg=\"x \\\"y\\\"\"\n"
        );
    }
}
