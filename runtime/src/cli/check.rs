// SPDX-License-Identifier: Apache-2.0

//! `caisson check`: can this machine run Caisson? The VMM tries KVM out; what is looked at here is the rest of the host.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use caisson_runtime::config::Config;
use caisson_runtime::error::RuntimeError;
use caisson_runtime::resources::cgroup::{CGROUP_ROOT, Cgroup};
use clap::Args;
use serde::{Deserialize, Serialize};

use super::list::table;
use super::{Global, print, print_json};

/// Oldest kernel with everything that is used: mount_setattr (5.12) and cgroup.kill (5.14).
const OLDEST_KERNEL: (u32, u32) = (5, 14);

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Row {
    /// What.
    name: String,
    /// Whether it is as it should be.
    ok: bool,
    /// What was found.
    what: String,
    /// What to do about it, if anything.
    advice: String,
}

impl Row {
    fn new(name: &str, ok: bool, what: impl Into<String>, advice: &str) -> Self {
        Self {
            name: name.to_owned(),
            ok,
            what: what.into(),
            advice: if ok { String::new() } else { advice.to_owned() },
        }
    }
}

pub(crate) fn run(global: &Global, args: &CheckArgs) -> Result<u8, RuntimeError> {
    let config = global.configuration()?;
    let mut rows = host(&config);
    rows.extend(vmm(&config));
    let ok = rows.iter().all(|row| row.ok);
    if args.json {
        print_json(&serde_json::json!({"ok": ok, "checks": rows}))?;
    } else {
        print(&render(&rows, ok))?;
    }
    Ok(u8::from(!ok))
}

fn render(rows: &[Row], ok: bool) -> String {
    let lines = rows.iter().map(|row| {
        let answer = if row.ok { "yes" } else { "NO" };
        [answer.to_owned(), row.name.clone(), row.what.clone()]
    });
    let mut text = table(lines.collect());
    for row in rows.iter().filter(|row| !row.ok && !row.advice.is_empty()) {
        text.push_str(&format!("\n{}: {}\n", row.name, row.advice));
    }
    text.push_str(if ok {
        "\nThis machine can run Caisson.\n"
    } else {
        "\nThis machine cannot run Caisson as it is.\n"
    });
    text
}

fn host(config: &Config) -> Vec<Row> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    let (major, minor) = OLDEST_KERNEL;
    let mut rows = vec![
        Row::new(
            "host kernel",
            kernel_is_new_enough(release),
            release,
            &format!(
                "Caisson needs Linux {major}.{minor} or newer for its mounts and cgroups: \
                 install a newer kernel."
            ),
        ),
        Row::new(
            "cgroup v2",
            Cgroup::available(),
            CGROUP_ROOT,
            "mount cgroup2 on /sys/fs/cgroup (on systemd hosts: boot with \
             systemd.unified_cgroup_hierarchy=1). Without it, pods run in the caller's cgroup.",
        ),
        Row::new(
            "root",
            rustix::process::geteuid().is_root(),
            "the runtime's own user",
            "run as root: mounts and cgroups need it.",
        ),
    ];
    for (name, path) in [
        ("VMM", &config.vm.vmm),
        ("guest kernel", &config.vm.kernel),
        ("guest initramfs", &config.vm.initramfs),
    ] {
        rows.push(file(name, path));
    }
    rows
}

fn file(name: &str, path: &Path) -> Row {
    let advice = "install it there, or set its path in the configuration, section [vm].";
    match fs::File::open(path) {
        Ok(_) => Row::new(name, true, path.display().to_string(), advice),
        Err(error) => Row::new(name, false, format!("{}: {error}", path.display()), advice),
    }
}

fn kernel_is_new_enough(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next().and_then(|text| text.parse::<u32>().ok());
    matches!((number(), number()), (Some(major), Some(minor)) if (major, minor) >= OLDEST_KERNEL)
}

/// The rows that the VMM finds out, by running a few instructions in a guest.
fn vmm(config: &Config) -> Vec<Row> {
    let program = &config.vm.vmm;
    let failed = |what: String| {
        let advice = "the VMM could not try KVM out; run it by hand with --check.";
        vec![Row::new("KVM", false, what, advice)]
    };
    let output = Command::new(program)
        .args(["--check", "--json"])
        .stdin(Stdio::null())
        .output();
    match output {
        Err(error) => failed(format!("{}: {error}", program.display())),
        Ok(output) => parse(&output.stdout).unwrap_or_else(|| {
            let said = String::from_utf8_lossy(&output.stderr);
            failed(format!("{}: {}", output.status, said.trim()))
        }),
    }
}

fn parse(json: &[u8]) -> Option<Vec<Row>> {
    let value: serde_json::Value = serde_json::from_slice(json).ok()?;
    let rows = if value.is_array() {
        value
    } else {
        value.get("checks").or_else(|| value.get("rows"))?.clone()
    };
    let rows: Vec<Row> = serde_json::from_value(rows).ok()?;
    (!rows.is_empty()).then_some(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_compared_by_number() {
        for (release, ok) in [
            ("6.1.0-18-amd64", true),
            ("5.14.0", true),
            ("5.9.1", false),
            ("5.4", false),
            ("10.0", true),
            ("", false),
        ] {
            assert_eq!(kernel_is_new_enough(release), ok, "{release}");
        }
    }

    #[test]
    fn advice_is_given_for_what_is_wrong_only() {
        let rows = [
            Row::new("good", true, "x", "advice one"),
            Row::new("bad", false, "y", "advice two"),
        ];
        let text = render(&rows, false);
        assert!(!text.contains("advice one"), "{text}");
        assert!(text.contains("bad: advice two"), "{text}");
        assert!(text.contains("cannot run"), "{text}");
    }

    #[test]
    fn a_vmm_that_says_nothing_usable_is_a_failed_check() {
        assert_eq!(parse(b""), None);
        assert_eq!(parse(b"[]"), None);
        assert_eq!(parse(b"{}"), None);
        let one = br#"[{"name":"kvm","ok":true,"what":"w","advice":""}]"#;
        assert_eq!(parse(one).unwrap().len(), 1);
    }
}
