// SPDX-License-Identifier: Apache-2.0

//! The processes behind a testbed: QEMU and one virtio-fs daemon per shared directory.
//!
//! One thread, the keeper, starts them all and waits for them, because a parent-death signal is sent when the
//! thread that started a child ends. It lives exactly as long as the machine.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, getpid, getppid, pidfd_open, set_parent_process_death_signal,
};

use crate::accel::Accel;
use crate::cpio;
use crate::frame::PORT_NAME;
use crate::root::Root;

/// Directories of the initramfs that `testbed-init` mounts on.
const DIRECTORIES: [&str; 7] = ["dev", "proc", "sys", "lower", "upper", "layers", "newroot"];

/// A directory that is given to the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shared {
    pub(crate) tag: String,
    pub(crate) dir: PathBuf,
    /// The host may change it meanwhile, so the guest asks again after a second.
    pub(crate) changes: bool,
}

/// Everything that QEMU is told.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) root: Root,
    pub(crate) init: PathBuf,
    pub(crate) qemu: PathBuf,
    pub(crate) virtiofsd: PathBuf,
    pub(crate) accel: Accel,
    pub(crate) memory_mib: u32,
    pub(crate) cpus: u32,
    pub(crate) shared: Vec<Shared>,
    /// Directory for sockets and logs.
    pub(crate) dir: PathBuf,
    pub(crate) console_log: PathBuf,
}

