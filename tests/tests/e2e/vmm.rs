// SPDX-License-Identifier: Apache-2.0

//! `caisson-vmm` by itself, with guests whose PID 1 is a shell: what no container uses yet, and ways to end.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use caisson_testbed::installed::path_of;
use serde_json::{Value, json};

use crate::parts::newc;
use crate::support::{count, sha256, wait_child, wait_for};

/// What the parts say to one another (protocol/src/lib.rs); the VMM refuses another and names its own.
const PROTOCOL_VERSION: u32 = 1;

/// A microVM; killed when this is dropped.
struct Machine {
    dir: tempfile::TempDir,
    child: Child,
}

impl Machine {
    /// Boots a guest whose PID 1 runs `script`, in a busybox with /proc, /sys and /dev, its output on the console.
    fn start(script: &str, change: impl FnOnce(&mut Value)) -> Self {
        let dir = tempfile::TempDir::new().unwrap();
        let initramfs = dir.path().join("initramfs");
        fs::write(&initramfs, archive(script)).unwrap();
        fs::create_dir(dir.path().join("vsock")).unwrap();
        let mut config = json!({
            "protocol_version": PROTOCOL_VERSION,
            "id": "test",
            "kernel": path_of("kernel").unwrap(),
            "initramfs": initramfs,
            "cmdline": "",
            "vcpus": 1,
            "memory_mib": 128,
            "control_socket": dir.path().join("control.sock"),
            "vsock": { "guest_cid": 3, "socket_dir": dir.path().join("vsock") },
        });
        change(&mut config);
        // The descriptor for its events may be none of the three standard ones.
        let mut child = Command::new("sh")
            .args(["-c", "exec \"$0\" --config-fd stdin --status-fd 3 3>\"$1\""])
            .arg(path_of("vmm").unwrap())
            .arg(dir.path().join("events"))
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(config.to_string().as_bytes()).unwrap();
        Self { dir, child }
    }

    /// Waits for its end; says why it ended, and the end of its console.
    fn ended(mut self) -> (Value, String) {
        let status = wait_child(&mut self.child);
        let events = fs::read_to_string(self.dir.path().join("events")).unwrap();
        println!("{status}: {events}");
        let last: Value = serde_json::from_str(events.lines().last().unwrap()).unwrap();
        assert_eq!(last["event"], "exited");
        (last["cause"].clone(), text(&last["console_tail"]))
    }

