// SPDX-License-Identifier: Apache-2.0

//! Machines that run a few instructions instead of a kernel, on this host's KVM.
//!
//! They use nothing that a KVM without hardware virtualization cannot do, so they run wherever /dev/kvm can be
//! opened; elsewhere they are left out, and the end-to-end tests, which bring a KVM, stand for them.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;

use caisson_protocol::control::{ExitCause, MAX_LINE, Request, Response, VmState};
use tempfile::TempDir;

use super::{Machine, with_panic_line};
use crate::boot::kernel::tests::elf;
use crate::builder::{self, BuildError};
use crate::control::ControlServer;
use crate::devices::console_ring::ConsoleRing;
use crate::plan::{VmPlan, host_memory_bytes, tests::config};
use crate::vm::open_kvm;

/// jmp to itself.
const FOREVER: &[u8] = &[0xeb, 0xfe];
/// mov al, 0xfe; out 0x64, al; jmp to itself.
const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe];

/// A machine with `code` as its kernel, or none where there is no KVM.
fn machine(directory: &TempDir, code: &[u8]) -> Option<Machine> {
    if open_kvm().is_err() {
        return None;
    }
    Some(builder::build(plan(directory, &elf(code, true))).unwrap())
}

fn plan(directory: &TempDir, kernel: &[u8]) -> VmPlan {
    let file = |name: &str, content: &[u8]| {
        let path = directory.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    let mut config = config();
    config.memory_mib = 32;
    config.kernel = file("kernel", kernel);
    config.initramfs = file("initramfs", b"x");
    config.control_socket = directory.path().join("control.sock");
    config.vsock.socket_dir = directory.path().to_owned();
    VmPlan::new(config, host_memory_bytes()).unwrap()
}

/// Runs `code` to its end.
fn end_of(code: &[u8]) -> Option<(ExitCause, Machine)> {
    let directory = tempfile::tempdir().unwrap();
    let mut machine = machine(&directory, code)?;
    let path = directory.path().join("control.sock");
    let mut server = ControlServer::bind(&path).unwrap();
    machine.start().unwrap();
    let force = server.run(&mut machine).unwrap();
    Some((machine.shut_down(force), machine))
}

#[test]
fn a_reset_by_the_keyboard_controller_is_the_guests_own_end() {
    if let Some((cause, _)) = end_of(RESET) {
        assert_eq!(cause, ExitCause::GuestReset {});
    }
}

#[test]
fn what_is_sent_to_the_early_console_tells_a_panic() {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03]; // mov dx, 0x3f8
    for byte in b"x\nKernel panic - not syncing: test\n" {
        code.extend([0xb0, *byte, 0xee]); // mov al, byte; out dx, al
    }
    code.extend(RESET);
    if let Some((cause, machine)) = end_of(&code) {
        let line = "Kernel panic - not syncing: test".to_owned();
        assert_eq!(cause, ExitCause::GuestPanic { line });
        assert_eq!(machine.metrics()["vcpu.exits.pio"], 36);
    }
}

#[test]
fn the_first_virtio_device_answers_at_its_place() {
    // mov eax, [0xd0000000]; cmp eax, "virt"; jne forever; reset
    let mut code = vec![
        0xa1, 0, 0, 0, 0xd0, 0x3d, b'v', b'i', b'r', b't', 0x75, 0xfe,
    ];
    code.extend(RESET);
    if let Some((cause, machine)) = end_of(&code) {
        assert_eq!(cause, ExitCause::GuestReset {});
        assert_eq!(machine.metrics()["vcpu.exits.mmio"], 1);
    }
}

#[test]
fn a_fault_without_handlers_is_a_triple_fault() {
    let ud2 = &[0x0f, 0x0b];
    if let Some((cause, _)) = end_of(ud2) {
        assert_eq!(cause, ExitCause::TripleFault {});
    }
}

#[test]
fn a_busy_guest_is_paused_resumed_and_stopped_on_request() {
    let directory = tempfile::tempdir().unwrap();
    let Some(mut machine) = machine(&directory, FOREVER) else {
        return;
    };
    let path = directory.path().join("control.sock");
    let mut server = ControlServer::bind(&path).unwrap();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    machine.start().unwrap();
    let client = std::thread::spawn({
        let path = path.clone();
        move || talk(UnixStream::connect(path).unwrap())
    });
    let force = server.run(&mut machine).unwrap();
    assert!(force);
    assert_eq!(machine.shut_down(force), ExitCause::Stopped {});
    client.join().unwrap();
    drop(server);
    assert!(!path.exists(), "the socket goes with its server");
}

