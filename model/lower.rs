//! Lowering: a model's operators become tile tasks with events, dealt to the workers' queues.
//!
//! Weights are named by index into `Program::tensors`, with a byte offset: `(index + 1) << 40 |
//! offset`. The host replaces the names by addresses when it has loaded the weights.

use tilert_mk_shared::event::EventId;
use tilert_mk_shared::kv::KvGeometry;
use tilert_mk_shared::program::{Dims, HeapPlan};
use tilert_mk_shared::queue::QueueSpan;
use tilert_mk_shared::task::{
    AttentionArgs, EmbedArgs, Epilogue, LinearArgs, Opcode, Prologue, Segment, Task, TokenRows,
    WeightFormat,
};

use crate::config::ModelConfig;

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
    /// Format of the matrices.
    pub format: WeightFormat,
    /// Weight bytes of a linear task, about.
    pub tile_bytes: u64,
}

/// A tensor the program reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its shape, outermost first.
    pub shape: Vec<u64>,
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
    /// Format of all matrices.
    pub format: WeightFormat,
    /// Shared sizes.
    pub dims: Dims,
    /// The heap.
    pub plan: HeapPlan,
    /// Dependent stages of a step.
    pub stage_count: u32,
}

/// Bits of a weight name below the tensor's index.
pub const TENSOR_SHIFT: u32 = 40;

struct Builder<'a> {
    config: &'a ModelConfig,
    options: LowerOptions,
    tasks: Vec<Task>,
    names: Vec<String>,
    homes: Vec<u32>,
    event_arrivals: Vec<u32>,
    tensors: Vec<Tensor>,
    stage_count: u32,
    prologue_count: u32,
}

/// A matrix and, if it has one, its bias.
struct Matrix {
    weights: u64,
    bias: u64,
    rows: u32,
    out_first: u32,
}

/// Lowers a dense decoder.
///
/// Errors: a context that the model does not have.
pub fn lower(config: &ModelConfig, options: &LowerOptions) -> Result<Program, LowerError> {
    let limit = config.sliding_window.unwrap_or(u32::MAX).min(config.position_max);
    if options.context_max > limit {
        return Err(LowerError::Context { wanted: options.context_max, limit });
    }
    let mut dims = dims(config, options);
    // Events and scratch, whose sizes only the tasks tell, follow every region that a task names.
    let draft = HeapPlan::new(&dims, options.worker_count, 0);
    let builder = Builder::new(config, *options).build(&draft);
    dims.task_rows_max = builder
        .tasks
        .iter()
        .filter(|task| task.opcode == Opcode::Linear as u16)
        .map(|task| LinearArgs::unpack(task).row_count())
        .max()
        .unwrap_or(1);
    let event_count = builder.event_arrivals.len() as u32;
    let plan = HeapPlan::new(&dims, options.worker_count, event_count);
    Ok(builder.finish(dims, plan))
}

fn dims(config: &ModelConfig, options: &LowerOptions) -> Dims {
    Dims {
        hidden_dim: config.hidden_dim,
        intermediate_dim: config.intermediate_dim,
        head_count: config.head_count,
        vocab_size: config.vocab_size,
        rms_norm_eps: config.rms_norm_eps,
        attention_scale: 1.0 / (config.head_dim as f32).sqrt(),
        step_tokens_max: options.step_tokens_max,
        task_rows_max: 1,
        prologue_dim_max: config.hidden_dim.max(config.head_count * config.head_dim),
        reserved: 0,
        kv: KvGeometry {
            layer_count: config.layer_count,
            slot_count: options.slot_count,
            kv_head_count: config.kv_head_count,
            context_max: options.context_max,
            head_dim: config.head_dim,
            reserved: 0,
        },
    }
}

impl<'a> Builder<'a> {
    fn new(config: &'a ModelConfig, options: LowerOptions) -> Self {
        Builder {
            config,
            options,
            tasks: Vec::new(),
            names: Vec::new(),
            homes: Vec::new(),
            event_arrivals: Vec::new(),
            tensors: Vec::new(),
            stage_count: 0,
            prologue_count: 0,
        }
    }

    /// Names a tensor; each is asked for once.
    fn tensor(&mut self, name: String, shape: &[u64]) -> u64 {
        self.tensors.push(Tensor { name, shape: shape.to_vec() });
        (self.tensors.len() as u64) << TENSOR_SHIFT
    }

    fn event(&mut self) -> EventId {
        self.event_arrivals.push(0);
        EventId(self.event_arrivals.len() as u32 - 1)
    }

