// SPDX-License-Identifier: Apache-2.0

//! What can go wrong with a container, and which code of the protocol says so.

use std::io;

use caisson_protocol::error::ErrorCode;

use super::cgroup::CgroupError;
use super::launch::LaunchError;
use super::spec::SpecError;
use crate::helper::channel::FailureKind;
use crate::id::{Id, IdError};
use crate::process::StreamError;
use crate::storage::StorageError;

/// See the module's story.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ContainerError {
    /// The id of a container or an exec.
    #[error("bad id")]
    Id(#[from] IdError),
    /// The host's JSON.
    #[error("bad specification")]
    Spec(#[from] SpecError),
    /// Another argument.
    #[error("bad argument: {0}")]
    Argument(String),
    /// No such container.
    #[error("container {0} does not exist")]
    NotFound(Id),
    /// No such exec.
    #[error("exec {0} does not exist in container {1}")]
    NoExec(Id, Id),
    /// The id is taken.
    #[error("{0} exists already")]
    Exists(Id),
    /// Started a second time.
    #[error("container {0} was started already")]
    Started(Id),
    /// Not in this state.
    #[error("{0}")]
    State(String),
    /// Too many.
    #[error("no more than {0} {1} fit in a guest")]
    TooMany(usize, &'static str),
    /// The process was not made.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The memory limit is too small to even start.
    #[error("the process was killed for lack of memory while it was made (is the limit too low?)")]
    OutOfMemory,
    /// A stream or terminal.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The cgroup.
    #[error("failed to use the container's cgroup")]
    Cgroup(#[from] CgroupError),
    /// New limits.
    #[error("failed to apply resource limits: {0}")]
    Resources(String),
    /// A file system of the container.
    #[error("failed to mount a file system")]
    Storage(#[from] StorageError),
    /// Files of ours.
    #[error("failed to {0}")]
    System(&'static str, #[source] io::Error),
}

impl ContainerError {
    /// The code for programs.
    pub(crate) fn code(&self) -> ErrorCode {
        match self {
            Self::Id(_) | Self::Argument(_) => ErrorCode::InvalidArgument,
            Self::Spec(SpecError::Unsupported(_)) => ErrorCode::Unsupported,
            Self::Spec(_) => ErrorCode::InvalidArgument,
            Self::NotFound(_) | Self::NoExec(..) => ErrorCode::NotFound,
            Self::Exists(_) | Self::Started(_) => ErrorCode::AlreadyExists,
            Self::State(_) => ErrorCode::FailedPrecondition,
            Self::TooMany(..) | Self::OutOfMemory => ErrorCode::ResourceExhausted,
            Self::Launch(LaunchError::Failed { kind, .. }) => match kind {
                FailureKind::CommandNotFound => ErrorCode::CommandNotFound,
                FailureKind::CommandNotExecutable => ErrorCode::CommandNotExecutable,
                FailureKind::Other => ErrorCode::Internal,
            },
            Self::Stream(StreamError::Size { .. }) => ErrorCode::InvalidArgument,
            Self::Stream(StreamError::System(_)) => ErrorCode::Internal,
            Self::Stream(_) => ErrorCode::FailedPrecondition,
            Self::Storage(error) => error.code(),
            Self::Launch(_) | Self::Cgroup(_) | Self::Resources(_) | Self::System(..) => {
                ErrorCode::Internal
            }
        }
    }
}
