// SPDX-License-Identifier: Apache-2.0

//! Signals: their names, and those that a per-container process passes on to the process it stands for.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// Signal names without `SIG`, x86-64 numbers (signal(7)).
const NAMES: &[(&str, i32)] = &[
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
];
/// The kernel's first and last real-time signal; libc keeps the first two for itself.
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// What a per-container process passes on. Not those that only it itself can mean (SEGV, CHLD, PIPE, …), nor those
/// that cannot be caught.
const FORWARDED: &[i32] = &[1, 2, 3, 10, 12, 14, 15, 18, 20, 24, 25, 26, 27, 29, 30];

/// The window size of the terminal changed.
pub const SIGWINCH: i32 = 28;
/// See signal(7).
pub const SIGKILL: i32 = 9;

/// A signal by number or name, with or without `SIG`, in any case; `RTMIN+n` and `RTMAX-n` too.
pub fn parse(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse::<i32>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let offset = |rest: &str, sign: char| match rest.strip_prefix(sign) {
        Some(number) => number.parse::<i32>().ok(),
        None if rest.is_empty() => Some(0),
        None => None,
    };
    let number = if let Some(rest) = name.strip_prefix("RTMIN") {
        RTMIN.checked_add(offset(rest, '+')?)?
    } else if let Some(rest) = name.strip_prefix("RTMAX") {
        RTMAX.checked_sub(offset(rest, '-')?)?
    } else {
        return NAMES.iter().find(|(n, _)| *n == name).map(|(_, s)| *s);
    };
    (RTMIN..=RTMAX).contains(&number).then_some(number)
}

/// From now on this process gets the forwarded signals (and SIGWINCH) here instead of dying of them.
///
/// # Errors
/// When a handler cannot be installed.
pub fn catch() -> std::io::Result<mpsc::UnboundedReceiver<i32>> {
    let (sender, receiver) = mpsc::unbounded_channel();
    for number in FORWARDED.iter().copied().chain([SIGWINCH]) {
        let mut stream = signal(SignalKind::from_raw(number))?;
        let sender = sender.clone();
        tokio::spawn(async move {
            while stream.recv().await.is_some() {
                if sender.send(number).is_err() {
                    break;
                }
            }
        });
    }
    Ok(receiver)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_known_in_every_spelling() {
        for (text, number) in [
            ("9", Some(9)),
            ("KILL", Some(9)),
            ("SIGKILL", Some(9)),
            ("sigterm", Some(15)),
            ("RTMIN", Some(34)),
            ("SIGRTMIN+3", Some(37)),
            ("RTMAX-1", Some(63)),
            ("64", Some(64)),
            ("0", None),
            ("65", None),
            ("-9", None),
            ("SIG", None),
            ("RTMIN+31", None),
            ("RTMIN3", None),
            ("FOO", None),
        ] {
            assert_eq!(parse(text), number, "{text}");
        }
    }

    #[test]
    fn what_cannot_be_caught_is_not_in_the_list() {
        assert!(!FORWARDED.contains(&9) && !FORWARDED.contains(&19));
    }
}
