// SPDX-License-Identifier: Apache-2.0

//! From an image's configuration to `config.json`.
//!
//! Follows <https://github.com/opencontainers/image-spec/blob/main/conversion.md>: environment, command,
//! working directory and user become the process, everything else becomes annotations, and a label wins
//! over an annotation of the same key. `Volumes` stay part of the root file system, as they do with containerd.

use std::collections::HashMap;
use std::path::PathBuf;

use oci_spec::image::{Config, ImageConfiguration};
use oci_spec::runtime::Spec;

const PREFIX: &str = "org.opencontainers.image.";

/// Puts what the image asks for into `spec`. Its user is for the caller to find out: see [`user_of`].
pub fn apply_image(spec: &mut Spec, configuration: &ImageConfiguration) {
    let config = configuration.config().clone().unwrap_or_default();
    let mut annotations = implied_annotations(configuration, &config);
    annotations.extend(config.labels().clone().unwrap_or_default());
    spec.set_annotations((!annotations.is_empty()).then_some(annotations));

    let Some(process) = spec.process_mut() else {
        return;
    };
    let mut env = config.env().clone().unwrap_or_default();
    for default in process.env().clone().unwrap_or_default() {
        let name = name_of(&default);
        if !env.iter().any(|entry| name_of(entry) == name) {
            env.push(default);
        }
    }
    process.set_env(Some(env));
    let mut args = config.entrypoint().clone().unwrap_or_default();
    args.extend(config.cmd().clone().unwrap_or_default());
    // An image without a command gets none from us; that it has none is said later, unless one is given.
    process.set_args(Some(args));
    let cwd = config.working_dir().clone().unwrap_or_default();
    process.set_cwd(PathBuf::from("/").join(cwd));
}

/// The user that the image asks for; empty if it does not.
#[must_use]
pub fn user_of(configuration: &ImageConfiguration) -> String {
    let config = configuration.config().as_ref();
    config
        .and_then(|config| config.user().clone())
        .unwrap_or_default()
}

fn name_of(entry: &str) -> &str {
    entry.split_once('=').map_or(entry, |(name, _)| name)
}

fn implied_annotations(
    configuration: &ImageConfiguration,
    config: &Config,
) -> HashMap<String, String> {
    let mut annotations = HashMap::new();
    let mut put = |key: &str, value: Option<String>| {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            annotations.insert(format!("{PREFIX}{key}"), value);
        }
    };
    put("os", Some(configuration.os().to_string()));
    put(
        "architecture",
        Some(configuration.architecture().to_string()),
    );
    put("variant", configuration.variant().clone());
    put("os.version", configuration.os_version().clone());
    put(
        "os.features",
        configuration
            .os_features()
            .as_ref()
            .map(|list| list.join(",")),
    );
    put("author", configuration.author().clone());
    put("created", configuration.created().clone());
    put("stopSignal", config.stop_signal().clone());
    let mut ports = config.exposed_ports().clone().unwrap_or_default();
    ports.sort();
    put("exposedPorts", Some(ports.join(",")));
    annotations
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::spec::{Privileges, base_spec, to_json};

    fn converted(config: &Value) -> Value {
        let configuration: ImageConfiguration = serde_json::from_value(json!({
            "created": "2024-01-02T03:04:05Z",
            "author": "someone",
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": []},
            "config": config,
        }))
        .unwrap();
        let mut spec = base_spec(Privileges::Docker).unwrap();
        apply_image(&mut spec, &configuration);
        serde_json::from_str(&to_json(&spec).unwrap()).unwrap()
    }

    #[test]
    fn everything_in_the_configuration_has_its_place() {
        let json = converted(&json!({
            "User": "www",
            "ExposedPorts": {"443/tcp": {}, "80/tcp": {}},
            "Env": ["PATH=/bin", "EMPTY=", "BARE"],
            "Entrypoint": ["/entry", "-x"],
            "Cmd": ["one", "two"],
            "WorkingDir": "/srv",
            "StopSignal": "SIGQUIT",
            "Labels": {"a": "b", "org.opencontainers.image.author": "the label"},
            "Healthcheck": {"Test": ["NONE"]},
            "Volumes": {"/data": {}},
        }));
        assert_eq!(
            json["process"]["args"],
            json!(["/entry", "-x", "one", "two"])
        );
        assert_eq!(
            json["process"]["env"],
            json!(["PATH=/bin", "EMPTY=", "BARE", "TERM=xterm"])
        );
        assert_eq!(json["process"]["cwd"], "/srv");
        assert_eq!(
            json["annotations"],
            json!({
                "a": "b",
                "org.opencontainers.image.os": "linux",
                "org.opencontainers.image.architecture": "amd64",
                "org.opencontainers.image.created": "2024-01-02T03:04:05Z",
                // A label wins over what is implied.
                "org.opencontainers.image.author": "the label",
                "org.opencontainers.image.stopSignal": "SIGQUIT",
                "org.opencontainers.image.exposedPorts": "443/tcp,80/tcp",
            })
        );
    }

    #[test]
    fn empty_configuration_gives_a_path_a_root_directory_and_no_command() {
        for config in [
            json!(null),
            json!({"Cmd": null, "Entrypoint": null, "Env": null}),
        ] {
            let json = converted(&config);
            assert_eq!(json["process"]["args"], json!([]));
            assert_eq!(json["process"]["cwd"], "/");
            assert!(
                json["process"]["env"][0]
                    .as_str()
                    .unwrap()
                    .starts_with("PATH=")
            );
        }
    }

    #[test]
    fn relative_working_directory_is_taken_from_the_root() {
        assert_eq!(
            converted(&json!({"WorkingDir": "srv/app"}))["process"]["cwd"],
            "/srv/app"
        );
    }
}
