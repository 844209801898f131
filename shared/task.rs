//! The task record: one tile of one operator, 128 bytes.
//!
//! A task waits for at most one event and signals at most one. What its op needs is packed into
//! words and references by the `…Args` types here; the model crate packs, the device unpacks.
//! References are byte addresses in the device's memory for weights, and byte offsets in the
//! device's heap for everything a step computes.

use crate::blocks::BlockShape;
use crate::event::EventId;
use crate::limits::SEGMENT_COUNT_MAX;

/// What a task does; selects the op in `device/ops`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Opcode {
    /// Nothing; measures the cost of a stage.
    Empty = 0,
    /// Decides which tokens the step processes.
    Admit = 1,
    /// Looks up the embeddings of the step's tokens.
    Embed = 2,
    /// Multiplies rows of weight matrices by the step's activations.
    Linear = 3,
    /// Appends to the KV cache and attends over it, for one KV head.
    Attention = 4,
    /// Chooses next tokens from logits and publishes them.
    Sample = 5,
}

impl Opcode {
    /// The opcode stored as `raw`.
    #[inline]
    pub const fn from_raw(raw: u16) -> Option<Opcode> {
        Some(match raw {
            0 => Opcode::Empty,
            1 => Opcode::Admit,
            2 => Opcode::Embed,
            3 => Opcode::Linear,
            4 => Opcode::Attention,
            5 => Opcode::Sample,
            _ => return None,
        })
    }

    /// Name for traces and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Opcode::Empty => "empty",
            Opcode::Admit => "admit",
            Opcode::Embed => "embed",
            Opcode::Linear => "linear",
            Opcode::Attention => "attention",
            Opcode::Sample => "sample",
        }
    }
}

/// How the values of a weight matrix are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum WeightFormat {
    /// IEEE binary32.
    F32 = 0,
    /// IEEE binary16.
    F16 = 1,
    /// The upper half of a binary32.
    Bf16 = 2,
    /// Integers of 8 bits, with a scale for each row's 32 columns; see `blocks.rs`.
    Q8 = 3,
    /// Integers of 4 bits, likewise.
    Q4 = 4,
    /// Binary8 with 4 bits of exponent (E4M3), with a scale for each 128 columns of 128 rows; see
    /// `blocks.rs`.
    Fp8 = 5,
}

impl WeightFormat {
    /// Bytes of one value, rounded up.
    #[inline]
    pub const fn value_bytes(self) -> u64 {
        match self {
            WeightFormat::F32 => 4,
            WeightFormat::F16 | WeightFormat::Bf16 => 2,
            WeightFormat::Q8 | WeightFormat::Q4 | WeightFormat::Fp8 => 1,
        }
    }

    /// Whether scales belong to the values: rows then lie in strips of blocks (`blocks.rs`).
    #[inline]
    pub const fn is_blocked(self) -> bool {
        matches!(self, WeightFormat::Q8 | WeightFormat::Q4 | WeightFormat::Fp8)
    }

    /// Bytes of a row of `in_dim` values with its scales.
    #[inline]
    pub const fn row_bytes(self, in_dim: u32) -> u64 {
        match BlockShape::of(self) {
            Some(shape) => shape.row_bytes(in_dim),
            None => in_dim as u64 * self.value_bytes(),
        }
    }

    #[inline]
    const fn from_raw(raw: u16) -> WeightFormat {
        match raw {
            0 => WeightFormat::F32,
            1 => WeightFormat::F16,
            2 => WeightFormat::Bf16,
            3 => WeightFormat::Q8,
            4 => WeightFormat::Q4,
            _ => WeightFormat::Fp8,
        }
    }
}

/// How precisely a linear task multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Precision {
    /// Inputs as they are: f32, or integers of 24 bits where weights are integers.
    Exact = 0,
    /// Inputs rounded to bf16, or to integers of 16 bits where weights are integers.
    Bf16 = 1,
}

