// SPDX-License-Identifier: Apache-2.0

//! The last steps of a container's process: find its program, execute it. What fails here is told on the
//! helper's channel as what it is; runc's words are kept, since clients look for them.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use libcontainer::workload::{
    Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError,
};
use nix::errno::Errno;
use oci_spec::runtime::{Process, Spec};

use super::channel::{FailureKind, Report, bounded, send_report};
use super::environment;
use crate::sys;

/// What libcontainer calls when the process is otherwise complete.
#[derive(Debug, Clone)]
pub(crate) struct Program {
    /// Where failures are told. Closed by the execution.
    channel: Rc<OwnedFd>,
    /// As configured.
    environment: Vec<String>,
    /// What the program was found to be when the process was made: as with runc, that is executed.
    found: OnceCell<PathBuf>,
}

/// Why a program was not found or not executed.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ProgramError {
    kind: FailureKind,
    message: String,
}

impl ProgramError {
    fn new(kind: FailureKind, message: String) -> Self {
        let message = bounded(message);
        Self { kind, message }
    }
}

impl Program {
    /// The program that the specification names, with this environment.
    pub(crate) fn new(channel: Rc<OwnedFd>, environment: Vec<String>) -> Self {
        Self {
            channel,
            environment,
            found: OnceCell::new(),
        }
    }

    fn tell(&self, error: &ProgramError) {
        let report = Report::Failed {
            kind: error.kind,
            message: error.message.clone(),
        };
        send_report(self.channel.as_ref(), &report);
    }

    /// Becomes the program; returns only with why not.
    fn execute(&self, process: Option<&Process>) -> ProgramError {
        let prepared = arguments(process).and_then(|(process, arguments, _)| {
            let path = match self.found.get() {
                Some(path) => path.clone(),
                None => find(Some(process))?,
            };
            let arguments = arguments
                .iter()
                .map(|argument| argument.as_bytes().to_vec());
            let home = || environment::home(process.user().uid());
            let environment = environment::complete(&self.environment, home);
            let program = c_strings([path.as_os_str().as_bytes().to_vec()])?.remove(0);
            Ok((
                path,
                program,
                c_strings(arguments)?,
                c_strings(environment)?,
            ))
        });
        let (path, program, arguments, environment) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => return error,
        };
        // A program that is told of a closed pipe by an error alone is a lesser evil than none.
        let _ = sys::default_sigpipe();
        let Err(errno) = nix::unistd::execve(&program, &arguments, &environment);
        let kind = match errno {
            // The interpreter of a script, or a library's loader, is missing.
            Errno::ENOENT | Errno::ENOTDIR => FailureKind::CommandNotFound,
            _ => FailureKind::CommandNotExecutable,
        };
        let reason = errno.desc().to_lowercase();
        ProgramError::new(kind, format!("exec {}: {reason}", path.display()))
    }
}

impl Executor for Program {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        match find(spec.process().as_ref()) {
            Ok(path) => {
                self.found.get_or_init(|| path);
                Ok(())
            }
            Err(error) => {
                self.tell(&error);
                Err(ExecutorValidationError::ArgValidationError(error.message))
            }
        }
    }

    /// None: this process's own environment is nobody's.
    fn setup_envs(&self, _: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        Ok(())
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let error = self.execute(spec.process().as_ref());
        self.tell(&error);
        let status = match error.kind {
            FailureKind::CommandNotFound => 127,
            FailureKind::CommandNotExecutable | FailureKind::Other => 126,
        };
        // The process that was to become the program ends as a shell's would.
        std::process::exit(status)
    }
}

fn arguments(process: Option<&Process>) -> Result<(&Process, &[String], &str), ProgramError> {
    let missing = || {
        let message = "process.args must not be empty".to_owned();
        ProgramError::new(FailureKind::Other, message)
    };
    let process = process.ok_or_else(missing)?;
    let arguments = process.args().as_deref().unwrap_or_default();
    let name = arguments.first().ok_or_else(missing)?;
    Ok((process, arguments, name))
}

