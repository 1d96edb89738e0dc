// SPDX-License-Identifier: Apache-2.0

//! The command line of `caisson-vmm`.

use std::ffi::OsString;
use std::os::fd::RawFd;

/// What `--help` prints.
pub const USAGE: &str = "\
Usage: caisson-vmm --config-fd N|stdin [--status-fd N] [--die-with-parent] [--log-level LEVEL]
       caisson-vmm --check [--json]
       caisson-vmm --version | --help

Runs one microVM, described by a JSON document, to its end.

  --config-fd N|stdin   read the configuration from this descriptor
  --status-fd N         write events to this descriptor, a JSON document per line
  --die-with-parent     end at once when the thread that started this process ends
  --log-level LEVEL     error, warn (default), info, debug or trace, to standard error
  --check               tell whether this machine can run microVMs; exit status 0 or 1
  --json                the same as JSON
";

/// A command line that is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ArgsError {
    /// Not an option.
    #[error("unknown argument {0:?}")]
    Unknown(OsString),
    /// An option without its value.
    #[error("{0} needs a value")]
    NoValue(&'static str),
    /// A value that does not fit.
    #[error("{value:?} is no value for {option}")]
    BadValue {
        /// The option.
        option: &'static str,
        /// What was given.
        value: OsString,
    },
    /// No configuration.
    #[error("--config-fd is missing")]
    NoConfig,
    /// The same descriptor for both.
    #[error("--config-fd and --status-fd are the same descriptor")]
    SameFd,
    /// `--json` alone.
    #[error("--json goes with --check")]
    JsonAlone,
}

/// Where the configuration comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConfigSource {
    /// Standard input.
    Stdin,
    /// An inherited descriptor.
    Fd(RawFd),
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Run a machine.
    Run {
        /// Where its configuration comes from.
        config: ConfigSource,
        /// Where its events go.
        status: Option<RawFd>,
        /// SIGKILL when the parent's thread ends.
        die_with_parent: bool,
    },
    /// Look at this host.
    Check {
        /// For machines.
        json: bool,
    },
    /// Print the version.
    Version,
    /// Print [`USAGE`].
    Help,
}

/// A parsed command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arguments {
    /// What to do.
    pub command: Command,
    /// How much to log.
    pub log_level: log::LevelFilter,
}

impl Arguments {
    /// Parses the words after the program's name.
    ///
    /// # Errors
    /// Names the word that is wrong.
    pub fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Self, ArgsError> {
        let mut words = words.into_iter();
        let mut log_level = log::LevelFilter::Warn;
        let (mut config, mut status, mut die_with_parent) = (None, None, false);
        let (mut check, mut json, mut other) = (false, false, None);
        while let Some(word) = words.next() {
            match word.to_str() {
                Some("--config-fd") => config = Some(config_source(words.next())?),
                Some("--status-fd") => status = Some(descriptor("--status-fd", words.next())?),
                Some("--die-with-parent") => die_with_parent = true,
                Some("--log-level") => log_level = value("--log-level", words.next())?,
                Some("--check") => check = true,
                Some("--json") => json = true,
                Some("--version") => other = Some(Command::Version),
                Some("--help" | "-h") => other = Some(Command::Help),
                Some(_) | None => return Err(ArgsError::Unknown(word)),
            }
        }
        let command = match (other, check, config) {
            (Some(other), _, _) => other,
            (None, true, _) => Command::Check { json },
            (None, false, _) if json => return Err(ArgsError::JsonAlone),
            (None, false, None) => return Err(ArgsError::NoConfig),
            (None, false, Some(ConfigSource::Fd(fd))) if status == Some(fd) => {
                return Err(ArgsError::SameFd);
            }
            (None, false, Some(config)) => Command::Run {
                config,
                status,
                die_with_parent,
            },
        };
        Ok(Self { command, log_level })
    }
}

fn config_source(word: Option<OsString>) -> Result<ConfigSource, ArgsError> {
    if word.as_deref() == Some("stdin".as_ref()) {
        return Ok(ConfigSource::Stdin);
    }
    Ok(ConfigSource::Fd(descriptor("--config-fd", word)?))
}

fn descriptor(option: &'static str, word: Option<OsString>) -> Result<RawFd, ArgsError> {
    let fd: u16 = value(option, word)?;
    Ok(fd.into())
}

fn value<T: std::str::FromStr>(
    option: &'static str,
    word: Option<OsString>,
) -> Result<T, ArgsError> {
    let value = word.ok_or(ArgsError::NoValue(option))?;
    match value.to_str().map(str::parse) {
        Some(Ok(parsed)) => Ok(parsed),
        Some(Err(_)) | None => Err(ArgsError::BadValue { option, value }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, ArgsError> {
        Arguments::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn a_run_is_parsed() {
        let run = |config, status, die_with_parent| Arguments {
            command: Command::Run {
                config,
                status,
                die_with_parent,
            },
            log_level: log::LevelFilter::Warn,
        };
        assert_eq!(
            parse("--config-fd 3 --status-fd 4 --die-with-parent"),
            Ok(run(ConfigSource::Fd(3), Some(4), true))
        );
        assert_eq!(
            parse("--config-fd stdin"),
            Ok(run(ConfigSource::Stdin, None, false))
        );
    }

    #[test]
    fn wrong_words_are_named() {
        assert_eq!(parse(""), Err(ArgsError::NoConfig));
        assert_eq!(parse("--x"), Err(ArgsError::Unknown("--x".into())));
        assert_eq!(parse("--config-fd"), Err(ArgsError::NoValue("--config-fd")));
        assert_eq!(parse("--json"), Err(ArgsError::JsonAlone));
        for value in ["-1", "x", "70000", ""] {
            let line = format!("--config-fd stdin --status-fd {value}");
            assert!(parse(&line).is_err(), "{value}");
        }
        assert_eq!(parse("--config-fd 3 --status-fd 3"), Err(ArgsError::SameFd));
    }
}
