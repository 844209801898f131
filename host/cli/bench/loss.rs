//! `bench loss`: how well a model predicts a text, to see what a weight format costs.

use std::ops::ControlFlow;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use tilert_mk_shared::sample::SamplingParams;

use super::plot::Chart;
use super::report::{Figures, ReportArgs};
use super::table;
use crate::cli::ModelArgs;
use crate::engine::{Engine, EngineOptions, Event, Request};
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// Tape that the demo model has not been trained on, from the same generator.
const DEMO_TEXT: &str = include_str!("../../../model/demo/held_out.txt");

const EXAMPLES: &str = "\
Examples:
  tilert-mk bench loss --weights q4
  tilert-mk bench loss --json > native.json; tilert-mk bench loss --weights q8 --compare native.json
  tilert-mk bench loss --model DIR --text FILE --window 512";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(super) struct LossArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The text; that of the demo model, which has not seen it, if absent.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tokens that are predicted from the ones before them in a window; the next one begins anew.
    #[arg(long, value_name = "N", default_value_t = 256,
          value_parser = clap::value_parser!(u32).range(2..))]
    window: u32,
    #[command(flatten)]
    report: ReportArgs,
}

/// How well a text was predicted.
#[derive(Debug, Serialize)]
struct LossFigures {
    device: String,
    weights: String,
    window: u32,
    /// Tokens that were predicted.
    tokens: u64,
    /// Mean of `-ln p` of the tokens.
    loss_nats: f64,
    /// `e^loss_nats`.
    perplexity: f64,
    /// The means of each window.
    #[serde(skip)]
    window_nats: Vec<f64>,
}

/// Runs the subcommand.
pub(super) fn run(args: &LossArgs) -> Result<()> {
    let report = args.report.open::<LossFigures>()?;
    let (tokenizer, text) = match (args.model.directory(), &args.text) {
        (None, None) => (Some(Tokenizer::demo()?), DEMO_TEXT.to_owned()),
        (Some(_), None) => return Err(Error::Usage("a --model DIR needs --text FILE".into())),
        (directory, Some(path)) => {
            let text = std::fs::read_to_string(path).map_err(|error| Error::file(path, error))?;
            (directory.map_or_else(|| Tokenizer::demo().map(Some), Tokenizer::load)?, text)
        }
    };
    let missing = || Error::Request("the model has no tokenizer.json, which a text needs".into());
    let tokenizer = tokenizer.ok_or_else(missing)?;
    let ids = tokenizer.encode(&text, false)?;
    // What texts begin with, if anything.
    let prefix = tokenizer.encode("", true)?;
    let mut engine = args.model.open(&EngineOptions {
        max_context: args.model.max_context.or(Some(args.window + prefix.len() as u32 + 1)),
        ..args.model.engine_options()
    })?;
    let (mut total, mut tokens, mut window_nats) = (0.0, 0, Vec::new());
    for window in ids.chunks(args.window as usize) {
        let prompt = [prefix.as_slice(), window].concat();
        // Without a prefix, nothing comes before the first token.
        let losses = losses(&mut engine, &prompt, prefix.len().max(1))?;
        let sum: f64 = losses.iter().sum();
        (total, tokens) = (total + sum, tokens + losses.len() as u64);
        window_nats.push(sum / losses.len().max(1) as f64);
    }
    let loss_nats = total / tokens.max(1) as f64;
    report.finish(&LossFigures {
        device: engine.device_name().to_owned(),
        weights: args.model.weights_name(),
        window: args.window,
        tokens,
        loss_nats,
        perplexity: loss_nats.exp(),
        window_nats,
    })
}

/// `-ln p` of the tokens of a prompt from `first` on, which is at least 1.
fn losses(engine: &mut Engine, prompt: &[u32], first: usize) -> Result<Vec<f64>> {
    let sampling = SamplingParams::GREEDY;
    let request = Request { prompt, max_tokens: 1, stop_ids: &[], sampling, want_logits: true };
    let mut losses = Vec::with_capacity(prompt.len());
    engine.generate(&request, &mut |event| {
        if let Event::Logits { position, row } = event
            && let Some(next) = prompt.get(position as usize + 1)
            && position as usize + 1 >= first
        {
            losses.push(loss(row, *next as usize));
        }
        ControlFlow::Continue(())
    })?;
    Ok(losses)
}

/// `-ln p` of a token by its row of logits.
fn loss(logits: &[f32], token: usize) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - largest).exp()).sum();
    sum.ln() + f64::from(largest) - f64::from(logits[token])
}

impl Figures for LossFigures {
    const BENCH: &'static str = "loss";

    fn to_text(&self) -> String {
        table(&[
            ("device".to_owned(), format!("{}, weights {}", self.device, self.weights)),
            ("tokens".to_owned(), format!("{} in windows of {}", self.tokens, self.window)),
            ("loss".to_owned(), format!("{:.5} nats a token", self.loss_nats)),
            ("perplexity".to_owned(), format!("{:.4}", self.perplexity)),
        ])
    }

    fn chart(&self) -> Chart {
        let points = self.window_nats.iter().enumerate().map(|(idx, nats)| (idx as f64, *nats));
        Chart {
            title: format!("Loss, {}, weights {}", self.device, self.weights),
            x: "window",
            y: "nats per token",
            is_log: false,
            series: vec![("mean of a window".into(), points.collect())],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::loss;

    #[test]
    fn loss_is_that_of_the_softmax() {
        let logits = [1.0f32, 3.0, -2.0];
        let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
        for (token, logit) in logits.iter().enumerate() {
            let expected = -(f64::from(*logit).exp() / sum).ln();
            assert!((loss(&logits, token) - expected).abs() < 1e-12);
        }
        // Logits that would overflow are no harder.
        assert!((loss(&[1000.0, 1000.0], 0) - 2f64.ln()).abs() < 1e-12);
    }
}
