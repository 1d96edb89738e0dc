// SPDX-License-Identifier: Apache-2.0

//! Error codes of the agent's answers: the only mapping between them and ttRPC's status codes.

use ttrpc::{Code, get_status};

/// What kind of failure an agent's answer reports. The text is for people, the code for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorCode {
    /// An argument that can never be right.
    InvalidArgument,
    /// No such container, process or stream.
    NotFound,
    /// The id is taken, or the container was started already.
    AlreadyExists,
    /// Not in this state: signalled after its end, versions that do not match.
    FailedPrecondition,
    /// A limit was reached: containers, processes, queued events, memory.
    ResourceExhausted,
    /// The program to run does not exist (exit status 127).
    CommandNotFound,
    /// The program to run cannot be executed (exit status 126).
    CommandNotExecutable,
    /// Not done by this version.
    Unsupported,
    /// The guest failed.
    Internal,
}

/// Prefixes of messages whose code alone would not tell them apart.
const NOT_FOUND_PREFIX: &str = "command not found: ";
const NOT_EXECUTABLE_PREFIX: &str = "command not executable: ";

impl ErrorCode {
    /// The ttRPC error that carries this code and `message`.
    pub fn to_ttrpc(self, message: impl Into<String>) -> ttrpc::Error {
        let message = message.into();
        let (code, text) = match self {
            Self::InvalidArgument => (Code::INVALID_ARGUMENT, message),
            Self::NotFound => (Code::NOT_FOUND, message),
            Self::AlreadyExists => (Code::ALREADY_EXISTS, message),
            Self::FailedPrecondition => (Code::FAILED_PRECONDITION, message),
            Self::ResourceExhausted => (Code::RESOURCE_EXHAUSTED, message),
            Self::CommandNotFound => (Code::ABORTED, format!("{NOT_FOUND_PREFIX}{message}")),
            Self::CommandNotExecutable => {
                (Code::ABORTED, format!("{NOT_EXECUTABLE_PREFIX}{message}"))
            }
            Self::Unsupported => (Code::UNIMPLEMENTED, message),
            Self::Internal => (Code::INTERNAL, message),
        };
        ttrpc::Error::RpcStatus(get_status(code, text))
    }

    /// The code and text of an answer that reports a failure; `None` when `error` is not an answer but a
    /// broken connection.
    pub fn of(error: &ttrpc::Error) -> Option<(Self, &str)> {
        let ttrpc::Error::RpcStatus(status) = error else {
            return None;
        };
        let text = status.message.as_str();
        Some(match status.code() {
            Code::INVALID_ARGUMENT => (Self::InvalidArgument, text),
            Code::NOT_FOUND => (Self::NotFound, text),
            Code::ALREADY_EXISTS => (Self::AlreadyExists, text),
            Code::FAILED_PRECONDITION => (Self::FailedPrecondition, text),
            Code::RESOURCE_EXHAUSTED => (Self::ResourceExhausted, text),
            Code::UNIMPLEMENTED => (Self::Unsupported, text),
            Code::ABORTED => match text.strip_prefix(NOT_FOUND_PREFIX) {
                Some(rest) => (Self::CommandNotFound, rest),
                None => match text.strip_prefix(NOT_EXECUTABLE_PREFIX) {
                    Some(rest) => (Self::CommandNotExecutable, rest),
                    None => (Self::Internal, text),
                },
            },
            _ => (Self::Internal, text),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_comes_back_with_its_text() {
        use ErrorCode::*;
        for code in [
            InvalidArgument,
            NotFound,
            AlreadyExists,
            FailedPrecondition,
            ResourceExhausted,
            CommandNotFound,
            CommandNotExecutable,
            Unsupported,
            Internal,
        ] {
            let error = code.to_ttrpc("why");
            assert_eq!(ErrorCode::of(&error), Some((code, "why")));
        }
    }

    #[test]
    fn a_broken_connection_is_not_an_answer() {
        assert_eq!(ErrorCode::of(&ttrpc::Error::RemoteClosed), None);
    }
}
