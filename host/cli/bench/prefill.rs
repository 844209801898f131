//! `bench prefill`: the time from a prompt to its first token.

use clap::Args;
use serde::Serialize;
use tilert_mk_shared::limits::STEP_TOKENS_MAX;

use super::plot::Chart;
use super::report::{Figures, ReportArgs};
use super::{answer, prompt, table, times};
use crate::cli::ModelArgs;
use crate::engine::EngineOptions;
use crate::error::Result;
use crate::metrics::{TpotUs, tpot};

const EXAMPLES: &str = "\
Examples:
  tilert-mk bench prefill
  tilert-mk bench prefill --model DIR --load dummy --prompt-tokens 128,512 --rounds 10 --json";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(super) struct PrefillArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens of the prompts, with commas between.
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "128,512",
          value_parser = clap::value_parser!(u32).range(1..))]
    prompt_tokens: Vec<u32>,
    /// Prompts of each length.
    #[arg(long, value_name = "N", default_value_t = 5,
          value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Prompt tokens that one step processes.
    #[arg(long, value_name = "N", default_value_t = STEP_TOKENS_MAX,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(STEP_TOKENS_MAX)))]
    prefill_chunk: u32,
    #[command(flatten)]
    report: ReportArgs,
}

/// What reading prompts took.
#[derive(Debug, Serialize)]
struct PrefillFigures {
    device: String,
    workers: u32,
    prefill_chunk: u32,
    rows: Vec<Row>,
}

/// Prompts of one length.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    prompt_tokens: u32,
    /// From the submission to the first token.
    ttft_us: TpotUs,
    /// Prompt tokens over the median time to the first token.
    tokens_per_second: f64,
}

/// Runs the subcommand.
pub(super) fn run(args: &PrefillArgs) -> Result<()> {
    let report = args.report.open::<PrefillFigures>()?;
    let longest = args.prompt_tokens.iter().copied().max().unwrap_or(1);
    let mut engine = args.model.open(&EngineOptions {
        max_context: args.model.max_context.or(Some(longest.saturating_add(1))),
        step_tokens: args.prefill_chunk,
        ..args.model.engine_options()
    })?;
    let mut rows = Vec::new();
    for count in &args.prompt_tokens {
        let prompt = prompt(*count, engine.config().vocab_size);
        // The first touches the memory that the others use; it is not counted.
        let _ = answer(&mut engine, &prompt, 1)?;
        let mut times_ns = Vec::new();
        for _ in 0..args.rounds {
            let answer = answer(&mut engine, &prompt, 1)?;
            let first_ns = answer.token_times_ns.first().copied().unwrap_or(answer.submitted_ns);
            times_ns.push(first_ns.saturating_sub(answer.submitted_ns));
        }
        let ttft_us = tpot(times_ns.into_iter());
        rows.push(Row {
            name: format!("{count} tokens"),
            prompt_tokens: *count,
            ttft_us,
            tokens_per_second: ttft_us.p50.map_or(0.0, |us| f64::from(*count) * 1e6 / us),
        });
    }
    report.finish(&PrefillFigures {
        device: engine.device_name().to_owned(),
        workers: engine.worker_count(),
        prefill_chunk: engine.program().dims.step_tokens_max,
        rows,
    })
}

impl Figures for PrefillFigures {
    const BENCH: &'static str = "prefill";

    fn to_text(&self) -> String {
        let device = format!("{}, {} workers", self.device, self.workers);
        let mut rows = vec![
            ("device".to_owned(), device),
            ("tokens in a step".to_owned(), self.prefill_chunk.to_string()),
        ];
        for row in &self.rows {
            let rate =
                format!("{:.1} tok/s; first token {}", row.tokens_per_second, times(&row.ttft_us));
            rows.push((row.name.clone(), rate));
        }
        table(&rows)
    }

    fn chart(&self) -> Chart {
        let rows = self.rows.iter();
        let points = rows.map(|row| (f64::from(row.prompt_tokens), row.tokens_per_second));
        Chart {
            title: format!("Prefill, {}, {} workers", self.device, self.workers),
            x: "tokens of the prompt",
            y: "tokens per second",
            is_log: false,
            series: vec![("median".into(), points.collect())],
        }
    }
}
