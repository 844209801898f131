//! The engine: binds a checkpoint to a program, starts the workers, and moves tokens.

mod bind;
mod mailbox;
mod summary;

use std::mem::offset_of;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use memmap2::MmapMut;
use tilert_mk_device::machine::cpu::Isa;
use tilert_mk_device::machine::memory::Span;
use tilert_mk_device::worker::Worker;
use tilert_mk_model::config::ModelConfig;
use tilert_mk_model::lower::{LowerOptions, Program, lower};
use tilert_mk_model::rope;
use tilert_mk_model::weights::{Dtype, WeightSource};
use tilert_mk_shared::ABI_VERSION;
use tilert_mk_shared::limits::{STEP_TOKENS_MAX, STOP_ID_COUNT_MAX, WAIT_NS_MAX};
use tilert_mk_shared::mailbox::{CommandKind, Mailbox, Output, OutputKind, StopWord};
use tilert_mk_shared::program::ProgramHeader;
use tilert_mk_shared::queue::{CURSOR_STRIDE_BYTES, Cursor};
use tilert_mk_shared::sample::SamplingParams;
use tilert_mk_shared::sequence::{SequenceParams, WANT_LOGITS};
use tilert_mk_shared::task::Task;
use tilert_mk_shared::trace::TraceRecord;

use self::bind::{anonymous, bind, format_of, load, open_checkpoint, read_config};
use crate::error::{Error, Result};
use crate::load::DummyWeights;

/// Positions kept for a sequence unless asked otherwise.
const CONTEXT_DEFAULT: u32 = 4096;
/// Weight bytes of a linear task, about.
const TILE_BYTES: u64 = 128 << 10;
/// How long the host sleeps between looks at the mailbox.
const POLL_SLEEP: Duration = Duration::from_micros(100);

/// Where a model comes from.
pub enum ModelSource<'a> {
    /// The demo model in the binary.
    Embedded,
    /// A checkpoint directory.
    Directory(&'a Path),
}

/// Which device runs the program.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum DeviceKind {
    /// The best that this build has: the CPU.
    Auto,
    /// One thread for each worker.
    Cpu,
    /// An NVIDIA GPU; not in this build.
    Cuda,
}

/// How weights come into memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum LoadMode {
    /// Used in place from the mapped file.
    Map,
    /// Copied once into huge pages.
    Copy,
    /// Random values in the shapes of config.json, for benchmarks.
    Dummy,
}

/// What the user decides about an engine.
pub struct EngineOptions {
    /// The device.
    pub device: DeviceKind,
    /// Workers; one per core if none.
    pub workers: Option<u32>,
    /// Positions per sequence; at most 4096 of the model's if none.
    pub max_context: Option<u32>,
    /// Sequences resident at once.
    pub slots: u32,
    /// Tokens of a step, from 1 to `STEP_TOKENS_MAX`.
    pub step_tokens: u32,
    /// Where weights are kept.
    pub load: LoadMode,
    /// Steps that the trace keeps; 0 for no trace.
    pub trace_steps: u32,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions {
            device: DeviceKind::Auto,
            workers: None,
            max_context: None,
            slots: 1,
            step_tokens: STEP_TOKENS_MAX,
            load: LoadMode::Map,
            trace_steps: 0,
        }
    }
}

/// One request.
pub struct Request<'a> {
    /// Token ids.
    pub prompt: &'a [u32],
    /// Tokens to generate at most.
    pub max_tokens: u32,
    /// Tokens that end the answer.
    pub stop_ids: &'a [u32],
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Whether `Event::Logits` is wanted for each position.
    pub want_logits: bool,
}

/// What happens while a request runs.
pub enum Event<'a> {
    /// A token was generated, at `time_ns` of the engine's clock.
    Token {
        /// The token.
        id: u32,
        /// When.
        time_ns: u64,
    },
    /// The logits of a position, in order of positions.
    Logits {
        /// The position.
        position: u32,
        /// `[vocab_size]`.
        row: &'a [f32],
    },
    /// Nothing for a while.
    Idle,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// `max_tokens` were generated.
    Length,
    /// A stop id was generated.
    Stop,
    /// The caller ended it.
    Cancelled,
}

