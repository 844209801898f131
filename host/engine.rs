//! The engine: binds a checkpoint to a program, starts the workers, and moves tokens.

mod bind;
mod empty;
mod headers;
mod mailbox;
mod pace;
mod pack;
mod request;
mod summary;

use std::mem::offset_of;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use tilert_mk_model::config::ModelConfig;
use tilert_mk_model::lower::{LowerOptions, Program, lower};
use tilert_mk_model::rope;
use tilert_mk_model::weights::{Dtype, WeightSource};
use tilert_mk_shared::limits::STOP_ID_COUNT_MAX;
use tilert_mk_shared::mailbox::{CommandKind, Mailbox, Output, OutputKind, StopWord};
use tilert_mk_shared::packed::PAD_ROWS;
use tilert_mk_shared::program::ProgramHeader;
use tilert_mk_shared::queue::{CURSOR_STRIDE_BYTES, Cursor};
use tilert_mk_shared::sample::SamplingParams;
use tilert_mk_shared::sequence::{SequenceParams, WANT_LOGITS};
use tilert_mk_shared::task::{Precision, WeightFormat};
use tilert_mk_shared::trace::TraceRecord;

pub use self::request::{
    Completion, Compute, DeviceKind, EngineOptions, Event, FinishReason, LoadMode, ModelSource,
    Request, Weights,
};

use self::bind::{
    bind, bytes_of, bytes_of_mut, check_fp8, dummy_tensors, format_of, load, open_checkpoint,
    read_config, table_dtype,
};
use self::pace::Pace;
use crate::driver::{Device, Profile};
use crate::error::{Error, Result};
use crate::load::DummyWeights;

/// Positions kept for a sequence unless asked otherwise.
const CONTEXT_DEFAULT: u32 = 4096;
/// Looks at the mailbox between two looks at the device and the caller's wishes, when spinning.
const LOOKS_PER_CHECK: u32 = 4096;
/// How long a device may take from its launch to its first sign of life.
const START_TIME_MAX: Duration = Duration::from_secs(30);

/// A model on a device, ready for requests.
pub struct Engine {
    config: ModelConfig,
    program: Program,
    /// Of each PE.
    headers: Vec<ProgramHeader>,
    is_busy: Vec<bool>,
    logits: Vec<f32>,
    /// Looks at the mailbox since its last output.
    empty_looks: u32,
    pace: Pace,
    clock: Instant,
    /// What to add to the device's clock to get the engine's.
    clock_offset_ns: u64,
    device: Box<dyn Device>,
    // What the workers' addresses point into; dropped after the device.
    weights: Box<dyn WeightSource + Send>,
    _vectors: Vec<Vec<f32>>,
}

