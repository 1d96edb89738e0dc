// SPDX-License-Identifier: Apache-2.0

//! One client: bytes in, lines out of them, and answers back. Both directions are bounded: a client that does not
//! read its answers is not read from.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use caisson_protocol::control::MAX_LINE;

/// Bytes read at once.
const CHUNK: usize = 16 << 10;

/// A line that is too long.
#[derive(Debug, PartialEq, Eq)]
pub struct TooLong;

/// See the module.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    /// The client has sent all that it will.
    ended: bool,
}

impl Connection {
    /// A client on a nonblocking stream.
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            input: Vec::new(),
            output: Vec::new(),
            ended: false,
        }
    }

    /// The stream, for epoll.
    pub fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Reads once.
    ///
    /// # Errors
    /// As read(2), except for having nothing.
    pub fn fill(&mut self) -> io::Result<()> {
        let mut chunk = [0; CHUNK];
        match self.stream.read(&mut chunk) {
            Ok(0) => self.ended = true,
            Ok(count) => self.input.extend(chunk.iter().take(count)),
            Err(error) if is_retry(&error) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Takes the next whole line, without its newline.
    ///
    /// # Errors
    /// When it is longer than [`MAX_LINE`].
    pub fn next_line(&mut self) -> Result<Option<Vec<u8>>, TooLong> {
        match self.input.iter().position(|byte| *byte == b'\n') {
            Some(end) if end < MAX_LINE => {
                let mut line: Vec<u8> = self.input.drain(..=end).collect();
                line.pop();
                Ok(Some(line))
            }
            None if self.input.len() < MAX_LINE => Ok(None),
            Some(_) | None => Err(TooLong),
        }
    }

    /// Adds an answer, with a newline.
    pub fn answer(&mut self, line: &[u8]) {
        self.output.extend_from_slice(line);
        self.output.push(b'\n');
    }

    /// Writes what it can of the answers.
    ///
    /// # Errors
    /// As write(2), except for having no room.
    pub fn flush(&mut self) -> io::Result<()> {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(count) => drop(self.output.drain(..count)),
                Err(error) if is_retry(&error) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether answers wait for the client.
    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// Whether the client has sent all that it will.
    pub fn has_ended(&self) -> bool {
        self.ended
    }
}

fn is_retry(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (UnixStream, Connection) {
        let (client, server) = UnixStream::pair().unwrap();
        server.set_nonblocking(true).unwrap();
        (client, Connection::new(server))
    }

    #[test]
    fn lines_come_whole_however_they_are_sent() {
        let (mut client, mut connection) = pair();
        connection.fill().unwrap();
        assert!(!connection.has_ended(), "nothing to read is no end");
        client.write_all(b"one\ntw").unwrap();
        connection.fill().unwrap();
        assert_eq!(connection.next_line(), Ok(Some(b"one".to_vec())));
        assert_eq!(connection.next_line(), Ok(None));
        client.write_all(b"o\n\n").unwrap();
        drop(client);
        connection.fill().unwrap();
        assert_eq!(connection.next_line(), Ok(Some(b"two".to_vec())));
        assert_eq!(connection.next_line(), Ok(Some(Vec::new())));
        connection.fill().unwrap();
        assert!(connection.has_ended());
    }

    #[test]
    fn a_line_without_end_is_refused_at_the_bound() {
        let (_client, mut connection) = pair();
        connection.input = vec![b'x'; MAX_LINE - 1];
        assert_eq!(connection.next_line(), Ok(None));
        connection.input.push(b'\n');
        assert!(connection.next_line().unwrap().is_some());
        connection.input = vec![b'x'; MAX_LINE];
        assert_eq!(connection.next_line(), Err(TooLong));
        connection.input.push(b'\n');
        assert_eq!(connection.next_line(), Err(TooLong));
    }
}
