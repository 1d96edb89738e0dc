// SPDX-License-Identifier: Apache-2.0

//! What the host tells the agent by the kernel's command line: `caisson.KEY=VALUE` words.
//!
//! Everything that can wait for the first RPC does; here stands only what the agent needs before that.

/// Where the agent mounts the shared file system in the guest.
pub const GUEST_SHARED_DIR: &str = "/run/caisson/shared";
/// Tag of the virtio-fs device behind [`GUEST_SHARED_DIR`].
pub const SHARED_TAG: &str = "caisson";

/// Why a command line was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BootParamsError {
    /// A `caisson.` word that this version does not know.
    #[error("unknown kernel parameter {0:?}")]
    Unknown(String),
    /// A value that does not parse.
    #[error("bad value in kernel parameter {0:?}")]
    BadValue(String),
    /// The host did not say which protocol it speaks.
    #[error("kernel parameter caisson.protocol is missing")]
    NoVersion,
}

/// How much the agent writes to the kernel log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogLevel {
    /// Failures only.
    Error,
    /// Failures and surprises.
    #[default]
    Warn,
    /// Every call.
    Debug,
}

/// The agent's boot parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootParams {
    /// [`crate::PROTOCOL_VERSION`] of the host.
    pub protocol_version: u32,
    /// Level of the agent's log.
    pub log: LogLevel,
}

impl BootParams {
    /// The words for the command line, separated by single spaces.
    pub fn to_cmdline(self) -> String {
        let log = match self.log {
            LogLevel::Error => "error",
            LogLevel::Warn => "warn",
            LogLevel::Debug => "debug",
        };
        format!(
            "caisson.protocol={} caisson.log={log}",
            self.protocol_version
        )
    }

    /// Reads the `caisson.` words of a whole command line; others are the kernel's and are passed over.
    ///
    /// # Errors
    /// On an unknown `caisson.` word, a bad value, or no version.
    pub fn from_cmdline(cmdline: &str) -> Result<Self, BootParamsError> {
        let mut version = None;
        let mut log = LogLevel::default();
        for word in cmdline.split_whitespace() {
            let Some(rest) = word.strip_prefix("caisson.") else {
                continue;
            };
            match rest.split_once('=') {
                Some(("protocol", value)) => {
                    let parsed = value.parse();
                    version = Some(parsed.map_err(|_| BootParamsError::BadValue(word.to_owned()))?);
                }
                Some(("log", "error")) => log = LogLevel::Error,
                Some(("log", "warn")) => log = LogLevel::Warn,
                Some(("log", "debug")) => log = LogLevel::Debug,
                Some(("log", _)) => return Err(BootParamsError::BadValue(word.to_owned())),
                _ => return Err(BootParamsError::Unknown(word.to_owned())),
            }
        }
        let protocol_version = version.ok_or(BootParamsError::NoVersion)?;
        Ok(Self {
            protocol_version,
            log,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_among_the_kernels_own_words() {
        for log in [LogLevel::Error, LogLevel::Warn, LogLevel::Debug] {
            for protocol_version in [0, 1, u32::MAX] {
                let params = BootParams {
                    protocol_version,
                    log,
                };
                let line = format!("quiet root=x {} panic=-1", params.to_cmdline());
                assert_eq!(BootParams::from_cmdline(&line), Ok(params));
            }
        }
    }

    #[test]
    fn unknown_and_malformed_words_are_refused_by_name() {
        let bad = |line: &str| BootParams::from_cmdline(line).unwrap_err();
        assert_eq!(bad("quiet"), BootParamsError::NoVersion);
        assert_eq!(
            bad("caisson.protocol=x"),
            BootParamsError::BadValue("caisson.protocol=x".into())
        );
        assert_eq!(
            bad("caisson.protocol=1 caisson.lgo=warn"),
            BootParamsError::Unknown("caisson.lgo=warn".into())
        );
    }
}
