//! The machine layer: the only place that touches raw memory, counters and vector arithmetic.
//!
//! `Machine` is what a worker can do. A worker is `lane_count` lanes that run the same code in step:
//! one thread of the CPU machine is one lane, the computing warps of a GPU's block are 256. Methods
//! marked *collective* are called by all lanes with the same arguments; they divide the work and
//! leave its result visible to every lane, unless they say otherwise.

pub mod best;
pub mod memory;

#[cfg(not(target_arch = "nvptx64"))]
pub mod cpu;
#[cfg(not(target_arch = "nvptx64"))]
pub use cpu::counter::{CursorCounter, EventCounter, HostCounter, fence_release};

#[cfg(target_arch = "nvptx64")]
pub mod nvptx;
#[cfg(target_arch = "nvptx64")]
pub use nvptx::counter::{CursorCounter, EventCounter, HostCounter, fence_release};

use crate::worker::{Claim, Stopped, Worker};
use core::ops::Deref;
use memory::Span;
use tilert_mk_shared::limits::SPLIT_ROWS;
use tilert_mk_shared::program::{Dims, ProgramHeader};
use tilert_mk_shared::sequence::{StepState, StepToken};
use tilert_mk_shared::task::{Opcode, Task, WeightFormat};

/// Rows of f32 values, `stride` apart.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// The values.
    pub values: Span<f32>,
    /// Values from one row to the next.
    pub stride: usize,
}

impl Rows {
    /// The first `len` values of row `row`.
    #[inline(always)]
    pub fn row(&self, row: usize, len: usize) -> Span<f32> {
        self.values.sub(row * self.stride, len)
    }
}

/// Attention of one token by one task: queries of heads that share keys, against the positions up to
/// the token's that `shared/kv.rs` deals to the task's splits.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Values of a head.
    pub head_dim: usize,
    /// Query heads.
    pub query_count: usize,
    /// `[query_count, head_dim]`, before norm and rotation.
    pub queries: Span<f32>,
    /// The token's key, `[head_dim]`, likewise.
    pub key: Span<f32>,
    /// The token's value, `[head_dim]`.
    pub value: Span<f32>,
    /// Weight of the queries' norm, `[head_dim]`; empty for no norm.
    pub query_norm: Span<f32>,
    /// Weight of the key's norm, likewise.
    pub key_norm: Span<f32>,
    /// Of both norms.
    pub eps: f32,
    /// Cosines of the position, `[head_dim / 2]`, for half-split RoPE.
    pub cos: Span<f32>,
    /// Its sines, likewise.
    pub sin: Span<f32>,
    /// Keys of the sequence, `[context_max, head_dim]`, rotated. The token's is appended if its
    /// position is in one of the task's splits.
    pub keys: Span<f32>,
    /// Values of the sequence, likewise.
    pub values: Span<f32>,
    /// The token's position.
    pub position: u32,
    /// Multiplies scores.
    pub scale: f32,
    /// The task's first split.
    pub part_idx: u32,
    /// From one of its splits to the next.
    pub part_count: u32,
    /// For each query and split `[head_dim]` weighted values, the largest score, the sum of weights:
    /// `[query_count, SPLIT_ROWS, split_values]`.
    pub out: Span<f32>,
    /// See `out`.
    pub split_values: usize,
    /// Room for rotated queries in this worker's share of the heap.
    pub scratch: Span<f32>,
}

impl Attention {
    /// Index in `out` of what belongs to a query and a split.
    #[inline(always)]
    pub fn out_idx(&self, query: u32, split: u32) -> usize {
        (query * SPLIT_ROWS + split) as usize * self.split_values
    }
}

/// The part of a task in merging the splits of its KV head, for all tokens of the step.
#[derive(Clone, Copy, Debug)]
pub struct Join<F> {
    /// Tokens.
    pub count: usize,
    /// Splits of a token: `F(token)`; 0 to leave them alone.
    pub split_count: F,
    /// Of the values that a token's queries have together, those that the task merges: whole fours; the
    /// end last.
    pub columns: [u32; 2],
    /// Values of a head.
    pub head_dim: u32,
    /// From one split to the next.
    pub split_values: u32,
    /// Address of the first token's splits of these queries, as in `Attention::out`. After the last split
    /// a row has what they are together: the merged values, 0 for a score and 1 for a sum of weights.
    pub splits: u64,
    /// Bytes to the next token's.
    pub pitch: u32,
}

