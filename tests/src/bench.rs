// SPDX-License-Identifier: Apache-2.0

//! What `caisson-bench` (in the testbed) tells `cargo xtask bench` (outside): one JSON document per line.

use serde::{Deserialize, Serialize};

/// A line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Line {
    /// Something that was measured with, such as a program's version.
    Fact {
        /// What it is of.
        name: String,
        /// In words.
        value: String,
    },
    /// One measurement.
    Sample(Sample),
}

/// One measurement of one run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sample {
    /// Which part of the bench.
    pub part: String,
    /// Who was measured: a runtime or a VMM.
    pub subject: String,
    /// What was measured.
    pub metric: String,
    /// Which time, from 0.
    pub run: u32,
    /// How much, in the metric's own unit: nanoseconds, KiB or a count, as its name's end says (`_ns`, `_kib`).
    pub value: u64,
}
