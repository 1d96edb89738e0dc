// SPDX-License-Identifier: Apache-2.0

//! Rows, and how they are shown.

use std::fmt::Write;

use serde::Serialize;

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Row {
    /// What was looked at.
    pub name: String,
    /// Whether it is as it must be.
    pub ok: bool,
    /// What was found.
    pub what: String,
    /// What to do about it; empty when nothing is to be done.
    pub advice: String,
}

impl Row {
    /// As it must be.
    pub fn yes(name: impl Into<String>, what: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            ok: true,
            what: what.into(),
            advice: String::new(),
        }
    }

    /// Not as it must be.
    pub fn no(name: impl Into<String>, what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            ok: false,
            what: what.into(),
            advice: advice.into(),
        }
    }
}

/// All rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether all rows are.
    pub ok: bool,
    /// In the order in which they were looked at.
    pub rows: Vec<Row>,
}

impl Report {
    /// A report of `rows`.
    pub fn new(rows: Vec<Row>) -> Self {
        Self {
            ok: rows.iter().all(|row| row.ok),
            rows,
        }
    }

    /// One JSON document, with a newline.
    pub fn json(&self) -> String {
        // Strings and booleans only: there is nothing that JSON cannot hold.
        let mut json = serde_json::to_string(self).unwrap_or_default();
        json.push('\n');
        json
    }

    /// A line per row, the advice below it. An advice that stands there already is not repeated.
    pub fn text(&self) -> String {
        let width = self.rows.iter().map(|row| row.name.len()).max();
        let width = width.unwrap_or(0);
        let mut text = String::new();
        let mut last = "";
        for row in &self.rows {
            let answer = if row.ok { "yes" } else { "NO" };
            // Writing to a String does not fail.
            let _ = writeln!(text, "{answer:<3}  {:<width$}  {}", row.name, row.what);
            if !row.advice.is_empty() && row.advice != last {
                let _ = writeln!(text, "{:5}{:<width$}  -> {}", "", "", row.advice);
                last = &row.advice;
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_no_makes_the_whole_a_no_and_its_advice_is_told() {
        let yes = Row::yes("a", "fine");
        assert!(Report::new(vec![yes.clone()]).ok);
        let report = Report::new(vec![
            yes,
            Row::no("long name", "bad", "fix it"),
            Row::no("b", "bad", "fix it"),
        ]);
        assert!(!report.ok);
        assert_eq!(
            report.text(),
            "yes  a          fine\n\
             NO   long name  bad\n                -> fix it\n\
             NO   b          bad\n"
        );
        let json: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
        assert_eq!(json["ok"], false);
        assert_eq!(json["rows"][1]["advice"], "fix it");
    }
}
