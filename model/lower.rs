//! Lowering: a model's operators become tile tasks with events, dealt to the workers' queues.
//!
//! Each operator is one stage: its tasks wait for the event of the stage before and signal their
//! own. How an operator is cut into tiles changes who computes a row, never a bit of it.
//!
//! Weights are named by index into `Program::tensors`, with a byte offset: `(index + 1) << 40 |
//! offset`. The host replaces the names by addresses when it has loaded the weights.

mod apart;
mod dims;
mod empty;
mod formats;

use tilert_mk_shared::blocks::STRIP_ROWS;
use tilert_mk_shared::event::EventId;
use tilert_mk_shared::limits::{ATTENTION_SPLIT_MAX, SEGMENT_ROWS_MAX};
use tilert_mk_shared::packed::Packing;
use tilert_mk_shared::program::{Dims, HeapPlan};
use tilert_mk_shared::queue::QueueSpan;
use tilert_mk_shared::task::{
    AttentionArgs, EmbedArgs, Epilogue, LinearArgs, Opcode, Precision, SampleArgs, Segment, Task,
    TokenRows, WeightFormat,
};

use crate::config::ModelConfig;
use crate::graph::{Graph, Kind, Linear, Matrix, TensorIdx, Value};
use crate::place::{Stage, place};
use crate::schedule::queues;
use crate::validate::{ValidateError, check_dims, validate};

use self::apart::Apart;
use self::dims::dims;

pub use self::empty::{EmptyShape, lower_empty};
pub use crate::graph::Tensor;

/// A model that cannot be lowered.
#[derive(Debug, thiserror::Error)]
pub enum LowerError {
    /// More positions than the model, or its attention window, has.
    #[error("a context of {wanted} positions exceeds the {limit} that the model supports")]
    Context {
        /// Positions asked for.
        wanted: u32,
        /// Positions it has.
        limit: u32,
    },
    /// Matrices of one operator, of which not all are stored as FP8.
    #[error(
        "`{fp8}` is FP8 and `{other}` is not: matrices that are multiplied together, as those of \
         {operator} are, must be of one kind"
    )]
    Mixed {
        /// The operator.
        operator: String,
        /// A tensor that is FP8.
        fp8: String,
        /// One that is not.
        other: String,
    },
    /// Sizes outside the bounds of the runtime, or a program that is not proved to be safe.
    #[error("the model cannot be run: {0}")]
    Invalid(#[from] ValidateError),
}

/// What the engine decides.
#[derive(Clone, Copy, Debug)]
pub struct LowerOptions {
    /// Workers of the device.
    pub worker_count: u32,
    /// Sequences resident at once.
    pub slot_count: u32,
    /// Positions kept for each.
    pub context_max: u32,
    /// Tokens of a step at most.
    pub step_tokens_max: u32,
    /// Format in which the checkpoint stores the matrices that are not FP8.
    pub stored_format: WeightFormat,
    /// Format in which linear tasks read those: the same, or one of blocks.
    pub format: WeightFormat,
    /// How precisely they multiply.
    pub precision: Precision,
    /// Weight bytes of a linear task at most, about. `u64::MAX` makes as few tiles as possible: one
    /// for each worker, or more where a tile would have too many rows.
    pub tile_bytes: u64,
    /// Rows of a linear task, over all its segments, at most.
    pub tile_rows_max: u32,
    /// Whether the device stamps values (`shared/stamp.rs`).
    pub is_stamped: bool,
    /// Rows that tiles of packed weights (`shared/packed.rs`) are multiples of, but for the last, if
    /// there are as many for each worker.
    pub packed_rows: u32,
}

/// A lowered model.
#[derive(Clone, Debug)]
pub struct Program {
    /// Tasks in a topological order.
    pub tasks: Vec<Task>,
    /// What each task is, for people.
    pub names: Vec<String>,
    /// Signals that each event gets in a step.
    pub event_arrivals: Vec<u32>,
    /// Event of `Admit`.
    pub begin_event: EventId,
    /// Tensors, in the order of their indices in weight names.
    pub tensors: Vec<Tensor>,
    /// Spans of each worker's queue and of the shared one.
    pub queue_spans: Vec<QueueSpan>,
    /// Entries of all queues.
    pub queue_entries: Vec<u32>,
    /// Format in which the checkpoint stores the matrices that are not FP8: names of weights count
    /// bytes as stored.
    pub stored_format: WeightFormat,
    /// Format in which linear tasks read those.
    pub format: WeightFormat,
    /// How precisely linear tasks multiply.
    pub precision: Precision,
    /// Shared sizes.
    pub dims: Dims,
    /// The heap.
    pub plan: HeapPlan,
    /// Dependent stages of a step.
    pub stage_count: u32,
}