/// What a linear task computes before it multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Prologue {
    /// Nothing: the input rows are used as they are.
    None = 0,
    /// RMSNorm of the input rows.
    RmsNorm = 1,
    /// The attention splits of each head are merged into the input rows.
    MergeSplits = 2,
}

/// What a linear task does with its products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Epilogue {
    /// Adds the bias, if any, and stores.
    Store = 0,
    /// Adds the bias, if any, and the value in the output; stores the sum.
    AddResidual = 1,
    /// `silu(segment 0) * segment 1`, each with its bias, if any.
    SiluMul = 2,
    /// As `Store`, of logits; leaves the best of the task's in `HeapPlan::bests` too.
    StoreBest = 3,
}

/// Which tokens of the step a linear task processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum TokenRows {
    /// All; row `i` of the output belongs to token `i`.
    All = 0,
    /// Those whose logits are wanted; row `i` of the output is row `i` of the logits.
    Logits = 1,
}

/// Flag of tasks that are announced, see `Task::is_announced`.
const ANNOUNCED: u16 = 1 << 15;

/// Which tokens a linear task with these flags processes.
const fn token_rows(flags: u16) -> TokenRows {
    if flags >> 4 & 1 == 0 { TokenRows::All } else { TokenRows::Logits }
}

/// One tile task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C, align(128))]
pub struct Task {
    /// An `Opcode`.
    pub opcode: u16,
    /// Small choices of the op, packed by its `…Args` type.
    pub flags: u16,
    /// Event to wait for.
    pub wait_event: EventId,
    /// Arrivals of that event in each step.
    pub wait_count: u32,
    /// Event to signal once.
    pub signal_event: EventId,
    /// Op-specific words.
    pub words: [u32; 10],
    /// Op-specific references.
    pub refs: [u64; 9],
}

const _: () = assert!(size_of::<Task>() == 128 && align_of::<Task>() == 128);

impl Task {
    /// A task of `opcode` without arguments and events.
    pub const fn new(opcode: Opcode) -> Task {
        Task {
            opcode: opcode as u16,
            flags: 0,
            wait_event: EventId::NONE,
            wait_count: 0,
            signal_event: EventId::NONE,
            words: [0; 10],
            refs: [0; 9],
        }
    }
}

impl Task {
    /// Whether the task is announced: where values are stamped (`stamp.rs`), it signals as soon as
    /// nothing can keep it from storing them, and whoever waits for it looks at each value's stamp.
    #[inline]
    pub const fn is_announced(&self) -> bool {
        self.flags & ANNOUNCED != 0
    }

    /// Whether the op reads nothing but stamped values of what other tasks of the step have left, so
    /// that it may begin once the step has, and wait for its input itself.
    #[inline]
    pub const fn waits_itself(&self) -> bool {
        match Opcode::from_raw(self.opcode) {
            Some(Opcode::Attention) => true,
            Some(Opcode::Linear) => true,
            _ => false,
        }
    }

    /// Segments of a linear task that have rows; they come first.
    #[inline]
    pub const fn segment_count(&self) -> usize {
        (self.words[4] != 0) as usize
            + (self.words[6] != 0) as usize
            + (self.words[8] != 0) as usize
    }

    /// Segment `idx` of a linear task, without the others: on a GPU they are read where they are.
    #[inline]
    pub const fn segment(&self, idx: usize) -> Segment {
        Segment {
            weights: self.refs[LINEAR_WEIGHTS[idx]],
            bias: self.refs[4 + 2 * idx],
            row_count: self.words[4 + 2 * idx],
            out_first: self.words[5 + 2 * idx],
        }
    }
}

