//! `bench runtime`: what the runtime itself costs, in programs whose tasks do nothing.
//!
//! What is shorter than a look at the clock is repeated between two looks; a sample is then the mean
//! of a batch, and quantiles are those of means. Each row says how large its batches are.

mod samples;
mod threads;

use std::time::Duration;

use clap::Args;
use serde::Serialize;
use tilert_mk_model::lower::EmptyShape;
use tilert_mk_shared::sample::SamplingParams;

use self::samples::{Limits, Row, Samples};
use super::plot::Chart;
use super::report::{Figures, ReportArgs};
use super::table;
use crate::cli::{device_count, worker_count};
use crate::engine::{DeviceKind, Engine, EngineOptions, Request};
use crate::error::{Error, Result};
use crate::metrics::{format_us, intervals_ns};

const EXAMPLES: &str = "\
Examples:
  tilert-mk bench runtime
  tilert-mk bench runtime --workers 2 --busy-poll --json
  tilert-mk bench runtime --only stage --samples 1000000 --plot stages.svg
  tilert-mk bench runtime --device cuda --devices 2 --only devices";

/// Stages of a step whose stages are timed, and tasks of one whose tasks are.
const EMPTY_COUNT: u32 = 256;
/// Tokens that the heap has room for; steps have one.
const STEP_TOKENS: u32 = 8;
/// Claims between two looks at the clock.
const CLAIM_BATCH: u32 = 32;
/// Tokens of a request: what the context of the demo model has room for.
const REQUEST_TOKENS: u32 = 1000;
/// Vocabulary of the programs that are not about sampling.
const VOCAB_SMALL: u32 = 96;
/// Bytes of a value, of which a store has twice as many: the value and its stamp.
const VALUE_BYTES: u32 = 4;
/// Vocabularies that are sampled from.
const VOCABS: [u32; 3] = [1024, 32_000, 151_936];
/// A pause after which workers of a CPU sleep, unless they poll busily.
const PAUSE: Duration = Duration::from_micros(300);

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(super) struct RuntimeArgs {
    /// Device that runs the programs; claims and signals are measured on a CPU only.
    #[arg(long, value_enum, default_value_t = DeviceKind::Auto)]
    device: DeviceKind,
    /// GPUs that run the programs together, the first ones.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = device_count())]
    devices: u32,
    /// Workers: threads of the CPU, blocks of all GPUs [default: one per core or multiprocessor].
    #[arg(long, value_name = "N", value_parser = worker_count)]
    workers: Option<u32>,
    /// Keep the CPU's workers from sleeping, and pin each to a core if there are enough.
    #[arg(long)]
    busy_poll: bool,
    /// Measure only what has this in its name.
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Samples of each row.
    #[arg(long, value_name = "N", default_value_t = 100_000,
          value_parser = clap::value_parser!(u64).range(1..))]
    samples: u64,
    /// Seconds after which a row goes without its other samples.
    #[arg(long, value_name = "N", default_value_t = 60,
          value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    #[command(flatten)]
    report: ReportArgs,
}

/// What the runtime costs.
#[derive(Debug, Serialize)]
struct RuntimeFigures {
    device: String,
    workers: u32,
    busy_poll: bool,
    rows: Vec<Row>,
}

/// Runs the subcommand.
pub(super) fn run(args: &RuntimeArgs) -> Result<()> {
    let report = args.report.open::<RuntimeFigures>()?;
    let mut bench = Bench { args, rows: Vec::new() };
    let engine = bench.engine(args.workers, EmptyShape::new(1, 1))?;
    let (device, workers) = (engine.device_name().to_owned(), engine.worker_count());
    let is_cpu = engine.runs_on_host_memory();
    drop(engine);
    if is_cpu {
        bench.claims()?;
        bench.threads()?;
    }
    bench.steps(workers)?;
    if args.devices > 1 {
        bench.exchanges(workers)?;
        bench.puts(workers)?;
    }
    bench.reactions(args.devices)?;
    if workers > args.devices {
        // Those that have nothing to do look at the mailbox too.
        bench.reactions(workers)?;
    }
    for vocab_size in VOCABS {
        bench.sampling(vocab_size)?;
    }
    if bench.rows.is_empty() {
        let only = &args.only;
        return Err(Error::Usage(format!("--only {only}: no row has this in its name")));
    }
    let (busy_poll, rows) = (args.busy_poll, bench.rows);
    report.finish(&RuntimeFigures { device, workers, busy_poll, rows })
}

