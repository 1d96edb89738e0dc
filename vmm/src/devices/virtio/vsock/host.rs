// SPDX-License-Identifier: Apache-2.0

//! The host's names for ports: Unix sockets in one directory, and the CONNECT handshake on the one that we listen on
//! ([`caisson_protocol::ports`]).
//!
//! The directory is held open and sockets are named relative to it, from threads whose working directory it is: so
//! paths may be longer than the 108 bytes of a socket address, neither `/proc` nor the path has to exist in the jail, and
//! nothing resolves a path twice.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use caisson_protocol::ports::{HOST_SOCKET, guest_to_host_socket};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};

use super::VsockError;

/// Longest CONNECT line, bytes, with its newline: `CONNECT 4294967295\n` and some.
const MAX_CONNECT_LINE: usize = 32;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;
/// VMADDR_PORT_ANY, which is no port.
const PORT_ANY: u32 = u32::MAX;

/// The directory of the sockets.
#[derive(Debug)]
pub(super) struct HostDir {
    fd: OwnedFd,
    path: PathBuf,
}

impl HostDir {
    /// Opens it.
    ///
    /// # Errors
    /// When it is no directory that can be opened.
    pub(super) fn open(path: &Path) -> Result<Self, VsockError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(fd) => Ok(Self {
                fd,
                path: path.to_owned(),
            }),
            Err(error) => Err(VsockError::Directory {
                path: path.to_owned(),
                source: error.into(),
            }),
        }
    }

    /// Makes it the working directory of the calling thread, and of that thread alone.
    ///
    /// # Errors
    /// As unshare(2) with CLONE_FS and fchdir(2).
    pub(super) fn enter(&self) -> io::Result<()> {
        unshare(CloneFlags::CLONE_FS)?;
        rustix::process::fchdir(&self.fd)?;
        Ok(())
    }

    /// Connects to the socket of host port `port`, without waiting. For threads that entered the directory.
    ///
    /// # Errors
    /// As connect(2) says, when nobody listens there or too many wait.
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let socket = socket()?;
        let address = SocketAddrUnix::new(guest_to_host_socket(port))?;
        rustix::net::connect(&socket, &address)?;
        Ok(UnixStream::from(socket))
    }

    fn bind(&self) -> io::Result<UnixListener> {
        self.enter()?;
        let socket = socket()?;
        // The socket's own mode, less the umask, is the mode of its name: so it never has a wider one.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(HOST_SOCKET)?)?;
        if let Err(error) = rustix::net::listen(&socket, BACKLOG) {
            self.unlink();
            return Err(error.into());
        }
        Ok(UnixListener::from(socket))
    }

    fn unlink(&self) {
        // Gone already, or the directory is: then there is nothing left to clean up.
        let _ = rustix::fs::unlinkat(&self.fd, HOST_SOCKET, AtFlags::empty());
    }
}

fn socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    Ok(rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        flags,
        None,
    )?)
}

/// The listening socket. Its name goes when it is dropped.
#[derive(Debug)]
pub(super) struct HostSocket {
    listener: UnixListener,
    dir: std::sync::Arc<HostDir>,
}

impl HostSocket {
    /// Binds `vsock.sock` with mode 0600 and listens.
    ///
    /// # Errors
    /// When there is one already, or it cannot be made.
    pub(super) fn bind(dir: std::sync::Arc<HostDir>) -> Result<Self, VsockError> {
        // In a thread of its own, whose working directory nobody else has.
        let bound = std::thread::scope(|scope| {
            std::thread::Builder::new()
                .name("vsock-bind".to_owned())
                .spawn_scoped(scope, || dir.bind())?
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the binding thread panicked")))
        });
        let path = dir.path.join(HOST_SOCKET);
        match bound {
            Ok(listener) => Ok(Self { listener, dir }),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                Err(VsockError::SocketExists { path })
            }
            Err(source) => Err(VsockError::Listen { path, source }),
        }
    }

    /// Another handle on the same listening socket, for a worker.
    ///
    /// # Errors
    /// As dup(2).
    pub(super) fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }
}

impl Drop for HostSocket {
    fn drop(&mut self) {
        self.dir.unlink();
    }
}

/// A host process that connected and is about to say which guest port it wants.
#[derive(Debug)]
pub(super) struct Greeting {
    stream: UnixStream,
    line: Vec<u8>,
}

/// What became of a [`Greeting`].
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Greeted {
    /// The line is not complete yet.
    Waiting,
    /// It wants this port of the guest.
    Port(u32),
    /// It went away, or does not speak the protocol.
    Over,
}