/// Rows of one weight matrix that a linear task multiplies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Segment {
    /// Address of the first row, `[row_count, in_dim]` in the task's weight format; of weights that are
    /// packed (`packed.rs`, `blocks.rs`), that of the task's rows in the first segment.
    pub weights: u64,
    /// Address of the rows' biases, `[row_count] f32`; 0 for none.
    pub bias: u64,
    /// Number of rows; 0 for a segment that is not used.
    pub row_count: u32,
    /// Column of the output row where the first product goes.
    pub out_first: u32,
}

impl Segment {
    /// One that is not used.
    pub const NONE: Segment = Segment { weights: 0, bias: 0, row_count: 0, out_first: 0 };
}

/// Which of a linear task's references are weights, by segment.
pub const LINEAR_WEIGHTS: [usize; SEGMENT_COUNT_MAX] = [3, 5, 7];

/// See `LinearArgs::residual_age`.
pub const RESIDUAL_AGE_MAX: u32 = 15;

/// Arguments of `Opcode::Linear`.
///
/// Shapes: input rows `[tokens, in_dim] f32`, `x_stride` values apart; output rows `y_stride` values
/// apart. With `Prologue::MergeSplits`, `x` is the splits region and `x_stride` is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LinearArgs {
    /// Computed before the product.
    pub prologue: Prologue,
    /// Computed after it.
    pub epilogue: Epilogue,
    /// Tokens it is computed for.
    pub token_rows: TokenRows,
    /// Format of all segments.
    pub format: WeightFormat,
    /// Precision of the inputs.
    pub precision: Precision,
    /// With `Epilogue::AddResidual`: the event of the stage that has left what is added to, counted
    /// back from the event that the task waits for, up to `RESIDUAL_AGE_MAX`; else 0.
    pub residual_age: u32,
    /// See `Task::is_announced`.
    pub is_announced: bool,
    /// With `Epilogue::StoreBest`, which has no third segment: the task's entry of each row of bests;
    /// else 0.
    pub best_idx: u32,
    /// Values in an input row; a multiple of 8.
    pub in_dim: u32,
    /// Values from one input row to the next.
    pub x_stride: u32,
    /// Values from one output row to the next.
    pub y_stride: u32,
    /// Tasks with the same key share a prologue: a worker that has its result need not repeat it.
    pub prologue_key: u32,
    /// Heap offset of the input.
    pub x: u64,
    /// Heap offset of the output.
    pub y: u64,
    /// Address of the norm's weight, `[in_dim] f32`; 0 unless the prologue is `RmsNorm`.
    pub norm_weight: u64,
    /// The rows.
    pub segments: [Segment; SEGMENT_COUNT_MAX],
}

impl LinearArgs {
    /// The task record with these arguments and no events.
    pub const fn pack(&self) -> Task {
        let mut task = Task::new(Opcode::Linear);
        task.flags = self.prologue as u16
            | (self.epilogue as u16) << 2
            | (self.token_rows as u16) << 4
            | (self.format as u16) << 5
            | (self.precision as u16) << 8
            | (self.residual_age as u16 & RESIDUAL_AGE_MAX as u16) << 9
            | if self.is_announced { ANNOUNCED } else { 0 };
        let [a, b, c] = self.segments;
        task.words = [
            self.in_dim,
            self.x_stride,
            self.y_stride,
            self.prologue_key,
            a.row_count,
            a.out_first,
            b.row_count,
            b.out_first,
            c.row_count,
            if self.leaves_best() { self.best_idx } else { c.out_first },
        ];
        task.refs = [
            self.x,
            self.y,
            self.norm_weight,
            a.weights,
            a.bias,
            b.weights,
            b.bias,
            c.weights,
            c.bias,
        ];
        task
    }

