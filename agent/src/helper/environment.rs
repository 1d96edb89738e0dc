// SPDX-License-Identifier: Apache-2.0

//! The environment of a container's process: as configured, with the `HOME` that the user has in the
//! container's own `/etc/passwd`.
//!
//! libcontainer would ask libc for it, and libc whatever the container's `nsswitch.conf` names: with
//! libraries out of the container's root, in a process that still has descriptors of ours. So libcontainer
//! is given a `HOME` ([`reserve_home`]), which the process never sees.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::OpenOptionsExt;

use oci_spec::runtime::Spec;

/// Where users have their home directories.
const PASSWD: &str = "/etc/passwd";
/// How much of it is read, bytes.
const MAX_PASSWD: u64 = 16 << 20;
/// Home of a user who has none, as runc has it.
const NO_HOME: &str = "/";
const HOME: &str = "HOME=";

/// The configured environment. The specification gets one that names a home, so that libcontainer looks for
/// none.
pub(crate) fn reserve_home(spec: &mut Spec) -> Vec<String> {
    let Some(process) = spec.process_mut() else {
        return Vec::new();
    };
    let configured = process.env().clone().unwrap_or_default();
    let mut reserved = configured.clone();
    reserved.push(format!("{HOME}{NO_HOME}"));
    process.set_env(Some(reserved));
    configured
}

/// The environment in the order of the configuration, the last of equal names winning. A home that is
/// missing or empty is what `home` says.
pub(crate) fn complete(configured: &[String], home: impl FnOnce() -> Vec<u8>) -> Vec<Vec<u8>> {
    let mut seen = HashSet::new();
    let last = configured.iter().rev();
    let last = last.filter(|entry| seen.insert(entry.split('=').next().unwrap_or_default()));
    let mut entries: Vec<Vec<u8>> = last
        .filter(|entry| entry.as_str() != HOME)
        .map(|entry| entry.as_bytes().to_vec())
        .collect();
    entries.reverse();
    if !entries
        .iter()
        .any(|entry| entry.starts_with(HOME.as_bytes()))
    {
        entries.push([HOME.as_bytes(), &home()].concat());
    }
    entries
}

/// The home directory of user `uid` in the root that this process is in.
pub(crate) fn home(uid: u32) -> Vec<u8> {
    // What is there instead of a file must neither keep us nor become our terminal.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = File::options().read(true).custom_flags(flags).open(PASSWD);
    let found = file.ok().and_then(|file| home_in(file, uid));
    found.unwrap_or_else(|| NO_HOME.into())
}

/// Sixth field of the first line whose third is `uid` (passwd(5)).
fn home_in(passwd: impl Read, uid: u32) -> Option<Vec<u8>> {
    let lines = BufReader::new(passwd.take(MAX_PASSWD)).split(b'\n');
    let uid = uid.to_string();
    for line in lines.map_while(Result::ok) {
        let mut fields = line.split(|byte| *byte == b':');
        if fields.nth(2) == Some(uid.as_bytes()) {
            let home = fields.nth(2).filter(|home| !home.is_empty());
            return home.filter(|home| !home.contains(&0)).map(Vec::from);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn completed(configured: &[&str], home: &str) -> Vec<String> {
        let configured: Vec<_> = configured.iter().map(ToString::to_string).collect();
        let entries = complete(&configured, || home.into()).into_iter();
        entries.map(|e| String::from_utf8(e).unwrap()).collect()
    }

    #[test]
    fn the_environment_keeps_its_order_and_gains_a_home() {
        let merged = completed(&["B=1", "A=2", "B=3"], "/root");
        assert_eq!(merged, ["A=2", "B=3", "HOME=/root"]);
        assert_eq!(completed(&["HOME=", "A=1"], "/h"), ["A=1", "HOME=/h"]);
        assert_eq!(completed(&["HOME=/x", "HOME="], "/h"), ["HOME=/h"]);
    }

    #[test]
    fn a_home_that_is_configured_is_not_looked_up() {
        let configured = ["HOMER=1".to_owned(), "HOME=/x".to_owned()];
        let entries = complete(&configured, || unreachable!());
        assert_eq!(entries, [b"HOMER=1".to_vec(), b"HOME=/x".to_vec()]);
    }

    #[test]
    fn libcontainer_has_a_home_and_the_configuration_is_kept() {
        for configured in [r#""env": ["A=1", "HOME="],"#, ""] {
            let json = format!(
                r#"{{"ociVersion": "1.0.2", "process": {{"cwd": "/", {configured}
                    "user": {{"uid": 5, "gid": 6}}, "args": ["sh"]}}}}"#
            );
            let mut spec: Spec = serde_json::from_str(&json).unwrap();
            let before = spec.process().as_ref().unwrap().env().clone();
            assert_eq!(reserve_home(&mut spec), before.unwrap_or_default());
            let process = spec.process().as_ref().unwrap();
            let told = process.env().as_ref().unwrap();
            assert_eq!(told.last().unwrap(), "HOME=/");
        }
    }

    #[test]
    fn a_home_is_that_of_the_first_line_with_the_uid() {
        let passwd = "# 7:\nx:x:70:7:::\na:x:7:1:A:/home/a:/bin/sh\nb:x:7:1::/home/b:/bin/sh\nc:x:8:::\n9\nd:x:10:::/\0:";
        let find =
            |uid| home_in(passwd.as_bytes(), uid).map(|home| String::from_utf8(home).unwrap());
        assert_eq!(find(7).as_deref(), Some("/home/a"));
        assert_eq!(find(8), None);
        assert_eq!(find(9), None);
        assert_eq!(find(10), None);
        assert_eq!(home(u32::MAX - 7), b"/");
    }

    #[test]
    fn an_endless_line_ends() {
        assert_eq!(home_in(std::io::repeat(b':'), 0), None);
    }
}
