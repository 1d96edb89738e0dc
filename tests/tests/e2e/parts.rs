// SPDX-License-Identifier: Apache-2.0

//! Other parts than the installed ones: configurations, programs, initramfs archives.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use caisson_testbed::installed::{config_with, path_of};

/// The installed configuration with changes.
pub(crate) struct Config {
    file: PathBuf,
    _dir: tempfile::TempDir,
}

impl Config {
    /// With a drop-in that holds `changes`.
    pub(crate) fn with(changes: &str) -> Self {
        let dir = tempfile::TempDir::new().unwrap();
        let file = config_with(dir.path(), "config", changes).unwrap();
        Self { file, _dir: dir }
    }

    /// And with another drop-in.
    pub(crate) fn add(&self, changes: &str) {
        let drop_in = format!("{}.d/60-more.toml", self.file());
        fs::write(drop_in, changes).unwrap();
    }

    /// Its path, for `--config`.
    pub(crate) fn file(&self) -> String {
        self.file.to_str().unwrap().to_owned()
    }
}

/// A static program made of C.
pub(crate) fn compiled(source: &str) -> Vec<u8> {
    let dir = tempfile::TempDir::new().unwrap();
    let (code, program) = (dir.path().join("main.c"), dir.path().join("main"));
    fs::write(&code, source).unwrap();
    let built = Command::new("gcc")
        .args(["-static", "-O1", "-o"])
        .args([&program, &code])
        .status()
        .unwrap();
    assert!(built.success());
    fs::read(&program).unwrap()
}

/// One entry of a cpio archive in the newc format (Documentation/driver-api/early-userspace/buffer-format.rst).
pub(crate) fn newc(name: &str, mode: u32, data: &[u8]) -> Vec<u8> {
    let size = u32::try_from(data.len()).unwrap();
    let fields = [1, mode, 0, 0, 1, 0, size, 0, 0, 0, 0];
    let mut entry = String::from("070701");
    for field in fields {
        entry.push_str(&format!("{field:08x}"));
    }
    entry.push_str(&format!("{:08x}{:08x}{name}\0", name.len() + 1, 0));
    let mut entry = entry.into_bytes();
    entry.resize(entry.len().next_multiple_of(4), 0);
    entry.extend_from_slice(data);
    entry.resize(entry.len().next_multiple_of(4), 0);
    entry
}

/// The installed initramfs with another program as PID 1; the agent is `/real`, and is what PID 1 is to become.
pub(crate) fn initramfs_with_init(program: &[u8]) -> Vec<u8> {
    let mut archive = fs::read(path_of("initramfs").unwrap()).unwrap();
    let mut at = 0;
    loop {
        let field = |index: usize| {
            let start = at + 6 + 8 * index;
            let text = std::str::from_utf8(&archive[start..start + 8]).unwrap();
            usize::from_str_radix(text, 16).unwrap()
        };
        let (size, name_size) = (field(6), field(11));
        let name = at + 110..at + 110 + name_size;
        if &archive[name.clone()] == b"init\0" {
            archive[name].copy_from_slice(b"real\0");
            break;
        }
        at = name.end.next_multiple_of(4) + size.next_multiple_of(4);
    }
    // The kernel unpacks one archive after another.
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(newc("init", 0o100_755, program));
    archive.extend(newc("TRAILER!!!", 0, b""));
    archive
}
