// SPDX-License-Identifier: Apache-2.0

//! Stands in for the VMM with a guest in it, where there is no KVM: it takes the place of `caisson-vmm`, speaks the
//! whole protocol, and runs containers' programs as plain processes of this machine.
//!
//! It shows what the host side does with every answer and every death; what real guests do is for the tests in
//! the testbed. The word `fake=…` on the kernel command line makes it misbehave.

#![expect(
    clippy::unwrap_used,
    reason = "a program of the tests: what it cannot do fails the test"
)]

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio as ProcessStdio;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use caisson_protocol::PROTOCOL_VERSION;
use caisson_protocol::agent::agent::*;
use caisson_protocol::agent::agent_ttrpc::{Agent, create_agent};
use caisson_protocol::control::{ExitCause, VmEvent};
use caisson_protocol::error::ErrorCode;
use caisson_protocol::ports::{AGENT_RPC, HOST_READY, Ready, StdioHello, Stream};
use caisson_protocol::vm::VmConfig;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use ttrpc::r#async::TtrpcContext;

type Answer<T> = ttrpc::Result<T>;

struct Process {
    args: Vec<String>,
    /// The program's ends of its streams until it starts.
    theirs: HashMap<Stream, OwnedFd>,
    /// Our ends until the host attaches.
    ours: HashMap<Stream, std::os::unix::net::UnixStream>,
    pid: Option<i32>,
    /// Exit status, once it has ended.
    exit: watch::Sender<Option<u32>>,
}

#[derive(Clone, Default)]
struct Guest {
    processes: Arc<Mutex<HashMap<(String, String), Process>>>,
    fake: String,
    status_fd: i32,
}

fn event(fd: i32, event: &VmEvent) {
    let mut line = serde_json::to_vec(event).unwrap();
    line.push(b'\n');
    let path = format!("/proc/self/fd/{fd}");
    let mut pipe = OpenOptions::new().write(true).open(path).unwrap();
    pipe.write_all(&line).unwrap();
}

impl Guest {
    fn end(&self, cause: ExitCause) -> ! {
        let console_tail = "last words of the kernel\n".to_owned();
        let exited = VmEvent::Exited {
            cause,
            console_tail,
        };
        event(self.status_fd, &exited);
        std::process::exit(0);
    }

    fn add(&self, key: (String, String), args: Vec<String>, stdio: &Stdio) -> Answer<()> {
        let program = args.first().cloned().unwrap_or_default();
        let found = std::path::Path::new(&program).is_absolute()
            || std::env::split_paths("/usr/bin:/bin").any(|dir| dir.join(&program).exists());
        if !found {
            return Err(ErrorCode::CommandNotFound.to_ttrpc(program));
        }
        if program.starts_with("/etc") {
            return Err(ErrorCode::CommandNotExecutable.to_ttrpc(program));
        }
        let (mut theirs, mut ours) = (HashMap::new(), HashMap::new());
        for (asked, stream) in [
            (stdio.stdin, Stream::Stdin),
            (stdio.stdout, Stream::Stdout),
            (stdio.stderr, Stream::Stderr),
        ] {
            if asked {
                let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
                theirs.insert(stream, OwnedFd::from(a));
                ours.insert(stream, b);
            }
        }
        let process = Process {
            args,
            theirs,
            ours,
            pid: None,
            exit: watch::channel(None).0,
        };
        self.processes.lock().unwrap().insert(key, process);
        Ok(())
    }

    fn start(&self, key: &(String, String)) -> Answer<()> {
        let mut processes = self.processes.lock().unwrap();
        let process = processes
            .get_mut(key)
            .ok_or_else(|| ErrorCode::NotFound.to_ttrpc("no such process"))?;
        if process.pid.is_some() || process.exit.borrow().is_some() {
            return Err(ErrorCode::FailedPrecondition.to_ttrpc("started already"));
        }
        let mut stdio = |stream| {
            let fd = process.theirs.remove(&stream);
            fd.map_or_else(ProcessStdio::null, ProcessStdio::from)
        };
        let (stdin, stdout, stderr) = (
            stdio(Stream::Stdin),
            stdio(Stream::Stdout),
            stdio(Stream::Stderr),
        );
        let mut child = tokio::process::Command::new(&process.args[0])
            .args(&process.args[1..])
            .env("PATH", "/usr/bin:/bin")
            .stdin(stdin)
            .stdout(stdout)
            .stderr(stderr)
            .spawn()
            .unwrap();
        process.pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        let exit = process.exit.clone();
        tokio::spawn(async move {
            let status = child.wait().await.unwrap();
            let code = status.code().or(status.signal().map(|s| s + 128));
            exit.send_replace(code.and_then(|code| u32::try_from(code).ok()));
        });
        Ok(())
    }
}

