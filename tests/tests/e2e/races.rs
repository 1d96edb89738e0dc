// SPDX-License-Identifier: Apache-2.0

//! Commands on one container at the same time, and a state directory whose disk fills up: each command does its
//! work or says why not, the state tells the truth, and nothing is left.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use crate::faults::{TRUTH, sleeping};
use crate::support::{Bundle, Traces, count, new_id, runtime, show, stderr, wait_for, wait_within};

/// Runs a command `times` times at once.
fn at_once(times: usize, command: impl Fn() -> Output + Sync) -> Vec<Output> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..times).map(|_| scope.spawn(&command)).collect();
        let outputs = threads.into_iter().map(|thread| thread.join().unwrap());
        outputs
            .inspect(|output| println!("{}", show(output)))
            .collect()
    })
}

#[test]
fn many_deletes_at_once_all_succeed_by_force() {
    let before = Traces::now();
    let bundle = sleeping();
    let container = bundle.start();
    let outputs = at_once(4, || container.verb(&["delete", "--force"], &[]));
    assert!(outputs.iter().all(|output| output.status.success()));
    assert!(container.state().is_none());
    Traces::wait_until_gone(&before);
}

#[test]
fn many_deletes_at_once_without_force_delete_once() {
    let before = Traces::now();
    let bundle = sleeping();
    let container = bundle.create();
    let outputs = at_once(4, || container.verb(&["delete"], &[]));
    assert!(outputs.iter().any(|output| output.status.success()));
    for output in outputs.iter().filter(|output| !output.status.success()) {
        let said = stderr(output);
        assert!(
            said.contains("does not exist") || said.contains("has no record"),
            "{said}"
        );
    }
    assert!(container.state().is_none());
    Traces::wait_until_gone(&before);
}

#[test]
fn of_many_starts_at_once_one_starts() {
    let bundle = Bundle::sh("echo up; exec sleep 100000");
    let container = bundle.create();
    let outputs = at_once(3, || container.verb(&["start"], &[]));
    let (started, refused): (Vec<_>, Vec<_>) =
        outputs.iter().partition(|output| output.status.success());
    assert_eq!(started.len(), 1);
    for output in refused {
        assert!(stderr(output).contains("cannot start"), "{}", show(output));
    }
    container.wait_output("up\n");
    assert_eq!(container.status(), "running");
}

/// Milliseconds after which a command is disturbed, spread over the length of a start.
fn moments(what: &str) -> Vec<u64> {
    let moments = u64::try_from(count(what, 4, 40)).unwrap();
    (0..moments).map(|moment| 4000 * moment / moments).collect()
}

#[test]
fn deleted_by_force_while_it_is_created() {
    let before = Traces::now();
    let bundle = sleeping();
    for moment in moments("moments of create") {
        let container = bundle.container(&new_id());
        std::thread::scope(|scope| {
            let creating = scope.spawn(|| container.try_create(&[]));
            let state = Path::new("/run/caisson").join(&container.id);
            wait_for("the state directory", || {
                state.exists() || creating.is_finished()
            });
            std::thread::sleep(Duration::from_millis(moment));
            container.ok(&["delete", "--force"]);
            let output = creating.join().unwrap();
            println!("deleted after {moment} ms: {}", show(&output));
            assert_eq!(output.status.success(), output.stderr.is_empty());
        });
        // The id is free, and stays so.
        assert!(container.state().is_none());
        Traces::wait_until_gone(&before);
    }
}

#[test]
fn deleted_by_force_while_it_is_started() {
    let before = Traces::now();
    let bundle = sleeping();
    for moment in 0..count("moments of start", 3, 20) {
        let container = bundle.create();
        std::thread::scope(|scope| {
            let starting = scope.spawn(|| container.verb(&["start"], &[]));
            std::thread::sleep(Duration::from_millis(10) * u32::try_from(moment).unwrap());
            container.ok(&["delete", "--force"]);
            let output = starting.join().unwrap();
            assert!(
                output.status.success() || !output.stderr.is_empty(),
                "a start that fails says why"
            );
        });
        assert!(container.state().is_none());
        Traces::wait_until_gone(&before);
    }
}

