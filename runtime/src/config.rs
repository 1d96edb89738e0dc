// SPDX-License-Identifier: Apache-2.0

//! The configuration: defaults, then /etc/caisson/config.toml, then its drop-ins, then checked.
//!
//! Every file is first parsed by itself, so that an unknown key or a wrong type is reported with the file and
//! the line; then the files are laid over one another, key by key. `config/default.toml` documents every key, and
//! a test keeps it the same as the defaults here.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use caisson_protocol::vm::{CachePolicy, MAX_VCPUS, MIN_MEMORY_MIB};
use serde::{Deserialize, Serialize};

/// Where the configuration is when nobody says otherwise. It may be missing.
pub const DEFAULT_PATH: &str = "/etc/caisson/config.toml";

/// The file that documents every key.
pub const DEFAULT_FILE: &str = include_str!("../config/default.toml");

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file or directory cannot be read.
    #[error("failed to read configuration {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file is not a configuration; the text names the line and the key.
    #[error("bad configuration {path}: {message}")]
    Parse {
        /// Which.
        path: PathBuf,
        /// From the parser.
        message: String,
    },
    /// A value that cannot be right.
    #[error("bad configuration: {key} is {value}, it must be {bound}")]
    Value {
        /// `section.key`.
        key: &'static str,
        /// What was found.
        value: String,
        /// What is allowed.
        bound: String,
    },
}

/// The whole configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The virtual machine.
    pub vm: VmSection,
    /// The shared file system.
    pub fs: FsSection,
    /// How long to wait.
    pub timeouts: TimeoutSection,
    /// What is logged.
    pub log: LogSection,
}

/// `[vm]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VmSection {
    /// The VMM's program.
    pub vmm: PathBuf,
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// The guest's initial RAM disk.
    pub initramfs: PathBuf,
    /// Memory of a guest, MiB.
    pub memory_mib: u64,
    /// Added to a memory limit, MiB.
    pub memory_overhead_mib: u64,
    /// Virtual CPUs of a guest.
    pub vcpus: u32,
    /// More words for the kernel command line.
    pub kernel_params: String,
    /// Size of the console ring, KiB.
    pub console_ring_kib: u32,
    /// Serial console from the first instruction on.
    pub early_console: bool,
}

impl Default for VmSection {
    fn default() -> Self {
        Self {
            vmm: "/usr/libexec/caisson/caisson-vmm".into(),
            kernel: "/usr/share/caisson/vmlinux".into(),
            initramfs: "/usr/share/caisson/initramfs.cpio".into(),
            memory_mib: 256,
            memory_overhead_mib: 64,
            vcpus: 1,
            kernel_params: String::new(),
            console_ring_kib: 256,
            early_console: false,
        }
    }
}

/// `[fs]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FsSection {
    /// Request queues.
    pub queues: u16,
    /// What the guest may cache.
    pub cache: CachePolicy,
}

impl Default for FsSection {
    fn default() -> Self {
        Self {
            queues: 1,
            cache: CachePolicy::Auto,
        }
    }
}

/// `[timeouts]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TimeoutSection {
    /// Until the agent answers.
    pub boot_ms: u64,
    /// For one request.
    pub request_ms: u64,
    /// From SIGKILL until the VM is killed.
    pub kill_ms: u64,
}

impl Default for TimeoutSection {
    fn default() -> Self {
        Self {
            boot_ms: 60_000,
            request_ms: 30_000,
            kill_ms: 10_000,
        }
    }
}

impl TimeoutSection {
    /// [`Self::boot_ms`].
    pub fn boot(&self) -> Duration {
        Duration::from_millis(self.boot_ms)
    }

    /// [`Self::request_ms`].
    pub fn request(&self) -> Duration {
        Duration::from_millis(self.request_ms)
    }

    /// [`Self::kill_ms`].
    pub fn kill(&self) -> Duration {
        Duration::from_millis(self.kill_ms)
    }
}

/// `[log]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogSection {
    /// The agent's level.
    pub agent: AgentLog,
}

impl Default for LogSection {
    fn default() -> Self {
        Self {
            agent: AgentLog::Warn,
        }
    }
}

/// `log.agent`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AgentLog {
    /// Failures.
    Error,
    /// Failures and surprises.
    Warn,
    /// Every call.
    Debug,
}

impl Config {
    /// Reads the configuration: `path` and `path.d/*.toml`, or those of [`DEFAULT_PATH`], which may be missing.
    ///
    /// # Errors
    /// When a file cannot be read, has an unknown key, a wrong type, or a value out of bounds.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let main = path.unwrap_or(Path::new(DEFAULT_PATH));
        let mut merged = toml::Table::new();
        match fs::read_to_string(main) {
            Ok(text) => overlay(&mut merged, parse(main, &text)?),
            Err(error) if path.is_none() && error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => {
                let path = main.to_owned();
                return Err(ConfigError::Read { path, source });
            }
        }
        for file in drop_ins(main)? {
            let text = fs::read_to_string(&file).map_err(|source| ConfigError::Read {
                path: file.clone(),
                source,
            })?;
            overlay(&mut merged, parse(&file, &text)?);
        }
        let config: Self = merged
            .try_into()
            .map_err(|error: toml::de::Error| parse_error(main, &error))?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let bad = |key, value: &dyn ToString, bound: String| {
            let value = value.to_string();
            Err(ConfigError::Value { key, value, bound })
        };
        let vm = &self.vm;
        if vm.memory_mib < MIN_MEMORY_MIB {
            let bound = format!("at least {MIN_MEMORY_MIB} (MiB)");
            return bad("vm.memory_mib", &vm.memory_mib, bound);
        }
        if !(1..=MAX_VCPUS).contains(&vm.vcpus) {
            return bad("vm.vcpus", &vm.vcpus, format!("1 to {MAX_VCPUS}"));
        }
        if !(4..=16384).contains(&vm.console_ring_kib) {
            let bound = "4 to 16384 (KiB)".to_owned();
            return bad("vm.console_ring_kib", &vm.console_ring_kib, bound);
        }
        if !(1..=8).contains(&self.fs.queues) {
            return bad("fs.queues", &self.fs.queues, "1 to 8".to_owned());
        }
        for (key, path) in [
            ("vm.vmm", &vm.vmm),
            ("vm.kernel", &vm.kernel),
            ("vm.initramfs", &vm.initramfs),
        ] {
            if !path.is_absolute() {
                return bad(key, &path.display(), "an absolute path".to_owned());
            }
        }
        for (key, value) in [
            ("timeouts.boot_ms", self.timeouts.boot_ms),
            ("timeouts.request_ms", self.timeouts.request_ms),
            ("timeouts.kill_ms", self.timeouts.kill_ms),
        ] {
            if !(1..=86_400_000).contains(&value) {
                return bad(key, &value, "1 to 86400000 (milliseconds)".to_owned());
            }
        }
        Ok(())
    }
}

