//! The command line: flags, subcommands, exit codes.
//!
//! Output goes to stdout; status and errors go to stderr. Every error is one line that begins with
//! `error: `. Exit codes: 0 done, 1 failed, 2 the command line makes no sense.

mod bench;
mod chat;
mod doctor;
mod inspect;
mod launch;
mod output;
mod sampling;

pub use inspect::Summary;

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tilert_mk_shared::limits::{PE_COUNT_MAX, WORKER_COUNT_MAX};

use crate::engine::{Compute, DeviceKind, Engine, EngineOptions, LoadMode, ModelSource, Weights};
use crate::error::{Error, Result};

const EXAMPLES: &str = "\
Examples:
  tilert-mk launch
      The embedded demo model writes a synthetic market tape.
  tilert-mk launch --model ./Qwen3-0.6B
      Chat on the terminal; Ctrl-C stops an answer, a second one leaves.
  tilert-mk launch --model ./Qwen3-0.6B --prompt 'The capital of France is' --max-tokens 32
  tilert-mk launch --model ./Qwen3-0.6B --weights q8
      With 8-bit weights: half the memory traffic, twice the tokens, a little less accurate.
  tilert-mk inspect --model ./Qwen3-0.6B
      Sizes, tasks and the bandwidth floor on this machine.
  tilert-mk doctor
      What was found of CPU, memory, driver and GPUs, and what is missing.
  tilert-mk bench decode --model ./Qwen3-0.6B
      Time per token, and its share of the memory's bandwidth.

Exit codes: 0 done, 1 failed, 2 usage.";

/// Low-latency inference of large language models through a persistent tile runtime.
#[derive(Debug, Parser)]
#[command(name = "tilert-mk", version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Generate text, or chat on a terminal.
    Launch(Box<launch::LaunchArgs>),
    /// Print a model's sizes, its tile program and the bandwidth floor on this machine.
    Inspect(inspect::InspectArgs),
    /// Print what was found of this machine, and what is missing.
    Doctor(doctor::DoctorArgs),
    /// Measure decoding, prompts, steps, the runtime itself, or the memory under it.
    Bench(bench::BenchArgs),
}

/// What is shown while weights are read.
const LOADING: &str = "loading {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}";
/// What is shown once they are there.
const STARTING: &str =
    "starting (on a GPU's first start its driver assembles the kernel: half a minute)";

/// Which model runs, and on what.
#[derive(Args, Debug)]
struct ModelArgs {
    /// Directory with config.json, safetensors weights and, for text, tokenizer.json; the embedded
    /// demo model if absent.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Device that runs the model.
    #[arg(long, value_enum, default_value_t = DeviceKind::Auto)]
    device: DeviceKind,
    /// GPUs that run the model together, the first ones; each holds its part of the weights.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = device_count())]
    devices: u32,
    /// Workers: threads of the CPU, blocks of all GPUs [default: one per core or multiprocessor].
    #[arg(long, value_name = "N", value_parser = worker_count)]
    workers: Option<u32>,
    /// Positions of the KV cache [default: the model's, at most 4096].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_context: Option<u32>,
    /// Use weights in place, copy them once, or make random ones from config.json alone.
    #[arg(long, value_enum, default_value_t = LoadMode::Map)]
    load: LoadMode,
    /// Quantise the matrices when they are loaded, the embedding excepted; several GPUs take no q8 and q4.
    /// They are then a copy, whatever --load says. A checkpoint in FP8 is taken as it is, with `native`
    /// alone.
    #[arg(long, value_enum, default_value_t = Weights::Native)]
    weights: Weights,
    /// Precision of the activations that are multiplied, bf16 on the CPU alone; sums are f32 or exact.
    #[arg(long, value_enum, default_value_t = Compute::Exact)]
    compute: Compute,
    /// Keep the CPU's workers from sleeping, and pin them to cores even if there are fewer than cores:
    /// the next request begins at once, at the price of the cores' power.
    #[arg(long)]
    busy_poll: bool,
}

fn device_count() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=PE_COUNT_MAX as i64)
}

