//! Samples of one row.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::error::{Error, Result};

/// The longest sample that is told apart from longer ones: an hour, in picoseconds.
const SAMPLE_PS_MAX: u64 = 3_600_000_000_000_000;
/// Significant digits that the histogram keeps.
const SIGNIFICANT_DIGITS: u8 = 3;

/// When a row is complete: whichever comes first.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Samples.
    pub(super) samples: u64,
    /// Time since the row began.
    pub(super) time: Duration,
}

/// A row that is being measured.
pub(super) struct Samples {
    /// Picoseconds: the mean of a batch may be a few nanoseconds.
    histogram: Histogram<u64>,
    batch: u32,
    limits: Limits,
    begin: Instant,
}

/// Quantiles of a row, in nanoseconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Row {
    pub(super) name: String,
    pub(super) samples: u64,
    /// Repeats of which each sample is the mean.
    pub(super) batch: u32,
    pub(super) p50_ns: f64,
    pub(super) p99_ns: f64,
    pub(super) p999_ns: f64,
    pub(super) max_ns: f64,
}

impl Samples {
    /// No samples yet; each will be of `batch` repeats.
    ///
    /// Errors: a histogram that cannot be made.
    pub(super) fn new(batch: u32, limits: Limits) -> Result<Samples> {
        let histogram = Histogram::new_with_bounds(1, SAMPLE_PS_MAX, SIGNIFICANT_DIGITS)
            .map_err(|error| Error::Request(format!("a histogram: {error}")))?;
        Ok(Samples { histogram, batch, limits, begin: Instant::now() })
    }

    /// Takes the time of one batch; whether more are wanted.
    pub(super) fn record(&mut self, batch_time: Duration) -> bool {
        let ps = batch_time.as_nanos() as u64 * 1000 / u64::from(self.batch);
        self.histogram.saturating_record(ps);
        self.histogram.len() < self.limits.samples && self.begin.elapsed() < self.limits.time
    }

    /// The quantiles.
    pub(super) fn row(self, name: String) -> Row {
        let ns = |ps: u64| ps as f64 / 1e3;
        let quantile = |q| ns(self.histogram.value_at_quantile(q));
        Row {
            name,
            samples: self.histogram.len(),
            batch: self.batch,
            p50_ns: quantile(0.5),
            p99_ns: quantile(0.99),
            p999_ns: quantile(0.999),
            max_ns: ns(self.histogram.max()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_the_mean_of_its_batch() {
        let limits = Limits { samples: 1000, time: Duration::from_secs(3600) };
        let mut samples = Samples::new(8, limits).unwrap();
        for idx in 0..1000 {
            let is_slow = idx >= 995;
            let is_wanted = samples.record(Duration::from_nanos(if is_slow { 8000 } else { 84 }));
            assert_eq!(is_wanted, idx < 999);
        }
        let row = samples.row("x".into());
        let near = |ns: f64, want: f64| (ns / want - 1.0).abs() < 2e-3;
        assert!(near(row.p50_ns, 10.5) && near(row.p99_ns, 10.5), "{row:?}");
        assert!(near(row.p999_ns, 1000.0) && near(row.max_ns, 1000.0), "{row:?}");
        assert_eq!((row.samples, row.batch), (1000, 8));
    }

    #[test]
    fn time_ends_a_row_too() {
        let limits = Limits { samples: u64::MAX, time: Duration::ZERO };
        assert!(!Samples::new(1, limits).unwrap().record(Duration::from_nanos(1)));
    }
}