/// Bits of a weight name below the tensor's index.
pub const TENSOR_SHIFT: u32 = 40;

/// Positions of the sequence for which attention is given its share of the work. Short sequences
/// are the common case, and with long ones attention is spread by its own splits.
const ATTENTION_POSITIONS_NOMINAL: u64 = 512;

/// Lowers a dense decoder to a program that has been proved safe to run.
///
/// Errors:  a context that the model does not have; operators of matrices that are FP8 and others;
///          sizes outside `shared/limits.rs`.
/// Cost:    proportional to the tasks; 20 000 take some 20 ms, a third of it for the proof.
pub fn lower(config: &ModelConfig, options: &LowerOptions) -> Result<Program, LowerError> {
    let limit = config.sliding_window.unwrap_or(u32::MAX).min(config.position_max);
    if options.context_max > limit {
        return Err(LowerError::Context { wanted: options.context_max, limit });
    }
    let mut dims = dims(config, options);
    check_dims(&dims, options.worker_count.into())?;
    // Regions whose sizes only the tasks tell follow every region that a task names.
    let draft = HeapPlan::new(&dims, options.worker_count, 0, 0);
    let graph = Graph::new(config);
    formats::check(&graph)?;
    let Builder { tasks, names, homes, event_arrivals, rows_max, head_task_count, .. } =
        Builder::new(options, &dims, &draft, &graph).build();
    dims.task_rows_max = rows_max;
    dims.head_task_count = head_task_count;
    let (event_count, task_count) = (event_arrivals.len() as u32, tasks.len() as u32);
    let plan = HeapPlan::new(&dims, options.worker_count, event_count, task_count);
    let (queue_spans, queue_entries) = queues(&homes, options.worker_count);
    let program = Program {
        tasks,
        names,
        event_arrivals,
        begin_event: BEGIN,
        queue_spans,
        queue_entries,
        stored_format: options.stored_format,
        format: options.format,
        precision: options.precision,
        dims,
        plan,
        // The operators, between admission and sampling.
        stage_count: graph.operators.len() as u32 + 2,
        tensors: graph.tensors,
    };
    validate(&program)?;
    Ok(program)
}

/// Event of `Sample`, for which the next step's `Admit` waits.
const END: EventId = EventId(0);
/// Event of `Admit`.
const BEGIN: EventId = EventId(1);
/// Worker of the tasks that come once in a step: they share the sequences' state.
const CONTROL_HOME: u32 = 0;

/// What a stage waits for and signals.
struct Edge {
    wait: EventId,
    signal: EventId,
    /// See `Task::is_announced`.
    is_announced: bool,
    /// Workers that get its tasks, if it is linear.
    worker_count: u32,
}

struct Builder<'a> {
    options: &'a LowerOptions,
    dims: &'a Dims,
    plan: &'a HeapPlan,
    graph: &'a Graph,
    tasks: Vec<Task>,
    names: Vec<String>,
    homes: Vec<u32>,
    event_arrivals: Vec<u32>,
    /// The stages that are dealt to workers.
    stages: Vec<Stage>,
    apart: Apart,
    rows_max: u32,
    head_task_count: u32,
    /// Event of the stage before the head's.
    before_head: EventId,
    /// Event of the stage that has left the residual stream.
    residual: EventId,
}

impl<'a> Builder<'a> {
    fn new(
        options: &'a LowerOptions,
        dims: &'a Dims,
        plan: &'a HeapPlan,
        graph: &'a Graph,
    ) -> Self {
        Builder {
            options,
            dims,
            plan,
            graph,
            tasks: Vec::new(),
            names: Vec::new(),
            homes: Vec::new(),
            event_arrivals: vec![0; 2],
            stages: Vec::new(),
            apart: Apart::new(graph, dims, options),
            rows_max: 1,
            head_task_count: 0,
            before_head: EventId::NONE,
            residual: EventId::NONE,
        }
    }

