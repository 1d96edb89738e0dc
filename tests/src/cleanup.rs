// SPDX-License-Identifier: Apache-2.0

//! Nothing is left behind: the directories of running testbeds, removed however their process ends.
//!
//! An ordinary end and a panic remove them by `Drop`. For SIGINT, SIGTERM and SIGHUP a program calls
//! [`on_signals`] first thing. After SIGKILL the next testbed's start removes them: a directory whose lock
//! nobody holds is nobody's. (The processes themselves die with their parent in every case.)

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise, sigaction};

const PREFIX: &str = "caisson-testbed.";
const LOCK: &str = "lock";

/// The directories of this process's testbeds. The one global: a signal ends them all.
static DIRECTORIES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// A temporary directory that goes with its owner, with the process, or at the next start of a testbed.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    /// Held for as long as the directory is in use.
    _lock: File,
}

impl RunDir {
    /// Makes one, and removes those that dead processes left.
    ///
    /// # Errors
    /// If it cannot be made in the system's directory for temporary files.
    pub fn new() -> io::Result<Self> {
        let parent = std::env::temp_dir();
        remove_abandoned(&parent);
        let path = tempfile::Builder::new()
            .prefix(PREFIX)
            .tempdir_in(&parent)?
            .keep();
        // The lock has its name only once it is held, so nobody takes the directory for abandoned.
        let unnamed = path.join("lock.new");
        let lock = File::create(&unnamed)?;
        lock.lock()?;
        fs::rename(&unnamed, path.join(LOCK))?;
        directories().push(path.clone());
        Ok(Self { path, _lock: lock })
    }

    /// Where it is; `lock` in it is taken.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        directories().retain(|path| *path != self.path);
        // What cannot be removed now is removed by the next start.
        let _ = fs::remove_dir_all(&self.path);
    }
}

fn directories() -> std::sync::MutexGuard<'static, Vec<PathBuf>> {
    DIRECTORIES.lock().unwrap_or_else(PoisonError::into_inner)
}

fn remove_abandoned(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let ours = entry.file_name().to_string_lossy().starts_with(PREFIX);
        let Some(lock) = ours.then(|| File::open(path.join(LOCK)).ok()).flatten() else {
            continue;
        };
        if lock.try_lock().is_ok() {
            let _ = fs::remove_dir_all(&path);
        }
    }
}

/// From now on SIGINT, SIGTERM and SIGHUP remove the testbeds' directories before they end the process.
/// Call it before any thread is started: it blocks those signals for the threads to come.
///
/// # Errors
/// If the signals cannot be blocked.
pub fn on_signals() -> nix::Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]
        .into_iter()
        .collect();
    signals.thread_block()?;
    std::thread::spawn(move || {
        // A signal that others wait for must not be delivered, and lost, here.
        if SigSet::all().thread_block().is_err() {
            return;
        }
        let Ok(signal) = signals.wait() else { return };
        // Kept locked: no directory is made any more.
        let directories = directories();
        for path in directories.iter() {
            let _ = fs::remove_dir_all(path);
        }
        end_by(signal);
    });
    Ok(())
}

/// Ends the process by the signal, as if it had not been caught.
fn end_by(signal: Signal) {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: the default action is no handler, so no code of ours runs in signal context.
    let _ = unsafe { sigaction(signal, &default) };
    let _ = raise(signal);
    let _ = SigSet::from(signal).thread_unblock();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_directories_without_a_living_holder_are_removed() {
        let parent = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let path = parent.path().join(name);
            fs::create_dir(&path).unwrap();
            path
        };
        let (dead, alive) = (make("caisson-testbed.dead"), make("caisson-testbed.alive"));
        let (new, other) = (make("caisson-testbed.new"), make("other"));
        for path in [&dead, &other] {
            File::create(path.join(LOCK)).unwrap();
        }
        let held = File::create(alive.join(LOCK)).unwrap();
        held.lock().unwrap();
        remove_abandoned(parent.path());
        assert!(!dead.exists() && alive.exists() && new.exists() && other.exists());
    }

    #[test]
    fn a_run_directory_goes_with_its_owner() {
        let dir = RunDir::new().unwrap();
        let path = dir.path().to_owned();
        remove_abandoned(&std::env::temp_dir());
        assert!(path.exists());
        drop(dir);
        assert!(!path.exists() && !directories().contains(&path));
    }
}