/// The path of the program, looked up as Go's `exec.LookPath` does.
fn find(process: Option<&Process>) -> Result<PathBuf, ProgramError> {
    let (process, _, name) = arguments(process)?;
    if name.contains('/') {
        return usable(Path::new(name)).map(|()| name.into());
    }
    let environment = process.env().as_deref().unwrap_or_default();
    let path = { environment.iter().rev() }.find_map(|entry| entry.strip_prefix("PATH="));
    let mut refused = None;
    for directory in path.unwrap_or_default().split(':') {
        let directory = if directory.is_empty() { "." } else { directory };
        let candidate = Path::new(directory).join(name);
        match usable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(error) if error.kind == FailureKind::CommandNotFound => {}
            Err(_) => refused = Some(()),
        }
    }
    Err(match refused {
        None => ProgramError::new(
            FailureKind::CommandNotFound,
            format!("exec: {name:?}: executable file not found in $PATH"),
        ),
        Some(()) => ProgramError::new(
            FailureKind::CommandNotExecutable,
            format!("exec: {name:?}: permission denied"),
        ),
    })
}

fn usable(path: &Path) -> Result<(), ProgramError> {
    use std::io::ErrorKind::{NotADirectory, NotFound};
    let refused = |text: &str| {
        let message = format!("exec: {path:?}: {text}");
        Err(ProgramError::new(
            FailureKind::CommandNotExecutable,
            message,
        ))
    };
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => refused("is a directory"),
        Ok(metadata) if metadata.permissions().mode() & 0o111 == 0 => refused("permission denied"),
        Ok(_) => Ok(()),
        Err(error) if matches!(error.kind(), NotFound | NotADirectory) => Err(ProgramError::new(
            FailureKind::CommandNotFound,
            format!("exec: {path:?}: stat {}: {}", path.display(), text(&error)),
        )),
        Err(error) => refused(&text(&error)),
    }
}

/// The kernel's words as C and Go write them: lower case, no number.
fn text(error: &std::io::Error) -> String {
    let errno = Errno::from_raw(error.raw_os_error().unwrap_or_default());
    errno.desc().to_lowercase()
}

fn c_strings(texts: impl IntoIterator<Item = Vec<u8>>) -> Result<Vec<CString>, ProgramError> {
    let convert = |text| {
        CString::new(text).map_err(|_| {
            let message = "an argument or environment entry holds a zero byte".to_owned();
            ProgramError::new(FailureKind::Other, message)
        })
    };
    texts.into_iter().map(convert).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::ProcessBuilder;

    fn process(name: &str, path: &str) -> Process {
        let builder = ProcessBuilder::default().args(vec![name.to_owned()]);
        let builder = builder.env(vec!["PATH=/nowhere".into(), format!("PATH={path}")]);
        builder.cwd("/").build().unwrap()
    }

    fn failure(name: &str, path: &str) -> (FailureKind, String) {
        let error = find(Some(&process(name, path))).unwrap_err();
        (error.kind, error.message)
    }

    #[test]
    fn a_program_is_found_by_path_and_by_the_last_path_variable() {
        let found = find(Some(&process("sh", "/nonexistent:/bin"))).unwrap();
        assert_eq!(found, Path::new("/bin/sh"));
        assert!(find(Some(&process("/bin/sh", ""))).is_ok());
    }

    #[test]
    fn what_is_missing_and_what_cannot_be_executed_are_told_apart_in_runcs_words() {
        use FailureKind::{CommandNotExecutable, CommandNotFound};
        assert_eq!(
            failure("nope", "/bin"),
            (
                CommandNotFound,
                "exec: \"nope\": executable file not found in $PATH".into()
            )
        );
        assert_eq!(
            failure("/no/pe", "/bin"),
            (
                CommandNotFound,
                "exec: \"/no/pe\": stat /no/pe: no such file or directory".into()
            )
        );
        assert_eq!(
            failure("/etc/passwd", ""),
            (
                CommandNotExecutable,
                "exec: \"/etc/passwd\": permission denied".into()
            )
        );
        assert_eq!(failure("/", "").0, CommandNotExecutable);
        assert_eq!(failure("passwd", "/etc").0, CommandNotExecutable);
    }

    #[test]
    fn no_arguments_is_an_error_and_not_an_index() {
        let empty = ProcessBuilder::default().args(Vec::new()).build().unwrap();
        assert!(find(Some(&empty)).is_err());
        assert!(find(None).is_err());
    }

    #[test]
    fn a_zero_byte_in_an_argument_is_an_error() {
        assert!(c_strings([b"a\0b".to_vec()]).is_err());
    }
}
