// SPDX-License-Identifier: Apache-2.0

//! A directory tree that nothing gets out of.
//!
//! Paths from archives are resolved by the kernel inside the tree (`openat2` with `RESOLVE_IN_ROOT`):
//! absolute links and `..` lead back into it, links of `/proc` are refused. Everything is then done to
//! one name in an open directory, and a name is never followed if it is a link.
//!
//! The tree is private to this process while it is filled (its parent has mode 0700), so what was just
//! made is still what the name stands for.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps,
    XattrFlags, fchmod, fchown, fstat, futimens, openat, openat2, setxattr, statat, unlinkat,
};
use rustix::fs::{chmodat, chownat, mkdirat, mknodat, symlinkat, utimensat};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};

use crate::layer::entry::Xattr;

/// How often the kernel may ask to try again because something was renamed meanwhile.
const MAX_ATTEMPTS: u32 = 64;

/// Something that could not be done to a file of the tree.
#[derive(Debug, thiserror::Error)]
#[error("failed to {operation}{}", hint(operation, *source))]
pub struct FileError {
    /// What was tried.
    pub operation: &'static str,
    /// What the system said.
    pub source: Errno,
}

fn hint(operation: &'static str, source: Errno) -> &'static str {
    match (operation, source) {
        ("set its owner" | "create the device", Errno::PERM) => " (this needs root)",
        ("set its extended attribute", Errno::OPNOTSUPP) => {
            " (the file system of the output has no such attributes)"
        }
        _ => "",
    }
}

/// Adds the operation to a system error.
pub(crate) fn failed(operation: &'static str) -> impl FnOnce(Errno) -> FileError {
    move |source| FileError { operation, source }
}

/// Owner, mode, times and attributes of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attributes {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Permission bits (12).
    pub(crate) mode: u32,
    pub(crate) accessed: Timespec,
    pub(crate) modified: Timespec,
    pub(crate) xattrs: Vec<Xattr>,
}

impl Attributes {
    pub(crate) fn times(&self) -> Timestamps {
        Timestamps {
            last_access: self.accessed,
            last_modification: self.modified,
        }
    }
}

/// The tree, held by its root.
#[derive(Debug)]
pub(crate) struct ConfinedRoot {
    root: OwnedFd,
}

impl ConfinedRoot {
    /// The tree below the directory at `path`, which is the caller's own (links in it are followed).
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            root: openat(CWD, path, flags, Mode::empty())?,
        })
    }

    /// The handle on the root itself.
    pub(crate) fn into_handle(self) -> OwnedFd {
        self.root
    }

    /// The directory at `path` (components, relative to the root), as a handle for work on names in it.
    pub(crate) fn directory(&self, path: &[&[u8]]) -> Result<OwnedFd, Errno> {
        self.resolve(path, OFlags::PATH | OFlags::DIRECTORY)
    }

    /// The directory at `path`, readable.
    pub(crate) fn readable_directory(&self, path: &[&[u8]]) -> Result<OwnedFd, Errno> {
        self.resolve(path, OFlags::RDONLY | OFlags::DIRECTORY)
    }

    /// The regular file at `path`, to read. Links are followed inside the tree; a fifo does not block.
    pub(crate) fn open_file(&self, path: &[&[u8]]) -> io::Result<File> {
        let file =
            File::from(self.resolve(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file",
            ));
        }
        Ok(file)
    }

    fn resolve(&self, path: &[&[u8]], flags: OFlags) -> Result<OwnedFd, Errno> {
        let joined = if path.is_empty() {
            b".".to_vec()
        } else {
            path.join(&b'/')
        };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        let flags = flags | OFlags::CLOEXEC;
        let mut attempts = 0;
        loop {
            match openat2(&self.root, joined.as_slice(), flags, Mode::empty(), resolve) {
                Err(Errno::AGAIN | Errno::INTR) if attempts < MAX_ATTEMPTS => attempts += 1,
                result => return result,
            }
        }
    }
}

/// What `name` in `directory` is, a link itself and not what it leads to; `None` if there is no such name.
pub(crate) fn stat_name(directory: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Stat>, FileError> {
    match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(source) => Err(FileError {
            operation: "look at it",
            source,
        }),
    }
}

