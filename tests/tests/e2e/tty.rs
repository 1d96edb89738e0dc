// SPDX-License-Identifier: Apache-2.0

//! Terminals by `--console-socket`, as conmon and containerd's shim use them.

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::json;

use crate::support::{Bundle, Container, wait_for};

/// The master side of a terminal, and everything it showed so far.
struct Terminal {
    master: File,
    seen: Arc<Mutex<String>>,
}

impl Terminal {
    fn wait(&self, text: &str) {
        wait_for(&format!("{text:?} on the terminal"), || {
            self.seen.lock().unwrap().contains(text)
        });
    }

    fn send(&mut self, bytes: &[u8]) {
        self.master.write_all(bytes).unwrap();
    }

    fn resize(&self, rows: u16, columns: u16) {
        let size = libc::winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: TIOCSWINSZ reads one winsize, which lives until the call returns.
        let result =
            unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        assert_eq!(result, 0);
    }
}

fn receive(listener: &UnixListener) -> Terminal {
    let (stream, _) = listener.accept().unwrap();
    let mut data = [0; 256];
    let mut parts = [IoSliceMut::new(&mut data)];
    let mut space = nix::cmsg_space!([i32; 1]);
    let message = recvmsg::<()>(
        stream.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )
    .unwrap();
    let fd = message
        .cmsgs()
        .unwrap()
        .find_map(|message| match message {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
            _ => None,
        })
        .expect("a descriptor came with the message");
    // SAFETY: the descriptor was made by recvmsg just now and has no other owner.
    let master = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let seen = Arc::new(Mutex::new(String::new()));
    let (mut reader, sink) = (master.try_clone().unwrap(), Arc::clone(&seen));
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        // A terminal without a process on the other side reads as EIO.
        while let Ok(count @ 1..) = reader.read(&mut buffer) {
            sink.lock()
                .unwrap()
                .push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
    });
    Terminal { master, seen }
}

fn with_terminal(bundle: &Bundle) -> (Container<'_>, Terminal) {
    let path = bundle.path().join("console.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let container = bundle.container(&crate::support::new_id());
    let output = container.try_create(&["--console-socket", path.to_str().unwrap()]);
    assert!(output.status.success(), "{}", crate::support::show(&output));
    let terminal = receive(&listener);
    (container, terminal)
}

fn shell(script: &str) -> Bundle {
    Bundle::sh(script).edit(|spec| spec["process"]["terminal"] = json!(true))
}

#[test]
fn the_process_has_a_terminal() {
    let bundle = shell("tty; test -t 0 && test -t 1 && test -t 2 && echo all three");
    let (container, terminal) = with_terminal(&bundle);
    container.ok(&["start"]);
    terminal.wait("all three");
    container.wait_status("stopped");
}

#[test]
fn input_is_echoed_and_read() {
    let bundle = shell("read line; echo got $line");
    let (container, mut terminal) = with_terminal(&bundle);
    container.ok(&["start"]);
    terminal.send(b"hello\n");
    terminal.wait("got hello");
}

#[test]
fn a_resize_is_seen_by_the_program() {
    let bundle = shell("trap 'stty size; exit' WINCH; echo up; while :; do sleep 0.2; done");
    let (container, terminal) = with_terminal(&bundle);
    container.ok(&["start"]);
    terminal.wait("up");
    terminal.resize(44, 133);
    terminal.wait("44 133");
}

#[test]
fn a_size_given_before_the_start_is_there_at_the_start() {
    let bundle = shell("stty size")
        .edit(|spec| spec["process"]["consoleSize"] = json!({"height": 31, "width": 97}));
    let (container, terminal) = with_terminal(&bundle);
    container.ok(&["start"]);
    terminal.wait("31 97");
}

#[test]
fn control_c_interrupts_the_foreground_process() {
    let bundle = shell("trap 'echo interrupted; exit 3' INT; echo up; while :; do sleep 0.2; done");
    let (container, mut terminal) = with_terminal(&bundle);
    container.ok(&["start"]);
    terminal.wait("up");
    terminal.send(b"\x03");
    terminal.wait("interrupted");
    container.wait_status("stopped");
}