/// Why the processes could not be started.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A file or socket.
    #[error("failed to {0} {1}")]
    File(&'static str, PathBuf, #[source] io::Error),
    /// A process.
    #[error("failed to start {0}")]
    Start(PathBuf, #[source] io::Error),
    /// The thread that starts them ended early.
    #[error("the thread that keeps the testbed's processes ended")]
    Keeper,
}

/// What the keeper is to do; the end of its channel means "kill".
enum Order {
    WaitForQemu(Duration),
}

/// The running processes. Dropping it kills them and waits until they are gone.
#[derive(Debug)]
pub(crate) struct Machine {
    orders: Option<mpsc::Sender<Order>>,
    keeper: Option<JoinHandle<()>>,
}

impl Machine {
    /// Starts everything; the stream is the machine's port.
    pub(crate) fn start(plan: Plan) -> Result<(Self, UnixStream), MachineError> {
        let (orders, received) = mpsc::channel();
        let (started, outcome) = mpsc::channel();
        let keeper = std::thread::spawn(move || {
            let mut children = Children(Vec::new());
            match children.start(&plan) {
                Ok(port) => {
                    if started.send(Ok(port)).is_ok() {
                        children.keep(&received);
                    }
                }
                Err(error) => {
                    // Whoever waits for the outcome lives until it comes.
                    let _ = started.send(Err(error));
                }
            }
        });
        let machine = Self {
            orders: Some(orders),
            keeper: Some(keeper),
        };
        let port = outcome.recv().map_err(|_| MachineError::Keeper)??;
        Ok((machine, port))
    }

    /// Waits until QEMU has ended, at most so long, and ends the rest.
    pub(crate) fn wait(mut self, limit: Duration) {
        if let Some(orders) = &self.orders {
            // A keeper that has ended has nothing left to wait for.
            let _ = orders.send(Order::WaitForQemu(limit));
        }
        self.end();
    }

    fn end(&mut self) {
        self.orders = None;
        if let Some(keeper) = self.keeper.take() {
            let _ = keeper.join();
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.end();
    }
}

/// The children, QEMU last.
struct Children(Vec<Child>);

impl Children {
    fn start(&mut self, plan: &Plan) -> Result<UnixStream, MachineError> {
        for shared in &plan.shared {
            let daemon = start_virtiofsd(plan, shared)?;
            self.0.push(daemon);
        }
        let initramfs = plan.dir.join("initramfs.cpio");
        let init = fs::read(&plan.init)
            .map_err(|error| MachineError::File("read", plan.init.clone(), error))?;
        cpio::initramfs(&init, &DIRECTORIES)
            .and_then(|archive| fs::write(&initramfs, archive))
            .map_err(|error| MachineError::File("write", initramfs.clone(), error))?;
        let (ours, theirs) = UnixStream::pair()
            .map_err(|error| MachineError::File("make a socket for", plan.qemu.clone(), error))?;
        let mut command = Command::new(&plan.qemu);
        command
            .args(qemu_arguments(plan, &initramfs))
            .stdin(OwnedFd::from(theirs));
        self.0.push(spawn(command, &plan.dir.join("qemu.log"))?);
        Ok(ours)
    }

    fn keep(&self, orders: &mpsc::Receiver<Order>) {
        while let Ok(Order::WaitForQemu(limit)) = orders.recv() {
            let Some(qemu) = self.0.last() else { return };
            wait_for(qemu, limit);
        }
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        for child in self.0.iter_mut().rev() {
            // It may have ended already; `wait` takes it away in any case.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Waits for the end of the child, at most so long. Errors count as its end: it is killed next.
fn wait_for(child: &Child, limit: Duration) {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let Some(pidfd) = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) else {
        return;
    };
    let mut fds = [PollFd::new(
        std::os::fd::AsFd::as_fd(&pidfd),
        PollFlags::POLLIN,
    )];
    let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
    let _ = poll(&mut fds, limit);
}

/// Starts a child that dies with this thread, in a process group of its own (Ctrl-C is the parent's), with
/// its words in `log`.
fn spawn(mut command: Command, log: &Path) -> Result<Child, MachineError> {
    let program = PathBuf::from(command.get_program());
    let open = |error| MachineError::File("write", log.to_owned(), error);
    let file = File::create(log).map_err(open)?;
    command
        .stdout(file.try_clone().map_err(open)?)
        .stderr(file)
        .process_group(0);
    let parent = getpid();
    // SAFETY: between fork and exec this makes two system calls, prctl(2) and getppid(2), both
    // async-signal-safe, and builds its errors without allocating.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // The parent may have died before the call above.
            match getppid() == Some(parent) {
                true => Ok(()),
                false => Err(io::Error::from_raw_os_error(libc::ESRCH)),
            }
        });
    }
    command
        .spawn()
        .map_err(|error| MachineError::Start(program, error))
}

fn socket_path(plan: &Plan, shared: &Shared) -> PathBuf {
    plan.dir.join(format!("{}.sock", shared.tag))
}

/// Starts the daemon for one directory. It is given the listening socket, so QEMU can connect at once.
fn start_virtiofsd(plan: &Plan, shared: &Shared) -> Result<Child, MachineError> {
    let socket = socket_path(plan, shared);
    let listener = UnixListener::bind(&socket)
        .map_err(|error| MachineError::File("listen on", socket.clone(), error))?;
    let cache = if shared.changes { "auto" } else { "always" };
    let dir = shared.dir.display();
    let mut command = Command::new(&plan.virtiofsd);
    command.arg("--fd=0").stdin(OwnedFd::from(listener));
    // Debian 12's daemon, written in C, and the one in Rust that came after it.
    if plan.virtiofsd.starts_with("/usr/lib/qemu") {
        for option in [
            &format!("source={dir}"),
            "sandbox=chroot",
            &format!("cache={cache}"),
            "xattr",
        ] {
            command.args(["-o", option]);
        }
    } else {
        command
            .arg(format!("--shared-dir={dir}"))
            .arg(format!("--cache={cache}"));
        command.args(["--sandbox=chroot", "--xattr"]);
    }
    spawn(
        command,
        &plan.dir.join(format!("virtiofsd-{}.log", shared.tag)),
    )
}

fn qemu_arguments(plan: &Plan, initramfs: &Path) -> Vec<String> {
    let accel: &[&str] = match plan.accel {
        Accel::Kvm => &["-accel", "kvm", "-cpu", "host"],
        Accel::Tcg => &["-accel", "tcg", "-cpu", "max"],
        Accel::InstructionCount => &[
            "-accel",
            "tcg,thread=single",
            "-icount",
            "shift=0,sleep=off",
            "-cpu",
            "max",
        ],
    };
    let mut arguments: Vec<String> = accel.iter().map(|&word| word.to_owned()).collect();
    let mut add = |words: &[&str]| arguments.extend(words.iter().map(|&word| word.to_owned()));
    let memory = plan.memory_mib;
    add(&["-name", "caisson-testbed,process=caisson-testbed"]);
    add(&[
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-M",
        "q35",
    ]);
    add(&["-smp", &plan.cpus.to_string(), "-m", &memory.to_string()]);
    // The daemons map the machine's memory.
    add(&[
        "-object",
        &format!("memory-backend-memfd,id=memory,size={memory}M,share=on"),
    ]);
    add(&["-numa", "node,memdev=memory"]);
    add(&["-kernel", &plan.root.vmlinux.display().to_string()]);
    add(&["-initrd", &initramfs.display().to_string()]);
    add(&["-append", "console=ttyS0 quiet mitigations=off panic=-1"]);
    add(&[
        "-chardev",
        &format!("file,id=console,path={}", plan.console_log.display()),
    ]);
    add(&["-serial", "chardev:console"]);
    // The port's socket is inherited as stdin: no name, nobody else can connect.
    add(&[
        "-chardev",
        "socket,id=port,fd=0",
        "-device",
        "virtio-serial-pci",
    ]);
    add(&[
        "-device",
        &format!("virtserialport,chardev=port,name={PORT_NAME}"),
    ]);
    add(&["-device", "virtio-rng-pci"]);
    for shared in &plan.shared {
        let tag = &shared.tag;
        let path = socket_path(plan, shared);
        add(&[
            "-chardev",
            &format!("socket,id=fs-{tag},path={}", path.display()),
        ]);
        add(&[
            "-device",
            &format!("vhost-user-fs-pci,chardev=fs-{tag},tag={tag},queue-size=1024"),
        ]);
    }
    arguments
}