#[async_trait]
impl Agent for Guest {
    async fn handshake(&self, _: &TtrpcContext, _: HandshakeRequest) -> Answer<HandshakeResponse> {
        Ok(HandshakeResponse {
            protocol_version: PROTOCOL_VERSION,
            ..Default::default()
        })
    }

    async fn create_sandbox(&self, _: &TtrpcContext, _: CreateSandboxRequest) -> Answer<Empty> {
        if self.fake == "dies-in-create" {
            self.end(ExitCause::TripleFault {});
        }
        Ok(Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> Answer<CreateContainerResponse> {
        let spec: serde_json::Value = serde_json::from_slice(&request.spec_json).unwrap();
        let args = serde_json::from_value(spec["process"]["args"].clone()).unwrap();
        let stdio = request.stdio.into_option().unwrap_or_default();
        self.add((request.container_id, String::new()), args, &stdio)?;
        Ok(CreateContainerResponse::new())
    }

    async fn start_container(&self, _: &TtrpcContext, request: ContainerRequest) -> Answer<Empty> {
        self.start(&(request.container_id, String::new()))?;
        Ok(Empty::new())
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> Answer<ExecProcessResponse> {
        let process: serde_json::Value = serde_json::from_slice(&request.process_json).unwrap();
        let args = serde_json::from_value(process["args"].clone()).unwrap();
        let key = (request.container_id, request.exec_id);
        let stdio = request.stdio.into_option().unwrap_or_default();
        self.add(key.clone(), args, &stdio)?;
        self.start(&key)?;
        Ok(ExecProcessResponse::new())
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: SignalProcessRequest,
    ) -> Answer<Empty> {
        if self.fake == "ignores-signals" {
            return Ok(Empty::new());
        }
        if self.fake == "hangs-on-signals" {
            std::future::pending::<()>().await;
        }
        let mut processes = self.processes.lock().unwrap();
        let process = processes.get_mut(&(request.container_id, request.exec_id));
        let process = process.ok_or_else(|| ErrorCode::NotFound.to_ttrpc("no such process"))?;
        let signal = i32::try_from(request.signal).unwrap();
        match process.pid.and_then(rustix::process::Pid::from_raw) {
            Some(pid) => {
                let signal = rustix::process::Signal::from_named_raw(signal).unwrap();
                rustix::process::kill_process(pid, signal).unwrap_or_default();
            }
            None => {
                process.exit.send_replace(Some(128 + request.signal));
                process.theirs.clear();
            }
        }
        Ok(Empty::new())
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: ProcessRequest,
    ) -> Answer<WaitProcessResponse> {
        let key = (request.container_id, request.exec_id);
        let exit = {
            let processes = self.processes.lock().unwrap();
            processes.get(&key).map(|process| process.exit.subscribe())
        };
        let mut exit = exit.ok_or_else(|| ErrorCode::NotFound.to_ttrpc("no such process"))?;
        let status = *exit.wait_for(Option::is_some).await.unwrap();
        Ok(WaitProcessResponse {
            exit_status: status.unwrap(),
            ..Default::default()
        })
    }

    async fn remove_process(&self, _: &TtrpcContext, _: ProcessRequest) -> Answer<Empty> {
        Ok(Empty::new())
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        _: ContainerRequest,
    ) -> Answer<ListProcessesResponse> {
        let processes = self.processes.lock().unwrap();
        let infos = processes.values().map(|process| ProcessInfo {
            pid: process.pid.unwrap_or(0).unsigned_abs(),
            command: process.args.join(" "),
            ..Default::default()
        });
        Ok(ListProcessesResponse {
            processes: infos.collect(),
            ..Default::default()
        })
    }

    async fn pause_container(&self, _: &TtrpcContext, _: ContainerRequest) -> Answer<Empty> {
        Ok(Empty::new())
    }

    async fn resume_container(&self, _: &TtrpcContext, _: ContainerRequest) -> Answer<Empty> {
        Ok(Empty::new())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> Answer<Empty> {
        let guest = self.clone();
        tokio::spawn(async move {
            tokio::task::yield_now().await;
            guest.end(ExitCause::GuestReset {});
        });
        Ok(Empty::new())
    }
}

/// `CONNECT <port>` and what comes after it.
async fn serve(guest: Guest, mut host: UnixStream) -> std::io::Result<()> {
    let line = read_line(&mut host).await?;
    let port: u32 = line.strip_prefix("CONNECT ").unwrap().parse().unwrap();
    host.write_all(b"OK 1\n").await?;
    if port == AGENT_RPC {
        let mut agent = UnixStream::connect("agent.sock").await?;
        tokio::io::copy_bidirectional(&mut host, &mut agent).await?;
        return Ok(());
    }
    let hello: StdioHello = serde_json::from_str(&read_line(&mut host).await?)?;
    let ours = {
        let mut processes = guest.processes.lock().unwrap();
        let process = processes.get_mut(&(hello.container, hello.exec));
        process.and_then(|process| process.ours.remove(&hello.stream))
    };
    let Some(ours) = ours else {
        return host.write_all(b"ERR no such stream\n").await;
    };
    host.write_all(b"OK\n").await?;
    ours.set_nonblocking(true)?;
    let mut ours = UnixStream::from_std(ours)?;
    tokio::io::copy_bidirectional(&mut host, &mut ours).await?;
    Ok(())
}

async fn read_line(stream: &mut UnixStream) -> std::io::Result<String> {
    let mut line = String::new();
    loop {
        match stream.read_u8().await? {
            b'\n' => return Ok(line),
            byte => line.push(char::from(byte)),
        }
    }
}

/// The control socket: only what the host side asks for.
async fn control(listener: UnixListener) {
    while let Ok((stream, _)) = listener.accept().await {
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        stream.read_line(&mut line).await.unwrap();
        assert!(line.contains("console"), "{line}");
        let answer = b"{\"result\":\"console\",\"text\":\"stuck here\",\"dropped_bytes\":0}\n";
        stream.get_mut().write_all(answer).await.unwrap();
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    assert_eq!(
        arguments[1..4],
        ["--die-with-parent", "--config-fd", "stdin"]
    );
    let status_fd = arguments[5].parse().unwrap();
    let config: VmConfig = serde_json::from_reader(std::io::stdin()).unwrap();
    let fake = config
        .cmdline
        .split(' ')
        .find_map(|w| w.strip_prefix("fake="));
    let guest = Guest {
        fake: fake.unwrap_or("").to_owned(),
        status_fd,
        ..Default::default()
    };
    // What the jail of the next issue will rely on: the served directory is there, and only here.
    assert!(
        config.fs[0]
            .directory
            .join(&config.id)
            .join("rootfs")
            .is_dir()
    );
    let control_listener = UnixListener::bind(&config.control_socket).unwrap();
    tokio::spawn(control(control_listener));
    let started = VmEvent::Started {
        exec_ns: 1,
        run_ns: 2,
    };
    event(status_fd, &started);
    let mut protocol_version = PROTOCOL_VERSION;
    match guest.fake.as_str() {
        "panics" => guest.end(ExitCause::GuestPanic {
            line: "Kernel panic - not syncing: fake".to_owned(),
        }),
        "silent" => std::future::pending().await,
        "other-version" => protocol_version += 1,
        _ => {}
    }
    let host = UnixListener::bind(config.vsock.socket_dir.join("vsock.sock")).unwrap();
    let mut server = ttrpc::r#async::Server::new()
        .bind("unix://agent.sock")
        .unwrap()
        .register_service(create_agent(Arc::new(guest.clone())));
    server.start().await.unwrap();
    let port = format!("port-{HOST_READY}.sock");
    let mut ready = UnixStream::connect(config.vsock.socket_dir.join(port))
        .await
        .unwrap();
    let greeting = Ready {
        protocol_version,
        agent_version: "fake".to_owned(),
    };
    let mut line = serde_json::to_vec(&greeting).unwrap();
    line.push(b'\n');
    ready.write_all(&line).await.unwrap();
    loop {
        let (stream, _) = host.accept().await.unwrap();
        let guest = guest.clone();
        tokio::spawn(async move { serve(guest, stream).await.unwrap_or_default() });
    }
}