/// Some products of a linear task, and what becomes of them.
#[derive(Clone, Copy)]
pub struct Finish {
    /// Tokens.
    pub count: usize,
    /// Rows of the task: the first, and how many.
    pub first: usize,
    /// See `first`.
    pub len: usize,
    /// Added to the products, unless it is empty.
    pub bias: Span<f32>,
    /// Whether `silu` of these products is multiplied by as many that follow them.
    pub is_gated: bool,
    /// Added to the products that follow, unless it is empty.
    pub up_bias: Span<f32>,
    /// Whether the result is added to what is there.
    pub adds: bool,
    /// See `LinearArgs::residual_age`.
    pub residual_age: u32,
    /// Values of an input row if it is normed, else 0; see `Machine::rms_norm`.
    pub norm_dim: u32,
    /// Whether the best of each token's results is left, see `BestPlace`.
    pub leaves_best: bool,
}

/// Where the best of a token's results goes (`best.rs`).
#[derive(Clone, Copy)]
pub struct BestPlace {
    /// One word.
    pub word: Span<u64>,
    /// Index of the first result.
    pub first: u32,
}

/// What a worker can do.
pub trait Machine {
    /// Whether other workers may take tasks from this worker's queue.
    const IS_STEALABLE: bool;

    /// Whether values are stamped (`shared/stamp.rs`): the machine looks at the stamps of all values
    /// of the step that it reads for `rms_norm`, `gather`, `merge`, `attend`, and of what `store` adds
    /// to, and waits for each; and it stamps what `store`, `attend` and `widen` leave.
    const HAS_STAMPS: bool = false;

    /// Whether other devices may take part in the program (`ProgramHeader::pe_count`): what `store`,
    /// `attend`, `join`, `widen` and `pass_on` leave is then in every PE's heap, but logits and bests,
    /// which are in the first one's alone.
    const HAS_PEERS: bool = false;

    /// Whether attention tasks merge splits: with stamps and in a step where a token has more than
    /// `Dims::late_splits_max`.
    const JOINS: bool = false;

    /// Whether tokens of a sequence go to `attend_run` together, not each to `attend`; without stamps alone.
    const ATTENDS_RUNS: bool = false;

    /// See `norm_ahead`.
    type NormAhead: Copy + Default;

    /// This lane's index among its worker's.
    fn lane_idx(&self) -> usize;

    /// Lanes of a worker.
    fn lane_count(&self) -> usize;

