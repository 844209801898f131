//! `bench steps`: the time of a step, by the context of its sequences and by their number.
//!
//! All sequences of a row have prompts of one length and start together; prompts are read one
//! after the other, so the first sequences are some tokens ahead when the last one begins. Timed
//! are the steps after that, in which each sequence gets one token.

use clap::Args;
use serde::Serialize;
use tilert_mk_shared::limits::DECODE_TOKENS_MAX;

use super::plot::Chart;
use super::report::{Figures, ReportArgs};
use super::{prompt, table, times};
use crate::cli::ModelArgs;
use crate::engine::{Engine, EngineOptions, Event, Request};
use crate::error::{Error, Result};
use crate::metrics::{TpotUs, intervals_ns, tpot};

const EXAMPLES: &str = "\
Examples:
  tilert-mk bench steps
  tilert-mk bench steps --model DIR --load dummy --context 64,1024,4096 --width 1 --json
  tilert-mk bench steps --model DIR --context 64 --width 1,2,3,4,5,6,7,8 --plot steps.svg";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(super) struct StepsArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens of the sequences' prompts, with commas between.
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "64,512",
          value_parser = clap::value_parser!(u32).range(1..))]
    context: Vec<u32>,
    /// Sequences that a step serves, with commas between.
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,2,4,8",
          value_parser = clap::value_parser!(u32).range(1..=i64::from(DECODE_TOKENS_MAX)))]
    width: Vec<u32>,
    /// Steps that are timed for each context and width.
    #[arg(long, value_name = "N", default_value_t = 64,
          value_parser = clap::value_parser!(u32).range(1..))]
    tokens: u32,
    #[command(flatten)]
    report: ReportArgs,
}

/// What steps took.
#[derive(Debug, Serialize)]
struct StepFigures {
    device: String,
    workers: u32,
    rows: Vec<Row>,
}

/// Steps of one width at one context.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    context: u32,
    width: u32,
    /// Positions of a sequence, on average over the sequences, when the timed steps began.
    positions_mean: f64,
    step_us: TpotUs,
    /// Of all sequences together, at the median step.
    tokens_per_second: f64,
}

/// Runs the subcommand.
pub(super) fn run(args: &StepsArgs) -> Result<()> {
    let report = args.report.open::<StepFigures>()?;
    let most = |list: &[u32]| list.iter().copied().max().unwrap_or(1);
    let (context, width) = (most(&args.context), most(&args.width));
    // While one prompt is read the sequences before it go on by a token in each step.
    let step_tokens = args.model.device.open(1, false)?.profile().step_tokens_max;
    let ahead =
        (width - 1).saturating_mul(context) / (step_tokens + 1).saturating_sub(width).max(1);
    let needed = context.saturating_add(ahead).saturating_add(width + args.tokens + 1);
    let mut engine = args.model.open(&EngineOptions {
        max_context: args.model.max_context.or(Some(needed)),
        slots: width,
        ..args.model.engine_options()
    })?;
    let mut rows = Vec::new();
    for context in &args.context {
        let prompt = prompt(*context, engine.config().vocab_size);
        for width in &args.width {
            rows.push(measure(&mut engine, &prompt, *width, args.tokens)?);
        }
    }
    let (device, workers) = (engine.device_name().to_owned(), engine.worker_count());
    report.finish(&StepFigures { device, workers, rows })
}

/// Times `token_count` steps of `width` sequences that begin with `prompt`.
fn measure(engine: &mut Engine, prompt: &[u32], width: u32, token_count: u32) -> Result<Row> {
    let context = prompt.len() as u32;
    let room = engine.context_max().saturating_sub(context);
    let mut slots = Vec::new();
    for _ in 0..width {
        slots.push(engine.submit(&Request::greedy(prompt, room))?);
    }
    // When each sequence's tokens were made, by the order of submission.
    let mut times_ns = vec![Vec::new(); slots.len()];
    let (mut ended, mut is_cancelled, mut generated) = (0, false, 0);
    while ended < slots.len() {
        let is_news = engine.poll(&mut |slot, event| match event {
            Event::Token { time_ns, .. } if !is_cancelled => {
                if let Some(idx) = slots.iter().position(|other| *other == slot) {
                    times_ns[idx].push(time_ns);
                }
            }
            Event::End(_) => ended += 1,
            _ => {}
        })?;
        let started = times_ns.iter().all(|times| !times.is_empty());
        if generated == 0 && started {
            generated = times_ns.iter().map(Vec::len).sum();
        }
        let is_enough = started && times_ns.iter().all(|times| times.len() > token_count as usize);
        if ended > 0 && !is_enough && !is_cancelled {
            let context_max = engine.context_max();
            return Err(Error::Request(format!(
                "{token_count} steps of {width} sequences do not fit a context of {context_max} \
                 after prompts of {context}"
            )));
        }
        if is_enough && !is_cancelled {
            is_cancelled = true;
            slots.iter().for_each(|slot| engine.cancel(*slot));
        }
        if !is_news {
            engine.rest();
        }
    }
    // The sequence that began last: since then every step has been one token of each.
    let last = times_ns.iter().max_by_key(|times| times.first().copied());
    let steps = last.map(|times| &times[..=token_count as usize]).unwrap_or_default();
    let step_us = tpot(intervals_ns(steps));
    Ok(Row {
        name: format!("context {context}, width {width}"),
        context,
        width,
        positions_mean: f64::from(context) + generated as f64 / f64::from(width),
        step_us,
        tokens_per_second: step_us.p50.map_or(0.0, |us| f64::from(width) * 1e6 / us),
    })
}

impl Figures for StepFigures {
    const BENCH: &'static str = "steps";

    fn to_text(&self) -> String {
        let device = format!("{}, {} workers", self.device, self.workers);
        let mut rows = vec![("device".to_owned(), device)];
        for row in &self.rows {
            let (rate, step) = (row.tokens_per_second, times(&row.step_us));
            rows.push((row.name.clone(), format!("{rate:.1} tok/s; a step {step}")));
        }
        table(&rows)
    }

    fn chart(&self) -> Chart {
        let mut widths: Vec<u32> = self.rows.iter().map(|row| row.width).collect();
        widths.sort_unstable();
        widths.dedup();
        let line = |width: u32| {
            let rows = self.rows.iter().filter(|row| row.width == width);
            let points =
                rows.filter_map(|row| Some((f64::from(row.context), row.step_us.p50? / 1e3)));
            (format!("width {width}"), points.collect())
        };
        Chart {
            title: format!("Median step, {}, {} workers", self.device, self.workers),
            x: "tokens of the prompt",
            y: "ms",
            is_log: false,
            series: widths.into_iter().map(line).collect(),
        }
    }
}
