// SPDX-License-Identifier: Apache-2.0

//! Broken inputs: each with an error of its own, and nothing left behind.

use std::fs;
use std::process::Output;

use serde_json::json;

use caisson_testbed::installed::path_of;

use crate::parts::{Config, compiled, newc};
use crate::support::{Bundle, Traces, is_caisson, new_id, runtime, show, stderr};

/// `run` fails, says all of `texts`, and leaves nothing.
fn refused(bundle: &Bundle, options: &[&str], texts: &[&str]) -> Output {
    let before = Traces::now();
    let mut command = runtime();
    command
        .args(options)
        .args(["run", "--bundle"])
        .arg(bundle.path())
        .arg(new_id());
    let output = command.output().unwrap();
    println!("{}", show(&output));
    assert!(!output.status.success());
    if is_caisson() {
        for text in texts {
            assert!(
                stderr(&output).contains(text),
                "{text:?} is not in: {}",
                stderr(&output)
            );
        }
        assert!(
            !stderr(&output).contains("panicked at"),
            "{}",
            stderr(&output)
        );
    }
    Traces::wait_until_gone(&before);
    output
}

#[test]
fn a_missing_config_json() {
    let bundle = Bundle::busybox();
    fs::remove_file(bundle.path().join("config.json")).unwrap();
    refused(&bundle, &[], &["config.json", "No such file"]);
}

#[test]
fn a_malformed_config_json_is_located() {
    let bundle = Bundle::busybox();
    fs::write(
        bundle.path().join("config.json"),
        "{\n  \"ociVersion\": \"1.0.2\",\n  \"process\": }\n",
    )
    .unwrap();
    refused(&bundle, &[], &["config.json", "line 3", "column 14"]);
}

#[test]
fn a_config_json_of_the_wrong_type_is_located() {
    let bundle = Bundle::busybox().edit(|spec| spec["process"]["args"] = json!("true"));
    refused(&bundle, &[], &["config.json", "line"]);
}

#[test]
fn no_process_or_no_arguments() {
    let bundle = Bundle::busybox().edit(|spec| spec["process"]["args"] = json!([]));
    refused(&bundle, &[], &["args"]);
}

#[test]
fn a_missing_root() {
    let bundle = Bundle::busybox().edit(|spec| spec["root"]["path"] = json!("not-there"));
    refused(&bundle, &[], &["not-there", "No such file"]);
}

#[test]
fn a_missing_bind_source() {
    let bundle = Bundle::busybox().mount(
        json!({"destination": "/data", "type": "bind", "source": "/no/such/dir", "options": ["rbind"]}),
    );
    refused(&bundle, &[], &["/no/such/dir", "No such file"]);
}

#[test]
fn a_bundle_that_is_not_there() {
    let output = runtime()
        .args(["run", "--bundle", "/no/such/bundle", &new_id()])
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(
        stderr(&output).contains("/no/such/bundle"),
        "{}",
        show(&output)
    );
}

#[test]
fn errors_go_to_the_log_as_json_when_asked() {
    let bundle = Bundle::busybox().edit(|spec| spec["root"]["path"] = json!("not-there"));
    let log = bundle.path().join("log");
    let log = log.to_str().unwrap();
    refused(
        &bundle,
        &["--log", log, "--log-format", "json"],
        &["not-there"],
    );
    let text = fs::read_to_string(log).unwrap();
    let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(last["level"], "error");
    assert!(
        last["msg"].as_str().unwrap().contains("not-there"),
        "{text}"
    );
    assert!(last["time"].is_string());
}

/// A bundle that is in order is refused because of the configuration.
fn refused_with(changes: &str, texts: &[&str]) {
    let config = Config::with(changes);
    refused(&Bundle::busybox(), &["--config", &config.file()], texts);
}

#[test]
fn an_unknown_key_is_named_with_its_file() {
    refused_with(
        "[vm]\nmemroy_mib = 256\n",
        &["memroy_mib", "50-changes.toml"],
    );
    refused_with("[vmm]\nmemory_mib = 256\n", &["vmm", "50-changes.toml"]);
}

#[test]
fn memory_out_of_bounds_is_refused() {
    refused_with("[vm]\nmemory_mib = 1\n", &["memory_mib", "32"]);
    refused_with("[vm]\nmemory_mib = 1099511627776\n", &["memory"]);
}

#[test]
fn too_many_cpus_are_refused() {
    refused_with("[vm]\nvcpus = 0\n", &["vcpus"]);
    refused_with("[vm]\nvcpus = 33\n", &["vcpus", "32"]);
}

#[test]
fn a_missing_kernel() {
    refused_with(
        "[vm]\nkernel = \"/no/such/kernel\"\n",
        &["/no/such/kernel", "No such file"],
    );
}

#[test]
fn a_kernel_that_is_none() {
    let dir = tempfile::TempDir::new().unwrap();
    let path = dir.path().join("kernel");
    let change = format!("[vm]\nkernel = {:?}\n", path.to_str().unwrap());
    fs::write(&path, "").unwrap();
    refused_with(&change, &["kernel", path.to_str().unwrap()]);
    fs::write(&path, "not a kernel at all\n".repeat(1000)).unwrap();
    refused_with(&change, &["kernel", "ELF"]);
    fs::copy("/bin/busybox", &path).unwrap();
    refused_with(&change, &["kernel", "PVH"]);
}

#[test]
fn a_truncated_kernel() {
    let bytes = fs::read(path_of("kernel").unwrap()).unwrap();
    let dir = tempfile::TempDir::new().unwrap();
    let path = dir.path().join("kernel");
    for length in [100, 5000, bytes.len() / 2] {
        fs::write(&path, &bytes[..length]).unwrap();
        refused_with(
            &format!("[vm]\nkernel = {:?}\n", path.to_str().unwrap()),
            &["kernel"],
        );
    }
}