impl FinishReason {
    /// The word for JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            FinishReason::Length => "length",
            FinishReason::Stop => "stop",
            FinishReason::Cancelled => "cancelled",
        }
    }
}

/// A finished answer.
pub struct Completion {
    /// The generated tokens.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// When it was submitted, on the engine's clock.
    pub submitted_ns: u64,
    /// When each token was generated.
    pub token_times_ns: Vec<u64>,
}

/// A model on a device, ready for requests.
pub struct Engine {
    config: ModelConfig,
    program: Program,
    header: ProgramHeader,
    workers: Vec<JoinHandle<()>>,
    clock: Instant,
    // What the workers' addresses point into; dropped after they have been joined.
    _weights: Box<dyn WeightSource + Send>,
    _vectors: Vec<Vec<f32>>,
    _tasks: Vec<Task>,
    _heap: MmapMut,
    _mailbox: MmapMut,
}

impl Engine {
    /// Loads a model and starts its workers. `progress` hears of bytes done and in all.
    pub fn open(
        source: ModelSource<'_>,
        options: &EngineOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Engine> {
        if options.device == DeviceKind::Cuda {
            return Err(Error::Device("--device cuda: this build runs on the CPU only".into()));
        }
        let is_dummy = options.load == LoadMode::Dummy;
        let (config, checkpoint) = match (&source, is_dummy) {
            (ModelSource::Directory(path), true) => {
                let file = path.join("config.json");
                let text = std::fs::read_to_string(&file).map_err(|e| Error::file(&file, e))?;
                (read_config(&source, &text, None)?, None)
            }
            _ => {
                let checkpoint = open_checkpoint(&source)?;
                let generation = checkpoint.generation_config_text();
                let config = read_config(&source, checkpoint.config_text(), generation)?;
                (config, Some(checkpoint))
            }
        };
        let table = "model.embed_tokens.weight";
        let dtype = match &checkpoint {
            Some(checkpoint) => {
                checkpoint.require(table)?;
                checkpoint.tensor(table).map_or(Dtype::F32, |view| view.dtype)
            }
            None => Dtype::Bf16,
        };
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
        let context = config.sliding_window.unwrap_or(u32::MAX).min(config.position_max);
        let lower_options = LowerOptions {
            worker_count: options.workers.unwrap_or(cores).max(1),
            slot_count: options.slots,
            context_max: options.max_context.unwrap_or(context.min(CONTEXT_DEFAULT)),
            step_tokens_max: options.step_tokens,
            format: format_of(dtype),
            tile_bytes: TILE_BYTES,
        };
        let program = lower(&config, &lower_options)?;
        let needed: Vec<_> =
            program.tensors.iter().map(|t| (t.name.clone(), t.shape.clone())).collect();
        let weights: Box<dyn WeightSource + Send> = match checkpoint {
            Some(checkpoint) => load(checkpoint, options.load, &needed, progress)?,
            None => Box::new(DummyWeights::new(&needed, dtype, 0)?),
        };
        Engine::start(config, program, weights, dtype, options)
    }

    fn start(
        config: ModelConfig,
        program: Program,
        weights: Box<dyn WeightSource + Send>,
        dtype: Dtype,
        options: &EngineOptions,
    ) -> Result<Engine> {
        let mut vectors = Vec::new();
        let tasks = bind(&program, weights.as_ref(), &mut vectors, dtype)?;
        let worker_count = program.queue_spans.len() as u32 - 1;
        let wanted = u64::from(options.trace_steps) * tasks.len() as u64;
        let trace_capacity = if wanted == 0 { 0 } else { wanted.next_power_of_two() };
        let ring_bytes = trace_capacity * size_of::<TraceRecord>() as u64;
        let heap = anonymous(program.plan.total_bytes)?;
        let mailbox_bytes = (size_of::<Mailbox>() as u64).next_multiple_of(128);
        let trace_offset = mailbox_bytes + 128;
        let mailbox = anonymous(trace_offset + ring_bytes * u64::from(worker_count))?;
        let base = mailbox.as_ptr() as u64;
        let header = ProgramHeader {
            abi_version: ABI_VERSION,
            worker_count,
            task_count: tasks.len() as u32,
            event_count: program.event_arrivals.len() as u32,
            begin_event: program.begin_event.0,
            trace_capacity: trace_capacity as u32,
            wait_ns_max: WAIT_NS_MAX,
            tasks: tasks.as_ptr() as u64,
            queue_spans: program.queue_spans.as_ptr() as u64,
            queue_entries: program.queue_entries.as_ptr() as u64,
            heap: heap.as_ptr() as u64,
            mailbox: base,
            fault: base + mailbox_bytes,
            trace: base + trace_offset,
            dims: program.dims,
            plan: program.plan,
        };
        let mut engine = Engine {
            config,
            header,
            workers: Vec::new(),
            clock: Instant::now(),
            _weights: weights,
            _vectors: vectors,
            _tasks: tasks,
            program,
            _heap: heap,
            _mailbox: mailbox,
        };
        engine.prepare();
        engine.spawn()?;
        Ok(engine)
    }

    /// Fills what the workers expect: cursors at their start, RoPE tables.
    fn prepare(&self) {
        let plan = &self.header.plan;
        for queue_idx in 0..=u64::from(self.header.worker_count) {
            let offset = plan.cursors + queue_idx * CURSOR_STRIDE_BYTES;
            self.heap::<u64>(offset, 1).write(0, Cursor::START.pack());
        }
        let tables = rope::tables(&self.config, self.context_max());
        for (offset, table) in [(plan.rope_cos, &tables.cos), (plan.rope_sin, &tables.sin)] {
            self.heap::<f32>(offset, table.len()).as_mut_slice().copy_from_slice(table);
        }
    }

    fn spawn(&mut self) -> Result<()> {
        let (isa, clock) = (Isa::detect(), self.clock);
        for worker_idx in 0..self.header.worker_count {
            let header = self.header;
            let handle = std::thread::Builder::new()
                .name(format!("worker {worker_idx}"))
                .spawn(move || {
                    // SAFETY: the engine keeps all memory until `drop` has joined this thread.
                    let mut worker = unsafe { Worker::new(&header, worker_idx, isa, clock) };
                    worker.run();
                })
                .map_err(|error| Error::Device(format!("starting a worker: {error}")))?;
            self.workers.push(handle);
        }
        Ok(())
    }

    fn heap<T: Copy>(&self, offset: u64, len: usize) -> Span<T> {
        // SAFETY: offsets come from the plan of this heap, which lives as long as the engine.
        unsafe { Span::new(self.header.heap + offset, len) }
    }

    /// The model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Positions of a sequence.
    pub fn context_max(&self) -> u32 {
        self.header.dims.kv.context_max
    }

    /// Name of the device.
    pub fn device_name(&self) -> &'static str {
        "cpu"
    }

