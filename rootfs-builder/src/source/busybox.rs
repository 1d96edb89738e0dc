// SPDX-License-Identifier: Apache-2.0

//! A root file system of one program: busybox, with a link for each of its applets.
//!
//! In: a static busybox. Out: `/bin` with the links (`/sbin`, `/usr/bin` and `/usr/sbin` lead there),
//! a handful of files in `/etc`, and the usual empty directories. Everything here is our own or the
//! host's; nothing of it is hostile, so plain paths serve.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::executable::{ExecutableError, read_static_executable};

/// Where Debian's busybox-static and others put it.
const USUAL_PLACES: &[&str] = &["/bin/busybox", "/usr/bin/busybox", "/sbin/busybox"];

/// Most applets accepted from `busybox --list` (there are about 400).
const MAX_APPLETS: usize = 2_000;

const DIRECTORIES: &[(&str, u32)] = &[
    ("bin", 0o755),
    ("dev", 0o755),
    ("etc", 0o755),
    ("home", 0o755),
    ("mnt", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("usr", 0o755),
    ("usr/lib", 0o755),
    ("var", 0o755),
    ("var/log", 0o755),
    ("var/tmp", 0o1777),
];

const LINKS: &[(&str, &str)] = &[
    ("sbin", "bin"),
    ("usr/bin", "../bin"),
    ("usr/sbin", "../bin"),
    ("lib", "usr/lib"),
    ("var/run", "../run"),
    ("etc/mtab", "../proc/self/mounts"),
];

const FILES: &[(&str, &str)] = &[
    (
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\n\
         daemon:x:1:1:daemon:/:/bin/false\n\
         nobody:x:65534:65534:nobody:/:/bin/false\n",
    ),
    (
        "etc/group",
        "root:x:0:\ndaemon:x:1:\ntty:x:5:\nnogroup:x:65534:\n",
    ),
    ("etc/hosts", "127.0.0.1\tlocalhost\n::1\tlocalhost\n"),
    ("etc/hostname", "caisson\n"),
    ("etc/resolv.conf", ""),
    (
        "etc/nsswitch.conf",
        "passwd: files\ngroup: files\nhosts: files dns\n",
    ),
    ("etc/shells", "/bin/sh\n"),
];

/// Why no busybox root could be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BusyboxError {
    /// There is no busybox where it usually is.
    #[error("no busybox at {}; install the package busybox-static or name one by --busybox PATH", USUAL_PLACES.join(", "))]
    NotFound,
    /// It needs libraries, or is no program.
    #[error("this busybox cannot be used (Debian's static one is in the package busybox-static)")]
    Program(#[source] ExecutableError),
    /// `busybox --list` could not be run.
    #[error("failed to run {path} --list")]
    List {
        /// The busybox.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// `busybox --list` failed or printed something else than names.
    #[error("{path} --list did not print a list of applets ({what})")]
    BadList {
        /// The busybox.
        path: PathBuf,
        /// What it did.
        what: String,
    },
    /// A file of the root could not be made.
    #[error("failed to create {path}")]
    Create {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The first busybox found where it usually is.
///
/// # Errors
/// [`BusyboxError::NotFound`] when there is none.
pub fn find() -> Result<PathBuf, BusyboxError> {
    USUAL_PLACES
        .iter()
        .map(PathBuf::from)
        .find(|path| path.is_file())
        .ok_or(BusyboxError::NotFound)
}

/// Fills the empty directory `root` with a system around the busybox at `binary`.
///
/// # Errors
/// Any [`BusyboxError`]; `root` may then be half full.
pub fn populate(binary: &Path, root: &Path) -> Result<(), BusyboxError> {
    let program = read_static_executable(binary).map_err(BusyboxError::Program)?;
    let applets = list_applets(binary)?;
    for &(path, mode) in DIRECTORIES {
        let path = root.join(path);
        create(&path, |path| {
            fs::create_dir(path)?;
            fs::set_permissions(path, Permissions::from_mode(mode))
        })?;
    }
    for &(path, target) in LINKS {
        create(&root.join(path), |path| symlink(target, path))?;
    }
    for &(path, text) in FILES {
        create(&root.join(path), |path| {
            fs::write(path, text)?;
            fs::set_permissions(path, Permissions::from_mode(0o644))
        })?;
    }
    create(&root.join("bin/busybox"), |path| {
        fs::write(path, program)?;
        fs::set_permissions(path, Permissions::from_mode(0o755))
    })?;
    for applet in applets.iter().filter(|applet| *applet != "busybox") {
        create(&root.join("bin").join(applet), |path| {
            symlink("busybox", path)
        })?;
    }
    create(root, |path| {
        fs::set_permissions(path, Permissions::from_mode(0o755))
    })
}

fn create(path: &Path, make: impl FnOnce(&Path) -> io::Result<()>) -> Result<(), BusyboxError> {
    make(path).map_err(|source| BusyboxError::Create {
        path: path.to_path_buf(),
        source,
    })
}

fn list_applets(binary: &Path) -> Result<Vec<String>, BusyboxError> {
    let output = Command::new(binary)
        .arg("--list")
        .env_clear()
        .output()
        .map_err(|source| BusyboxError::List {
            path: binary.to_path_buf(),
            source,
        })?;
    let bad = |what: String| BusyboxError::BadList {
        path: binary.to_path_buf(),
        what,
    };
    if !output.status.success() {
        return Err(bad(format!("{}", output.status)));
    }
    parse_applets(&output.stdout).map_err(bad)
}

/// The names in `list`, one a line, each fit to be a file name in `/bin`.
fn parse_applets(list: &[u8]) -> Result<Vec<String>, String> {
    let text = std::str::from_utf8(list).map_err(|_| "it is not text".to_owned())?;
    let mut applets: Vec<String> = text.lines().map(str::to_owned).collect();
    applets.sort();
    applets.dedup();
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"[-_.+".contains(&byte);
    let sound = |name: &String| {
        !name.is_empty() && name != "." && name != ".." && name.bytes().all(allowed)
    };
    if let Some(odd) = applets.iter().find(|name| !sound(name)) {
        return Err(format!("{odd:?} is no name of an applet"));
    }
    if !applets.iter().any(|name| name == "sh") {
        return Err("there is no sh in it".to_owned());
    }
    if applets.len() > MAX_APPLETS {
        return Err(format!("{} lines", applets.len()));
    }
    Ok(applets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_with_a_path_in_it_is_refused() {
        for bad in [
            "sh\n../x\n",
            "sh\na/b\n",
            "sh\n..\n",
            "sh\n\nls\n",
            "sh\na b\n",
            "ls\n",
            "",
        ] {
            assert!(
                parse_applets(bad.as_bytes()).is_err(),
                "{bad:?} was accepted"
            );
        }
        assert_eq!(parse_applets(b"[[\nsh\n[\n").unwrap(), ["[", "[[", "sh"]);
    }

    #[test]
    fn every_applet_leads_to_busybox_from_every_directory_of_the_path() {
        let Ok(binary) = find() else {
            eprintln!("skipped: no busybox on this machine (package busybox-static)");
            return;
        };
        let root = tempfile::tempdir().unwrap();
        populate(&binary, root.path()).unwrap();
        let busybox = fs::canonicalize(root.path().join("bin/busybox")).unwrap();
        for path in ["bin/sh", "sbin/ls", "usr/bin/env", "usr/sbin/ip"] {
            assert_eq!(
                fs::canonicalize(root.path().join(path)).unwrap(),
                busybox,
                "{path}"
            );
        }
        assert_eq!(fs::read(&busybox).unwrap(), fs::read(&binary).unwrap());
        let mode = |path: &str| {
            fs::metadata(root.path().join(path))
                .unwrap()
                .permissions()
                .mode()
                & 0o7777
        };
        assert_eq!(mode("tmp"), 0o1777);
        assert_eq!(mode("root"), 0o700);
        assert_eq!(mode("bin/busybox"), 0o755);
        assert!(
            fs::read_to_string(root.path().join("etc/passwd"))
                .unwrap()
                .contains("root:x:0:0")
        );
    }

    #[test]
    fn dynamic_busybox_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let dynamic = std::env::current_exe().unwrap();
        if cfg!(not(target_feature = "crt-static")) {
            let error = populate(&dynamic, root.path()).unwrap_err();
            assert!(matches!(
                error,
                BusyboxError::Program(ExecutableError::Dynamic { .. })
            ));
        }
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }
}
