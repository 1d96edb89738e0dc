// SPDX-License-Identifier: Apache-2.0

//! `caisson update`: limits inside the guest. The VM keeps its size.

use std::io::Read;
use std::path::{Path, PathBuf};

use caisson_runtime::error::RuntimeError;
use caisson_runtime::sandbox::control;
use clap::Args;
use oci_spec::runtime::LinuxResources;
use serde_json::{Map, Value, json};

use super::{Global, block_on};

/// Largest document, bytes.
const MAX: u64 = 1 << 20;

#[derive(Debug, Args)]
pub(crate) struct UpdateArgs {
    /// The container's id.
    id: String,
    /// The runtime-spec's linux.resources as JSON in a file, or `-` for stdin.
    #[arg(long, short)]
    resources: Option<PathBuf>,
    /// Bytes, -1 for no limit.
    #[arg(long, allow_hyphen_values = true)]
    memory: Option<i64>,
    /// Bytes of memory and swap together.
    #[arg(long, allow_hyphen_values = true)]
    memory_swap: Option<i64>,
    /// Bytes.
    #[arg(long, allow_hyphen_values = true)]
    memory_reservation: Option<i64>,
    /// Microseconds.
    #[arg(long)]
    cpu_period: Option<u64>,
    /// Microseconds per period, -1 for no limit.
    #[arg(long, allow_hyphen_values = true)]
    cpu_quota: Option<i64>,
    /// Relative weight.
    #[arg(long, alias = "cpu-share")]
    cpu_shares: Option<u64>,
    /// Number of processes, -1 for no limit.
    #[arg(long, allow_hyphen_values = true)]
    pids_limit: Option<i64>,
}

pub(crate) fn run(global: &Global, args: UpdateArgs) -> Result<u8, RuntimeError> {
    let resources = match &args.resources {
        Some(path) => parse(path, read(path))?,
        None => {
            let json = from_flags(&args).to_string();
            parse(Path::new("the options"), Ok(json.into_bytes()))?
        }
    };
    block_on(control::update(&global.open(&args.id)?, resources)).map(|()| 0)
}

fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut text = Vec::new();
    if path == Path::new("-") {
        std::io::stdin().lock().take(MAX).read_to_end(&mut text)?;
    } else {
        let file = std::fs::File::open(path)?;
        file.take(MAX).read_to_end(&mut text)?;
    }
    Ok(text)
}

fn parse(path: &Path, text: std::io::Result<Vec<u8>>) -> Result<LinuxResources, RuntimeError> {
    let text = text.map_err(RuntimeError::file("read resources", path))?;
    serde_json::from_slice(&text)
        .map_err(|error| RuntimeError::file("parse resources", path)(error.into()))
}

fn from_flags(args: &UpdateArgs) -> Value {
    let section = |pairs: &[(&str, Option<Value>)]| {
        let given = pairs
            .iter()
            .filter_map(|(key, value)| Some(((*key).to_owned(), value.clone()?)));
        given.collect::<Map<_, _>>()
    };
    let mut all = Map::new();
    let memory = section(&[
        ("limit", args.memory.map(Value::from)),
        ("swap", args.memory_swap.map(Value::from)),
        ("reservation", args.memory_reservation.map(Value::from)),
    ]);
    let cpu = section(&[
        ("period", args.cpu_period.map(Value::from)),
        ("quota", args.cpu_quota.map(Value::from)),
        ("shares", args.cpu_shares.map(Value::from)),
    ]);
    for (key, section) in [("memory", memory), ("cpu", cpu)] {
        if !section.is_empty() {
            all.insert(key.to_owned(), Value::Object(section));
        }
    }
    if let Some(limit) = args.pids_limit {
        all.insert("pids".to_owned(), json!({"limit": limit}));
    }
    Value::Object(all)
}
