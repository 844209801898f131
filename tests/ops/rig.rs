//! The smallest program around one task: a heap, a mailbox and a worker that nobody helps.

use std::cell::Cell;
use std::time::Instant;

use half::{bf16, f16};
use tilert_mk_device::machine::EventCounter;
use tilert_mk_device::machine::cpu::Isa;
use tilert_mk_device::machine::cpu::thread::{Idling, Thread};
use tilert_mk_device::machine::memory::Span;
use tilert_mk_device::worker::{Claim, Progress, Worker};
use tilert_mk_shared::ABI_VERSION;
use tilert_mk_shared::event::{EVENT_STRIDE_BYTES, EventId};
use tilert_mk_shared::fault::FaultRecord;
use tilert_mk_shared::kv::KvGeometry;
use tilert_mk_shared::limits::{ATTENTION_SPLIT_MAX, STEP_TOKENS_MAX};
use tilert_mk_shared::mailbox::Mailbox;
use tilert_mk_shared::program::{Dims, HeapPlan, ProgramHeader, SAMPLE_BIN_COUNT};
use tilert_mk_shared::queue::{CURSOR_STRIDE_BYTES, Cursor};
use tilert_mk_shared::sequence::{NO_LOGITS, StepState, StepToken};
use tilert_mk_shared::task::{Task, WeightFormat};

/// Half an ulp of 1: the relative error of one rounding.
pub(crate) const UNIT: f64 = 1.0 / (1u64 << 24) as f64;
pub(crate) const FORMATS: [WeightFormat; 3] =
    [WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16];
/// Tasks of a run, at most.
const RUN_TASKS_MAX: u32 = 64;
const ISAS: [Isa; 4] = [Isa::Amx, Isa::Avx512, Isa::Avx2, Isa::Portable];

/// Numbers that are the same in every run: SplitMix64.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// Uniform in -1 to 1.
    pub(crate) fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z >> 40) as f32) / (1 << 23) as f32 - 1.0
    }

    pub(crate) fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.next()).collect()
    }
}