fn parse(path: &Path, text: &str) -> Result<toml::Table, ConfigError> {
    // As a whole configuration, for errors with line and key; then as what it says and no more.
    toml::from_str::<Config>(text).map_err(|error| parse_error(path, &error))?;
    text.parse().map_err(|error| parse_error(path, &error))
}

fn parse_error(path: &Path, error: &toml::de::Error) -> ConfigError {
    ConfigError::Parse {
        path: path.to_owned(),
        message: error.to_string().trim_end().to_owned(),
    }
}

fn overlay(base: &mut toml::Table, over: toml::Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(toml::Value::Table(old)), toml::Value::Table(new)) => overlay(old, new),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

fn drop_ins(main: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let mut directory = main.as_os_str().to_owned();
    directory.push(".d");
    let path = PathBuf::from(directory);
    let entries = match fs::read_dir(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.and_then(Iterator::collect::<io::Result<Vec<_>>>),
    }
    .map_err(|source| ConfigError::Read { path, source })?;
    let mut files: Vec<_> = entries.iter().map(fs::DirEntry::path).collect();
    files.retain(|file| file.extension().is_some_and(|e| e == "toml"));
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(main: &str, drop_ins: &[(&str, &str)]) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        fs::write(&path, main).unwrap();
        fs::create_dir(dir.path().join("config.toml.d")).unwrap();
        for (name, text) in drop_ins {
            fs::write(dir.path().join("config.toml.d").join(name), text).unwrap();
        }
        Config::load(Some(&path)).map_err(|error| error.to_string())
    }

    #[test]
    fn the_shipped_file_names_every_key_with_its_default() {
        let shipped: toml::Table = DEFAULT_FILE.parse().unwrap();
        let defaults = toml::Table::try_from(Config::default()).unwrap();
        assert_eq!(shipped, defaults);
        assert_eq!(load(DEFAULT_FILE, &[]).unwrap(), Config::default());
        for line in DEFAULT_FILE.lines().filter(|line| line.contains(" = ")) {
            let before = DEFAULT_FILE.split(line).next().unwrap();
            let previous = before.lines().last().unwrap_or("");
            assert!(previous.starts_with('#'), "{line:?} has no comment");
        }
    }

    #[test]
    fn drop_ins_replace_single_keys_in_the_order_of_their_names() {
        let config = load(
            "[vm]\nmemory_mib = 100\nvcpus = 2\n",
            &[
                ("20.toml", "[vm]\nmemory_mib = 300\n"),
                ("10.toml", "[vm]\nmemory_mib = 200\n[fs]\nqueues = 4\n"),
                ("30.txt", "nonsense"),
            ],
        )
        .unwrap();
        assert_eq!(config.vm.memory_mib, 300);
        assert_eq!(config.vm.vcpus, 2);
        assert_eq!(config.fs.queues, 4);
    }

    #[test]
    fn unknown_keys_are_refused_by_name_with_file_and_line() {
        let error = load("", &[("a.toml", "[vm]\nvcpus = 1\nvcpsu = 2\n")]).unwrap_err();
        assert!(error.contains("a.toml"), "{error}");
        assert!(error.contains("line 3"), "{error}");
        assert!(error.contains("vcpsu"), "{error}");
        assert!(load("[vmm]\n", &[]).unwrap_err().contains("vmm"));
        assert!(
            load("[vm]\nvcpus = \"two\"\n", &[])
                .unwrap_err()
                .contains("line 2")
        );
    }

    #[test]
    fn values_out_of_bounds_are_refused_by_name() {
        for (text, key) in [
            ("[vm]\nmemory_mib = 1", "vm.memory_mib is 1"),
            ("[vm]\nvcpus = 0", "vm.vcpus is 0"),
            ("[vm]\nvcpus = 33", "vm.vcpus is 33"),
            ("[vm]\nkernel = \"x\"", "vm.kernel is x"),
            ("[fs]\nqueues = 9", "fs.queues is 9"),
            ("[timeouts]\nboot_ms = 0", "timeouts.boot_ms is 0"),
        ] {
            let error = load(text, &[]).unwrap_err();
            assert!(error.contains(key), "{error}");
        }
    }

    #[test]
    fn a_named_file_must_exist() {
        let error = Config::load(Some(Path::new("/nonexistent.toml"))).unwrap_err();
        assert!(error.to_string().contains("/nonexistent.toml"));
    }
}
