// SPDX-License-Identifier: Apache-2.0

//! A working directory that the root file system lacks is made, as runc does: images name one that their layers do
//! not have.
//!
//! Every step is resolved inside the root (openat2, RESOLVE_IN_ROOT), so a symbolic link in the image leads nowhere
//! else. What cannot be made (a read-only root, a file in the way) is left for the container's start to report.

use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::Spec;
use rustix::fs::{Mode, OFlags, ResolveFlags, mkdirat, open, openat2};
use rustix::io::Errno;

/// Makes the working directory of the container's process where it is missing.
pub(crate) fn make(spec: &Spec) {
    let (Some(root), Some(process)) = (spec.root(), spec.process()) else {
        return;
    };
    if let Err(error) = make_in(root.path(), process.cwd()) {
        log::debug!(
            "the working directory {:?} was not made: {error}",
            process.cwd()
        );
    }
}

fn make_in(root: &Path, cwd: &Path) -> Result<(), Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = open(root, flags, Mode::empty())?;
    let within = |path: &Path| -> Result<OwnedFd, Errno> {
        openat2(&root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)
    };
    let mut parent = within(Path::new("."))?;
    let mut path = PathBuf::new();
    for component in cwd.components() {
        let Component::Normal(name) = component else {
            // `..` would have to be resolved by hand; no image needs it.
            continue;
        };
        path.push(name);
        parent = match within(&path) {
            Err(Errno::NOENT) => {
                mkdirat(&parent, name, Mode::from_raw_mode(0o755))?;
                within(&path)?
            }
            other => other?,
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_directories_are_made_inside_the_root() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/made", dir.path().join("link")).unwrap();
        std::fs::create_dir(dir.path().join("made")).unwrap();
        make_in(dir.path(), Path::new("/new/dir")).unwrap();
        make_in(dir.path(), Path::new("/link/below")).unwrap();
        make_in(dir.path(), Path::new("/")).unwrap();
        assert!(dir.path().join("new/dir").is_dir());
        assert!(dir.path().join("made/below").is_dir());
    }

    #[test]
    fn a_link_out_of_the_root_makes_nothing_outside() {
        let outside = tempfile::tempdir().unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(outside.path(), dir.path().join("out")).unwrap();
        assert!(make_in(dir.path(), Path::new("/out/x")).is_err());
        assert!(!outside.path().join("x").exists());
    }
}
