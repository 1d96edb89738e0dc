// SPDX-License-Identifier: Apache-2.0

//! The file or block device behind a disk.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::{FcntlArg, fcntl};

use super::request::Geometry;
use super::{BlkError, SECTOR_LEN};

/// An opened and locked raw image.
#[derive(Debug)]
pub struct Disk {
    file: File,
    sectors: u64,
    read_only: bool,
}

impl Disk {
    /// Opens `path` and locks it: for itself to write, together with other readers to read.
    ///
    /// The lock (fcntl F_OFD_SETLK, advisory) lasts as long as the disk. What is beyond the last whole sector
    /// is not part of the disk.
    ///
    /// # Errors
    /// When it cannot be opened, is in use, or is neither file nor block device.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, BlkError> {
        let failed = |source| BlkError::Open {
            path: path.to_owned(),
            source,
        };
        // O_NONBLOCK: a FIFO is to be refused, not waited for.
        let mut file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(BlkError::Kind {
                path: path.to_owned(),
            });
        }
        let kind = if read_only {
            libc::F_RDLCK
        } else {
            libc::F_WRLCK
        };
        lock(&file, kind).map_err(|source| BlkError::Locked {
            path: path.to_owned(),
            source,
        })?;
        let sectors = file.seek(SeekFrom::End(0)).map_err(failed)? / SECTOR_LEN;
        if sectors == 0 {
            return Err(BlkError::Empty {
                path: path.to_owned(),
            });
        }
        Ok(Self {
            file,
            sectors,
            read_only,
        })
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Size in sectors.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Opened for reading alone.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    pub(super) fn geometry(&self) -> Geometry {
        Geometry {
            sectors: self.sectors,
            read_only: self.read_only,
        }
    }
}

impl Drop for Disk {
    /// The kernel takes apart an io_uring, which holds the file, in its own time; the lock is not to wait for it.
    fn drop(&mut self) {
        if let Err(error) = lock(&self.file, libc::F_UNLCK) {
            log::warn!("blk: failed to unlock the image: {error}");
        }
    }
}

/// Puts a lock of `kind` (`F_RDLCK`, `F_WRLCK`, `F_UNLCK`) on all of the file.
fn lock(file: &File, kind: i32) -> std::io::Result<()> {
    let lock = libc::flock {
        l_type: libc::c_short::try_from(kind).map_err(std::io::Error::other)?,
        l_whence: 0,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok(()),
        // Some network file systems have no locks.
        Err(nix::Error::ENOLCK | nix::Error::EOPNOTSUPP | nix::Error::ENOSYS) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(len: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        file
    }

    #[test]
    fn a_disk_is_whole_sectors() {
        let file = image(3 * 512 + 511);
        assert_eq!(Disk::open(file.path(), true).unwrap().sectors(), 3);
        let small = image(511);
        assert!(matches!(
            Disk::open(small.path(), true),
            Err(BlkError::Empty { .. })
        ));
    }

    #[test]
    fn one_writer_or_many_readers() {
        let file = image(512);
        let reader = Disk::open(file.path(), true).unwrap();
        let another = Disk::open(file.path(), true).unwrap();
        assert!(matches!(
            Disk::open(file.path(), false),
            Err(BlkError::Locked { .. })
        ));
        drop((reader, another));
        let _writer = Disk::open(file.path(), false).unwrap();
        for read_only in [true, false] {
            assert!(matches!(
                Disk::open(file.path(), read_only),
                Err(BlkError::Locked { .. })
            ));
        }
    }

    #[test]
    fn only_files_and_block_devices_are_disks() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [&fifo, Path::new("/dev/null"), directory.path()] {
            assert!(matches!(Disk::open(path, true), Err(BlkError::Kind { .. })));
        }
        assert!(matches!(
            Disk::open(&directory.path().join("missing"), true),
            Err(BlkError::Open { .. })
        ));
    }

    #[test]
    fn a_read_only_disk_cannot_be_written_through() {
        use std::os::unix::fs::FileExt;
        let file = image(512);
        let disk = Disk::open(file.path(), true).unwrap();
        assert!(disk.file().write_at(b"x", 0).is_err());
    }
}
