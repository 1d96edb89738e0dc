// SPDX-License-Identifier: Apache-2.0

//! The log: lines on standard error, bounded in rate, since a guest can cause most of them.

use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::{LevelFilter, Log, Metadata, Record, SetLoggerError};

/// Most lines in one [`PERIOD`]; others are counted.
const LINES_PER_PERIOD: u32 = 50;
const PERIOD: Duration = Duration::from_secs(5);

#[derive(Debug)]
struct Logger {
    rate: Mutex<Rate>,
}

#[derive(Debug)]
struct Rate {
    since: Option<Instant>,
    lines: u32,
    left_out: u64,
}

impl Rate {
    /// Whether a line is printed now, and how many were not before it.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        let fresh = self
            .since
            .is_none_or(|since| now.saturating_duration_since(since) >= PERIOD);
        if fresh {
            self.since = Some(now);
            self.lines = 0;
        }
        if self.lines < LINES_PER_PERIOD {
            self.lines += 1;
            Some(std::mem::take(&mut self.left_out))
        } else {
            self.left_out += 1;
            None
        }
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        let mut rate = self.rate.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(left_out) = rate.admit(Instant::now()) {
            let mut err = std::io::stderr().lock();
            // There is nowhere to tell that standard error is gone.
            if left_out > 0 {
                let _ = writeln!(err, "caisson-vmm: warn: {left_out} lines were left out");
            }
            let level = record.level().as_str().to_ascii_lowercase();
            let _ = writeln!(err, "caisson-vmm: {level}: {}", record.args());
        }
    }

    fn flush(&self) {}
}

/// Logs from `level` on.
///
/// # Errors
/// When there is a log already.
pub fn init(level: LevelFilter) -> Result<(), SetLoggerError> {
    static LOGGER: Logger = Logger {
        rate: Mutex::new(Rate {
            since: None,
            lines: 0,
            left_out: 0,
        }),
    };
    log::set_max_level(level);
    log::set_logger(&LOGGER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_counted() {
        let mut rate = Rate {
            since: None,
            lines: 0,
            left_out: 0,
        };
        let now = Instant::now();
        let printed = (0..1000).filter(|_| rate.admit(now).is_some()).count();
        assert_eq!(printed, LINES_PER_PERIOD as usize);
        assert_eq!(rate.admit(now + PERIOD), Some(1000 - printed as u64));
        assert_eq!(rate.admit(now + PERIOD), Some(0));
    }
}
