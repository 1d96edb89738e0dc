// SPDX-License-Identifier: Apache-2.0

//! Opening the virtio-serial port: it appears, and its host side is connected, some time after boot.
//!
//! Both are told by events: the device node by inotify on /dev, the connection by an edge on the port
//! (until then a read would answer 0, as at the end of a file).

use std::fs::{File, OpenOptions};
use std::io;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

/// The only port that the testbed's machine has.
const PORT: &str = "/dev/vport0p1";

/// Waits for the port and for the host behind it.
pub(crate) fn open() -> Result<File> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC).context("failed to make an inotify")?;
    inotify
        .add_watch("/dev", AddWatchFlags::IN_CREATE)
        .context("failed to watch /dev")?;
    let port = loop {
        match OpenOptions::new().read(true).write(true).open(PORT) {
            Ok(port) => break port,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                inotify
                    .read_events()
                    .context("failed to wait for a device node")?;
            }
            Err(error) => return Err(error).with_context(|| format!("failed to open {PORT}")),
        }
    };
    wait_for_host(&port)?;
    Ok(port)
}

/// Waits until the port is no longer hung up.
fn wait_for_host(port: &File) -> Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("failed to make an epoll")?;
    let wanted = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
    epoll
        .add(port, EpollEvent::new(wanted, 0))
        .context("failed to watch the port")?;
    loop {
        let mut events = [EpollEvent::empty()];
        match epoll.wait(&mut events, EpollTimeout::NONE) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) if events[0].events().contains(EpollFlags::EPOLLERR) => bail!("the port failed"),
            Ok(_) if events[0].events().contains(EpollFlags::EPOLLHUP) => {}
            Ok(_) => return Ok(()),
            Err(errno) => return Err(errno).context("failed to wait for the host on the port"),
        }
    }
}