impl Greeting {
    /// A connection just accepted, non-blocking.
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            line: Vec::new(),
        }
    }

    /// For the epoll set.
    pub(super) fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// The stream, positioned after the line.
    pub(super) fn into_stream(self) -> UnixStream {
        self.stream
    }

    /// Reads what is there of the line, and not a byte after it: what follows is the guest's.
    pub(super) fn read(&mut self) -> Greeted {
        let mut bytes = [0; MAX_CONNECT_LINE];
        let room = MAX_CONNECT_LINE.saturating_sub(self.line.len());
        let window = bytes.get_mut(..room).unwrap_or_default();
        let seen = match self.receive(window, RecvFlags::PEEK) {
            Ok(0) => return Greeted::Over,
            Ok(seen) => seen,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Greeted::Waiting,
            Err(_) => return Greeted::Over,
        };
        let newline = window.iter().take(seen).position(|byte| *byte == b'\n');
        let take = newline.map_or(seen, |at| at + 1);
        let window = window.get_mut(..take).unwrap_or_default();
        match self.receive(window, RecvFlags::empty()) {
            Ok(taken) if taken == take => self.line.extend_from_slice(window),
            Ok(_) | Err(_) => return Greeted::Over,
        }
        if newline.is_some() {
            return parse_connect(&self.line).map_or(Greeted::Over, Greeted::Port);
        }
        if self.line.len() >= MAX_CONNECT_LINE {
            return Greeted::Over;
        }
        Greeted::Waiting
    }

    fn receive(&self, window: &mut [u8], flags: RecvFlags) -> io::Result<usize> {
        let (count, _) = rustix::net::recv(&self.stream, window, flags | RecvFlags::DONTWAIT)?;
        Ok(count)
    }
}

/// The port of a line `CONNECT <port>\n`.
fn parse_connect(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?.strip_suffix(b"\n")?;
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let port = std::str::from_utf8(digits).ok()?.parse().ok()?;
    (port != PORT_ANY).then_some(port)
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::fs::PermissionsExt as _;
    use std::sync::Arc;

    use super::*;

    #[test]
    fn only_a_plain_number_is_a_port() {
        assert_eq!(parse_connect(b"CONNECT 0\n"), Some(0));
        assert_eq!(parse_connect(b"CONNECT 4294967294\n"), Some(4_294_967_294));
        for bad in [
            &b"CONNECT 4294967295\n"[..],
            b"CONNECT 4294967296\n",
            b"CONNECT -1\n",
            b"CONNECT +1\n",
            b"CONNECT \n",
            b"CONNECT 1 \n",
            b"CONNECT 1\r\n",
            b"CONNECT 1",
            b"connect 1\n",
            b"\n",
        ] {
            assert_eq!(parse_connect(bad), None, "{:?}", bad.escape_ascii());
        }
    }

    #[test]
    fn a_greeting_takes_its_line_in_pieces_and_leaves_what_follows() {
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut greeting = Greeting::new(ours);
        assert_eq!(greeting.read(), Greeted::Waiting);
        theirs.write_all(b"CONN").unwrap();
        assert_eq!(greeting.read(), Greeted::Waiting);
        theirs.write_all(b"ECT 77\nfirst bytes").unwrap();
        assert_eq!(greeting.read(), Greeted::Port(77));
        let mut rest = [0; 11];
        greeting.into_stream().read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"first bytes");
    }

    #[test]
    fn an_overlong_line_and_a_hang_up_end_a_greeting() {
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        theirs.write_all(&[b'1'; 4096]).unwrap();
        assert_eq!(Greeting::new(ours).read(), Greeted::Over);
        let (theirs, ours) = UnixStream::pair().unwrap();
        drop(theirs);
        assert_eq!(Greeting::new(ours).read(), Greeted::Over);
    }

    #[test]
    fn the_socket_is_private_refuses_a_second_owner_and_goes_with_its_owner() {
        let temp = tempfile::tempdir().unwrap();
        let deep = temp.path().join("d".repeat(120));
        std::fs::create_dir(&deep).unwrap();
        let dir = Arc::new(HostDir::open(&deep).unwrap());
        let socket = HostSocket::bind(Arc::clone(&dir)).unwrap();
        let path = deep.join(HOST_SOCKET);
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        let second = HostSocket::bind(dir).unwrap_err();
        assert_eq!(
            second.to_string(),
            format!("socket {} exists already", path.display())
        );
        assert!(path.exists(), "the loser removed the winner's socket");
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_missing_directory_is_an_error_by_name() {
        let error = HostDir::open(Path::new("/nonexistent/pod")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/pod"), "{error}");
    }
}
