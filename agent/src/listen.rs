// SPDX-License-Identifier: Apache-2.0

//! The agent's two vsock ports. Only the host may connect: whoever else does is turned away.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use caisson_protocol::PROTOCOL_VERSION;
use caisson_protocol::ports::StdioHello;
use caisson_protocol::ports::{AGENT_RPC, AGENT_STDIO, HOST_CID, HOST_READY, MAX_LINE, Ready};
use futures_util::stream::{Stream, unfold};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Semaphore;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

use crate::id::Id;
use crate::sandbox::Sandbox;

/// Longest time from connecting to the end of the first line.
const HELLO: Duration = Duration::from_secs(10);
/// Most stdio connections whose first line is not there yet.
const MAX_HELLOS: usize = 256;

/// Both ports, bound.
#[derive(Debug)]
pub(crate) struct Ports {
    /// For ttRPC.
    pub(crate) rpc: VsockListener,
    /// For streams.
    pub(crate) stdio: VsockListener,
}

/// Binds both.
///
/// # Errors
/// When the kernel has no vsock or a port is taken.
pub(crate) fn bind() -> io::Result<Ports> {
    let listen = |port| VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port));
    Ok(Ports {
        rpc: listen(AGENT_RPC)?,
        stdio: listen(AGENT_STDIO)?,
    })
}

/// Tells the host that the agent serves.
///
/// # Errors
/// When the host does not listen.
pub(crate) async fn say_ready() -> io::Result<()> {
    let ready = Ready {
        protocol_version: PROTOCOL_VERSION,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let mut line = serde_json::to_vec(&ready)?;
    line.push(b'\n');
    let mut stream = VsockStream::connect(VsockAddr::new(HOST_CID, HOST_READY)).await?;
    stream.write_all(&line).await?;
    // The host closes once it has read the line; a connection closed by us might overtake it.
    let mut end = [0; 1];
    let _ = tokio::time::timeout(HELLO, stream.read(&mut end)).await;
    Ok(())
}

/// The connections of the host to `listener`; never ends.
pub(crate) fn from_host(listener: VsockListener) -> impl Stream<Item = io::Result<VsockStream>> {
    unfold(listener, |mut listener| async move {
        let stream = accept(&mut listener).await;
        Some((Ok(stream), listener))
    })
}

async fn accept(listener: &mut VsockListener) -> VsockStream {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) if peer.cid() == HOST_CID => return stream,
            Ok((_, peer)) => log::warn!("connection of context {} turned away", peer.cid()),
            Err(error) => {
                // Out of descriptors or memory; both come back.
                log::error!("failed to accept a connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Serves the streams, for ever.
pub(crate) async fn serve_stdio(mut listener: VsockListener, sandbox: Arc<Sandbox>) {
    let hellos = Arc::new(Semaphore::new(MAX_HELLOS));
    loop {
        let stream = accept(&mut listener).await;
        let Ok(permit) = hellos.clone().acquire_owned().await else {
            return;
        };
        let sandbox = sandbox.clone();
        tokio::spawn(async move {
            if let Err(error) = attach(stream, &sandbox).await {
                log::warn!("stdio connection: {error}");
            }
            drop(permit);
        });
    }
}

/// Why a stream was not attached.
#[derive(Debug, thiserror::Error)]
enum HelloError {
    #[error("the first line did not come within {HELLO:?}")]
    Deadline,
    #[error("the first line is longer than {MAX_LINE} bytes or not complete")]
    Line,
    #[error("the first line is not understood: {0}")]
    Json(#[from] serde_json::Error),
    #[error("{0}")]
    Refused(String),
    #[error("failed to use the connection: {0}")]
    Connection(#[from] io::Error),
}

async fn attach(mut stream: VsockStream, sandbox: &Sandbox) -> Result<(), HelloError> {
    let hello = tokio::time::timeout(HELLO, greet(&mut stream, sandbox)).await;
    let greeted = hello.unwrap_or(Err(HelloError::Deadline));
    let greeting = match greeted {
        Ok(greeting) => greeting,
        Err(error) => {
            let text = error.to_string().replace('\n', " ");
            stream.write_all(format!("ERR {text}\n").as_bytes()).await?;
            return Err(error);
        }
    };
    stream.write_all(b"OK\n").await?;
    let socket = OwnedFd::from(stream);
    let Greeting {
        process,
        hello,
        ours,
        rest,
    } = greeting;
    process.attach(hello.stream, ours, socket, rest)?;
    Ok(())
}

struct Greeting {
    process: Arc<crate::process::Process>,
    hello: StdioHello,
    ours: OwnedFd,
    rest: Vec<u8>,
}

async fn greet(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    sandbox: &Sandbox,
) -> Result<Greeting, HelloError> {
    let (line, rest) = read_line(stream).await?;
    let hello: StdioHello = serde_json::from_slice(&line)?;
    let refused = |error: &dyn std::error::Error| HelloError::Refused(crate::helper::chain(error));
    let id = |text: &str| Id::parse(text).map_err(|error| refused(&error));
    let container = id(&hello.container)?;
    let exec = match hello.exec.as_str() {
        "" => None,
        exec => Some(id(exec)?),
    };
    let process = sandbox
        .process(&container, exec.as_ref())
        .map_err(|error| refused(&error))?;
    let ours = { process.take_stream(hello.stream) }.map_err(|error| refused(&error))?;
    Ok(Greeting {
        process,
        hello,
        ours,
        rest,
    })
}

/// The first line, without its newline, and what came with it.
async fn read_line(
    stream: &mut (impl AsyncRead + Unpin),
) -> Result<(Vec<u8>, Vec<u8>), HelloError> {
    let mut bytes = Vec::new();
    let mut buffer = [0; MAX_LINE];
    loop {
        let count = stream.read(&mut buffer).await?;
        let new = buffer.get(..count).unwrap_or_default();
        let newline = new.iter().position(|byte| *byte == b'\n');
        let end = newline.map(|at| bytes.len() + at);
        bytes.extend_from_slice(new);
        match end {
            Some(end) if end < MAX_LINE => {
                let rest = bytes.split_off(end).into_iter().skip(1).collect();
                return Ok((bytes, rest));
            }
            None if count > 0 && bytes.len() < MAX_LINE => {}
            _ => return Err(HelloError::Line),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_line_is_parted_from_what_follows() {
        let (mut host, mut agent) = tokio::io::duplex(64);
        host.write_all(b"{\"a\":").await.unwrap();
        host.write_all(b"1}\nstdin\nbytes").await.unwrap();
        let (line, rest) = read_line(&mut agent).await.unwrap();
        assert_eq!(
            (line.as_slice(), rest.as_slice()),
            (&b"{\"a\":1}"[..], &b"stdin\nbytes"[..])
        );
    }

    #[tokio::test]
    async fn endless_and_incomplete_lines_are_refused() {
        let mut endless = io::Cursor::new(vec![b'x'; MAX_LINE * 2]);
        assert!(read_line(&mut endless).await.is_err());
        let mut incomplete = io::Cursor::new(b"{".to_vec());
        assert!(read_line(&mut incomplete).await.is_err());
    }
}
