// SPDX-License-Identifier: Apache-2.0

//! What the spec's `process` says, the process has.

use serde_json::json;

use crate::support::{Bundle, show, stderr};

#[test]
fn environment_and_working_directory() {
    let bundle = Bundle::sh("echo $ONE; echo \"$TWO\"; pwd").edit(|spec| {
        spec["process"]["env"] = json!(["PATH=/bin", "ONE=1", "TWO=a b=c"]);
        spec["process"]["cwd"] = json!("/tmp");
    });
    assert_eq!(bundle.stdout(), "1\na b=c\n/tmp\n");
}

#[test]
fn a_working_directory_that_is_missing_is_made() {
    let bundle = Bundle::sh("pwd").edit(|spec| spec["process"]["cwd"] = json!("/new/dir"));
    assert_eq!(bundle.stdout(), "/new/dir\n");
}

#[test]
fn user_group_and_supplementary_groups() {
    let bundle = Bundle::sh("id -u; id -g; grep Groups /proc/self/status; umask").edit(|spec| {
        spec["process"]["user"] =
            json!({"uid": 1000, "gid": 1001, "additionalGids": [2000, 3000], "umask": 0o27});
    });
    let text = bundle.stdout();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..2], ["1000", "1001"]);
    let mut groups: Vec<&str> = lines[2].split_whitespace().skip(1).collect();
    groups.retain(|group| *group != "1001");
    assert_eq!(groups, ["2000", "3000"]);
    assert_eq!(lines[3], "0027");
}

#[test]
fn capabilities_are_those_asked_for() {
    let bundle = Bundle::sh("grep Cap /proc/self/status").edit(|spec| {
        let caps = json!(["CAP_KILL", "CAP_CHOWN"]);
        spec["process"]["capabilities"] =
            json!({"bounding": caps, "effective": caps, "permitted": caps});
    });
    let text = bundle.stdout();
    // CAP_CHOWN is bit 0, CAP_KILL bit 5 (linux/capability.h).
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert!(
            text.contains(&format!("{set}:\t0000000000000021")),
            "{text}"
        );
    }
    assert!(text.contains("CapInh:\t0000000000000000"), "{text}");
}

#[test]
fn what_a_capability_allows_fails_without_it() {
    let allowed = Bundle::sh("chown 1000 /tmp && echo changed");
    assert_eq!(allowed.stdout(), "changed\n");
    let denied = Bundle::sh("chown 1000 /tmp || echo denied").edit(|spec| {
        spec["process"]["capabilities"] = json!({"bounding": [], "effective": [], "permitted": []});
    });
    assert_eq!(denied.stdout(), "denied\n");
}

#[test]
fn resource_limits() {
    let bundle = Bundle::sh("ulimit -Sn; ulimit -Hn; ulimit -Sc").edit(|spec| {
        spec["process"]["rlimits"] = json!([
            {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}
        ]);
    });
    assert_eq!(bundle.stdout(), "100\n200\n0\n");
}

#[test]
fn no_new_privileges_is_as_asked() {
    for want in [false, true] {
        let bundle = Bundle::sh("grep NoNewPrivs /proc/self/status")
            .edit(|spec| spec["process"]["noNewPrivileges"] = json!(want));
        assert_eq!(
            bundle.stdout(),
            format!("NoNewPrivs:\t{}\n", u8::from(want))
        );
    }
}

#[test]
fn the_home_of_a_user_is_what_the_containers_passwd_says() {
    for (uid, home) in [(1000, "/home/one"), (2000, "/")] {
        let bundle = Bundle::sh("echo $HOME").edit(|spec| {
            spec["process"]["user"] = json!({"uid": uid, "gid": 100});
        });
        let passwd = "one:x:1000:100::/home/one:/bin/sh\n";
        std::fs::write(bundle.root("etc/passwd"), passwd).unwrap();
        assert_eq!(bundle.stdout(), format!("{home}\n"));
    }
}

#[test]
fn hostname_and_its_namespace() {
    let bundle = Bundle::sh("hostname; uname -n").edit(|spec| spec["hostname"] = json!("a-name"));
    assert_eq!(bundle.stdout(), "a-name\na-name\n");
}

#[test]
fn sysctls_of_its_namespaces() {
    let bundle =
        Bundle::sh("cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/msgmax").edit(|spec| {
            spec["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1", "kernel.msgmax": "4242"});
        });
    assert_eq!(bundle.stdout(), "1\n4242\n");
}

#[test]
fn oom_score_adjustment() {
    let bundle = Bundle::sh("cat /proc/self/oom_score_adj")
        .edit(|spec| spec["process"]["oomScoreAdj"] = json!(321));
    assert_eq!(bundle.stdout(), "321\n");
}

#[test]
fn arguments_arrive_as_they_are() {
    let odd = [
        "printf",
        "[%s]\\n",
        "",
        " a  b ",
        "*",
        "$HOME",
        "é",
        "new\nline",
        "--",
        "-x",
    ];
    let bundle = Bundle::busybox().args(&odd);
    assert_eq!(
        bundle.stdout(),
        "[]\n[ a  b ]\n[*]\n[$HOME]\n[é]\n[new\nline]\n[--]\n[-x]\n"
    );
}

#[test]
fn an_unknown_capability_or_limit_is_refused_by_name() {
    let bundle = Bundle::busybox().edit(|spec| {
        spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOSUCH", "soft": 1, "hard": 1}])
    });
    let output = bundle.run();
    assert!(!output.status.success(), "{}", show(&output));
    assert!(
        stderr(&output).contains("RLIMIT_NOSUCH"),
        "{}",
        stderr(&output)
    );
}
