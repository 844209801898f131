//! `bench decode`: the time of a token, beside what the memory allows.
//!
//! A round probes the memory and decodes right after it, so that both meet the same conditions. All rounds
//! must give the same tokens.

use clap::Args;
use serde::Serialize;

use super::plot::Chart;
use super::probe::{over_rounds, shown};
use super::report::{Figures, ReportArgs};
use super::{answer, prompt, table, times};
use crate::bandwidth::{Bandwidth, Probe};
use crate::cli::ModelArgs;
use crate::cli::inspect::format_bytes;
use crate::error::{Error, Result};
use crate::metrics::{TpotUs, intervals_ns, tpot};

const EXAMPLES: &str = "\
Examples:
  tilert-mk bench decode
  tilert-mk bench decode --model DIR --load dummy --workers 2 --rounds 10 --json
  tilert-mk bench decode --model DIR --context 4000 --max-context 4096 --plot decode.svg";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(super) struct DecodeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Rounds of a bandwidth probe and a decode; an error if their tokens differ.
    #[arg(long, value_name = "N", default_value_t = 5,
          value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Tokens that each round decodes after its first.
    #[arg(long, value_name = "N", default_value_t = 64,
          value_parser = clap::value_parser!(u32).range(1..))]
    tokens: u32,
    /// Tokens of the prompt: the context at the first token.
    #[arg(long, value_name = "N", default_value_t = 16,
          value_parser = clap::value_parser!(u32).range(1..))]
    context: u32,
    #[command(flatten)]
    report: ReportArgs,
}

/// What decoding reached.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct DecodeFigures {
    device: String,
    workers: u32,
    context: u32,
    tokens: u64,
    weight_bytes: u64,
    bytes_per_token: u64,
    tpot_us: TpotUs,
    /// Over all intervals: slow tokens count by their length.
    tokens_per_second: f64,
    /// Bytes of weights that the median token reads in a second.
    decode_bytes_per_second: f64,
    /// On the CPU: of all rounds' probes the best pass, and the median of the medians.
    bandwidth: Option<Bandwidth>,
    /// The rate of decoding over the best pass.
    share_of_best: Option<f64>,
    /// The rate of decoding over the median pass.
    share_of_median: Option<f64>,
    /// After a decode, before the probe takes memory.
    peak_resident_bytes: Option<u64>,
    resident_over_weights: Option<f64>,
    rounds: Vec<Round>,
}

/// One round.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Round {
    tpot_us: TpotUs,
    bandwidth: Option<Bandwidth>,
}

/// Runs the subcommand.
pub(super) fn run(args: &DecodeArgs) -> Result<()> {
    let report = args.report.open::<DecodeFigures>()?;
    report.finish(&decode(args)?)
}

fn decode(args: &DecodeArgs) -> Result<DecodeFigures> {
    let mut engine = args.model.open(&args.model.engine_options())?;
    let prompt = prompt(args.context, engine.config().vocab_size);
    // The first run touches all memory that a run needs; it is not counted.
    let first = answer(&mut engine, &prompt, args.tokens + 1)?;
    let peak_resident_bytes = peak_resident_bytes();
    let has_probe = engine.runs_on_host_memory();
    let probe = has_probe.then(|| Probe::new(engine.worker_count())).transpose()?;
    let (mut rounds, mut all_ns) = (Vec::new(), Vec::new());
    for round in 1..=args.rounds {
        let bandwidth = probe.as_ref().map(Probe::measure);
        let answer = answer(&mut engine, &prompt, args.tokens + 1)?;
        if answer.ids != first.ids {
            let message = format!("round {round} gave other tokens than the run before round 1");
            return Err(Error::Fault(message));
        }
        let round_ns: Vec<u64> = intervals_ns(&answer.token_times_ns).collect();
        rounds.push(Round { tpot_us: tpot(round_ns.iter().copied()), bandwidth });
        all_ns.extend(round_ns);
    }
    let probed: Vec<Bandwidth> = rounds.iter().filter_map(|round| round.bandwidth).collect();
    let (tpot_us, bandwidth) = (tpot(all_ns.iter().copied()), over_rounds(&probed));
    let (weight_bytes, bytes_per_token) = (engine.weight_bytes(), engine.bytes_per_token());
    let decode_bytes_per_second = tpot_us.p50.map_or(0.0, |us| bytes_per_token as f64 * 1e6 / us);
    let all_seconds = all_ns.iter().sum::<u64>() as f64 / 1e9;
    Ok(DecodeFigures {
        device: engine.device_name().to_owned(),
        workers: engine.worker_count(),
        context: args.context,
        tokens: all_ns.len() as u64,
        weight_bytes,
        bytes_per_token,
        tpot_us,
        tokens_per_second: all_ns.len() as f64 / all_seconds,
        decode_bytes_per_second,
        bandwidth,
        share_of_best: bandwidth.map(|b| decode_bytes_per_second / b.best_bytes_per_second),
        share_of_median: bandwidth.map(|b| decode_bytes_per_second / b.median_bytes_per_second),
        peak_resident_bytes,
        resident_over_weights: peak_resident_bytes.map(|peak| peak as f64 / weight_bytes as f64),
        rounds,
    })
}

