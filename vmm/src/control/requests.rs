// SPDX-License-Identifier: Apache-2.0

//! What a request does, and its answer.

use caisson_protocol::control::{MAX_LINE, Request, Response};

use crate::devices::console_ring::ConsoleRing;
use crate::error::chain;
use crate::machine::Machine;

/// What follows an answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// The next request.
    Go,
    /// The connection is closed: it was no request.
    Close,
    /// The machine ends, when the answer is sent.
    Stop {
        /// Without waiting for requests in flight.
        force: bool,
    },
}

/// Does what `line` asks for; the answer is a line without its newline.
pub fn handle(machine: &mut Machine, line: &[u8]) -> (Vec<u8>, Next) {
    let (response, next) = match serde_json::from_slice(line) {
        Ok(Request::Stop { force }) => (Response::Ok {}, Next::Stop { force }),
        Ok(Request::Console {}) => return (console(machine.console()), Next::Go),
        Ok(request) => (answer(machine, &request), Next::Go),
        Err(error) => (refusal(format!("not a request: {error}")), Next::Close),
    };
    (encode(&response), next)
}

/// An answer that says what is wrong.
pub fn refusal(message: String) -> Response {
    Response::Error { message }
}

/// An answer as a line. One that does not fit is replaced by an error.
pub fn encode(response: &Response) -> Vec<u8> {
    match serde_json::to_vec(response) {
        Ok(line) if line.len() < MAX_LINE => line,
        Ok(_) => br#"{"result":"error","message":"the answer is too long"}"#.to_vec(),
        Err(error) => {
            log::error!("failed to encode an answer: {error}");
            br#"{"result":"error","message":"the answer cannot be encoded"}"#.to_vec()
        }
    }
}

fn answer(machine: &mut Machine, request: &Request) -> Response {
    match request {
        Request::Status {} => Response::Status {
            state: machine.state(),
            vcpus: machine.plan().config().vcpus,
            memory_mib: machine.plan().config().memory_mib,
        },
        Request::Pause {} => done(machine.pause()),
        Request::Resume {} => done(machine.resume()),
        Request::Metrics {} => Response::Metrics {
            counters: machine.metrics(),
        },
        Request::Stop { .. } | Request::Console {} => {
            refusal("not answered here".to_owned()) // `handle` has these
        }
    }
}

fn done<E: std::error::Error>(result: Result<(), E>) -> Response {
    match result {
        Ok(()) => Response::Ok {},
        Err(error) => refusal(chain(&error)),
    }
}

/// The newest output that fits into a line: escapes make JSON longer than the bytes are.
fn console(ring: &ConsoleRing) -> Vec<u8> {
    let (bytes, dropped) = ring.contents();
    let mut kept = bytes.len().min(MAX_LINE);
    loop {
        let skipped = bytes.len() - kept;
        let newest: Vec<u8> = bytes.iter().skip(skipped).copied().collect();
        let response = Response::Console {
            text: String::from_utf8_lossy(&newest).into_owned(),
            dropped_bytes: dropped + skipped as u64,
        };
        match serde_json::to_vec(&response) {
            Ok(line) if line.len() >= MAX_LINE && kept > 0 => kept -= kept.div_ceil(4),
            Ok(line) => return line,
            Err(_) => return encode(&response),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(line: &[u8]) -> (String, u64) {
        assert!(line.len() < MAX_LINE);
        match serde_json::from_slice(line).unwrap() {
            Response::Console {
                text,
                dropped_bytes,
            } => (text, dropped_bytes),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_console_fits_into_a_line_whatever_the_guest_wrote() {
        for byte in [b'x', 0x1b, 0xff, b'"'] {
            let ring = ConsoleRing::new(4 << 20);
            ring.write(&vec![byte; 3 << 20]);
            ring.write(b"the end");
            let (text, dropped) = decode(&console(&ring));
            assert!(text.ends_with("the end"));
            let shown = text.chars().count() as u64;
            assert_eq!(shown + dropped, (3 << 20) + 7);
            assert!(shown > 100_000, "only {shown} of {byte:#x}");
        }
        assert_eq!(decode(&console(&ConsoleRing::new(1))), (String::new(), 0));
    }

    #[test]
    fn an_answer_that_is_too_long_becomes_an_error() {
        let line = encode(&refusal("x".repeat(MAX_LINE)));
        let response: Response = serde_json::from_slice(&line).unwrap();
        assert_eq!(response, refusal("the answer is too long".into()));
    }
}