#[test]
fn deleted_by_force_during_an_exec_and_under_the_eyes_of_state() {
    let before = Traces::now();
    let bundle = sleeping();
    let container = bundle.start();
    std::thread::scope(|scope| {
        let exec = scope.spawn(|| container.exec("touch /tmp/up; exec sleep 1000"));
        wait_for("the exec", || bundle.root("tmp/up").exists());
        let deleting = scope.spawn(|| container.verb(&["delete", "--force"], &[]));
        let mut gone = false;
        while !deleting.is_finished() {
            let status = container.state().map(|state| state["status"].clone());
            match status.as_ref().and_then(|status| status.as_str()) {
                None => gone = true,
                Some(status) => {
                    assert!(!gone, "it came back as {status}");
                    assert!(["running", "stopped"].contains(&status), "{status}");
                }
            }
        }
        assert!(deleting.join().unwrap().status.success());
        let output = exec.join().unwrap();
        assert!(!output.status.success(), "{}", show(&output));
        assert!(
            !output.stderr.is_empty(),
            "an exec whose container is deleted says so"
        );
    });
    assert!(container.state().is_none());
    Traces::wait_until_gone(&before);
}

#[test]
fn a_kill_at_the_very_end_says_that_nothing_runs() {
    for _ in 0..count("containers that end under a kill", 3, 40) {
        // It ignores the signal, so that each one meets it at another moment of its end.
        let bundle = Bundle::sh("trap '' WINCH; sleep 0.5");
        let container = bundle.start();
        let refused = loop {
            let output = container.verb(&["kill"], &["WINCH"]);
            if !output.status.success() {
                break output;
            }
        };
        assert!(
            stderr(&refused).contains("container not running"),
            "{}",
            show(&refused)
        );
        container.wait_status("stopped");
        container.ok(&["delete"]);
    }
}

#[test]
fn an_exec_or_start_at_the_very_end_says_that_it_has_ended() {
    for _ in 0..count("containers that end under an exec", 3, 40) {
        let bundle = Bundle::sh("sleep 0.5");
        let container = bundle.start();
        let refused = loop {
            let output = container.exec("true");
            if !output.status.success() {
                break output;
            }
        };
        let said = stderr(&refused);
        let expected = [
            "cannot exec in a stopped container",
            "ended before the process did",
            "not running",
        ];
        // Or it had begun, and was killed with the container, as with every other runtime.
        let killed = refused.status.code() == Some(128 + 9);
        let told = expected.iter().any(|text| said.contains(text));
        assert!(told || killed, "{}", show(&refused));
        container.wait_status("stopped");
    }
}

/// A small file system for the state directory.
struct Disk {
    dir: tempfile::TempDir,
}

impl Disk {
    fn new(options: &str) -> Self {
        let dir = tempfile::TempDir::new().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(dir.path())
            .status();
        assert!(mounted.unwrap().success());
        Self { dir }
    }

    fn fill(&self) {
        let filled = fs::write(self.dir.path().join("filler"), vec![1; 16 << 20]);
        assert!(filled.is_err());
    }

    fn is_empty(&self) -> bool {
        let mut names = fs::read_dir(self.dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name());
        names.all(|name| name == "filler")
    }

    fn caisson(&self, arguments: &[&str]) -> Output {
        let files = tempfile::TempDir::new().unwrap();
        let file = |name| fs::File::create(files.path().join(name)).unwrap();
        let status = runtime()
            .arg("--root")
            .arg(self.dir.path())
            .args(arguments)
            .stdout(file("out"))
            .stderr(file("err"))
            .status()
            .unwrap();
        let read = |name| fs::read(files.path().join(name)).unwrap();
        let output = Output {
            status,
            stdout: read("out"),
            stderr: read("err"),
        };
        println!("{arguments:?}: {}", show(&output));
        output
    }

    fn status(&self, id: &str) -> Option<String> {
        let output = self.caisson(&["state", id]);
        let state: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
        Some(state["status"].as_str().unwrap().to_owned())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(self.dir.path()).status();
        println!("umount: {unmounted:?}");
    }
}