struct Bench<'a> {
    args: &'a RuntimeArgs,
    rows: Vec<Row>,
}

impl Bench<'_> {
    /// Adds a row, if it is wanted, of what `measure` records; a sample is the mean of `batch`.
    fn row(
        &mut self,
        name: String,
        batch: u32,
        measure: impl FnOnce(&mut Samples) -> Result<()>,
    ) -> Result<()> {
        if name.contains(&self.args.only) {
            let limits =
                Limits { samples: self.args.samples, time: Duration::from_secs(self.args.seconds) };
            let mut samples = Samples::new(batch, limits)?;
            measure(&mut samples)?;
            self.rows.push(samples.row(name));
        }
        Ok(())
    }

    fn engine(&self, workers: Option<u32>, shape: EmptyShape) -> Result<Engine> {
        self.engine_of(workers, shape, VOCAB_SMALL)
    }

    fn engine_of(
        &self,
        workers: Option<u32>,
        shape: EmptyShape,
        vocab_size: u32,
    ) -> Result<Engine> {
        let args = self.args;
        let device = args.device.open(args.devices, args.busy_poll)?;
        let options =
            EngineOptions { workers, step_tokens: STEP_TOKENS, ..EngineOptions::default() };
        Engine::open_empty(device, &options, &shape, vocab_size)
    }

    fn claims(&mut self) -> Result<()> {
        let shape = EmptyShape::new(1, EMPTY_COUNT);
        let engine = self.engine(Some(1), shape)?;
        self.row("claim of a task".into(), CLAIM_BATCH, |samples| {
            engine.claim_alone(CLAIM_BATCH, &mut |elapsed| samples.record(elapsed))
        })
    }

    fn threads(&mut self) -> Result<()> {
        self.row("signal to observed wait".into(), threads::BATCH, |samples| {
            threads::signal(samples);
            Ok(())
        })?;
        for bytes in [64, 4 << 10, 64 << 10] {
            self.row(format!("put of {bytes} bytes + signal"), threads::BATCH, |samples| {
                threads::put(bytes, samples);
                Ok(())
            })?;
        }
        Ok(())
    }

    fn steps(&mut self, workers: u32) -> Result<()> {
        // Each device has a worker at least.
        let (few, shape) = (self.args.devices, EmptyShape::new);
        let fewest = counted(few, "worker");
        let all = [
            (format!("step without tasks, {fewest}"), few, shape(0, 0), 1),
            (format!("empty task, {fewest}"), few, shape(1, EMPTY_COUNT), EMPTY_COUNT),
            (
                format!("empty stage, a task each of {workers} workers"),
                workers,
                shape(EMPTY_COUNT, workers),
                EMPTY_COUNT,
            ),
            (
                format!("empty stage, one task, {workers} workers in turns"),
                workers,
                shape(EMPTY_COUNT, 1),
                EMPTY_COUNT,
            ),
        ];
        all.into_iter()
            .try_for_each(|(name, workers, shape, batch)| self.stages(name, workers, shape, batch))
    }

    /// Stages of which all workers need all values, as those of a model do.
    fn exchanges(&mut self, workers: u32) -> Result<()> {
        let devices = self.args.devices;
        let workers = whole_blocks(workers, devices);
        for task_values in [1, 4, 16, 64] {
            let bytes = workers * task_values * VALUE_BYTES;
            let shape = EmptyShape { task_values, ..EmptyShape::new(EMPTY_COUNT, workers) };
            let name = format!("exchange of {bytes} bytes among {devices} devices, a stage");
            self.stages(name, workers, shape, EMPTY_COUNT)?;
        }
        Ok(())
    }

    /// Stages of which each worker needs what one of another device has stored.
    fn puts(&mut self, workers: u32) -> Result<()> {
        let devices = self.args.devices;
        let all = whole_blocks(workers, devices);
        // Pairs of workers.
        let few = devices * (1 + devices % 2);
        let sizes = [1, 16, 256, 1024].map(|values| (few, values));
        for (workers, task_values) in sizes.into_iter().chain([16, 256, 2048].map(|v| (all, v))) {
            let bytes = workers / devices * task_values * VALUE_BYTES;
            let blocks = counted(workers / devices, "block");
            let shape = EmptyShape {
                task_values,
                is_paired: true,
                ..EmptyShape::new(EMPTY_COUNT, workers)
            };
            let name = format!("put of {bytes} bytes by {blocks} between {devices} devices");
            self.stages(name, workers, shape, EMPTY_COUNT)?;
        }
        Ok(())
    }

    /// A row of the time of a step, by `batch`: for a stage, or a task.
    fn stages(&mut self, name: String, workers: u32, shape: EmptyShape, batch: u32) -> Result<()> {
        if !name.contains(&self.args.only) {
            return Ok(());
        }
        let mut engine = self.engine(Some(workers), shape)?;
        self.row(name, batch, |samples| step_times(&mut engine, SamplingParams::GREEDY, samples))
    }

    fn reactions(&mut self, workers: u32) -> Result<()> {
        let mut engine = self.engine(Some(workers), EmptyShape::new(0, 0))?;
        let workers = counted(workers, "worker");
        for (name, pause) in [("at once", None), ("after 300 µs", Some(PAUSE))] {
            let name = format!("submission to reaction, {name}, {workers}");
            self.row(name, 1, |samples| {
                loop {
                    if let Some(pause) = pause {
                        std::thread::sleep(pause);
                    }
                    if !samples.record(engine.react()?) {
                        return Ok(());
                    }
                }
            })?;
        }
        Ok(())
    }

    fn sampling(&mut self, vocab_size: u32) -> Result<()> {
        let shape = EmptyShape::new(0, 0);
        let mut engine = self.engine_of(Some(self.args.devices), shape, vocab_size)?;
        let warm = SamplingParams { temperature: 1.0, ..SamplingParams::GREEDY };
        let filtered = SamplingParams { top_k: 50, top_p: 0.9, ..warm };
        let all = [
            ("greedy", SamplingParams::GREEDY),
            ("temperature", warm),
            ("top-k 50, top-p 0.9", filtered),
        ];
        for (name, sampling) in all {
            self.row(format!("step of sampling, {name}, of {vocab_size}"), 1, |samples| {
                step_times(&mut engine, sampling, samples)
            })?;
        }
        Ok(())
    }
}

