//! `bench bandwidth`: the read bandwidth of the memory.

use clap::Args;
use serde::Serialize;

use super::plot::Chart;
use super::report::{Figures, ReportArgs};
use crate::bandwidth::{Bandwidth, Probe};
use crate::cli::worker_count;
use crate::error::Result;

const EXAMPLES: &str = "\
Examples:
  tilert-mk bench bandwidth
  tilert-mk bench bandwidth --threads 1 --rounds 10 --plot bandwidth.svg";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(super) struct BandwidthArgs {
    /// Threads that read [default: one per core].
    #[arg(long, value_name = "N", value_parser = worker_count)]
    threads: Option<u32>,
    /// Measurements.
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    #[command(flatten)]
    report: ReportArgs,
}

/// What reading reached.
#[derive(Debug, Serialize)]
struct BandwidthFigures {
    threads: u32,
    #[serde(flatten)]
    bandwidth: Bandwidth,
    rounds: Vec<Bandwidth>,
}

/// Runs the subcommand.
pub(super) fn run(args: &BandwidthArgs) -> Result<()> {
    let report = args.report.open::<BandwidthFigures>()?;
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    let threads = args.threads.unwrap_or(cores);
    let probe = Probe::new(threads)?;
    let rounds: Vec<Bandwidth> = (0..args.rounds).map(|_| probe.measure()).collect();
    let bandwidth = over_rounds(&rounds).unwrap_or_default();
    report.finish(&BandwidthFigures { threads, bandwidth, rounds })
}

/// The best pass of all rounds and the median round's median pass; none without rounds.
pub(super) fn over_rounds(rounds: &[Bandwidth]) -> Option<Bandwidth> {
    let mut medians: Vec<f64> = rounds.iter().map(|b| b.median_bytes_per_second).collect();
    medians.sort_by(f64::total_cmp);
    Some(Bandwidth {
        best_bytes_per_second: rounds.iter().map(|b| b.best_bytes_per_second).fold(0.0, f64::max),
        median_bytes_per_second: medians.get(medians.len() / 2).copied()?,
    })
}

/// A bandwidth for people.
pub(super) fn shown(bandwidth: &Bandwidth) -> String {
    let [best, median] = [bandwidth.best_bytes_per_second, bandwidth.median_bytes_per_second];
    format!("{:.2} GB/s best, {:.2} GB/s median", best / 1e9, median / 1e9)
}

impl Figures for BandwidthFigures {
    const BENCH: &'static str = "bandwidth";

    fn to_text(&self) -> String {
        format!("read bandwidth of {} threads  {}\n", self.threads, shown(&self.bandwidth))
    }

    fn chart(&self) -> Chart {
        let line = |value: fn(&Bandwidth) -> f64| {
            let rounds = self.rounds.iter().enumerate();
            rounds.map(|(idx, round)| (idx as f64 + 1.0, value(round) / 1e9)).collect()
        };
        Chart {
            title: format!("Read bandwidth of {} threads", self.threads),
            x: "round",
            y: "GB/s",
            is_log: false,
            series: vec![
                ("best pass".into(), line(|round| round.best_bytes_per_second)),
                ("median pass".into(), line(|round| round.median_bytes_per_second)),
            ],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_give_their_best_pass_and_their_median_median() {
        let round = |best_bytes_per_second, median_bytes_per_second| Bandwidth {
            best_bytes_per_second,
            median_bytes_per_second,
        };
        let bandwidth = over_rounds(&[round(3e9, 1e9), round(9e9, 2e9), round(4e9, 3e9)]).unwrap();
        assert_eq!(bandwidth, round(9e9, 2e9));
        assert_eq!(over_rounds(&[]), None);
    }
}
