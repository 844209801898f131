//! Latency figures of one answer, from the times at which its tokens were made.
//!
//! TTFT runs from the submission of the request to its first token; TPOT is the distribution of the
//! times between neighbouring tokens. Both are in microseconds for people and scripts; inside,
//! times are nanoseconds. The histogram keeps three significant digits.

use hdrhistogram::Histogram;
use serde::Serialize;

/// The longest time the histogram tells apart from longer ones: an hour.
const INTERVAL_NS_MAX: u64 = 3_600_000_000_000;
/// Significant digits that the histogram keeps.
const SIGNIFICANT_DIGITS: u8 = 3;

/// Quantiles of the time per output token; none when there were fewer than two tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct TpotUs {
    /// Median.
    pub p50: Option<f64>,
    /// 99 of 100 are at most this.
    pub p99: Option<f64>,
    /// 999 of 1000 are at most this.
    pub p999: Option<f64>,
    /// The longest.
    pub max: Option<f64>,
}

/// Latency figures of one answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Metrics {
    /// Time from submission to the first token.
    pub ttft_us: Option<f64>,
    /// Times between tokens.
    pub tpot_us: TpotUs,
    /// Rate of decoding: tokens after the first, divided by the time since the first.
    pub tokens_per_second: Option<f64>,
}

impl Metrics {
    /// Figures for tokens made at `token_times_ns` (ascending) of a request made at `submitted_ns`.
    pub fn of(submitted_ns: u64, token_times_ns: &[u64]) -> Metrics {
        let (Some(first), Some(last)) = (token_times_ns.first(), token_times_ns.last()) else {
            return Metrics::default();
        };
        let decode_ns = last.saturating_sub(*first);
        let decode_count = token_times_ns.len() - 1;
        Metrics {
            ttft_us: Some(micros(first.saturating_sub(submitted_ns))),
            tpot_us: tpot(intervals_ns(token_times_ns)),
            tokens_per_second: (decode_ns > 0)
                .then(|| decode_count as f64 * 1e9 / decode_ns as f64),
        }
    }
}

/// Times between neighbouring tokens that were made at `token_times_ns`.
pub(crate) fn intervals_ns(token_times_ns: &[u64]) -> impl Iterator<Item = u64> {
    token_times_ns.windows(2).map(|pair| pair[1].saturating_sub(pair[0]))
}

/// Quantiles of the times between tokens.
pub(crate) fn tpot(intervals_ns: impl Iterator<Item = u64>) -> TpotUs {
    // Constant bounds, accepted by the test below; without a histogram there is nothing to report.
    let histogram = Histogram::<u64>::new_with_bounds(1, INTERVAL_NS_MAX, SIGNIFICANT_DIGITS);
    let Ok(mut histogram) = histogram else {
        return TpotUs::default();
    };
    for interval_ns in intervals_ns {
        histogram.saturating_record(interval_ns);
    }
    if histogram.is_empty() {
        return TpotUs::default();
    }
    let quantile = |q| Some(micros(histogram.value_at_quantile(q)));
    TpotUs {
        p50: quantile(0.5),
        p99: quantile(0.99),
        p999: quantile(0.999),
        max: Some(micros(histogram.max())),
    }
}

fn micros(ns: u64) -> f64 {
    ns as f64 / 1000.0
}

/// `us` microseconds for people: `85 µs`, `1.2 ms`, `3.4 s`.
pub fn format_us(us: f64) -> String {
    match us {
        us if us < 9.95 => format!("{us:.1} µs"),
        us if us < 999.5 => format!("{us:.0} µs"),
        us if us < 999_950.0 => format!("{:.1} ms", us / 1e3),
        us => format!("{:.1} s", us / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(value: Option<f64>, want: f64) -> bool {
        value.is_some_and(|v| (v / want - 1.0).abs() < 2e-3)
    }

    #[test]
    fn quantiles_of_known_intervals() {
        // 999 intervals of 100 µs and one of 5 ms.
        let mut times = vec![2_000_000u64];
        for n in 0..1000u64 {
            times.push(times[n as usize] + if n == 500 { 5_000_000 } else { 100_000 });
        }
        let metrics = Metrics::of(500_000, &times);
        assert_eq!(metrics.ttft_us, Some(1500.0));
        assert!(near(metrics.tpot_us.p50, 100.0), "{metrics:?}");
        assert!(near(metrics.tpot_us.p99, 100.0), "{metrics:?}");
        assert!(near(metrics.tpot_us.p999, 100.0), "{metrics:?}");
        assert!(near(metrics.tpot_us.max, 5000.0), "{metrics:?}");
        assert!(near(metrics.tokens_per_second, 1e9 / 104_900.0), "{metrics:?}");
    }

    #[test]
    fn too_few_tokens_have_no_tpot() {
        assert_eq!(Metrics::of(7, &[]), Metrics::default());
        let one = Metrics::of(1_000, &[3_000]);
        assert_eq!(one.ttft_us, Some(2.0));
        assert_eq!(one.tpot_us, TpotUs::default());
        assert_eq!(one.tokens_per_second, None);
    }

    #[test]
    fn equal_and_huge_intervals_are_kept_in_bounds() {
        assert!(Metrics::of(0, &[5, 5]).tpot_us.max.is_some());
        assert!(Metrics::of(0, &[5, u64::MAX]).tpot_us.max.is_some());
    }

    #[test]
    fn times_for_people() {
        let all = [0.25, 85.4, 1234.0, 999_960.0].map(format_us);
        assert_eq!(all, ["0.2 µs", "85 µs", "1.2 ms", "1.0 s"]);
    }
}
