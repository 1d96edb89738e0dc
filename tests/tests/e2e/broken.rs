// SPDX-License-Identifier: Apache-2.0

//! Broken inputs: each with an error of its own, and nothing left behind.

use std::fs;
use std::process::Output;

use serde_json::json;

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
