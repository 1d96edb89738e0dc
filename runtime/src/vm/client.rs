// SPDX-License-Identifier: Apache-2.0

//! Asks the VMM on its control socket: one line of JSON each way, each with a deadline.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use caisson_protocol::control::{MAX_LINE, Request, Response};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// Name of the control socket in the state directory.
pub const CONTROL_SOCKET: &str = "control.sock";

/// Why the VMM gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The socket failed.
    #[error("failed to ask the VMM on {path}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No answer in time.
    #[error("the VMM did not answer within {0:?}")]
    Timeout(Duration),
    /// The VMM refused.
    #[error("the VMM refused: {0}")]
    Refused(String),
}

/// Sends `request` to the VMM at `socket` and reads its answer.
///
/// # Errors
/// When the VMM cannot be reached, does not answer within `limit`, or refuses.
pub async fn ask(
    socket: &Path,
    request: &Request,
    limit: Duration,
) -> Result<Response, ControlError> {
    let exchange = async {
        let mut stream = UnixStream::connect(socket).await?;
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        stream.write_all(&line).await?;
        let mut answer = Vec::new();
        let mut reader = BufReader::new(stream).take(MAX_LINE as u64);
        reader.read_until(b'\n', &mut answer).await?;
        serde_json::from_slice(&answer).map_err(io::Error::from)
    };
    match timeout(limit, exchange).await {
        Err(_) => Err(ControlError::Timeout(limit)),
        Ok(Err(source)) => Err(ControlError::Io {
            path: socket.to_owned(),
            source,
        }),
        Ok(Ok(Response::Error { message })) => Err(ControlError::Refused(message)),
        Ok(Ok(response)) => Ok(response),
    }
}
