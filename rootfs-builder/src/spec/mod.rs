// SPDX-License-Identifier: Apache-2.0

//! The bundle's `config.json`: what `runc spec` would write, made to fit the root file system.
//!
//! In: defaults ([`base_spec`]), what an image asks for, what the person asks for ([`SpecOverrides`]), in
//! rising order of precedence. Out: the JSON text, the same for the same inputs (maps and capability
//! lists are sorted).
//!
//! Format: <https://github.com/opencontainers/runtime-spec/blob/main/config.md>.

mod base;
mod image;
mod user;

use std::path::{Path, PathBuf};

use oci_spec::runtime::{Spec, UserBuilder};
use serde_json::Value;

pub use self::base::{Privileges, base_spec};
pub use self::image::{apply_image, user_of};
pub(crate) use self::user::resolve as resolve_user;
pub use self::user::{ResolvedUser, UserError};

/// Why no `config.json` could be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpecError {
    /// The working directory is relative.
    #[error("working directory {0} is not absolute")]
    RelativeCwd(PathBuf),
    /// The argument list is empty.
    #[error("there is no command to run; give one after --")]
    NoCommand,
    /// The host name is empty or longer than Linux takes (64 bytes).
    #[error("host name {0:?} is empty or longer than 64 bytes")]
    Hostname(String),
    /// The user could not be found out.
    #[error("failed to find out the user")]
    User(#[from] UserError),
    /// A string with a NUL byte can be neither an argument nor a variable.
    #[error("{0:?} holds a NUL byte")]
    Nul(String),
    /// The library that models the specification refused a value.
    #[error("failed to model the specification")]
    Model(#[from] oci_spec::OciSpecError),
    /// The specification could not be turned into JSON.
    #[error("failed to write the specification as JSON")]
    Json(#[from] serde_json::Error),
}

/// An environment variable to set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnvVar {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: String,
}

/// What the person asks for, over the defaults and the image.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SpecOverrides {
    /// The whole command.
    pub args: Option<Vec<String>>,
    /// Variables, set over those of the same name.
    pub env: Vec<EnvVar>,
    /// Working directory, absolute.
    pub cwd: Option<PathBuf>,
    /// Give the process a terminal.
    pub terminal: bool,
    /// User and group (`USER[:GROUP]`, names or numbers); the names are the root file system's.
    pub user: Option<String>,
    /// Host name.
    pub hostname: Option<String>,
    /// Mount the root file system read-only.
    pub readonly: bool,
    /// What the process may do, instead of the source's own default.
    pub privileges: Option<Privileges>,
    /// Annotations, set over those of the same key.
    pub annotations: Vec<(String, String)>,
}

/// Puts `overrides` over what `spec` says.
///
/// # Errors
/// When a value could not be used by any runtime: a relative directory, an empty command, a NUL.
pub fn apply_overrides(spec: &mut Spec, overrides: &SpecOverrides) -> Result<(), SpecError> {
    if let Some(hostname) = &overrides.hostname {
        if hostname.is_empty() || hostname.len() > 64 {
            return Err(SpecError::Hostname(hostname.clone()));
        }
        spec.set_hostname(Some(hostname.clone()));
    }
    if overrides.readonly
        && let Some(root) = spec.root_mut()
    {
        root.set_readonly(Some(true));
    }
    if !overrides.annotations.is_empty() {
        let mut annotations = spec.annotations().clone().unwrap_or_default();
        annotations.extend(overrides.annotations.iter().cloned());
        spec.set_annotations(Some(annotations));
    }
    if let Some(privileges) = overrides.privileges {
        privileges.apply(spec)?;
    }
    let Some(process) = spec.process_mut() else {
        return Ok(());
    };
    process.set_terminal(Some(overrides.terminal));
    if let Some(args) = &overrides.args {
        process.set_args(Some(args.clone()));
    }
    if let Some(cwd) = &overrides.cwd {
        process.set_cwd(cwd.clone());
    }
    let mut env = process.env().clone().unwrap_or_default();
    for variable in &overrides.env {
        set_variable(&mut env, variable);
    }
    process.set_env(Some(env));

    if !process.cwd().is_absolute() {
        return Err(SpecError::RelativeCwd(process.cwd().clone()));
    }
    let args = process.args().clone().unwrap_or_default();
    if args.is_empty() {
        return Err(SpecError::NoCommand);
    }
    let env = process.env().clone().unwrap_or_default();
    if let Some(bad) = args.into_iter().chain(env).find(|text| text.contains('\0')) {
        return Err(SpecError::Nul(bad));
    }
    Ok(())
}

/// Sets `variable` in `env`, in the place of the variable of that name or at the end.
pub fn set_variable(env: &mut Vec<String>, variable: &EnvVar) {
    let text = format!("{}={}", variable.name, variable.value);
    let same_name = |entry: &String| {
        entry
            .split_once('=')
            .map_or(entry.as_str(), |(name, _)| name)
            == variable.name
    };
    match env.iter_mut().find(|entry| same_name(entry)) {
        Some(entry) => *entry = text,
        None => env.push(text),
    }
}