    /// Asks on the control socket.
    fn ask(&self, request: &Value) -> Value {
        let mut socket = UnixStream::connect(self.dir.path().join("control.sock")).unwrap();
        writeln!(socket, "{request}").unwrap();
        let mut line = String::new();
        BufReader::new(socket).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn console(&self) -> String {
        let answer = self.ask(&json!({ "method": "console" }));
        text(&answer["text"])
    }

    fn wait_console(&self, text: &str) {
        wait_for("the control socket", || {
            self.dir.path().join("control.sock").exists()
        });
        wait_for(text, || self.console().contains(text));
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a console had, with plain line ends.
fn text(console: &Value) -> String {
    console.as_str().unwrap().replace('\r', "")
}

fn archive(script: &str) -> Vec<u8> {
    let init = format!(
        "#!/bin/busybox sh\n/bin/busybox --install -s /bin\nmount -t devtmpfs dev /dev\nmount -t proc proc /proc\n\
         mount -t sysfs sys /sys\nexec >/dev/hvc0 2>&1\n{script}\n"
    );
    let mut archive = Vec::new();
    for name in ["bin", "dev", "proc", "sys", "mnt", "tmp"] {
        archive.extend(newc(name, 0o040_755, b""));
    }
    let busybox = fs::read("/bin/busybox").unwrap();
    archive.extend(newc("bin/busybox", 0o100_755, &busybox));
    archive.extend(newc("init", 0o100_755, init.as_bytes()));
    archive.extend(newc("TRAILER!!!", 0, b""));
    archive
}

/// A file of random bytes.
fn random(path: &Path, mib: usize) {
    let status = Command::new("dd")
        .args([
            "if=/dev/urandom",
            "bs=1M",
            "status=none",
            &format!("count={mib}"),
        ])
        .arg(format!("of={}", path.display()))
        .status();
    assert!(status.unwrap().success());
}

/// A sparse file with an ext4 file system.
fn ext4(path: &Path) {
    let file = fs::File::create(path).unwrap();
    file.set_len(512 << 20).unwrap();
    let made = Command::new("mkfs.ext4").arg("-q").arg(path).status();
    assert!(made.unwrap().success());
}

fn disk(serial: &str, path: &Path, read_only: bool, queues: u16) -> Value {
    json!({ "serial": serial, "path": path, "read_only": read_only, "queues": queues })
}

/// KiB that a file takes on its disk.
fn kib(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).unwrap().blocks() / 2
}

#[test]
fn a_disk_keeps_what_a_guest_writes_and_gives_back_what_it_discards() {
    let dir = tempfile::TempDir::new().unwrap();
    let (data, seed) = (dir.path().join("data"), dir.path().join("seed"));
    let mib = count("MiB through disks", 16, 48);
    ext4(&data);
    random(&seed, mib);
    let before = kib(&data);
    // The file stays, one that is twice as long is discarded; the disk that may only be read takes nothing.
    let script = "set -e
cat /sys/block/vda/serial /sys/block/vdb/serial; echo
cat /sys/block/vda/ro /sys/block/vdb/ro
mount -t ext4 /dev/vda /mnt
cat /dev/vdb >/mnt/copy
cat /dev/vdb /dev/vdb >/mnt/gone
sync
if echo x 2>/dev/null >/dev/vdb; then echo written to a read-only disk; fi
mount -o remount,ro /mnt; mount -o remount,rw /mnt
rm /mnt/gone
sync
fstrim -v /mnt
umount /mnt
echo done
reboot -f";
    let machine = Machine::start(script, |config| {
        config["blk"] = json!([disk("data", &data, false, 2), disk("seed", &seed, true, 1)]);
        config["vcpus"] = json!(2);
    });
    let (cause, console) = machine.ended();
    assert_eq!(cause, json!({ "cause": "guest-reset" }), "{console}");
    assert!(console.contains("dataseed\n0\n1\n"), "{console}");
    assert!(console.ends_with("done\n"), "{console}");
    assert!(!console.contains("read-only disk"), "{console}");

    let checked = Command::new("e2fsck").arg("-fn").arg(&data).output();
    let checked = checked.unwrap();
    assert!(checked.status.success(), "{checked:?}");
    let copy = dir.path().join("copy");
    let dumped = Command::new("debugfs")
        .args(["-R", &format!("dump /copy {}", copy.display())])
        .arg(&data)
        .status();
    assert!(dumped.unwrap().success());
    assert_eq!(sha256(&copy), sha256(&seed));
    let now = kib(&data);
    let written = u64::try_from(mib).unwrap() << 10;
    println!("KiB of the image: {before} at first, {now} with {written} in it");
    assert!(now >= written, "the file is there");
    assert!(
        now < before + 2 * written,
        "what was discarded takes no room"
    );
}

#[test]
fn what_a_guest_has_synced_is_in_the_image_when_it_is_killed() {
    let dir = tempfile::TempDir::new().unwrap();
    let data = dir.path().join("data");
    ext4(&data);
    let script =
        "mount -t ext4 /dev/vda /mnt && echo kept >/mnt/file && sync && echo synced; sleep 1000";
    let machine = Machine::start(script, |config| {
        config["blk"] = json!([disk("data", &data, false, 1)]);
    });
    machine.wait_console("synced\n");
    drop(machine);
    let repaired = Command::new("e2fsck").arg("-fp").arg(&data).status();
    // 1: there was a journal to replay.
    assert!(matches!(repaired.unwrap().code(), Some(0 | 1)));
    let read = Command::new("debugfs")
        .args(["-R", "cat /file"])
        .arg(&data)
        .output();
    assert_eq!(read.unwrap().stdout, b"kept\n");
}

#[test]
fn each_end_of_a_guest_has_its_own_cause() {
    let cause = |script: &str, words: &str| {
        let machine = Machine::start(script, |config| config["cmdline"] = json!(words));
        machine.ended().0
    };
    assert_eq!(cause("reboot -f", ""), json!({ "cause": "guest-reset" }));
    assert_eq!(
        cause("reboot -f", "reboot=t"),
        json!({ "cause": "triple-fault" })
    );
    let panic = cause("exit 7", "");
    assert_eq!(panic["cause"], "guest-panic");
    let line = panic["line"].as_str().unwrap();
    assert!(
        line.contains("Attempted to kill init! exitcode=0x00000700"),
        "{line}"
    );
}

#[test]
fn the_control_socket_pauses_resumes_and_stops() {
    let ticking = "i=0; while true; do i=$((i+1)); echo tick $i; usleep 20000; done";
    let machine = Machine::start(ticking, |_| ());
    machine.wait_console("tick 3\n");
    let status = json!({ "method": "status" });
    let ok = json!({ "result": "ok" });
    assert_eq!(
        machine.ask(&status),
        json!({ "result": "status", "state": "running", "vcpus": 1, "memory_mib": 128 })
    );
    for _ in 0..2 {
        assert_eq!(machine.ask(&json!({ "method": "pause" })), ok);
        assert_eq!(machine.ask(&status)["state"], "paused");
    }
    let still = machine.console();
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert_eq!(machine.console(), still, "a paused guest says nothing");
    assert_eq!(machine.ask(&json!({ "method": "resume" })), ok);
    wait_for("the guest to go on", || machine.console() != still);
    let counters = machine.ask(&json!({ "method": "metrics" }));
    assert!(
        counters["counters"]["console.bytes"].as_u64().unwrap() > 0,
        "{counters}"
    );
    assert_eq!(
        machine.ask(&json!({ "method": "explode" }))["result"],
        "error"
    );
    assert_eq!(
        machine.ask(&json!({ "method": "stop", "force": false })),
        ok
    );
    assert_eq!(machine.ended().0, json!({ "cause": "stopped" }));

    let machine = Machine::start(ticking, |_| ());
    machine.wait_console("tick 1\n");
    assert_eq!(machine.ask(&json!({ "method": "pause" })), ok);
    assert_eq!(machine.ask(&json!({ "method": "stop", "force": true })), ok);
    assert_eq!(machine.ended().0, json!({ "cause": "stopped" }));
}