/// The type in a stat's mode.
pub(crate) fn type_of(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// The names in `directory`, but for itself and its parent.
pub(crate) fn names_in(directory: BorrowedFd<'_>) -> Result<Vec<Vec<u8>>, FileError> {
    let read_error = || failed("read the directory");
    let mut names = Vec::new();
    for entry in Dir::read_from(directory).map_err(read_error())? {
        let entry = entry.map_err(read_error())?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    Ok(names)
}

/// Opens the directory `name` in `directory` to read it; fails if it is anything else.
pub(crate) fn open_directory(directory: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, FileError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(directory, name, flags, Mode::empty()).map_err(failed("open the directory"))
}

/// Removes `name` from `directory`, with all it holds; nothing to do if there is no such name.
///
/// Goes as deep as the tree does; callers keep trees shallow (`Limits::max_depth`).
pub(crate) fn remove_tree(directory: BorrowedFd<'_>, name: &[u8]) -> Result<(), FileError> {
    match unlinkat(directory, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(source) => {
            return Err(FileError {
                operation: "remove it",
                source,
            });
        }
    }
    let inside = open_directory(directory, name)?;
    for child in names_in(inside.as_fd())? {
        remove_tree(inside.as_fd(), &child)?;
    }
    unlinkat(directory, name, AtFlags::REMOVEDIR).map_err(failed("remove the directory"))
}

/// Makes the regular file `name`, which must not exist, to write to. Its mode is 0600 so far.
pub(crate) fn create_file(directory: BorrowedFd<'_>, name: &[u8]) -> Result<File, FileError> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(directory, name, flags, Mode::RUSR | Mode::WUSR)
        .map(File::from)
        .map_err(failed("create the file"))
}

/// Makes the directory `name`, which must not exist. Its mode is 0700 so far.
pub(crate) fn create_directory(directory: BorrowedFd<'_>, name: &[u8]) -> Result<(), FileError> {
    mkdirat(directory, name, Mode::RWXU).map_err(failed("create the directory"))
}

/// Makes the symbolic link `name`, which must not exist.
pub(crate) fn create_symlink(
    directory: BorrowedFd<'_>,
    name: &[u8],
    target: &[u8],
) -> Result<(), FileError> {
    symlinkat(target, directory, name).map_err(failed("create the symbolic link"))
}

/// Makes the fifo, socket or device `name`, which must not exist. Its mode is 0600 so far.
pub(crate) fn create_special(
    directory: BorrowedFd<'_>,
    name: &[u8],
    kind: FileType,
    device: u64,
) -> Result<(), FileError> {
    mknodat(directory, name, kind, Mode::RUSR | Mode::WUSR, device)
        .map_err(failed("create the device"))
}

/// Gives an open file or directory its owner, mode, attributes and times.
///
/// The order matters: a change of owner drops set-user-ID bits and capabilities.
pub(crate) fn set_attributes(
    file: BorrowedFd<'_>,
    attributes: &Attributes,
) -> Result<(), FileError> {
    let stat = fstat(file).map_err(failed("look at it"))?;
    if (stat.st_uid, stat.st_gid) != (attributes.uid, attributes.gid) {
        fchown(
            file,
            Some(Uid::from_raw(attributes.uid)),
            Some(Gid::from_raw(attributes.gid)),
        )
        .map_err(failed("set its owner"))?;
    }
    fchmod(file, Mode::from_raw_mode(attributes.mode)).map_err(failed("set its mode"))?;
    for (name, value) in &attributes.xattrs {
        rustix::fs::fsetxattr(file, name.as_slice(), value, XattrFlags::empty())
            .map_err(failed("set its extended attribute"))?;
    }
    futimens(file, &attributes.times()).map_err(failed("set its times"))
}

/// Gives `name` in `directory`, a link, fifo, socket or device just made, its owner, mode, attributes
/// and times without opening it.
pub(crate) fn set_attributes_by_name(
    directory: BorrowedFd<'_>,
    name: &[u8],
    kind: FileType,
    attributes: &Attributes,
) -> Result<(), FileError> {
    let nofollow = AtFlags::SYMLINK_NOFOLLOW;
    let stat = statat(directory, name, nofollow).map_err(failed("look at it"))?;
    if (stat.st_uid, stat.st_gid) != (attributes.uid, attributes.gid) {
        let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
        chownat(directory, name, Some(uid), Some(gid), nofollow)
            .map_err(failed("set its owner"))?;
    }
    if kind != FileType::Symlink {
        // Not a link, so there is nothing to follow.
        chmodat(
            directory,
            name,
            Mode::from_raw_mode(attributes.mode),
            AtFlags::empty(),
        )
        .map_err(failed("set its mode"))?;
    }
    if !attributes.xattrs.is_empty() {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let handle = openat(directory, name, flags, Mode::empty()).map_err(failed("open it"))?;
        // The way to a handle that is not open for reading; it ends at the file, link or not.
        let path = format!("/proc/self/fd/{}", handle.as_raw_fd());
        for (name, value) in &attributes.xattrs {
            setxattr(path.as_str(), name.as_slice(), value, XattrFlags::empty())
                .map_err(failed("set its extended attribute"))?;
        }
    }
    utimensat(directory, name, &attributes.times(), nofollow).map_err(failed("set its times"))
}

/// Components of a host path below a [`ConfinedRoot`]; anything but plain names is left out.
pub(crate) fn components_of(path: &Path) -> Vec<&[u8]> {
    path.components()
        .filter_map(|component| match component {
            std::path::Component::Normal(part) => Some(OsStr::as_bytes(part)),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn tree() -> (tempfile::TempDir, ConfinedRoot) {
        let place = tempfile::tempdir().unwrap();
        fs::create_dir(place.path().join("root")).unwrap();
        fs::create_dir(place.path().join("root/real")).unwrap();
        fs::write(place.path().join("secret"), "host").unwrap();
        let root = ConfinedRoot::open(&place.path().join("root")).unwrap();
        (place, root)
    }

    #[test]
    fn links_are_resolved_inside_the_tree() {
        let (place, root) = tree();
        let inside = place.path().join("root");
        symlink("/real", inside.join("absolute")).unwrap();
        symlink("../../../../real", inside.join("climbing")).unwrap();
        let real = fstat(root.directory(&[b"real"]).unwrap()).unwrap().st_ino;
        for link in [&b"absolute"[..], b"climbing"] {
            assert_eq!(
                fstat(root.directory(&[link]).unwrap()).unwrap().st_ino,
                real
            );
        }
        symlink("/", inside.join("top")).unwrap();
        assert_eq!(
            fstat(root.directory(&[b"top"]).unwrap()).unwrap().st_ino,
            fstat(root.directory(&[]).unwrap()).unwrap().st_ino
        );
    }

    #[test]
    fn host_file_cannot_be_read_through_a_link() {
        let (place, root) = tree();
        let secret = place.path().join("secret");
        symlink(&secret, place.path().join("root/a")).unwrap();
        symlink("../secret", place.path().join("root/b")).unwrap();
        symlink("/proc/self/root/etc/passwd", place.path().join("root/c")).unwrap();
        for link in [&b"a"[..], b"b", b"c"] {
            assert!(root.open_file(&[link]).is_err());
        }
    }

    #[test]
    fn reading_a_fifo_is_refused_and_does_not_block() {
        let (_place, root) = tree();
        let directory = root.directory(&[]).unwrap();
        create_special(directory.as_fd(), b"pipe", FileType::Fifo, 0).unwrap();
        assert_eq!(
            root.open_file(&[b"pipe"]).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }

    #[test]
    fn removing_a_tree_stops_at_links() {
        let (place, root) = tree();
        let inside = place.path().join("root");
        fs::create_dir_all(inside.join("real/a/b")).unwrap();
        symlink(place.path().join("secret"), inside.join("real/a/link")).unwrap();
        symlink(place.path(), inside.join("real/a/b/dir")).unwrap();
        remove_tree(root.directory(&[]).unwrap().as_fd(), b"real").unwrap();
        assert!(!inside.join("real").exists());
        assert_eq!(
            fs::read_to_string(place.path().join("secret")).unwrap(),
            "host"
        );
        remove_tree(root.directory(&[]).unwrap().as_fd(), b"real").unwrap();
    }

    #[test]
    fn existing_file_or_link_is_never_written_through() {
        let (place, root) = tree();
        symlink(place.path().join("secret"), place.path().join("root/link")).unwrap();
        let directory = root.directory(&[]).unwrap();
        let error = create_file(directory.as_fd(), b"link").unwrap_err();
        assert_eq!(error.source, Errno::EXIST);
    }
}