    /// Adds a task that waits for all of `wait` and signals `signal`.
    fn push(&mut self, mut task: Task, wait: EventId, signal: EventId, name: String) {
        task.wait_event = wait;
        task.wait_count = self.event_arrivals[wait.0 as usize];
        task.signal_event = signal;
        if signal.is_some() {
            self.event_arrivals[signal.0 as usize] += 1;
        }
        self.tasks.push(task);
        self.names.push(name);
    }

    /// Signals that an event gets in a step.
    fn arrivals(&self, event: EventId) -> u32 {
        self.event_arrivals.get(event.0 as usize).copied().unwrap_or(0)
    }

    /// A new event.
    fn event(&mut self) -> EventId {
        self.event_arrivals.push(0);
        EventId(self.event_arrivals.len() as u32 - 1)
    }

    fn build(mut self) -> Self {
        let graph = self.graph;
        self.push(Task::new(Opcode::Admit), END, BEGIN, "admit".into());
        let mut ready = BEGIN;
        for (idx, operator) in graph.operators.iter().enumerate() {
            let done = self.event();
            // Tasks that look at the stamps of all they read need no more than a hint; for what the
            // head reads, `Sample` waits too.
            let is_announced = graph.operators.get(idx + 1).is_some_and(|next| match &next.kind {
                Kind::Linear(linear) => linear.token_rows == TokenRows::All,
                Kind::Attention { .. } => true,
                Kind::Embed { .. } => false,
            });
            let worker_count = self.apart.worker_count(graph, idx);
            let edge = Edge { wait: ready, signal: done, is_announced, worker_count };
            match &operator.kind {
                Kind::Embed { table } => {
                    let (format, hidden) = (self.options.stored_format, self.plan.hidden);
                    let args = EmbedArgs { format, table: named(*table, 0), hidden };
                    self.push(args.pack(), ready, done, operator.name.clone());
                    self.residual = done;
                }
                Kind::Linear(linear) => {
                    self.linear(linear, &edge, &operator.name);
                    if linear.epilogue == Epilogue::AddResidual {
                        self.residual = done;
                    }
                }
                Kind::Attention { layer_idx, query_norm, key_norm } => {
                    let norms = [*query_norm, *key_norm];
                    self.attention(*layer_idx, norms, &edge, &operator.name);
                }
            }
            ready = done;
        }
        let (also_event, also_count) = (self.before_head, self.arrivals(self.before_head));
        let args = SampleArgs { also_event, also_count };
        self.push(args.pack(), ready, END, "sample".into());
        // `Admit` was pushed before its event had a signaller.
        self.tasks[0].wait_count = self.event_arrivals[END.0 as usize];
        self.place();
        self
    }

    /// One stage of linear tasks.
    fn linear(&mut self, linear: &Linear, edge: &Edge, name: &str) {
        let adds = linear.epilogue == Epilogue::AddResidual;
        let residual_age = if adds { edge.wait.0 - self.residual.0 } else { 0 };
        let format = formats::of_linear(self.graph, linear, self.options.format);
        let leaves_best = linear.epilogue == Epilogue::StoreBest;
        if leaves_best {
            self.before_head = edge.wait;
        }
        let stage_idx = self.stages.len() as u32;
        let mut costs = Vec::new();
        for (tile_idx, rows) in (0u32..).zip(self.tiles(linear, format, edge.worker_count)) {
            let args = LinearArgs {
                prologue: linear.prologue,
                epilogue: linear.epilogue,
                token_rows: linear.token_rows,
                format,
                precision: self.options.precision,
                residual_age,
                is_announced: edge.is_announced,
                best_idx: if leaves_best { tile_idx } else { 0 },
                in_dim: linear.in_dim,
                x_stride: linear.in_dim,
                y_stride: linear.out_dim,
                // A prologue is the same for all tiles of its stage, and for no others.
                prologue_key: stage_idx,
                x: self.offset(linear.x),
                y: self.offset(linear.y),
                norm_weight: linear.norm.map_or(0, |norm| named(norm, 0)),
                segments: self.segments(linear, rows),
            };
            self.rows_max = self.rows_max.max(args.row_count());
            self.head_task_count += u32::from(leaves_best);
            costs.push(args.weight_bytes());
            self.push(args.pack(), edge.wait, edge.signal, format!("{name} tile {tile_idx}"));
        }
        let homes = vec![None; costs.len()];
        self.stages.push(Stage { costs, homes, worker_count: edge.worker_count });
    }