    /// Workers.
    pub fn worker_count(&self) -> u32 {
        self.header.worker_count
    }

    /// The program.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Name of a task.
    fn task_name(&self, task_idx: u32) -> &str {
        self.program.names.get(task_idx as usize).map_or("", String::as_str)
    }

    /// Checks a request against the model.
    fn check(&self, request: &Request<'_>) -> Result<()> {
        let vocab = self.config.vocab_size;
        if let Some(id) = request.prompt.iter().find(|id| **id >= vocab) {
            let message = format!("token id {id} is not below the vocabulary size {vocab}");
            return Err(Error::Request(message));
        }
        if request.prompt.is_empty() {
            return Err(Error::Request("the prompt is empty".into()));
        }
        let wanted = request.prompt.len() as u64 + u64::from(request.max_tokens);
        if wanted > u64::from(self.context_max()) || request.max_tokens == 0 {
            return Err(Error::Request(format!(
                "a prompt of {} tokens and {} to generate do not fit a context of {}",
                request.prompt.len(),
                request.max_tokens,
                self.context_max()
            )));
        }
        if request.stop_ids.len() > STOP_ID_COUNT_MAX {
            return Err(Error::Request(format!("more than {STOP_ID_COUNT_MAX} stop ids")));
        }
        Ok(())
    }

