// SPDX-License-Identifier: Apache-2.0

//! The root file system and volumes over virtio-fs: both sides see the same.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::process::Command;

use serde_json::json;

use crate::support::{Bundle, count, is_caisson, sha256, show};

#[test]
fn what_the_container_writes_is_on_the_host() {
    let bundle = Bundle::sh(
        "umask 022; echo content > /tmp/file; chmod 640 /tmp/file; chown 1000:2000 /tmp/file; \
         touch -d '2001-02-03 04:05:06' /tmp/file; mkdir -m 1770 /tmp/dir; ln -s file /tmp/link; \
         ln /tmp/file /tmp/hard; mkfifo /tmp/fifo; chmod 4755 /tmp/dir",
    );
    let output = bundle.run();
    assert!(output.status.success(), "{}", show(&output));
    let file = fs::metadata(bundle.root("tmp/file")).unwrap();
    assert_eq!(
        fs::read_to_string(bundle.root("tmp/file")).unwrap(),
        "content\n"
    );
    assert_eq!(
        (file.uid(), file.gid(), file.mode() & 0o7777),
        (1000, 2000, 0o640)
    );
    assert_eq!(file.mtime(), 981_173_106);
    assert_eq!(file.nlink(), 2);
    assert_eq!(
        fs::metadata(bundle.root("tmp/hard")).unwrap().ino(),
        file.ino()
    );
    assert_eq!(
        fs::read_link(bundle.root("tmp/link")).unwrap().to_str(),
        Some("file")
    );
    assert_eq!(
        fs::metadata(bundle.root("tmp/dir"))
            .unwrap()
            .permissions()
            .mode()
            & 0o7777,
        0o4755
    );
    assert!(
        fs::metadata(bundle.root("tmp/fifo"))
            .unwrap()
            .file_type()
            .is_fifo()
    );
}

#[test]
fn a_device_node_cannot_be_made_on_the_host() {
    let bundle =
        Bundle::sh("mknod /tmp/null c 1 3 || echo refused; mknod /tmp/disk b 8 0 || echo refused");
    let text = bundle.stdout();
    if is_caisson() {
        assert_eq!(text, "refused\nrefused\n");
        assert!(!bundle.root("tmp/null").exists() && !bundle.root("tmp/disk").exists());
    }
}

#[test]
fn what_the_host_writes_is_seen_by_the_guest() {
    let bundle = Bundle::sh(
        "while ! test -e /tmp/now; do sleep 0.1; done; cat /tmp/now; stat -c %u:%a /tmp/now",
    );
    let container = bundle.start();
    fs::write(bundle.root("tmp/new"), "from the host\n").unwrap();
    fs::set_permissions(bundle.root("tmp/new"), fs::Permissions::from_mode(0o604)).unwrap();
    std::os::unix::fs::chown(bundle.root("tmp/new"), Some(77), None).unwrap();
    fs::rename(bundle.root("tmp/new"), bundle.root("tmp/now")).unwrap();
    container.wait_status("stopped");
    assert_eq!(container.output(), "from the host\n77:604\n");
}

#[test]
fn extended_attributes_go_both_ways() {
    // Debian's tools by a bind mount: busybox has none for attributes.
    let bundle = debian(
        "setfattr -n user.guest -v one /work/file && getfattr --only-values -n user.host /work/file",
    );
    fs::write(bundle.path().join("work/file"), "x").unwrap();
    let set = Command::new("setfattr")
        .args(["-n", "user.host", "-v", "two"])
        .arg(bundle.path().join("work/file"))
        .status()
        .unwrap();
    assert!(set.success());
    assert_eq!(bundle.stdout(), "two");
    let get = Command::new("getfattr")
        .args(["--only-values", "-n", "user.guest"])
        .arg(bundle.path().join("work/file"))
        .output()
        .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&get.stdout),
        "one",
        "{}",
        show(&get)
    );
}