/// The most memory that this process has had resident, where the system tells.
fn peak_resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

impl Figures for DecodeFigures {
    const BENCH: &'static str = "decode";

    fn to_text(&self) -> String {
        let mut rows = vec![
            ("device".to_owned(), format!("{}, {} workers", self.device, self.workers)),
            ("weights".to_owned(), format_bytes(self.weight_bytes)),
            ("read per token".to_owned(), format_bytes(self.bytes_per_token)),
            ("tokens timed".to_owned(), format!("{} from {} on", self.tokens, self.context)),
        ];
        let share =
            |share: Option<f64>| share.map_or(String::new(), |s| format!("{:.1}%", s * 100.0));
        for (idx, round) in self.rounds.iter().enumerate() {
            let bandwidth =
                round.bandwidth.map_or(String::new(), |b| format!("; read {}", shown(&b)));
            rows.push((
                format!("round {}", idx + 1),
                format!("{}{bandwidth}", times(&round.tpot_us)),
            ));
        }
        rows.push(("time per token".to_owned(), times(&self.tpot_us)));
        rows.push(("tokens per second".to_owned(), format!("{:.2}", self.tokens_per_second)));
        let rate = format!("{:.2} GB/s", self.decode_bytes_per_second / 1e9);
        rows.push(("weights read at".to_owned(), rate));
        if let Some(bandwidth) = &self.bandwidth {
            rows.push(("read bandwidth".to_owned(), shown(bandwidth)));
            let shares = [share(self.share_of_best), share(self.share_of_median)];
            let shares = format!("{} of the best pass, {} of the median", shares[0], shares[1]);
            rows.push(("share".to_owned(), shares));
        }
        if let (Some(peak), Some(ratio)) = (self.peak_resident_bytes, self.resident_over_weights) {
            let text = format!("{}, {ratio:.3} of the weights", format_bytes(peak));
            rows.push(("peak resident".to_owned(), text));
        }
        table(&rows)
    }

    fn chart(&self) -> Chart {
        let line = |name: &str, value: fn(&TpotUs) -> Option<f64>| {
            let rounds = self.rounds.iter().enumerate();
            let points = rounds
                .filter_map(|(idx, round)| Some((idx as f64 + 1.0, value(&round.tpot_us)? / 1e3)));
            (name.to_owned(), points.collect())
        };
        Chart {
            title: format!("Time per token, {}, {} workers", self.device, self.workers),
            x: "round",
            y: "ms",
            is_log: false,
            series: vec![
                line("p50", |t| t.p50),
                line("p99", |t| t.p99),
                line("p99.9", |t| t.p999),
                line("max", |t| t.max),
            ],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_shows_what_a_gpu_has_and_what_a_cpu_has() {
        let tpot_us = TpotUs { p50: Some(100.0), p99: Some(1e3), p999: Some(2e3), max: Some(3e3) };
        let bandwidth =
            Some(Bandwidth { best_bytes_per_second: 2e10, median_bytes_per_second: 1.9e10 });
        let cpu = DecodeFigures {
            device: "cpu".into(),
            workers: 2,
            context: 16,
            tokens: 320,
            weight_bytes: 2_000_000,
            bytes_per_token: 1_500_000,
            tpot_us,
            tokens_per_second: 9e3,
            decode_bytes_per_second: 1.5e10,
            bandwidth,
            share_of_best: Some(0.75),
            share_of_median: Some(0.789),
            peak_resident_bytes: Some(2_500_000),
            resident_over_weights: Some(1.25),
            rounds: vec![Round { tpot_us, bandwidth }],
        };
        let text = cpu.to_text();
        for shown in [
            "p50 100 µs, p99 1.0 ms, p99.9 2.0 ms, max 3.0 ms",
            "15.00 GB/s",
            "20.00 GB/s best, 19.00 GB/s median",
            "75.0% of the best pass, 78.9% of the median",
            "2.50 MB, 1.250 of the weights",
            "round 1",
        ] {
            assert!(text.contains(shown), "{shown} is not in\n{text}");
        }
        let gpu = DecodeFigures { bandwidth: None, peak_resident_bytes: None, ..cpu };
        assert!(!gpu.to_text().contains("share") && !gpu.to_text().contains("resident"));
    }

    #[test]
    fn this_process_has_a_peak() {
        if cfg!(target_os = "linux") {
            assert!(peak_resident_bytes().is_some_and(|bytes| bytes > 100_000));
        }
    }
}
