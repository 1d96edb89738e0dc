// SPDX-License-Identifier: Apache-2.0

//! The middle and the spread of samples.

/// Of at least one sample.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Stats {
    pub(super) median: f64,
    pub(super) min: u64,
    pub(super) max: u64,
    pub(super) count: usize,
}

impl Stats {
    /// Of these, if there are any.
    pub(super) fn of(samples: impl IntoIterator<Item = u64>) -> Option<Self> {
        let mut samples: Vec<u64> = samples.into_iter().collect();
        samples.sort_unstable();
        let (min, max) = (*samples.first()?, *samples.last()?);
        let count = samples.len();
        let at = |index: usize| samples.get(index).map_or(0.0, |&value| float(value));
        let median = match count % 2 {
            0 => f64::midpoint(at(count / 2 - 1), at(count / 2)),
            _ => at(count / 2),
        };
        Some(Self {
            median,
            min,
            max,
            count,
        })
    }

    /// `median (min–max)`, divided by `unit`.
    pub(super) fn show(&self, unit: f64, digits: usize) -> String {
        let [median, min, max] =
            [self.median, float(self.min), float(self.max)].map(|value| value / unit);
        format!("{median:.digits$} ({min:.digits$}–{max:.digits$})")
    }
}

/// Nanoseconds of a bench and counts are far below 2^53.
#[expect(
    clippy::cast_precision_loss,
    reason = "what is measured is below 2^53, and shown with few digits"
)]
pub(super) fn float(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_one_or_between_the_two() {
        assert_eq!(Stats::of([]), None);
        let stats = Stats::of([5, 1, 9]).unwrap();
        assert_eq!(
            (stats.median, stats.min, stats.max, stats.count),
            (5.0, 1, 9, 3)
        );
        assert_eq!(Stats::of([1, 2, 30, 4]).unwrap().median, 3.0);
        assert_eq!(stats.show(2.0, 1), "2.5 (0.5–4.5)");
    }
}