/// `count` things of a name.
fn counted(count: u32, name: &str) -> String {
    format!("{count} {name}{}", if count == 1 { "" } else { "s" })
}

/// The most workers up to `workers` of which each device has a power of two.
fn whole_blocks(workers: u32, devices: u32) -> u32 {
    devices << (workers / devices).max(1).ilog2()
}

/// Records the times between the tokens of as many requests as are needed.
fn step_times(engine: &mut Engine, sampling: SamplingParams, samples: &mut Samples) -> Result<()> {
    loop {
        let request = Request { sampling, ..Request::greedy(&[0], REQUEST_TOKENS) };
        let answer = engine.generate(&request, &mut |_| std::ops::ControlFlow::Continue(()))?;
        for interval_ns in intervals_ns(&answer.token_times_ns) {
            if !samples.record(Duration::from_nanos(interval_ns)) {
                return Ok(());
            }
        }
    }
}

impl Figures for RuntimeFigures {
    const BENCH: &'static str = "runtime";

    fn to_text(&self) -> String {
        let device = format!("{}, {} workers", self.device, self.workers);
        let mut rows = vec![("device".to_owned(), device)];
        for row in &self.rows {
            let shown = [row.p50_ns, row.p99_ns, row.p999_ns, row.max_ns].map(format_ns);
            let [p50, p99, p999, max] = shown;
            let batch = if row.batch > 1 { format!(" of {}", row.batch) } else { String::new() };
            let text = format!(
                "p50 {p50}, p99 {p99}, p99.9 {p999}, max {max}; {} samples{batch}",
                row.samples
            );
            rows.push((row.name.clone(), text));
        }
        table(&rows)
    }

    fn chart(&self) -> Chart {
        // Each nine of a quantile has the same width; the slowest of n samples is log10(n) nines.
        let line = |row: &Row| {
            let nines = [0.5f64.log10().abs(), 2.0, 3.0, (row.samples as f64).log10()];
            let values = [row.p50_ns, row.p99_ns, row.p999_ns, row.max_ns];
            (row.name.clone(), nines.into_iter().zip(values).collect())
        };
        Chart {
            title: format!("Runtime, {}, {} workers", self.device, self.workers),
            x: "nines of the quantile: 2 is p99, 3 is p99.9, the last point is the slowest sample",
            y: "ns",
            is_log: true,
            series: self.rows.iter().map(line).collect(),
        }
    }
}

/// Nanoseconds for people.
fn format_ns(ns: f64) -> String {
    if ns < 999.5 { format!("{ns:.1} ns") } else { format_us(ns / 1e3) }
}