impl Engine {
    /// Loads a model onto a device and starts its workers. `progress` hears of bytes done and in
    /// all.
    ///
    /// Errors: a model, a checkpoint or a device that cannot be used, each with its name.
    pub fn open(
        source: ModelSource<'_>,
        mut device: Box<dyn Device>,
        options: &EngineOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Engine> {
        let is_dummy = options.load == LoadMode::Dummy;
        let (config, checkpoint) = match (&source, is_dummy) {
            (ModelSource::Directory(path), true) => {
                let file = path.join("config.json");
                let text = std::fs::read_to_string(&file).map_err(|e| Error::file(&file, e))?;
                (read_config(&source, &text, None)?, None)
            }
            (ModelSource::Embedded, true) => {
                return Err(Error::Usage(
                    "--load dummy needs --model DIR with a config.json: the demo model has weights"
                        .into(),
                ));
            }
            _ => {
                let checkpoint = open_checkpoint(&source)?;
                let generation = checkpoint.generation_config_text();
                let config = read_config(&source, checkpoint.config_text(), generation)?;
                (config, Some(checkpoint))
            }
        };
        let dtype = match &checkpoint {
            Some(checkpoint) => table_dtype(checkpoint, &config)?,
            None => Dtype::Bf16,
        };
        let lower_options = lower_options(&config, device.profile(), options, dtype)?;
        let program = lower(&config, &lower_options)?;
        device.prepare(&program.formats())?;
        let needed: Vec<_> =
            program.tensors.iter().map(|t| (t.name.clone(), t.shape.clone())).collect();
        let weights: Box<dyn WeightSource + Send> = match checkpoint {
            Some(checkpoint) => load(checkpoint, options, &needed, progress)?,
            None => Box::new(DummyWeights::new(&dummy_tensors(&program, dtype), 0, progress)?),
        };
        let mut engine = Engine::build(config, program, device, weights, dtype, options, progress)?;
        engine.prepare()?;
        engine.launch()?;
        Ok(engine)
    }

    /// An engine whose device has all it needs but the contents of the heap.
    fn build(
        config: ModelConfig,
        program: Program,
        mut device: Box<dyn Device>,
        weights: Box<dyn WeightSource + Send>,
        dtype: Dtype,
        options: &EngineOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Engine> {
        let mut vectors = Vec::new();
        let tasks =
            bind(&program, weights.as_ref(), device.as_mut(), &mut vectors, dtype, progress)?;
        let headers = headers::upload(&program, &tasks, device.as_mut(), options)?;
        let slots = program.dims.kv.slot_count;
        Ok(Engine {
            config,
            headers,
            is_busy: vec![false; slots as usize],
            logits: vec![0.0; program.dims.vocab_size as usize],
            empty_looks: 0,
            pace: Pace::new(),
            clock: Instant::now(),
            clock_offset_ns: 0,
            device,
            weights,
            _vectors: vectors,
            program,
        })
    }

    /// Fills what the workers expect: cursors at their start, RoPE tables.
    fn prepare(&mut self) -> Result<()> {
        let tables = rope::tables(&self.config, self.context_max());
        for (pe, header) in (0u32..).zip(&self.headers) {
            let (heap, plan) = (header.heap, header.plan);
            for queue_idx in 0..=u64::from(header.worker_count) {
                let address = heap + plan.cursors + queue_idx * CURSOR_STRIDE_BYTES;
                self.device.write(pe, address, &Cursor::START.pack().to_ne_bytes())?;
            }
            self.device.write(pe, heap + plan.rope_cos, bytes_of(&tables.cos))?;
            self.device.write(pe, heap + plan.rope_sin, bytes_of(&tables.sin))?;
        }
        Ok(())
    }

    /// The header of the first PE, whose workers admit and sample.
    fn header(&self) -> &ProgramHeader {
        &self.headers[0]
    }

    /// Starts the workers and waits for their first sign of life, which also relates the clocks.
    fn launch(&mut self) -> Result<()> {
        self.device.launch(&self.headers)?;
        let begin = Instant::now();
        while self.word(offset_of!(Mailbox, ready)).load_acquire() == 0 {
            self.check_fault()?;
            if begin.elapsed() > START_TIME_MAX {
                let seconds = START_TIME_MAX.as_secs();
                return Err(Error::Fault(format!("no worker began within {seconds} s")));
            }
            std::hint::spin_loop();
        }
        if self.device.now_ns().is_none() {
            self.clock_offset_ns = self.now_ns().wrapping_sub(self.started_ns());
        }
        Ok(())
    }

    /// Nanoseconds on the engine's clock, which is the device's where the host has that one.
    fn now_ns(&self) -> u64 {
        self.device.now_ns().unwrap_or_else(|| self.clock.elapsed().as_nanos() as u64)
    }

    /// The model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Positions of a sequence.
    pub fn context_max(&self) -> u32 {
        self.header().dims.kv.context_max
    }

    /// Name of the device.
    pub fn device_name(&self) -> &str {
        &self.device.profile().name
    }

    /// Workers.
    pub fn worker_count(&self) -> u32 {
        self.header().worker_count
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

    /// Starts a request in a free slot and returns the slot; `poll` tells what becomes of it.
    ///
    /// Errors: a request that does not fit the model; all slots busy.
    pub fn submit(&mut self, request: &Request<'_>) -> Result<u32> {
        self.check(request)?;
        let slot = self.is_busy.iter().position(|busy| !busy);
        let slot = slot.ok_or_else(|| Error::Request("all sequence slots are busy".into()))? as u32;
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
        self.write_prompt(slot, request.prompt);
        self.pace = Pace::new();
        self.command(CommandKind::Start, slot, params);
        self.is_busy[slot as usize] = true;
        Ok(slot)
    }

    /// Ends the request in a slot before it ends by itself; its `Event::End` still comes.
    pub fn cancel(&mut self, slot: u32) {
        let params = SequenceParams {
            prompt_count: 0,
            generate_max: 0,
            flags: 0,
            stop_id_count: 0,
            stop_ids: [0; STOP_ID_COUNT_MAX],
            sampling: SamplingParams::GREEDY,
        };
        self.command(CommandKind::Cancel, slot, params);
    }

    /// Hands the oldest output to `on_event` with its slot; false if there is none.
    ///
    /// Errors: a device that has stopped.
    pub fn poll(&mut self, on_event: &mut dyn FnMut(u32, Event<'_>)) -> Result<bool> {
        let Some(output) = self.next_output()? else {
            self.empty_looks = self.empty_looks.wrapping_add(1);
            if self.is_check_due() {
                self.check_fault()?;
            }
            return Ok(false);
        };
        if self.empty_looks > 0 {
            self.pace.note_news();
        }
        self.empty_looks = 0;
        let (slot, position) = (output.slot, output.position);
        let event = match OutputKind::from_raw(output.kind) {
            Some(OutputKind::Token) => {
                let time_ns = output.time_ns.wrapping_add(self.clock_offset_ns);
                Event::Token { id: output.value, time_ns }
            }
            Some(OutputKind::Logits) => {
                self.read_logits(&output)?;
                Event::Logits { position, row: &self.logits }
            }
            Some(OutputKind::EndLength) => Event::End(FinishReason::Length),
            Some(OutputKind::EndStop) => Event::End(FinishReason::Stop),
            Some(OutputKind::EndCancelled) => Event::End(FinishReason::Cancelled),
            Some(OutputKind::EndNotANumber) => Event::End(FinishReason::NotANumber { position }),
            None => return Err(Error::Fault(format!("an output of kind {}", output.kind))),
        };
        if matches!(event, Event::End(_)) {
            self.is_busy[slot as usize] = false;
        }
        on_event(slot, event);
        self.consume();
        Ok(true)
    }

    fn read_logits(&mut self, output: &Output) -> Result<()> {
        let offset = u64::from(output.value) * self.logits.len() as u64 * 4;
        let address = self.header().heap + self.header().plan.logits + offset;
        self.device.read(0, address, bytes_of_mut(&mut self.logits))
    }

    /// Runs one request to its end; `on_event` may break to cancel it.
    ///
    /// Errors: a request that does not fit the model, logits that are not numbers, a fault.
    pub fn generate(
        &mut self,
        request: &Request<'_>,
        on_event: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<Completion> {
        let mut answer = Completion {
            ids: Vec::with_capacity(request.max_tokens as usize),
            finish_reason: FinishReason::Length,
            submitted_ns: self.now_ns(),
            token_times_ns: Vec::with_capacity(request.max_tokens as usize),
        };
        let slot = self.submit(request)?;
        let (mut is_cancelled, mut end) = (false, None);
        while end.is_none() {
            let mut flow = ControlFlow::Continue(());
            let is_news = self.poll(&mut |_, event| match event {
                Event::End(reason) => end = Some(reason),
                _ if is_cancelled => {}
                event => {
                    if let Event::Token { id, time_ns } = event {
                        answer.ids.push(id);
                        answer.token_times_ns.push(time_ns);
                    }
                    flow = on_event(event);
                }
            })?;
            if !is_news && self.rest() && !is_cancelled {
                flow = on_event(Event::Idle);
            }
            if flow.is_break() && end.is_none() {
                is_cancelled = true;
                self.cancel(slot);
            }
        }
        match end {
            Some(FinishReason::NotANumber { position }) => {
                let message = format!("the logits at position {position} are not numbers");
                return Err(Error::Request(message));
            }
            Some(reason) if !is_cancelled => answer.finish_reason = reason,
            _ => answer.finish_reason = FinishReason::Cancelled,
        }
        Ok(answer)
    }

    /// Lets time pass after a look at the mailbox that found nothing; true when the caller should be asked.
    pub fn rest(&self) -> bool {
        if self.device.profile().host_spins {
            std::hint::spin_loop();
        } else {
            std::thread::sleep(self.pace.sleep());
        }
        self.is_check_due()
    }

    /// Whether to ask the driver and the caller now: not at every look of a host that spins.
    fn is_check_due(&self) -> bool {
        !self.device.profile().host_spins || self.empty_looks.is_multiple_of(LOOKS_PER_CHECK)
    }

    /// Stops the workers and waits for their ends; no request can follow.
    fn shut_down(&mut self) {
        let stop = self.word(offset_of!(Mailbox, stop));
        // A fault stays a fault; the workers leave either way.
        let _ = stop.replace_release(StopWord::Run as u32, StopWord::Shutdown as u32);
        self.device.join();
    }

    /// Ends the engine; the last traced tasks of each worker, in the order of time.
    ///
    /// Errors: what the driver says.
    pub fn into_trace(mut self) -> Result<Vec<Vec<TraceRecord>>> {
        self.shut_down();
        (0..self.header().worker_count).map(|worker_idx| self.trace_of(worker_idx)).collect()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shut_down();
    }
}

/// What lowering needs, from the model, the device and the user.
fn lower_options(
    config: &ModelConfig,
    profile: &Profile,
    options: &EngineOptions,
    dtype: Dtype,
) -> Result<LowerOptions> {
    let worker_count = options.workers.unwrap_or(profile.worker_count).max(1);
    if worker_count > profile.worker_count_max {
        let limit = profile.worker_count_max;
        return Err(Error::Usage(format!(
            "--workers {worker_count}: {} has at most {limit}",
            profile.name
        )));
    }
    if !worker_count.is_multiple_of(profile.pe_count) {
        let count = profile.pe_count;
        return Err(Error::Usage(format!(
            "--workers {worker_count}: {count} devices have equally many"
        )));
    }
    if profile.shared_bytes > 0 && !config.head_dim.is_multiple_of(8) {
        let dim = config.head_dim;
        return Err(Error::Device(format!(
            "{}: a head dimension of {dim}, not of eights",
            profile.name
        )));
    }
    if config.fp8.is_some() {
        check_fp8(options.weights)?;
    }
    let format = match options.weights {
        Weights::Native => format_of(dtype),
        Weights::Fp8 => WeightFormat::Fp8,
        Weights::Q8 => WeightFormat::Q8,
        Weights::Q4 => WeightFormat::Q4,
    };
    let precision = match options.compute {
        Compute::Exact => Precision::Exact,
        Compute::Bf16 => Precision::Bf16,
    };
    if precision != Precision::Exact && profile.shared_bytes > 0 {
        let name = &profile.name;
        return Err(Error::Device(format!("{name}: --compute bf16 needs --device cpu")));
    }
    let context = config.sliding_window.unwrap_or(u32::MAX).min(config.position_max);
    Ok(LowerOptions {
        worker_count,
        slot_count: options.slots,
        context_max: options.max_context.unwrap_or(context.min(CONTEXT_DEFAULT)),
        step_tokens_max: options.step_tokens.min(profile.step_tokens_max),
        stored_format: format_of(dtype),
        format,
        precision,
        tile_bytes: profile.tile_bytes,
        tile_rows_max: profile.tile_rows_max,
        is_stamped: profile.stamps_values,
        // Tried on hardware on one device alone.
        packed_rows: if profile.packs_weights && profile.pe_count == 1 { PAD_ROWS } else { 1 },
    })
}