/// Everything a client can ask for.
fn talk(stream: UnixStream) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut ask = |request: Request| -> Response {
        let mut writer = &stream;
        writeln!(writer, "{}", serde_json::to_string(&request).unwrap()).unwrap();
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    };
    let status = |state| Response::Status {
        state,
        vcpus: 1,
        memory_mib: 32,
    };
    assert_eq!(ask(Request::Status {}), status(VmState::Running));
    for _ in 0..10 {
        assert_eq!(ask(Request::Pause {}), Response::Ok {});
        assert_eq!(ask(Request::Pause {}), Response::Ok {});
        assert_eq!(ask(Request::Status {}), status(VmState::Paused));
        assert_eq!(ask(Request::Resume {}), Response::Ok {});
    }
    assert_eq!(ask(Request::Status {}), status(VmState::Running));
    let Response::Metrics { counters } = ask(Request::Metrics {}) else {
        panic!("no metrics");
    };
    assert!(counters["vcpu.exits.interrupted"] > 0);
    assert!(matches!(ask(Request::Console {}), Response::Console { .. }));
    assert_eq!(ask(Request::Stop { force: true }), Response::Ok {});
}

#[test]
fn clients_that_break_the_rules_are_told_and_hung_up_on() {
    let directory = tempfile::tempdir().unwrap();
    let Some(mut machine) = machine(&directory, FOREVER) else {
        return;
    };
    let path = directory.path().join("control.sock");
    let mut server = ControlServer::bind(&path).unwrap();
    machine.start().unwrap();
    let client = std::thread::spawn(move || {
        for line in [b"nonsense\n".to_vec(), vec![b'x'; MAX_LINE]] {
            let mut stream = UnixStream::connect(&path).unwrap();
            stream.write_all(&line).unwrap();
            let mut lines = BufReader::new(stream).lines();
            let answer = lines.next().unwrap().unwrap();
            let answer: Response = serde_json::from_str(&answer).unwrap();
            assert!(matches!(answer, Response::Error { .. }), "{answer:?}");
            assert!(!matches!(lines.next(), Some(Ok(_))), "hung up");
        }
        // More clients than are served at once: the others wait.
        let mut clients: Vec<_> = (0..40)
            .map(|_| UnixStream::connect(&path).unwrap())
            .collect();
        for client in clients.drain(..) {
            let mut writer = &client;
            writeln!(writer, r#"{{"method":"status"}}"#).unwrap();
            let mut line = String::new();
            BufReader::new(&client).read_line(&mut line).unwrap();
            assert!(line.contains("running"), "{line}");
        }
        let mut stream = UnixStream::connect(&path).unwrap();
        stream
            .write_all(b"{\"method\":\"stop\",\"force\":false}\n")
            .unwrap();
    });
    let force = server.run(&mut machine).unwrap();
    assert!(!force);
    assert_eq!(machine.shut_down(force), ExitCause::Stopped {});
    client.join().unwrap();
}

#[test]
fn what_cannot_be_built_says_so() {
    if open_kvm().is_err() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let message = |kernel: &[u8]| {
        let error: BuildError = builder::build(plan(&directory, kernel)).unwrap_err();
        crate::error::chain(&error)
    };
    assert!(message(b"no kernel").contains("is not an ELF file"));
    assert!(message(&elf(FOREVER, false)).contains("no PVH entry note"));
}

#[test]
fn a_reset_after_a_panic_is_a_panic_and_a_requested_stop_is_not() {
    let ring = ConsoleRing::new(4096);
    let reset = ExitCause::GuestReset {};
    assert_eq!(with_panic_line(reset.clone(), &ring), reset);
    ring.write(b"Kernel panic - not syncing: VFS: no root\r\n");
    assert_eq!(
        with_panic_line(reset, &ring),
        ExitCause::GuestPanic {
            line: "Kernel panic - not syncing: VFS: no root".into()
        }
    );
    let stopped = ExitCause::Stopped {};
    assert_eq!(with_panic_line(stopped.clone(), &ring), stopped);
}