    /// The arguments of a linear task.
    #[inline]
    pub const fn unpack(task: &Task) -> LinearArgs {
        let (w, r) = (&task.words, &task.refs);
        let leaves_best = task.flags >> 2 & 3 == Epilogue::StoreBest as u16;
        LinearArgs {
            prologue: match task.flags & 3 {
                0 => Prologue::None,
                1 => Prologue::RmsNorm,
                _ => Prologue::MergeSplits,
            },
            epilogue: match task.flags >> 2 & 3 {
                0 => Epilogue::Store,
                1 => Epilogue::AddResidual,
                2 => Epilogue::SiluMul,
                _ => Epilogue::StoreBest,
            },
            token_rows: token_rows(task.flags),
            format: WeightFormat::from_raw(task.flags >> 5 & 7),
            precision: if task.flags >> 8 & 1 == 0 { Precision::Exact } else { Precision::Bf16 },
            residual_age: task.flags as u32 >> 9 & RESIDUAL_AGE_MAX,
            is_announced: task.is_announced(),
            best_idx: if leaves_best { w[9] } else { 0 },
            in_dim: w[0],
            x_stride: w[1],
            y_stride: w[2],
            prologue_key: w[3],
            x: r[0],
            y: r[1],
            norm_weight: r[2],
            segments: [
                task.segment(0),
                task.segment(1),
                if leaves_best { Segment::NONE } else { task.segment(2) },
            ],
        }
    }

    /// Whether the best of the task's products is left, see `best_idx`.
    #[inline]
    pub const fn leaves_best(&self) -> bool {
        matches!(self.epilogue, Epilogue::StoreBest)
    }

    /// Rows of all segments.
    #[inline]
    pub const fn row_count(&self) -> u32 {
        let [a, b, c] = self.segments;
        a.row_count + b.row_count + c.row_count
    }

    /// Bytes of weights the task reads.
    #[inline]
    pub const fn weight_bytes(&self) -> u64 {
        self.row_count() as u64 * self.format.row_bytes(self.in_dim)
    }
}

/// Arguments of `Opcode::Attention`: one KV head, or a part of its splits.
///
/// The task has the splits `part_idx`, `part_idx + part_count` and so on: it appends the step's keys
/// and values whose positions are in them, and attends to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttentionArgs {
    /// Layer in the KV cache.
    pub layer_idx: u32,
    /// KV head.
    pub kv_head_idx: u32,
    /// Which part of the head's splits.
    pub part_idx: u32,
    /// Parts into which the head's splits are dealt, at most `ATTENTION_SPLIT_MAX`.
    pub part_count: u32,
    /// Heap offset of `[tokens, (head_count + 2 * kv_head_count) * head_dim] f32`: queries, keys,
    /// values.
    pub qkv: u64,
    /// Heap offset of the splits region (`HeapPlan::splits`).
    pub splits: u64,
    /// Address of the query norm's weight, `[head_dim] f32`; 0 for none.
    pub query_norm: u64,
    /// Address of the key norm's weight, `[head_dim] f32`; 0 for none.
    pub key_norm: u64,
    /// See `Task::is_announced`.
    pub is_announced: bool,
}

impl AttentionArgs {
    /// The task record with these arguments and no events.
    pub const fn pack(&self) -> Task {
        let mut task = Task::new(Opcode::Attention);
        task.flags = if self.is_announced { ANNOUNCED } else { 0 };
        task.words[0] = self.layer_idx;
        task.words[1] = self.kv_head_idx;
        task.words[2] = self.part_idx;
        task.words[3] = self.part_count;
        task.refs[0] = self.qkv;
        task.refs[1] = self.splits;
        task.refs[2] = self.query_norm;
        task.refs[3] = self.key_norm;
        task
    }

    /// The arguments of an attention task.
    #[inline]
    pub const fn unpack(task: &Task) -> AttentionArgs {
        AttentionArgs {
            layer_idx: task.words[0],
            kv_head_idx: task.words[1],
            part_idx: task.words[2],
            part_count: task.words[3],
            qkv: task.refs[0],
            splits: task.refs[1],
            query_norm: task.refs[2],
            key_norm: task.refs[3],
            is_announced: task.is_announced(),
        }
    }
}