#[test]
fn access_control_lists_are_the_hosts_and_decide_in_the_guest() {
    let bundle = debian(
        "cd /work; umask 077; setfacl -m u:1234:rw file; setfacl -d -m u:1234:rwx,o::r dir; : > dir/new; \
         getfacl -cE dir/new",
    );
    let work = bundle.path().join("work");
    fs::write(work.join("file"), "x\n").unwrap();
    fs::set_permissions(work.join("file"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::create_dir(work.join("dir")).unwrap();
    // The directory's default list stands above the umask.
    let inherited = "user::rw-\nuser:1234:rwx\ngroup::r-x\nmask::rw-\nother::r--\n\n";
    assert_eq!(bundle.stdout(), inherited);
    let on_host = |name: &str| {
        let get = Command::new("getfacl")
            .arg("-cnE")
            .arg(work.join(name))
            .output()
            .unwrap();
        String::from_utf8_lossy(&get.stdout).into_owned()
    };
    assert_eq!(on_host("dir/new"), inherited);
    let set = "user::rw-\nuser:1234:rw-\ngroup::---\nmask::rw-\nother::---\n\n";
    assert_eq!(on_host("file"), set);

    // Whom the list names may, others may not.
    let mut bundle = bundle.args(&["/usr/bin/bash", "-c", "echo $UID >> /work/file"]);
    for (user, may) in [(1234, true), (1235, false)] {
        bundle = bundle.edit(|spec| spec["process"]["user"] = json!({"uid": user, "gid": 1}));
        let output = bundle.run();
        assert_eq!(output.status.success(), may, "{user}: {}", show(&output));
    }
    assert_eq!(fs::read_to_string(work.join("file")).unwrap(), "x\n1234\n");
}

/// A container whose root is the testbed's own (read-only), with `/work` from the bundle, running a script of
/// bash.
fn debian(script: &str) -> Bundle {
    let bundle = Bundle::busybox();
    let work = bundle.path().join("work");
    fs::create_dir(&work).unwrap();
    for name in ["usr", "lib", "lib64", "etc", "work"] {
        fs::create_dir_all(bundle.root(name)).unwrap();
    }
    let mut bundle = bundle.args(&["/usr/bin/bash", "-ec", script]);
    for name in ["/usr", "/etc"] {
        bundle = bundle.mount(
            json!({"destination": name, "type": "bind", "source": name, "options": ["rbind", "ro"]}),
        );
    }
    fs::remove_dir(bundle.root("lib")).unwrap();
    fs::remove_dir(bundle.root("lib64")).unwrap();
    std::os::unix::fs::symlink("usr/lib", bundle.root("lib")).unwrap();
    std::os::unix::fs::symlink("usr/lib64", bundle.root("lib64")).unwrap();
    bundle.mount(
        json!({"destination": "/work", "type": "bind", "source": work, "options": ["rbind", "rw"]}),
    )
}

#[test]
fn ten_thousand_small_files() {
    let files = count("small files", 2_000, 10_000);
    let bundle = Bundle::sh(&format!(
        "mkdir /tmp/many; cd /tmp/many; i=0; while [ $i -lt {files} ]; do echo $i > f$i; i=$((i+1)); done; \
         ls | wc -l; rm f0; ls | wc -l"
    ));
    assert_eq!(bundle.stdout(), format!("{files}\n{}\n", files - 1));
    let seen = fs::read_dir(bundle.root("tmp/many")).unwrap().count();
    assert_eq!(seen, files - 1);
    for n in [1, files / 2, files - 1] {
        let text = fs::read_to_string(bundle.root(&format!("tmp/many/f{n}"))).unwrap();
        assert_eq!(text, format!("{n}\n"));
    }
}

#[test]
fn a_large_file_has_the_same_checksum_on_both_sides() {
    let mib = count("MiB of the large file", 64, 256);
    let bundle = Bundle::sh(&format!(
        "dd if=/dev/urandom of=/tmp/large bs=1M count={mib} 2>/dev/null; sha256sum < /tmp/large; \
         sha256sum < /tmp/other"
    ));
    let other = bundle.root("tmp/other");
    let made = Command::new("dd")
        .args(["if=/dev/urandom", "bs=1M", &format!("count={mib}")])
        .arg(format!("of={}", other.display()))
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(made.success());
    let text = bundle.stdout();
    let sums: Vec<&str> = text
        .lines()
        .map(|line| line.split(' ').next().unwrap())
        .collect();
    assert_eq!(sums, [sha256(&bundle.root("tmp/large")), sha256(&other)]);
}

#[test]
fn random_reads_and_writes_keep_their_content() {
    // Every block holds its own number, written in a shuffled order and read back in another.
    let script = r"
import os, random
rng = random.Random(7)
blocks = list(range(600))
fd = os.open('/work/random', os.O_RDWR | os.O_CREAT)
for _ in range(2):
    rng.shuffle(blocks)
    for n in blocks:
        os.pwrite(fd, n.to_bytes(8, 'little') * 512, n * 4096)
    rng.shuffle(blocks)
    for n in blocks:
        assert os.pread(fd, 4096, n * 4096) == n.to_bytes(8, 'little') * 512, n
os.fsync(fd)
os.ftruncate(fd, 4096 * 599)
assert os.pread(fd, 4096, 599 * 4096) == b''
import fcntl, mmap
m = mmap.mmap(fd, 4096 * 10)
assert m[4096:4104] == (1).to_bytes(8, 'little')
m[0:8] = b'mappedup'
m.flush()
print('ok')
";
    let bundle = debian("python3 /work/blocks.py");
    fs::write(bundle.path().join("work/blocks.py"), script).unwrap();
    assert_eq!(bundle.stdout(), "ok\n");
    let data = fs::read(bundle.path().join("work/random")).unwrap();
    assert_eq!(data.len(), 4096 * 599);
    assert_eq!(&data[..8], b"mappedup");
    for n in 1_usize..599 {
        assert_eq!(&data[n * 4096..n * 4096 + 8], (n as u64).to_le_bytes());
    }
}

#[test]
fn file_calls_beyond_read_and_write() {
    let script = r"
import os, ctypes, errno, fcntl
os.chdir('/work')
libc = ctypes.CDLL(None, use_errno=True)
open('a', 'w').write('a'); open('b', 'w').write('b')
AT = -100
assert libc.renameat2(AT, b'a', AT, b'b', 1) == -1 and ctypes.get_errno() == errno.EEXIST
assert libc.renameat2(AT, b'a', AT, b'b', 2) == 0
assert open('a').read() == 'b' and open('b').read() == 'a'
fd = os.open('.', os.O_TMPFILE | os.O_RDWR, 0o600)
os.write(fd, b'temporary')
assert os.fstat(fd).st_nlink == 0 and 'named' not in os.listdir('.')
assert libc.linkat(AT, b'/proc/self/fd/%d' % fd, AT, b'named', 0x400) == 0, ctypes.get_errno()
assert os.fstat(fd).st_nlink == 1
assert open('named').read() == 'temporary'
fd = os.open('sparse', os.O_RDWR | os.O_CREAT)
os.posix_fallocate(fd, 0, 1 << 20)
assert os.fstat(fd).st_size == 1 << 20
src = os.open('named', os.O_RDONLY)
assert os.copy_file_range(src, fd, 9, 0, 100) == 9
assert os.pread(fd, 9, 100) == b'temporary'
assert os.lseek(fd, 0, os.SEEK_DATA) == 0
fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
other = os.open('sparse', os.O_RDWR)
try:
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    raise SystemExit('locked twice')
except BlockingIOError:
    pass
fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 10)
held = os.open('held', os.O_RDWR | os.O_CREAT)
os.unlink('held')
os.write(held, b'still here')
assert os.pread(held, 10, 0) == b'still here'
os.mkdir('dir'); open('dir/x', 'w').close()
try:
    os.rmdir('dir')
    raise SystemExit('removed a full directory')
except OSError as e:
    assert e.errno == errno.ENOTEMPTY
import socket
s = socket.socket(socket.AF_UNIX); s.bind('sock')
assert os.statvfs('.').f_bsize > 0
os.setxattr('a', 'user.x', b'1'); assert os.listxattr('a') == ['user.x']
os.removexattr('a', 'user.x'); assert os.listxattr('a') == []
assert len('n' * 255) == 255 and open('n' * 255, 'w')
try:
    open('n' * 256, 'w')
    raise SystemExit('name too long was taken')
except OSError as e:
    assert e.errno == errno.ENAMETOOLONG
print('ok')
";
    let bundle = debian("python3 /work/calls.py");
    fs::write(bundle.path().join("work/calls.py"), script).unwrap();
    assert_eq!(bundle.stdout(), "ok\n");
}

#[test]
fn a_git_clone_is_sound() {
    let bundle = debian(
        "export HOME=/work GIT_CONFIG_GLOBAL=/work/.gitconfig; git config --global user.email e@x; \
         git config --global user.name e; git init -q /work/one; cd /work/one; \
         for i in $(seq 1 40); do echo $i > f$i; git add f$i; done; git commit -qm first; \
         seq 1 5000 > big; git add big; git commit -qm second; \
         git clone -q --no-local /work/one /work/two; cd /work/two; git fsck --full --strict; git log --oneline | wc -l; \
         ls | wc -l",
    );
    let text = bundle.stdout();
    assert!(text.ends_with("2\n41\n"), "{text}");
    let fsck = Command::new("git")
        .args(["-c", "safe.directory=*", "fsck", "--full"])
        .current_dir(bundle.path().join("work/two"))
        .output()
        .unwrap();
    assert!(fsck.status.success(), "{}", show(&fsck));
}

#[test]
fn a_small_c_project_is_built_inside() {
    let bundle = debian("cd /work; make -s; ./program");
    let work = bundle.path().join("work");
    fs::write(
        work.join("Makefile"),
        "program: main.o sum.o\n\tcc -o $@ $^\n%.o: %.c sum.h\n\tcc -O1 -c -o $@ $<\n",
    )
    .unwrap();
    fs::write(work.join("sum.h"), "int sum(int n);\n").unwrap();
    fs::write(
        work.join("sum.c"),
        "#include \"sum.h\"\nint sum(int n) { return n ? n + sum(n - 1) : 0; }\n",
    )
    .unwrap();
    fs::write(
        work.join("main.c"),
        "#include <stdio.h>\n#include \"sum.h\"\nint main(void) { printf(\"%d\\n\", sum(100)); return 0; }\n",
    )
    .unwrap();
    // The compiler writes its temporary files.
    let bundle =
        bundle.edit(|spec| spec["process"]["env"] = json!(["PATH=/usr/bin:/bin", "TMPDIR=/work"]));
    assert_eq!(bundle.stdout(), "5050\n");
}

#[test]
fn bind_mounts_of_directories_and_single_files() {
    let bundle = Bundle::sh(
        "cat /data/file /etc/one; echo new > /data/new; echo changed > /etc/one; \
         (echo no > /ro/file) 2>&1 | grep -c Read-only; cat /ro/file",
    );
    let data = bundle.path().join("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("file"), "a file\n").unwrap();
    let one = bundle.path().join("one");
    fs::write(&one, "single\n").unwrap();
    let bundle = bundle
        .mount(json!({"destination": "/data", "type": "bind", "source": data, "options": ["rbind", "rw"]}))
        .mount(json!({"destination": "/etc/one", "type": "bind", "source": one, "options": ["bind"]}))
        .mount(json!({"destination": "/ro", "type": "bind", "source": data, "options": ["bind", "ro"]}));
    assert_eq!(bundle.stdout(), "a file\nsingle\n1\na file\n");
    assert_eq!(fs::read_to_string(data.join("new")).unwrap(), "new\n");
    assert_eq!(fs::read_to_string(&one).unwrap(), "changed\n");
}

#[test]
fn a_recursive_bind_brings_the_mounts_below_it() {
    let bundle = Bundle::sh("cat /data/sub/inner; cat /data/outer");
    let data = bundle.path().join("data");
    fs::create_dir_all(data.join("sub")).unwrap();
    fs::write(data.join("outer"), "outer\n").unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "tmpfs"])
        .arg(data.join("sub"))
        .status();
    assert!(mounted.unwrap().success());
    fs::write(data.join("sub/inner"), "inner\n").unwrap();
    let bundle = bundle.mount(
        json!({"destination": "/data", "type": "bind", "source": data, "options": ["rbind"]}),
    );
    let output = bundle.run();
    assert!(
        Command::new("umount")
            .arg(data.join("sub"))
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "inner\nouter\n",
        "{}",
        show(&output)
    );
}