    /// Adds a task that waits for all of `wait` and signals `signal`.
    fn push(&mut self, mut task: Task, wait: EventId, signal: EventId, home: u32, name: String) {
        task.wait_event = wait;
        task.wait_count = self.event_arrivals[wait.0 as usize];
        task.signal_event = signal;
        self.event_arrivals[signal.0 as usize] += 1;
        self.tasks.push(task);
        self.homes.push(home);
        self.names.push(name);
    }

    fn matrix(&mut self, name: &str, rows: u32, columns: u32, has_bias: bool) -> Matrix {
        let shape = [u64::from(rows), u64::from(columns)];
        let weights = self.tensor(format!("{name}.weight"), &shape);
        let bias = if has_bias { self.tensor(format!("{name}.bias"), &shape[..1]) } else { 0 };
        Matrix { weights, bias, rows, out_first: 0 }
    }

    /// One stage of linear tasks: each takes the same share of the rows of every matrix.
    fn linear(&mut self, args: LinearArgs, parts: &[Matrix], wait: EventId, name: &str) -> EventId {
        let signal = self.event();
        let row_bytes = u64::from(args.in_dim) * args.format.value_bytes();
        let rows = parts.iter().map(|part| part.rows).max().unwrap_or(1);
        let all_bytes = parts.iter().map(|part| u64::from(part.rows)).sum::<u64>() * row_bytes;
        let tiles = all_bytes.div_ceil(self.options.tile_bytes).max(u64::from(rows.div_ceil(512)));
        let tile_count = (tiles as u32).next_multiple_of(self.options.worker_count).min(rows);
        self.prologue_count += 1;
        for tile in 0..tile_count {
            let mut args = LinearArgs { prologue_key: self.prologue_count, ..args };
            for (segment, part) in args.segments.iter_mut().zip(parts) {
                let at = |tile: u32| {
                    (u64::from(part.rows) * u64::from(tile) / u64::from(tile_count)) as u32
                };
                let first = at(tile);
                if at(tile + 1) == first {
                    continue;
                }
                *segment = Segment {
                    weights: part.weights + u64::from(first) * row_bytes,
                    bias: if part.bias == 0 { 0 } else { part.bias + u64::from(first) * 4 },
                    row_count: at(tile + 1) - first,
                    out_first: part.out_first + first,
                };
            }
            let home = tile * self.options.worker_count / tile_count;
            self.push(args.pack(), wait, signal, home, format!("{name} tile {tile}"));
        }
        self.stage_count += 1;
        signal
    }

    fn build(mut self, plan: &HeapPlan) -> Self {
        let c = self.config;
        let (hidden, vocab) = (c.hidden_dim, c.vocab_size);
        let shape = [u64::from(vocab), u64::from(hidden)];
        let table = self.tensor("model.embed_tokens.weight".into(), &shape);
        let (end, begin, embedded) = (self.event(), self.event(), self.event());
        self.push(Task::new(Opcode::Admit), end, begin, 0, "admit".into());
        let embed = EmbedArgs { format: self.options.format, table, hidden: plan.hidden };
        self.push(embed.pack(), begin, embedded, 0, "embed".into());
        let mut ready = embedded;
        for layer_idx in 0..c.layer_count {
            ready = self.layer(plan, layer_idx, ready);
        }
        let head = if c.tied_head {
            Matrix { weights: table, bias: 0, rows: vocab, out_first: 0 }
        } else {
            self.matrix("lm_head", vocab, hidden, false)
        };
        let norm = self.tensor("model.norm.weight".into(), &shape[1..]);
        let args = LinearArgs {
            token_rows: TokenRows::Logits,
            ..self.args(Prologue::RmsNorm, Epilogue::Store, hidden, plan.hidden, hidden, norm)
        };
        let args = LinearArgs { y: plan.logits, y_stride: vocab, ..args };
        let logits = self.linear(args, &[head], ready, "head");
        self.push(Task::new(Opcode::Sample), logits, end, 0, "sample".into());
        self.stage_count += 3;
        // `Admit` was pushed before its event had a signaller.
        self.tasks[0].wait_count = 1;
        self
    }

    fn args(
        &self,
        prologue: Prologue,
        epilogue: Epilogue,
        in_dim: u32,
        x: u64,
        x_stride: u32,
        norm_weight: u64,
    ) -> LinearArgs {
        LinearArgs {
            prologue,
            epilogue,
            token_rows: TokenRows::All,
            format: self.options.format,
            in_dim,
            x_stride,
            y_stride: 0,
            prologue_key: 0,
            x,
            y: 0,
            norm_weight,
            segments: Default::default(),
        }
    }