    /// Cuts an operator's rows, or pairs of rows of gate and up, into tiles that differ by one; rows
    /// that lie in strips, or are packed together, into whole strips or packs but for the last: what
    /// a pack is padded with is read like other rows.
    ///
    /// As many tiles as `tile_bytes` asks for, then more until each of `workers` has equally many.
    fn tiles(
        &self,
        linear: &Linear,
        format: WeightFormat,
        workers: u32,
    ) -> impl Iterator<Item = [u32; 2]> + use<> {
        let options = self.options;
        let rows = linear.matrices.iter().map(|matrix| matrix.row_count);
        let (pairs, pair_rows) = match linear.epilogue {
            Epilogue::SiluMul => (rows.min().unwrap_or(0), linear.matrices.len() as u32),
            _ => (rows.sum(), 1),
        };
        // What is cut: rows, pairs, or as many of them as fill a strip or are packed together. Every
        // worker keeps a task of the stage: what nobody waits for could be late for its step.
        let has_packs = pairs * pair_rows >= options.packed_rows * workers;
        let group_rows = match (options.is_stamped, format.is_blocked()) {
            (true, _) if Packing::is_for(format) && has_packs => options.packed_rows,
            (false, true) => STRIP_ROWS,
            _ => 1,
        };
        let unit_pairs = group_rows.div_ceil(pair_rows);
        let (units, unit_rows) = (pairs.div_ceil(unit_pairs), unit_pairs * pair_rows);
        let row_bytes = format.row_bytes(linear.in_dim);
        let bytes = u64::from(units) * u64::from(unit_rows) * row_bytes;
        let wanted = bytes.div_ceil(options.tile_bytes.max(1)).min(units.into()) as u32;
        let rows_max = options.tile_rows_max.min(SEGMENT_ROWS_MAX).max(unit_rows);
        let least = units.div_ceil(rows_max / unit_rows);
        let even = wanted.max(least).max(1).next_multiple_of(workers);
        let count = match even {
            even if even <= units => even,
            _ if units >= workers => units / workers * workers,
            _ => units,
        };
        let at = move |tile: u32| {
            let unit = u64::from(units) * u64::from(tile) / u64::from(count.max(1));
            (unit as u32 * unit_pairs).min(pairs)
        };
        (0..count).map(move |tile| [at(tile), at(tile + 1)])
    }

    /// The rows `first` to `end` of an operator, as rows of its matrices.
    ///
    /// Matrices follow each other, except gate and up, of which each has the same rows. Segments
    /// with rows come first.
    fn segments(&self, linear: &Linear, [first, end]: [u32; 2]) -> [Segment; 3] {
        let mut segments = [Segment::default(); 3];
        let mut free = segments.iter_mut();
        let mut base = 0;
        for matrix in &linear.matrices {
            let (from, to) = (first.max(base) - base, end.max(base) - base);
            let (from, to) = (from.min(matrix.row_count), to.min(matrix.row_count));
            if from < to
                && let Some(segment) = free.next()
            {
                let tensor = &self.graph.tensors[matrix.weight.0 as usize];
                let row_bytes = tensor.stored_row_bytes(self.options.stored_format);
                *segment = rows_of(matrix, from, to, row_bytes);
            }
            if linear.epilogue != Epilogue::SiluMul {
                base += matrix.row_count;
            }
        }
        segments
    }

