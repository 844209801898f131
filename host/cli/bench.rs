//! `tilert-mk bench`: how fast tokens are decoded, beside what the memory allows.
//!
//! A round probes the memory and decodes right after it, so that both meet the same conditions.

use std::ops::ControlFlow;

use clap::{Args, Subcommand};
use serde::Serialize;
use tilert_mk_shared::sample::SamplingParams;

use super::ModelArgs;
use super::inspect::format_bytes;
use super::output::{Output, pretty_json};
use crate::bandwidth::{Bandwidth, Probe};
use crate::engine::{Engine, Request};
use crate::error::Result;
use crate::metrics::{TpotUs, format_us, intervals_ns, tpot};

const EXAMPLES: &str = "\
Examples:
  tilert-mk bench decode
  tilert-mk bench decode --model DIR --load dummy --workers 2 --rounds 10 --json
  tilert-mk bench bandwidth --threads 2";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(super) struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Decode tokens; print the time of each and the share of the memory's bandwidth.
    Decode(DecodeArgs),
    /// Print the read bandwidth of the memory.
    Bandwidth(BandwidthArgs),
}

#[derive(Args, Debug)]
struct DecodeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Rounds of a bandwidth probe and a decode.
    #[arg(long, value_name = "N", default_value_t = 5,
          value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Tokens that each round decodes after its first.
    #[arg(long, value_name = "N", default_value_t = 64,
          value_parser = clap::value_parser!(u32).range(1..))]
    tokens: u32,
    /// Tokens of the prompt.
    #[arg(long, value_name = "N", default_value_t = 16,
          value_parser = clap::value_parser!(u32).range(1..))]
    prompt_tokens: u32,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
