//! Arguments of linear tasks.

use super::{ANNOUNCED, Opcode, Task, WeightFormat};
use crate::limits::SEGMENT_COUNT_MAX;

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

impl TokenRows {
    /// How many that are in a step of so many tokens and rows of logits.
    #[inline]
    pub const fn count(self, [tokens, logits]: [u32; 2]) -> u32 {
        match self {
            TokenRows::All => tokens,
            TokenRows::Logits => logits,
        }
    }
}

/// Which tokens a linear task with these flags processes.
const fn token_rows(flags: u16) -> TokenRows {
    if flags >> 4 & 1 == 0 { TokenRows::All } else { TokenRows::Logits }
}

impl Task {
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
}