    /// One stage of attention: as many tasks for each KV head as there are workers for.
    fn attention(
        &mut self,
        layer_idx: u32,
        norms: [Option<TensorIdx>; 2],
        edge: &Edge,
        name: &str,
    ) {
        let kv = &self.dims.kv;
        let part_count =
            (self.options.worker_count / kv.kv_head_count).clamp(1, ATTENTION_SPLIT_MAX);
        let [query_norm, key_norm] = norms.map(|norm| norm.map_or(0, |norm| named(norm, 0)));
        let positions = ATTENTION_POSITIONS_NOMINAL.min(kv.context_max.into());
        let cost = positions * u64::from(kv.head_dim) * 2 * size_of::<f32>() as u64;
        let task_count = kv.kv_head_count * part_count;
        let group = self.dims.heads_per_kv();
        let costs = vec![cost / u64::from(part_count); task_count as usize];
        let mut homes = Vec::new();
        for task_idx in 0..task_count {
            let (kv_head_idx, part_idx) = (task_idx / part_count, task_idx % part_count);
            homes.push(self.apart.home(kv_head_idx, part_idx));
            let args = AttentionArgs {
                layer_idx,
                kv_head_idx,
                part_idx,
                part_count,
                columns: AttentionArgs::columns_of(group * kv.head_dim, part_idx, part_count),
                qkv: self.plan.qkv,
                splits: self.plan.splits + self.dims.split_idx(0, kv_head_idx * group, 0) * 4,
                query_norm,
                key_norm,
                is_announced: edge.is_announced,
            };
            let part = if part_count == 1 { String::new() } else { format!(" part {part_idx}") };
            let name = format!("{name} head {kv_head_idx}{part}");
            self.push(args.pack(), edge.wait, edge.signal, name);
        }
        self.stages.push(Stage { costs, homes, worker_count: self.apart.others });
    }

    /// Heap offset of a value.
    fn offset(&self, value: Value) -> u64 {
        match value {
            Value::Hidden => self.plan.hidden,
            Value::Qkv => self.plan.qkv,
            Value::Splits => self.plan.splits,
            Value::Intermediate => self.plan.intermediate,
            Value::Logits => self.plan.logits,
        }
    }

    /// Finds a worker for each task, and a task for each worker.
    fn place(&mut self) {
        let worker_count = self.options.worker_count;
        // What sampling reads if it takes the best.
        let best_bytes = u64::from(self.head_task_count) * size_of::<u64>() as u64;
        let mut dealt = place(&self.stages, worker_count, best_bytes).into_iter();
        let is_dealt = |task: &Task| {
            [Opcode::Linear, Opcode::Attention].map(|opcode| opcode as u16).contains(&task.opcode)
        };
        let home = |task: &Task| if is_dealt(task) { dealt.next() } else { None };
        let homes = self.tasks.iter().map(home).map(|home| home.unwrap_or(CONTROL_HOME));
        self.homes = homes.collect();
        // A worker without any task would end, which the host takes for a fault.
        let mut has_task = vec![false; worker_count as usize];
        for home in &self.homes {
            has_task[*home as usize] = true;
        }
        for (worker_idx, _) in (0u32..).zip(has_task).filter(|(_, has_task)| !has_task) {
            let name = format!("idle worker {worker_idx}");
            self.push(Task::new(Opcode::Empty), BEGIN, EventId::NONE, name);
            self.homes.push(worker_idx);
        }
    }
}

/// Name of a byte of a tensor.
fn named(tensor: TensorIdx, byte: u64) -> u64 {
    ((u64::from(tensor.0) + 1) << TENSOR_SHIFT) + byte
}

/// The index of the tensor that a weight name means, and the byte in it; none for a reference that
/// is no such name. The inverse of `named`.
pub fn named_place(name: u64) -> Option<(usize, u64)> {
    let index = (name >> TENSOR_SHIFT).checked_sub(1)?;
    Some((index as usize, name & ((1 << TENSOR_SHIFT) - 1)))
}

/// Rows `from` to `to` of a matrix.
fn rows_of(matrix: &Matrix, from: u32, to: u32, row_bytes: u64) -> Segment {
    let bias_byte = u64::from(from) * size_of::<f32>() as u64;
    Segment {
        weights: named(matrix.weight, u64::from(from) * row_bytes),
        bias: matrix.bias.map_or(0, |bias| named(bias, bias_byte)),
        row_count: to - from,
        out_first: matrix.out_first + from,
    }
}

#[cfg(test)]
mod tests;