    /// The program's header, which was at `bound` when the worker began: on a GPU a copy near.
    #[inline(always)]
    fn header<'a>(&self, bound: &'a ProgramHeader) -> impl Deref<Target = ProgramHeader> + 'a {
        bound
    }

    /// The record of the task that runs: on a GPU a copy near.
    #[inline(always)]
    fn record<'a>(&self, task: &'a Task) -> impl Deref<Target = Task> + 'a {
        task
    }

    /// What leads from an address in this PE's heap to the same place in the heap of `pe`; see
    /// `ProgramHeader::distances`.
    #[inline(always)]
    fn distance(&self, _pe: u32) -> u64 {
        0
    }

    /// Collective: copies the step's description, which is visible to all lanes, to the heaps of the other
    /// PEs; not yet visible there.
    #[inline(always)]
    fn put_step(&self, _step: Span<StepState>) {}

    /// Waits for all lanes of the worker; orders their accesses before and after.
    fn sync(&self);

    /// Collective: runs `job` on the leading lane and gives its result to all. What the job stored
    /// is visible to all lanes.
    fn lead(&self, job: impl FnOnce() -> u32) -> u32;

    /// Collective: brings the description of step `epoch` near, once a step, when its first input is ready.
    fn keep_step(&self, step: Span<StepState>, epoch: u32);

    /// Collective: the input rows hold the result of this prologue from now on, see
    /// `Progress::prologue`; for machines whose workers are made anew for each op.
    #[inline(always)]
    fn keep_prologue(&self, _prologue: u64) {}

    /// The step's description: what `keep_step` has brought near, or `step` itself.
    fn step(&self, step: Span<StepState>) -> Span<StepState>;

    /// Tokens of the step, and rows of logits.
    #[inline(always)]
    fn step_counts(&self, step: Span<StepState>) -> [u32; 2] {
        let step = step.get(0);
        [step.token_count, step.logit_count]
    }

    /// A token of the step.
    #[inline(always)]
    fn step_token(&self, step: Span<StepState>, idx: usize) -> StepToken {
        step.get(0).tokens[idx]
    }

    /// Nanoseconds on the device's clock.
    fn now_ns(&self) -> u64;

    /// A pause between two polls.
    fn relax(&self);

    /// Gives the core away while there is nothing to do; the more, the longer it has lasted.
    fn idle(&self, looks: u32);

    /// Requests a task's weights, or the first of them, before the worker comes to it.
    fn stage(&self, task: &Task);

    /// Collective: `job(row, column)` for all of `row_count` times `column_count`, in any order;
    /// the results are *not* visible to other lanes until `sync`.
    #[inline(always)]
    fn for_each(&self, row_count: usize, column_count: usize, mut job: impl FnMut(usize, usize)) {
        if self.lane_count() == 1 {
            for row in 0..row_count {
                for column in 0..column_count {
                    job(row, column);
                }
            }
        } else {
            // 32-bit arithmetic: a GPU has no other division.
            let (columns, mut index) = (column_count as u32, self.lane_idx() as u32);
            while index < row_count as u32 * columns {
                let row = if row_count == 1 { 0 } else { index / columns };
                job(row as usize, (index - row * columns) as usize);
                index += self.lane_count() as u32;
            }
        }
    }

    /// Memory for `count` input rows of `dim` values, to be multiplied; `heap` is this worker's share
    /// of the heap.
    fn input_rows(&self, heap: Span<f32>, count: usize, dim: usize) -> Rows;

    /// Memory for `count` rows of `len` products; `heap` is this worker's share of the heap.
    fn output_rows(&self, heap: Span<f32>, count: usize, len: usize) -> Rows;

    /// Collective: `from` as input of `multiply` for a linear task, copied to `to` if the machine
    /// wants it near or in another form. `is_kept`: an earlier call with the same arguments has done
    /// so, and nobody has used `to`.
    fn gather(
        &self,
        task: &Task,
        from: Rows,
        count: usize,
        dim: usize,
        to: Rows,
        is_kept: bool,
    ) -> Rows;

    /// Collective: brings rows that a prologue has left into the form in which `multiply` takes
    /// them for a linear task, in place.
    #[inline(always)]
    fn settle(&self, _task: &Task, _x: Rows, _count: usize, _dim: usize) {}

    /// Collective: `out[i] = weight * from(i) / sqrt(mean(from(i)^2) + eps)` for each row; a machine
    /// may leave the division to `store`. `ahead` is what `norm_ahead` has said of the first row.
    fn rms_norm(
        &self,
        from: impl Fn(usize) -> Span<f32>,
        count: usize,
        weight: Span<f32>,
        eps: f32,
        out: Rows,
        ahead: Self::NormAhead,
    );

    /// Collective: what `rms_norm` needs and can have before its rows are there.
    #[inline(always)]
    fn norm_ahead(&self, _first_row: Span<f32>, _weight: Span<f32>) -> Self::NormAhead {
        Self::NormAhead::default()
    }

    /// Collective: the input of a linear task has come.
    #[inline(always)]
    fn note_input(&self, _task: &Task) {}

    /// Collective: products of all rows of a linear task's segments with `count` input rows, for
    /// `store`.
    ///
    /// `out[token, row]` counts rows over the segments. The order of a product's additions depends on
    /// `in_dim` alone. On machines that stage, this takes the task's pages.
    fn multiply(&self, task: &Task, x: Rows, count: usize, out: Rows);

    /// Collective: the first call of `store` for the products to come will have these arguments; the
    /// machine may ask for what they will be added to. The input rows are there.
    fn expect(&self, finish: &Finish, out: impl Fn(usize) -> Span<f32>);

    /// Collective: what becomes of products that `multiply` has left in `products`, to `out(token)`, and
    /// the best of each token's to `best(token)`; not yet visible to other lanes.
    fn store(
        &self,
        products: Rows,
        finish: &Finish,
        out: impl Fn(usize) -> Span<f32>,
        best: impl Fn(usize) -> BestPlace,
    );

    /// Collective: merges what `attend` of all parts of a KV head leaves, as `Join` says; only where
    /// `JOINS` says so.
    fn join(&self, _join: &Join<impl Fn(usize) -> u32>) {}

    /// Collective: merges the `split_count` attention splits of each of a token's heads, in order,
    /// into row `row` of the input rows `out`. `splits`
    /// is `[head_count, SPLIT_ROWS, split_values]`. Not yet visible to other lanes.
    fn merge(&self, dims: &Dims, splits: Span<f32>, split_count: usize, out: Rows, row: usize);

    /// Collective: appends a token's key and value and attends, split by split.
    fn attend(&self, attention: &Attention);

    /// Collective: what `attend` does for each of `count` tokens, with the same bits. They follow each other in
    /// a sequence, and their positions are in one block of `ATTENTION_BLOCK`. Only where `ATTENDS_RUNS` says so.
    fn attend_run(&self, _count: u32, _attention: impl Fn(u32) -> Attention) {}

    /// Collective: waits for the stamps of all values of `from`, then leaves values in `to`; only with
    /// stamps.
    fn pass_on(&self, _from: Span<f32>, _to: Span<f32>) {}

    /// Collective: stored values `first..` of the table at `address`, widened into `out`.
    fn widen(&self, address: u64, format: WeightFormat, first: u64, out: Span<f32>);

    /// Collective: index of the largest value, the lowest on a tie; none if one is not a number or
    /// none is finite.
    fn argmax(&self, values: Span<f32>) -> Option<u32>;

    /// Collective: the same of the values whose bests `store` has left in `bests`.
    fn best_of(&self, bests: Span<u64>) -> Option<u32>;

    /// Collective: adds up `amount` by bin over `0..len`; `bins` has 256 entries.
    fn histogram(&self, len: usize, bins: Span<u64>, item: impl Fn(usize) -> Option<(usize, u64)>);

    /// Collective: the sum of `amount` over `0..len`; `bins` are as above, and free.
    #[inline(always)]
    fn sum(&self, len: usize, bins: Span<u64>, amount: impl Fn(usize) -> u64) -> u64
    where
        Self: Sized,
    {
        crate::ops::sample::sum_in_bins(self, len, bins, amount)
    }

    /// Collective: the first index at which the amounts of `0..=index` exceed `left`; `bins` likewise.
    #[inline(always)]
    fn find(&self, len: usize, bins: Span<u64>, left: u64, amount: impl Fn(usize) -> u64) -> usize
    where
        Self: Sized,
    {
        crate::ops::sample::find_in_bins(self, len, bins, left, amount)
    }

    /// Collective: `weights = e^((logits - largest) / temperature) * one`, rounded down; no logit is above `largest`.
    #[inline(always)]
    fn weigh(&self, logits: Span<f32>, [largest, temperature, one]: [f32; 3], weights: Span<u64>) {
        self.for_each(1, weights.len(), |_, index| {
            let scaled = (logits.read(index) - largest) / temperature;
            weights.write(index, (self.exp(scaled) * one) as u64);
        });
        self.sync();
    }

    /// Collective: runs the op of a claimed task; `ops::run`, unless the machine keeps ops apart.
    #[inline(always)]
    fn run(&self, worker: &Worker<Self>, opcode: Opcode, claim: &Claim) -> Result<(), Stopped>
    where
        Self: Sized,
    {
        crate::ops::run(opcode, worker, claim)
    }

    /// `e^x`, within 2 units in the last place; 0 below -87.
    fn exp(&self, x: f32) -> f32;
}