    /// Runs one request to its end; `on_event` may break to cancel it.
    ///
    /// Errors: a request that does not fit the model, logits that are not numbers, a fault.
    pub fn generate(
        &mut self,
        request: &Request<'_>,
        on_event: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<Completion> {
        self.check(request)?;
        let mut stop_ids = [0; STOP_ID_COUNT_MAX];
        stop_ids[..request.stop_ids.len()].copy_from_slice(request.stop_ids);
        let params = SequenceParams {
            prompt_count: request.prompt.len() as u32,
            generate_max: request.max_tokens,
            flags: if request.want_logits { WANT_LOGITS } else { 0 },
            stop_id_count: request.stop_ids.len() as u32,
            stop_ids,
            sampling: request.sampling,
        };
        self.heap::<u32>(self.header.plan.tokens, request.prompt.len())
            .as_mut_slice()
            .copy_from_slice(request.prompt);
        let mut answer = Completion {
            ids: Vec::with_capacity(request.max_tokens as usize),
            finish_reason: FinishReason::Length,
            submitted_ns: self.clock.elapsed().as_nanos() as u64,
            token_times_ns: Vec::with_capacity(request.max_tokens as usize),
        };
        self.command(CommandKind::Start, params);
        let mut is_cancelled = false;
        loop {
            let flow = match self.next_output()? {
                None => {
                    std::thread::sleep(POLL_SLEEP);
                    if is_cancelled { ControlFlow::Continue(()) } else { on_event(Event::Idle) }
                }
                Some(output) => {
                    let end = OutputKind::from_raw(output.kind);
                    let end = end.filter(|k| !matches!(k, OutputKind::Token | OutputKind::Logits));
                    let flow = if is_cancelled || end.is_some() {
                        ControlFlow::Continue(())
                    } else {
                        self.report(&output, &mut answer, on_event)
                    };
                    self.consume();
                    if let Some(end) = end {
                        answer.finish_reason = finish_reason(end, output.position, is_cancelled)?;
                        return Ok(answer);
                    }
                    flow
                }
            };
            if flow.is_break() {
                is_cancelled = true;
                self.command(CommandKind::Cancel, params);
            }
        }
    }

    /// Hands a token or a row of logits to the caller.
    fn report(
        &self,
        output: &Output,
        answer: &mut Completion,
        on_event: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        if output.kind == OutputKind::Token as u32 {
            answer.ids.push(output.value);
            answer.token_times_ns.push(output.time_ns);
            return on_event(Event::Token { id: output.value, time_ns: output.time_ns });
        }
        let vocab = self.config.vocab_size as usize;
        let offset = u64::from(output.value) * vocab as u64 * 4;
        let row = self.heap::<f32>(self.header.plan.logits + offset, vocab);
        on_event(Event::Logits { position: output.position, row: row.as_slice() })
    }

    /// Stops the workers and waits for their ends; no request can follow.
    fn shut_down(&mut self) {
        let stop = self.word(offset_of!(Mailbox, stop));
        // A fault stays a fault; the workers leave either way.
        let _ = stop.compare_exchange(
            StopWord::Run as u32,
            StopWord::Shutdown as u32,
            Ordering::Release,
            Ordering::Relaxed,
        );
        for worker in self.workers.drain(..) {
            // A worker that panicked has nothing more to say here.
            let _ = worker.join();
        }
    }

    /// Ends the engine; the last traced tasks of each worker, in the order of time.
    pub fn into_trace(mut self) -> Vec<Vec<TraceRecord>> {
        self.shut_down();
        let capacity = self.header.trace_capacity as usize;
        let ring_bytes = (capacity * size_of::<TraceRecord>()) as u64;
        let worker_idxs = 0..u64::from(self.header.worker_count);
        let records = |worker_idx| {
            // SAFETY: the ring lives as long as the engine, and the workers that wrote to it have
            // been joined above.
            let ring: Span<TraceRecord> =
                unsafe { Span::new(self.header.trace + worker_idx * ring_bytes, capacity) };
            let mut records: Vec<_> =
                ring.as_slice().iter().filter(|record| record.epoch != 0).copied().collect();
            records.sort_by_key(|record| record.started_ns);
            records
        };
        worker_idxs.map(records).collect()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shut_down();
    }
}

fn finish_reason(end: OutputKind, position: u32, is_cancelled: bool) -> Result<FinishReason> {
    Ok(match end {
        OutputKind::EndNotANumber => {
            let message = format!("the logits at position {position} are not numbers");
            return Err(Error::Request(message));
        }
        _ if is_cancelled => FinishReason::Cancelled,
        OutputKind::EndStop => FinishReason::Stop,
        _ => FinishReason::Length,
    })
}