/// Arguments of `Opcode::Sample`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SampleArgs {
    /// Event of the stage before the head's, `NONE` if nothing computes logits. In a step without logits
    /// the head's tasks read nothing; where others do not wait for events either (`Task::waits_itself`),
    /// it is this task that waits for that stage, so that whatever comes after it comes after all.
    pub also_event: EventId,
    /// Arrivals of that event in each step.
    pub also_count: u32,
}

impl SampleArgs {
    /// The task record with these arguments and no events.
    pub const fn pack(&self) -> Task {
        let mut task = Task::new(Opcode::Sample);
        task.words[0] = self.also_event.0;
        task.words[1] = self.also_count;
        task
    }

    /// The arguments of a sampling task.
    #[inline]
    pub const fn unpack(task: &Task) -> SampleArgs {
        SampleArgs { also_event: EventId(task.words[0]), also_count: task.words[1] }
    }
}

/// Arguments of `Opcode::Embed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EmbedArgs {
    /// Format of the table.
    pub format: WeightFormat,
    /// Address of the table, `[vocab_size, hidden_dim]`.
    pub table: u64,
    /// Heap offset of the output, `[tokens, hidden_dim] f32`.
    pub hidden: u64,
}

impl EmbedArgs {
    /// The task record with these arguments and no events.
    pub const fn pack(&self) -> Task {
        let mut task = Task::new(Opcode::Embed);
        task.flags = self.format as u16;
        task.refs[0] = self.table;
        task.refs[1] = self.hidden;
        task
    }

    /// The arguments of an embedding task.
    #[inline]
    pub const fn unpack(task: &Task) -> EmbedArgs {
        EmbedArgs {
            format: WeightFormat::from_raw(task.flags),
            table: task.refs[0],
            hidden: task.refs[1],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_args_survive_packing() {
        let segment = |n: u32| Segment {
            weights: n as u64 + 1,
            bias: n as u64 + 2,
            row_count: n + 3,
            out_first: n + 4,
        };
        for prologue in [Prologue::None, Prologue::RmsNorm, Prologue::MergeSplits] {
            for epilogue in
                [Epilogue::Store, Epilogue::AddResidual, Epilogue::SiluMul, Epilogue::StoreBest]
            {
                let is_best = epilogue == Epilogue::StoreBest;
                for token_rows in [TokenRows::All, TokenRows::Logits] {
                    for format in (0..6).map(WeightFormat::from_raw) {
                        let args = LinearArgs {
                            prologue,
                            epilogue,
                            token_rows,
                            format,
                            precision: Precision::Bf16,
                            residual_age: 9,
                            is_announced: format == WeightFormat::Fp8,
                            best_idx: if is_best { 11 } else { 0 },
                            in_dim: 72,
                            x_stride: 73,
                            y_stride: 74,
                            prologue_key: 75,
                            x: 1 << 40,
                            y: 2 << 40,
                            norm_weight: 3 << 40,
                            segments: [
                                segment(10),
                                segment(20),
                                if is_best { Segment::NONE } else { segment(30) },
                            ],
                        };
                        assert_eq!(LinearArgs::unpack(&args.pack()), args);
                    }
                }
            }
        }
    }

    #[test]
    fn other_args_survive_packing() {
        let attention = AttentionArgs {
            layer_idx: 1,
            kv_head_idx: 2,
            part_idx: 5,
            part_count: 7,
            qkv: 5 << 33,
            splits: 6 << 33,
            query_norm: 7 << 33,
            key_norm: 8 << 33,
            is_announced: true,
        };
        assert_eq!(AttentionArgs::unpack(&attention.pack()), attention);
        let embed = EmbedArgs { format: WeightFormat::F16, table: 1 << 50, hidden: 64 };
        assert_eq!(EmbedArgs::unpack(&embed.pack()), embed);
        let sample = SampleArgs { also_event: EventId(12), also_count: 13 };
        assert_eq!(SampleArgs::unpack(&sample.pack()), sample);
    }
}