/// A life on a disk that can take all of it or not: each step works or says that there is no space.
fn lives_or_says_why(disk: &Disk, bundle: &Bundle) -> bool {
    let id = new_id();
    let path = bundle.path().to_str().unwrap();
    let steps: [&[&str]; 3] = [
        &["create", "--bundle", path, &id],
        &["start", &id],
        &["pause", &id],
    ];
    let failed = steps.into_iter().find_map(|step| {
        let output = disk.caisson(step);
        (!output.status.success()).then_some((step[0], output))
    });
    if let Some((step, output)) = &failed {
        assert!(
            stderr(output).contains("No space left"),
            "{step}: {}",
            show(output)
        );
        if *step == "create" {
            assert_eq!(disk.status(&id), None, "a create that fails leaves nothing");
        }
    }
    assert!(disk.caisson(&["delete", "--force", &id]).status.success());
    assert!(disk.is_empty());
    failed.is_none()
}

/// On disks with room for ever more of something, up to `most`, which is enough; `option` is the mount option
/// for so many.
fn on_small_disks(what: &str, few: usize, most: usize, option: fn(usize) -> String) {
    let before = Traces::now();
    let bundle = sleeping();
    let tries = count(&format!("numbers of {what}"), few, most);
    let mut lived = 0;
    for n in 1..=tries {
        let room = n * most / tries;
        println!("room for {room} {what}");
        let disk = Disk::new(&format!("mode=700,{}", option(room)));
        lived += u32::from(lives_or_says_why(&disk, &bundle));
    }
    drop(bundle);
    assert!(lived > 0, "{most} {what} are not enough");
    Traces::wait_until_gone(&before);
}

#[test]
fn a_disk_with_room_for_a_few_files_only() {
    on_small_disks("files", 5, 20, |files| format!("nr_inodes={files}"));
}

#[test]
fn a_disk_with_room_for_a_few_pages_only() {
    on_small_disks("pages", 4, 16, |pages| format!("size={}k", 4 * pages));
}

/// A disk with a container of the bundle, on which more fits.
fn created(bundle: &Bundle) -> (Disk, String) {
    let disk = Disk::new("mode=700,size=256k");
    let id = new_id();
    let created = disk.caisson(&["create", "--bundle", bundle.path().to_str().unwrap(), &id]);
    assert!(created.status.success());
    (disk, id)
}

/// Fills the disk; then this command says that there is no space.
fn fails_on_a_full_disk(disk: &Disk, command: &[&str]) {
    disk.fill();
    let output = disk.caisson(command);
    assert!(!output.status.success());
    assert!(
        stderr(&output).contains("No space left"),
        "{}",
        show(&output)
    );
}

#[test]
fn a_start_that_cannot_be_written_down_is_undone() {
    let before = Traces::now();
    let bundle = sleeping();
    let (disk, id) = created(&bundle);
    fails_on_a_full_disk(&disk, &["start", &id]);
    wait_within("the truth", TRUTH, &mut || {
        disk.status(&id).as_deref() == Some("stopped")
    });
    assert!(disk.caisson(&["delete", &id]).status.success());
    assert!(disk.is_empty());
    drop(disk);
    Traces::wait_until_gone(&before);
}

#[test]
fn a_pause_that_cannot_be_written_down_is_undone() {
    let before = Traces::now();
    let bundle = Bundle::sh("while :; do echo tick; sleep 0.1; done >/tmp/ticks");
    let (disk, id) = created(&bundle);
    assert!(disk.caisson(&["start", &id]).status.success());
    fails_on_a_full_disk(&disk, &["pause", &id]);
    assert_eq!(disk.status(&id).as_deref(), Some("running"));
    let ticks = || fs::metadata(bundle.root("tmp/ticks")).map_or(0, |file| file.len());
    let now = ticks();
    wait_for("the container to run on", || ticks() > now);
    assert!(disk.caisson(&["delete", "--force", &id]).status.success());
    assert!(disk.is_empty());
    drop(disk);
    Traces::wait_until_gone(&before);
}