#[test]
fn a_missing_initramfs() {
    refused_with(
        "[vm]\ninitramfs = \"/no/such/file\"\n",
        &["/no/such/file", "No such file"],
    );
}

#[test]
fn an_initramfs_without_an_agent() {
    let dir = tempfile::TempDir::new().unwrap();
    let path = dir.path().join("initramfs");
    let archive = newc("TRAILER!!!", 0, b"");
    fs::write(&path, archive).unwrap();
    let change = format!("[vm]\ninitramfs = {:?}\n", path.to_str().unwrap());
    refused_with(&change, &["Kernel panic"]);
}

#[test]
fn a_kernel_that_panics_at_boot_is_quoted_and_no_time_limit_waited_for() {
    // The limit for a boot is longer than the one for a test: whoever waits for it fails. (On the instruction-count
    // clock it takes 0.26 to 0.30 s from the command to the error.)
    let config = Config::with(
        "[vm]\nkernel_params = \"rdinit=/no/such/init\"\n[timeouts]\nboot_ms = 3600000\n",
    );
    let output = refused(
        &Bundle::busybox(),
        &["--config", &config.file()],
        &["the guest kernel panicked: Kernel panic - not syncing: "],
    );
    assert!(
        !stderr(&output).contains("was not ready"),
        "{}",
        show(&output)
    );
}

#[test]
fn an_agent_of_another_protocol_version() {
    // PID 1 of another release: it dials the host as ours does, and says another version.
    let change = agent_that(
        r#"const char *line = "{\"protocol_version\":99,\"agent_version\":\"9.9\"}\n";
           if (write(fd, line, strlen(line)) < 0)
               return 1;
           for (;;)
               pause();"#,
    );
    refused_with(&change.1, &["protocol", "99"]);
}

#[test]
fn an_agent_that_dies_before_it_greets() {
    // Its connection ends a moment before its machine does, whose end says more.
    let change = agent_that("close(fd); usleep(300000); return 7;");
    refused_with(&change.1, &["Attempted to kill init! exitcode=0x00000700"]);
}

/// The change of the configuration for a guest whose PID 1 dials the host as the agent does, and then does this with
/// `fd`; and the directory that it is in.
fn agent_that(code: &str) -> (tempfile::TempDir, String) {
    let source = format!(
        r#"
#include <linux/vm_sockets.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
int main(void) {{
    struct sockaddr_vm to = {{.svm_family = AF_VSOCK, .svm_cid = 2, .svm_port = 1024}};
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (connect(fd, (struct sockaddr *)&to, sizeof to))
        return 1;
    {code}
}}
"#
    );
    let dir = tempfile::TempDir::new().unwrap();
    let path = dir.path().join("initramfs");
    let mut archive = newc("init", 0o100_755, &compiled(&source));
    archive.extend(newc("TRAILER!!!", 0, b""));
    fs::write(&path, archive).unwrap();
    let change = format!("[vm]\ninitramfs = {:?}\n", path.to_str().unwrap());
    (dir, change)
}

#[test]
fn a_missing_vmm() {
    refused_with(
        "[vm]\nvmm = \"/no/such/vmm\"\n",
        &["/no/such/vmm", "No such file"],
    );
}

/// `caisson run` behind a shell that changes /dev in a mount namespace of its own first.
fn refused_after(prepare: &str, text: &str) {
    let before = Traces::now();
    let bundle = Bundle::busybox();
    let script = format!(
        "mount -t tmpfs tmpfs /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9 && {prepare} \
         caisson run --bundle {} {}",
        bundle.path().display(),
        new_id()
    );
    let output = std::process::Command::new("unshare")
        .args(["--mount", "sh", "-c", &script])
        .output()
        .unwrap();
    println!("{}", show(&output));
    assert!(!output.status.success());
    assert!(stderr(&output).contains("/dev/kvm"), "{}", stderr(&output));
    assert!(stderr(&output).contains(text), "{}", stderr(&output));
    Traces::wait_until_gone(&before);
}

#[test]
fn no_dev_kvm() {
    refused_after("", "does not exist");
}

#[test]
fn dev_kvm_without_permission() {
    refused_after(
        "mknod -m 000 /dev/kvm c 10 232 && chown 65534:65534 /dev/kvm && \
         exec setpriv --bounding-set=-dac_override,-dac_read_search --inh-caps=-dac_override,-dac_read_search",
        "ermission denied",
    );
}

#[test]
fn a_full_disk_under_the_state_directory() {
    let before = Traces::now();
    let dir = tempfile::TempDir::new().unwrap();
    let mount = |args: &[&str]| {
        std::process::Command::new("mount")
            .args(args)
            .arg(dir.path())
            .status()
    };
    assert!(
        mount(&["-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs"])
            .unwrap()
            .success()
    );
    let filler = fs::write(dir.path().join("filler"), vec![1; 1 << 20]);
    assert!(filler.is_err());
    let bundle = Bundle::busybox();
    let output = runtime()
        .arg("--root")
        .arg(dir.path())
        .args(["run", "--bundle"])
        .arg(bundle.path())
        .arg(new_id())
        .output()
        .unwrap();
    let left: Vec<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert!(
        std::process::Command::new("umount")
            .arg(dir.path())
            .status()
            .unwrap()
            .success()
    );
    println!("{}", show(&output));
    assert!(!output.status.success());
    assert!(
        stderr(&output).contains("No space left"),
        "{}",
        stderr(&output)
    );
    assert_eq!(left, ["filler"]);
    Traces::wait_until_gone(&before);
}