struct BandwidthArgs {
    /// Threads that read [default: one per core].
    #[arg(long, value_name = "N", value_parser = super::worker_count)]
    threads: Option<u32>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// What decoding reached.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Figures {
    device: String,
    workers: u32,
    tokens: u64,
    weight_bytes: u64,
    bytes_per_token: u64,
    tpot_us: TpotUs,
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
pub(super) fn run(args: &BenchArgs) -> Result<()> {
    let (json, text) = match &args.what {
        What::Decode(args) => {
            let figures = decode(args)?;
            (args.json.then(|| pretty_json(&figures)), figures.to_text())
        }
        What::Bandwidth(args) => {
            let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
            let threads = args.threads.unwrap_or(cores);
            let bandwidth = Probe::new(threads)?.measure();
            let text = format!("read bandwidth of {threads} threads  {}\n", shown(&bandwidth));
            (args.json.then(|| pretty_json(&bandwidth)), text)
        }
    };
    Output::new().write(&json.transpose()?.unwrap_or(text)).map(|_| ())
}

fn shown(bandwidth: &Bandwidth) -> String {
    let [best, median] = [bandwidth.best_bytes_per_second, bandwidth.median_bytes_per_second];
    format!("{:.2} GB/s best, {:.2} GB/s median", best / 1e9, median / 1e9)
}

fn decode(args: &DecodeArgs) -> Result<Figures> {
    let mut engine = args.model.open(&args.model.engine_options())?;
    let prompt: Vec<u32> = (0..args.prompt_tokens)
        .map(|idx| (u64::from(idx) * 7919 % u64::from(engine.config().vocab_size)) as u32)
        .collect();
    // The first run touches all memory that a run needs; it is not counted.
    let _ = intervals(&mut engine, &prompt, args.tokens)?;
    let peak_resident_bytes = peak_resident_bytes();
    let has_probe = engine.runs_on_host_memory();
    let probe = has_probe.then(|| Probe::new(engine.worker_count())).transpose()?;
    let (mut rounds, mut all_ns) = (Vec::new(), Vec::new());
    for _ in 0..args.rounds {
        let bandwidth = probe.as_ref().map(Probe::measure);
        let round_ns = intervals(&mut engine, &prompt, args.tokens)?;
        rounds.push(Round { tpot_us: tpot(round_ns.iter().copied()), bandwidth });
        all_ns.extend(round_ns);
    }
    let (tpot_us, bandwidth) = (tpot(all_ns.iter().copied()), over_rounds(&rounds));
    let (weight_bytes, bytes_per_token) = (engine.weight_bytes(), engine.bytes_per_token());
    let decode_bytes_per_second = tpot_us.p50.map_or(0.0, |us| bytes_per_token as f64 * 1e6 / us);
    Ok(Figures {
        device: engine.device_name().to_owned(),
        workers: engine.worker_count(),
        tokens: all_ns.len() as u64,
        weight_bytes,
        bytes_per_token,
        tpot_us,
        decode_bytes_per_second,
        bandwidth,
        share_of_best: bandwidth.map(|b| decode_bytes_per_second / b.best_bytes_per_second),
        share_of_median: bandwidth.map(|b| decode_bytes_per_second / b.median_bytes_per_second),
        peak_resident_bytes,
        resident_over_weights: peak_resident_bytes.map(|peak| peak as f64 / weight_bytes as f64),
        rounds,
    })
}

/// Times between the tokens of one answer.
fn intervals(engine: &mut Engine, prompt: &[u32], token_count: u32) -> Result<Vec<u64>> {
    let request = Request {
        prompt,
        max_tokens: token_count + 1,
        stop_ids: &[],
        sampling: SamplingParams::GREEDY,
        want_logits: false,
    };
    let answer = engine.generate(&request, &mut |_| ControlFlow::Continue(()))?;
    Ok(intervals_ns(&answer.token_times_ns).collect())
}

/// The best pass of all rounds and the median round's median pass.
fn over_rounds(rounds: &[Round]) -> Option<Bandwidth> {
    let of_rounds: Option<Vec<Bandwidth>> = rounds.iter().map(|round| round.bandwidth).collect();
    let of_rounds = of_rounds?;
    let mut medians: Vec<f64> = of_rounds.iter().map(|b| b.median_bytes_per_second).collect();
    medians.sort_by(f64::total_cmp);
    Some(Bandwidth {
        best_bytes_per_second: of_rounds
            .iter()
            .map(|b| b.best_bytes_per_second)
            .fold(0.0, f64::max),
        median_bytes_per_second: medians.get(medians.len() / 2).copied()?,
    })
}

/// The most memory that this process has had resident, where the system tells.
fn peak_resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

impl Figures {
    /// A table for people.
    fn to_text(&self) -> String {
        let mut rows = vec![
            ("device".to_owned(), format!("{}, {} workers", self.device, self.workers)),
            ("weights".to_owned(), format_bytes(self.weight_bytes)),
            ("read per token".to_owned(), format_bytes(self.bytes_per_token)),
            ("tokens timed".to_owned(), self.tokens.to_string()),
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
        let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        rows.iter().map(|(name, value)| format!("{name:width$}  {value}\n")).collect()
    }
}

fn times(tpot_us: &TpotUs) -> String {
    let named =
        [("p50", tpot_us.p50), ("p99", tpot_us.p99), ("p99.9", tpot_us.p999), ("max", tpot_us.max)];
    let shown = named.map(|(name, us)| format!("{name} {}", us.map_or("-".into(), format_us)));
    shown.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(best: f64, median: f64) -> Round {
        let bandwidth = Bandwidth { best_bytes_per_second: best, median_bytes_per_second: median };
        Round { tpot_us: TpotUs::default(), bandwidth: Some(bandwidth) }
    }

    #[test]
    fn rounds_give_their_best_pass_and_their_median_median() {
        let all = [round(3e9, 1e9), round(9e9, 2e9), round(4e9, 3e9)];
        let bandwidth = over_rounds(&all).unwrap();
        assert_eq!(bandwidth.best_bytes_per_second, 9e9);
        assert_eq!(bandwidth.median_bytes_per_second, 2e9);
        assert_eq!(over_rounds(&[Round { bandwidth: None, ..all[0] }]), None);
    }

    #[test]
    fn text_shows_what_a_gpu_has_and_what_a_cpu_has() {
        let tpot_us = TpotUs { p50: Some(100.0), p99: Some(1e3), p999: Some(2e3), max: Some(3e3) };
        let bandwidth = over_rounds(&[round(2e10, 1.9e10)]);
        let cpu = Figures {
            device: "cpu".into(),
            workers: 2,
            tokens: 320,
            weight_bytes: 2_000_000,
            bytes_per_token: 1_500_000,
            tpot_us,
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
        let gpu = Figures { bandwidth: None, peak_resident_bytes: None, ..cpu };
        assert!(!gpu.to_text().contains("share") && !gpu.to_text().contains("resident"));
    }

    #[test]
    fn this_process_has_a_peak() {
        if cfg!(target_os = "linux") {
            assert!(peak_resident_bytes().is_some_and(|bytes| bytes > 100_000));
        }
    }
}
