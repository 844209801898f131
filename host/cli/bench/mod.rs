//! `tilert-mk bench`: how fast the runtime is, beside what the machine allows.
//!
//! Each subcommand measures and returns `Figures`; `report` prints, compares and plots them.

mod compare;
mod decode;
mod loss;
mod plot;
mod prefill;
mod probe;
mod report;
mod runtime;
mod steps;

use std::ops::ControlFlow;

use clap::{Args, Subcommand};

use crate::engine::{Completion, Engine, Request};
use crate::error::Result;
use crate::metrics::{TpotUs, format_us};

const EXAMPLES: &str = "\
Examples:
  tilert-mk bench decode
  tilert-mk bench decode --model DIR --load dummy --workers 2 --rounds 10 --json
  tilert-mk bench prefill --model DIR --prompt-tokens 128,512
  tilert-mk bench steps --model DIR --context 64,1024 --width 1,8
  tilert-mk bench runtime --workers 2 --busy-poll
  tilert-mk bench loss --weights q8
  tilert-mk bench bandwidth --threads 2
  tilert-mk bench decode --json > old.json
  tilert-mk bench decode --compare old.json --plot decode.svg";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(super) struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Decode tokens; print the time of each and the share of the memory's bandwidth.
    Decode(decode::DecodeArgs),
    /// Read prompts; print the time to the first token.
    Prefill(prefill::PrefillArgs),
    /// Decode several sequences at once; print the time of a step by context and by width.
    Steps(steps::StepsArgs),
    /// Measure what the runtime adds: claims, signals, stages, reactions, sampling.
    Runtime(runtime::RuntimeArgs),
    /// Print how well the model predicts a text: what a weight format costs.
    Loss(loss::LossArgs),
    /// Print the read bandwidth of the memory.
    Bandwidth(probe::BandwidthArgs),
}

/// Runs the subcommand.
pub(super) fn run(args: &BenchArgs) -> Result<()> {
    match &args.what {
        What::Decode(args) => decode::run(args),
        What::Prefill(args) => prefill::run(args),
        What::Steps(args) => steps::run(args),
        What::Runtime(args) => runtime::run(args),
        What::Loss(args) => loss::run(args),
        What::Bandwidth(args) => probe::run(args),
    }
}

/// A prompt of `count` tokens that the vocabulary has.
fn prompt(count: u32, vocab_size: u32) -> Vec<u32> {
    let id = |idx: u32| (u64::from(idx) * 7919 % u64::from(vocab_size)) as u32;
    (0..count).map(id).collect()
}

/// The answer of `token_count` tokens to `prompt`.
fn answer(engine: &mut Engine, prompt: &[u32], token_count: u32) -> Result<Completion> {
    engine.generate(&Request::greedy(prompt, token_count), &mut |_| ControlFlow::Continue(()))
}

/// Quantiles for people.
fn times(times_us: &TpotUs) -> String {
    let named = [
        ("p50", times_us.p50),
        ("p99", times_us.p99),
        ("p99.9", times_us.p999),
        ("max", times_us.max),
    ];
    let shown = named.map(|(name, us)| format!("{name} {}", us.map_or("-".into(), format_us)));
    shown.join(", ")
}

/// Names and values as lines with aligned values.
fn table(rows: &[(String, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    rows.iter().map(|(name, value)| format!("{name:width$}  {value}\n")).collect()
}