/// 128 bytes, on as many: the alignment of heap regions.
#[derive(Clone, Copy)]
#[repr(align(128))]
struct Line(#[expect(dead_code, reason = "reached through addresses alone")] [u8; 128]);

/// Zeroed memory that tasks name by its address.
pub(crate) struct Memory(Vec<Line>);

impl Memory {
    pub(crate) fn new(bytes: u64) -> Memory {
        Memory(vec![Line([0; 128]); bytes.div_ceil(128).max(1) as usize])
    }

    pub(crate) fn of<T: Copy>(values: &[T]) -> Memory {
        let memory = Memory::new(size_of_val(values) as u64);
        // SAFETY: as many bytes as the values have, which nobody else knows yet.
        let span = unsafe { Span::<T>::new(memory.address(), values.len()) };
        span.as_mut_slice().copy_from_slice(values);
        memory
    }

    pub(crate) fn address(&self) -> u64 {
        self.0.as_ptr().expose_provenance() as u64
    }
}

/// Formats whose values have scales.
pub(crate) const BLOCKED: [WeightFormat; 3] =
    [WeightFormat::Q8, WeightFormat::Q4, WeightFormat::Fp8];

/// Random weights as stored, and their values.
pub(crate) fn matrix(
    random: &mut Random,
    format: WeightFormat,
    count: usize,
) -> (Memory, Vec<f32>) {
    let values = random.values(count);
    match format {
        WeightFormat::F32 => (Memory::of(&values), values),
        WeightFormat::F16 => {
            let stored: Vec<f16> = values.iter().map(|value| f16::from_f32(*value)).collect();
            (Memory::of(&stored), stored.iter().map(|value| value.to_f32()).collect())
        }
        WeightFormat::Bf16 => {
            let stored: Vec<bf16> = values.iter().map(|value| bf16::from_f32(*value)).collect();
            (Memory::of(&stored), stored.iter().map(|value| value.to_f32()).collect())
        }
        _ => panic!("{format:?} is packed by task"),
    }
}

/// Sizes of a model with `[head_count, kv_head_count, head_dim]`, two layers and three slots.
pub(crate) fn dims(hidden_dim: u32, heads: [u32; 3], context_max: u32) -> Dims {
    let [head_count, kv_head_count, head_dim] = heads;
    Dims {
        hidden_dim,
        intermediate_dim: 200,
        head_count,
        vocab_size: 300,
        rms_norm_eps: 1e-5,
        attention_scale: 1.0 / (head_dim as f32).sqrt(),
        step_tokens_max: STEP_TOKENS_MAX,
        task_rows_max: 64,
        prologue_dim_max: hidden_dim.max(head_count * head_dim),
        sample_bin_count: SAMPLE_BIN_COUNT as u32,
        is_stamped: 0,
        head_task_count: 0,
        late_splits_max: ATTENTION_SPLIT_MAX,
        kv: KvGeometry { layer_count: 2, slot_count: 3, kv_head_count, context_max, head_dim },
    }
}

/// A program of one worker, or of two that take turns.
pub(crate) struct Rig {
    pub(crate) header: ProgramHeader,
    machine: Thread,
    /// Steps that have been run.
    epoch: Cell<u32>,
    _memory: [Memory; 3],
}

impl Rig {
    pub(crate) fn new(dims: &Dims, isa: Isa) -> Rig {
        let plan = HeapPlan::new(dims, 2, 2, RUN_TASKS_MAX);
        let memory =
            [plan.total_bytes, size_of::<Mailbox>() as u64, size_of::<FaultRecord>() as u64]
                .map(Memory::new);
        let [heap, mailbox, fault] = [0, 1, 2].map(|idx| memory[idx].address());
        let header = ProgramHeader {
            abi_version: ABI_VERSION,
            worker_count: 1,
            event_count: 2,
            task_count: RUN_TASKS_MAX,
            heap,
            mailbox,
            fault,
            dims: *dims,
            plan,
            ..ProgramHeader::default()
        };
        let machine = Thread { isa, idling: Idling::Park, clock: Instant::now() };
        Rig { header, machine, epoch: Cell::new(0), _memory: memory }
    }

    /// Runs `test` on a new program for each instruction set.
    pub(crate) fn for_each_isa(dims: &Dims, mut test: impl FnMut(&Rig)) {
        for isa in ISAS.into_iter().filter(|isa| isa.is_supported()) {
            println!("{isa:?}");
            test(&Rig::new(dims, isa));
        }
    }

    /// A worker; two of them take turns on one thread.
    pub(crate) fn worker(&self, worker_idx: u32) -> Worker<'_, Thread> {
        // SAFETY: no other runs meanwhile; the rig owns the memory that the header names, and tests keep
        // what their tasks name.
        unsafe { Worker::new(&self.header, worker_idx, &self.machine, Progress::NONE) }
    }

    /// Makes it a program of two workers whose queues are at these addresses.
    pub(crate) fn run_for_two(&mut self, tasks: u64, queue_spans: u64, queue_entries: u64) {
        let (worker_count, polls_per_look, wait_ns_max) = (2, 4, 10_000_000_000);
        let [heap, plan] = [self.header.heap, self.header.plan.cursors];
        for queue_idx in 0..=u64::from(worker_count) {
            // SAFETY: a cursor of the rig's heap, which no worker knows yet.
            let cursor = unsafe { Span::new(heap + plan + queue_idx * CURSOR_STRIDE_BYTES, 1) };
            cursor.write(0, Cursor::START.pack());
        }
        self.header = ProgramHeader {
            worker_count,
            polls_per_look,
            wait_ns_max,
            tasks,
            queue_spans,
            queue_entries,
            ..self.header
        };
    }

    fn event(&self, event: EventId) -> &EventCounter {
        let offset = self.header.plan.events + u64::from(event.0) * EVENT_STRIDE_BYTES;
        // SAFETY: an event of the rig's heap, which is only a counter.
        unsafe { EventCounter::at(self.header.heap + offset) }
    }

    /// Adds one arrival.
    pub(crate) fn signal(&self, event: EventId) {
        tilert_mk_device::event::signal(self.event(event));
    }

    /// Arrivals so far.
    pub(crate) fn arrivals(&self, event: EventId) -> u32 {
        self.event(event).load_relaxed()
    }

    /// Values of the heap.
    pub(crate) fn heap<T: Copy>(&self, offset: u64, len: u64) -> Span<T> {
        self.worker(0).heap(offset, len)
    }

    /// The mailbox.
    pub(crate) fn mailbox(&self) -> Mailbox {
        // SAFETY: the rig's own memory, zeroed or written by a task that has ended.
        unsafe { Span::<Mailbox>::new(self.header.mailbox, 1) }.read(0)
    }

    /// Stores what the step processes.
    pub(crate) fn set_step(&self, tokens: &[StepToken]) {
        let mut step = StepState {
            token_count: tokens.len() as u32,
            logit_count: 0,
            logit_tokens: [0; STEP_TOKENS_MAX as usize],
            tokens: [StepToken::default(); STEP_TOKENS_MAX as usize],
        };
        for (idx, token) in tokens.iter().enumerate() {
            step.tokens[idx] = *token;
            if token.logit_row != NO_LOGITS {
                step.logit_tokens[token.logit_row as usize] = idx as u32;
                step.logit_count += 1;
            }
        }
        self.heap(self.header.plan.step, 1).write(0, step);
    }

    /// Runs a task that waits for nothing.
    pub(crate) fn run(&self, task: &Task) {
        self.run_all(std::slice::from_ref(task));
    }

    /// Runs tasks of one step after each other on one worker.
    pub(crate) fn run_all(&self, tasks: &[Task]) {
        let worker = self.worker(0);
        self.epoch.set(self.epoch.get() + 1);
        for (task, idx) in tasks.iter().zip(0..) {
            let claim = Claim::new(task, idx, self.epoch.get());
            worker.execute(&claim, 0, 0).expect("nobody stops the worker");
        }
    }
}

/// A value that the device should find, and how far off it may be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Near {
    pub(crate) value: f64,
    pub(crate) error: f64,
}

impl Near {
    pub(crate) fn check(&self, found: f32, what: &dyn Fn() -> String) {
        let difference = (f64::from(found) - self.value).abs();
        assert!(
            difference <= self.error,
            "{}: {found} is {difference:e} from {}, not within {:e}",
            what(),
            self.value,
            self.error
        );
    }
}