#[test]
fn kernel_file_systems_are_mounted() {
    let bundle = Bundle::sh(
        "grep -w /dev/shm /proc/mounts | cut -d' ' -f3; grep -w /dev/mqueue /proc/mounts | cut -d' ' -f3; \
         grep -w /dev/pts /proc/mounts | cut -d' ' -f3; grep -w /proc /proc/mounts | head -n 1 | cut -d' ' -f3; \
         grep -w /sys /proc/mounts | head -n 1 | cut -d' ' -f3; ls /dev/null /dev/zero /dev/full /dev/random \
         /dev/urandom /dev/tty /dev/ptmx | wc -l; df -k /dev/shm | tail -n 1 | tr -s ' ' | cut -d' ' -f2; \
         df -k /small | tail -n 1 | tr -s ' ' | cut -d' ' -f2",
    )
    .mount(json!({"destination": "/small", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m"]}));
    assert_eq!(
        bundle.stdout(),
        "tmpfs\nmqueue\ndevpts\nproc\nsysfs\n7\n65536\n1024\n"
    );
}

#[test]
fn no_mount_appears_in_the_hosts_table() {
    let mounts = || fs::read_to_string("/proc/self/mountinfo").unwrap();
    let before = mounts();
    let bundle = Bundle::busybox().args(&["sleep", "100000"]);
    let data = bundle.path().join("data");
    fs::create_dir(&data).unwrap();
    let bundle = bundle.mount(
        json!({"destination": "/data", "type": "bind", "source": data, "options": ["rbind"]}),
    );
    let container = bundle.start();
    assert!(container.exec("test -d /data").status.success());
    assert_eq!(mounts(), before);
}