fn worker_count(text: &str) -> std::result::Result<u32, String> {
    let range = || format!("a number from 1 to {WORKER_COUNT_MAX} is needed");
    let count: u32 = text.parse().map_err(|_| range())?;
    if (1..=WORKER_COUNT_MAX).contains(&count) { Ok(count) } else { Err(range()) }
}

impl ModelArgs {
    fn source(&self) -> ModelSource<'_> {
        self.model.as_deref().map_or(ModelSource::Embedded, ModelSource::Directory)
    }

    fn directory(&self) -> Option<&Path> {
        self.model.as_deref()
    }

    /// The format of the matrices, as the flag spells it.
    fn weights_name(&self) -> String {
        self.weights.to_possible_value().map_or_else(String::new, |value| value.get_name().into())
    }

    /// Options for one sequence; the caller overrides what it knows better.
    fn engine_options(&self) -> EngineOptions {
        EngineOptions {
            workers: self.workers,
            max_context: self.max_context,
            slots: 1,
            load: self.load,
            weights: self.weights,
            compute: self.compute,
            ..EngineOptions::default()
        }
    }

    /// Loads the model, with a progress bar when stderr is a terminal.
    fn open(&self, options: &EngineOptions) -> Result<Engine> {
        let target = if io::stderr().is_terminal() {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(None, target);
        let set_style = |template| {
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
        };
        set_style(LOADING);
        let device = self.device.open(self.devices, self.busy_poll)?;
        let engine =
            Engine::open(self.source(), device, options, &mut |done_bytes, total_bytes| {
                bar.set_length(total_bytes);
                bar.set_position(done_bytes);
                // A GPU's kernel may not be ready yet.
                set_style(if done_bytes < total_bytes { LOADING } else { STARTING });
                bar.tick();
            });
        bar.finish_and_clear();
        engine
    }
}

/// Runs the command line of this process.
pub fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.exit_code() == 0 => {
            // Help or version; a reader that has gone away is no failure.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => return report(&Error::Usage(usage_message(&error))),
    };
    let result = match cli.command {
        Command::Launch(args) => launch::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Bench(args) => bench::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report(&error),
    }
}

/// Prints `error` as one line; returns its exit code.
fn report(error: &Error) -> ExitCode {
    print_error(error);
    ExitCode::from(error.exit_code())
}

fn print_error(error: &Error) {
    let message = error.to_string();
    let one_line: Vec<&str> = message.lines().map(str::trim).collect();
    status(&format!("error: {}", one_line.join(" ")));
}

/// Writes a line to stderr. That stderr is closed is no reason to fail.
fn status(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// What clap says in front of its usage text, as one line.
fn usage_message(error: &clap::Error) -> String {
    use clap::error::ErrorKind::{DisplayHelpOnMissingArgumentOrSubcommand, MissingSubcommand};
    if matches!(error.kind(), DisplayHelpOnMissingArgumentOrSubcommand | MissingSubcommand) {
        return "a subcommand is needed: launch, inspect, doctor, or bench with decode, prefill, \
                steps, runtime or bandwidth (see --help)"
            .to_owned();
    }
    let rendered = error.render().to_string();
    let is_usage =
        |line: &&str| line.starts_with("Usage:") || line.starts_with("For more information");
    let lines = rendered.lines().take_while(|line| !is_usage(line)).map(str::trim);
    let message = lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ");
    format!("{} (see --help)", message.strip_prefix("error: ").unwrap_or(&message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn usage_errors_are_one_line_that_names_the_flag() {
        let cases: [(&[&str], &str); 7] = [
            (&[], "subcommand"),
            (&["lunch"], "lunch"),
            (&["launch", "--modle", "x"], "--modle"),
            (&["launch", "--workers", "0"], "--workers"),
            (&["launch", "--prefill-chunk", "65"], "--prefill-chunk"),
            (&["launch", "--prompt", "a", "--prompt-ids", "1"], "--prompt-ids"),
            (&["launch", "--device", "tpu"], "--device"),
        ];
        for (args, named) in cases {
            let args = std::iter::once("tilert-mk").chain(args.iter().copied());
            let message = usage_message(&Cli::try_parse_from(args).unwrap_err());
            assert!(message.contains(named), "{message}");
            assert!(!message.contains('\n') && !message.contains("Usage"), "{message}");
        }
    }
}
