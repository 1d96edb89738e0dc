// SPDX-License-Identifier: Apache-2.0

//! The testbed's own initramfs: a newc archive that holds `/init` and the directories that it mounts on.
//!
//! Format: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel.

use std::io;

/// Appends one entry; `data` is empty for directories and devices.
fn entry(
    archive: &mut Vec<u8>,
    inode: u32,
    name: &str,
    mode: u32,
    rdev: (u32, u32),
    data: &[u8],
) -> io::Result<()> {
    let too_long = |_| io::Error::from(io::ErrorKind::FileTooLarge);
    let size = u32::try_from(data.len()).map_err(too_long)?;
    let name_size = u32::try_from(name.len())
        .map_err(too_long)?
        .saturating_add(1);
    archive.extend_from_slice(b"070701");
    // inode, mode, uid, gid, links, mtime, size, device (2), rdev (2), name's size, checksum
    for field in [
        inode, mode, 0, 0, 1, 0, size, 0, 0, rdev.0, rdev.1, name_size, 0,
    ] {
        archive.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    pad(archive);
    archive.extend_from_slice(data);
    pad(archive);
    Ok(())
}

/// Names and data both end at a multiple of four bytes.
fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}

/// An initramfs whose `/init` has the bytes `init`, with the directories `directories` (no leading slash,
/// parents first) and `/dev/console`.
///
/// # Errors
/// If `init` is 4 GiB or longer.
pub(crate) fn initramfs(init: &[u8], directories: &[&str]) -> io::Result<Vec<u8>> {
    let mut archive = Vec::with_capacity(init.len().saturating_add(4096));
    let mut inode = 1;
    for directory in directories {
        entry(&mut archive, inode, directory, 0o040_755, (0, 0), &[])?;
        inode += 1;
    }
    entry(&mut archive, inode, "dev/console", 0o020_600, (5, 1), &[])?;
    entry(&mut archive, inode + 1, "init", 0o100_755, (0, 0), init)?;
    entry(&mut archive, 0, "TRAILER!!!", 0, (0, 0), &[])?;
    Ok(archive)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    #[test]
    fn gnu_cpio_lists_what_was_put_in() {
        let archive = initramfs(b"#!/bin/sh\n", &["dev", "lower"]).unwrap();
        let cpio = Command::new("cpio")
            .args(["--list", "--verbose", "--numeric-uid-gid"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let mut cpio = match cpio {
            Ok(cpio) => cpio,
            Err(error) => panic!("cpio is needed for this test (apt-get install cpio): {error}"),
        };
        cpio.stdin.take().unwrap().write_all(&archive).unwrap();
        let output = cpio.wait_with_output().unwrap();
        let list = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<Vec<&str>> = list
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        let found: Vec<(&str, &str)> = lines
            .iter()
            .map(|words| (words[0], words[words.len() - 1]))
            .collect();
        assert_eq!(
            found,
            [
                ("drwxr-xr-x", "dev"),
                ("drwxr-xr-x", "lower"),
                ("crw-------", "dev/console"),
                ("-rwxr-xr-x", "init")
            ]
        );
        assert_eq!(lines[3][4], "10", "size of init in {list}");
        assert!(output.status.success());
    }
}