    fn layer(&mut self, plan: &HeapPlan, layer_idx: u32, ready: EventId) -> EventId {
        let c = self.config;
        let base = format!("model.layers.{layer_idx}");
        let (hidden, inner) = (c.hidden_dim, c.intermediate_dim);
        let (query, kv) = (c.head_count * c.head_dim, c.kv_head_count * c.head_dim);
        let norm = self.tensor(format!("{base}.input_layernorm.weight"), &[hidden.into()]);
        let mut parts = [
            self.matrix(&format!("{base}.self_attn.q_proj"), query, hidden, c.qkv_bias),
            self.matrix(&format!("{base}.self_attn.k_proj"), kv, hidden, c.qkv_bias),
            self.matrix(&format!("{base}.self_attn.v_proj"), kv, hidden, c.qkv_bias),
        ];
        (parts[1].out_first, parts[2].out_first) = (query, query + kv);
        let args = self.args(Prologue::RmsNorm, Epilogue::Store, hidden, plan.hidden, hidden, norm);
        let args = LinearArgs { y: plan.qkv, y_stride: query + 2 * kv, ..args };
        let projected = self.linear(args, &parts, ready, &format!("layer {layer_idx} qkv"));
        let attended = self.attention(plan, layer_idx, projected);

        let o = self.matrix(&format!("{base}.self_attn.o_proj"), hidden, query, c.output_bias);
        let args =
            self.args(Prologue::MergeSplits, Epilogue::AddResidual, query, plan.splits, query, 0);
        let args = LinearArgs { y: plan.hidden, y_stride: hidden, ..args };
        let mixed = self.linear(args, &[o], attended, &format!("layer {layer_idx} output"));

        let name = format!("{base}.post_attention_layernorm.weight");
        let norm = self.tensor(name, &[hidden.into()]);
        let parts = [
            self.matrix(&format!("{base}.mlp.gate_proj"), inner, hidden, c.mlp_bias),
            self.matrix(&format!("{base}.mlp.up_proj"), inner, hidden, c.mlp_bias),
        ];
        let args =
            self.args(Prologue::RmsNorm, Epilogue::SiluMul, hidden, plan.hidden, hidden, norm);
        let args = LinearArgs { y: plan.intermediate, y_stride: inner, ..args };
        let gated = self.linear(args, &parts, mixed, &format!("layer {layer_idx} gate-up"));

        let down = self.matrix(&format!("{base}.mlp.down_proj"), hidden, inner, c.mlp_bias);
        let args =
            self.args(Prologue::None, Epilogue::AddResidual, inner, plan.intermediate, inner, 0);
        let args = LinearArgs { y: plan.hidden, y_stride: hidden, ..args };
        self.linear(args, &[down], gated, &format!("layer {layer_idx} down"))
    }

    fn attention(&mut self, plan: &HeapPlan, layer_idx: u32, wait: EventId) -> EventId {
        let c = self.config;
        let signal = self.event();
        let shape = [u64::from(c.head_dim)];
        let norm = |builder: &mut Self, which: &str| {
            let name = format!("model.layers.{layer_idx}.self_attn.{which}_norm.weight");
            if c.qk_norm { builder.tensor(name, &shape) } else { 0 }
        };
        let (query_norm, key_norm) = (norm(self, "q"), norm(self, "k"));
        for kv_head_idx in 0..c.kv_head_count {
            let args = AttentionArgs {
                layer_idx,
                kv_head_idx,
                qkv: plan.qkv,
                splits: plan.splits,
                query_norm,
                key_norm,
            };
            let home = kv_head_idx * self.options.worker_count / c.kv_head_count;
            let name = format!("layer {layer_idx} attention head {kv_head_idx}");
            self.push(args.pack(), wait, signal, home, name);
        }
        self.stage_count += 1;
        signal
    }

    fn finish(self, dims: Dims, plan: HeapPlan) -> Program {
        let (mut queue_spans, mut queue_entries) = (Vec::new(), Vec::new());
        for worker_idx in 0..=self.options.worker_count {
            let first = queue_entries.len() as u32;
            let own = (0..self.tasks.len()).filter(|task| self.homes[*task] == worker_idx);
            queue_entries.extend(own.map(|task| task as u32));
            let count = queue_entries.len() as u32 - first;
            queue_spans.push(QueueSpan { first, count });
        }
        Program {
            tasks: self.tasks,
            names: self.names,
            event_arrivals: self.event_arrivals,
            begin_event: EventId(1),
            tensors: self.tensors,
            queue_spans,
            queue_entries,
            format: self.options.format,
            dims,
            plan,
            stage_count: self.stage_count,
        }
    }
}