/// Makes the process run as `user`.
///
/// # Errors
/// When the library that models the specification refuses it.
pub fn set_user(spec: &mut Spec, user: &ResolvedUser) -> Result<(), SpecError> {
    let mut model = UserBuilder::default().uid(user.uid).gid(user.gid).build()?;
    if !user.additional_gids.is_empty() {
        model.set_additional_gids(Some(user.additional_gids.clone()));
    }
    if let Some(process) = spec.process_mut() {
        process.set_user(model);
    }
    Ok(())
}

/// Points the specification at its root file system.
pub fn set_root_path(spec: &mut Spec, path: &Path) {
    if let Some(root) = spec.root_mut() {
        root.set_path(path.to_path_buf());
    }
}

/// The text of `config.json`: indented, with a line end, and the same whenever `spec` is the same.
///
/// # Errors
/// When a path in it is not UTF-8.
pub fn to_json(spec: &Spec) -> Result<String, SpecError> {
    let mut value = sorted(serde_json::to_value(spec)?);
    // Capabilities are sets, whose order changes from run to run.
    if let Some(sets) = value
        .pointer_mut("/process/capabilities")
        .and_then(Value::as_object_mut)
    {
        for set in sets.values_mut().filter_map(Value::as_array_mut) {
            set.sort_by(|left, right| left.as_str().cmp(&right.as_str()));
        }
    }
    let mut text = serde_json::to_string_pretty(&value)?;
    text.push('\n');
    Ok(text)
}

/// The same value with the keys of every map in order, whatever order the JSON library keeps.
fn sorted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.into_iter().collect();
            entries.sort_by(|left, right| left.0.cmp(&right.0));
            Value::Object(
                entries
                    .into_iter()
                    .map(|(key, item)| (key, sorted(item)))
                    .collect(),
            )
        }
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(overrides: &SpecOverrides) -> Result<Spec, SpecError> {
        let mut spec = base_spec(Privileges::Runc).unwrap();
        apply_overrides(&mut spec, overrides)?;
        Ok(spec)
    }

    #[test]
    fn variable_is_replaced_in_place_or_added() {
        let mut env = vec!["A=1".to_owned(), "B=2".to_owned(), "C".to_owned()];
        set_variable(
            &mut env,
            &EnvVar {
                name: "A".into(),
                value: "x=y".into(),
            },
        );
        set_variable(
            &mut env,
            &EnvVar {
                name: "D".into(),
                value: String::new(),
            },
        );
        set_variable(
            &mut env,
            &EnvVar {
                name: "C".into(),
                value: "3".into(),
            },
        );
        assert_eq!(env, ["A=x=y", "B=2", "C=3", "D="]);
    }

    #[test]
    fn overrides_reach_the_json() {
        let overrides = SpecOverrides {
            args: Some(vec!["echo".into(), "hi".into()]),
            env: vec![EnvVar {
                name: "TERM".into(),
                value: "dumb".into(),
            }],
            cwd: Some("/srv".into()),
            user: None,
            terminal: true,
            hostname: Some("box".into()),
            readonly: true,
            privileges: Some(Privileges::Docker),
            annotations: vec![("a.b".into(), "c".into())],
        };
        let json: Value =
            serde_json::from_str(&to_json(&with(&overrides).unwrap()).unwrap()).unwrap();
        assert_eq!(json["process"]["args"], serde_json::json!(["echo", "hi"]));
        assert_eq!(json["process"]["env"][1], "TERM=dumb");
        assert_eq!(json["process"]["cwd"], "/srv");
        assert_eq!(json["process"]["terminal"], true);
        assert_eq!(json["process"]["noNewPrivileges"], false);
        assert_eq!(json["hostname"], "box");
        assert_eq!(json["root"]["readonly"], true);
        assert_eq!(json["annotations"]["a.b"], "c");
    }

    #[test]
    fn unusable_values_are_refused() {
        let bad = [
            SpecOverrides {
                cwd: Some("srv".into()),
                ..Default::default()
            },
            SpecOverrides {
                args: Some(vec![]),
                ..Default::default()
            },
            SpecOverrides {
                args: Some(vec!["a\0b".into()]),
                ..Default::default()
            },
            SpecOverrides {
                hostname: Some("x".repeat(65)),
                ..Default::default()
            },
        ];
        for overrides in bad {
            assert!(with(&overrides).is_err(), "{overrides:?} was accepted");
        }
    }

    #[test]
    fn json_is_the_same_every_time() {
        let annotations = (0..50).map(|n| (format!("k{n}"), "v".to_owned())).collect();
        let overrides = SpecOverrides {
            annotations,
            privileges: Some(Privileges::Docker),
            ..Default::default()
        };
        let texts: Vec<_> = (0..5)
            .map(|_| to_json(&with(&overrides).unwrap()).unwrap())
            .collect();
        assert!(texts.windows(2).all(|pair| pair[0] == pair[1]));
    }
}
