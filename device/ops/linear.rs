//! Linear: a prologue, rows of up to three matrices times the step's activations, an epilogue.

use tilert_mk_shared::kv::attention_split_count;
use tilert_mk_shared::limits::SPLIT_ROWS;
use tilert_mk_shared::sequence::StepState;
use tilert_mk_shared::task::{Epilogue, LinearArgs, Prologue, Task, TokenRows};

use crate::machine::memory::Span;
use crate::machine::{BestPlace, Finish, Machine, Rows};
use crate::worker::{Claim, Worker};

#[inline(always)]
pub(crate) fn run<M: Machine>(worker: &Worker<M>, claim: &Claim) {
    if worker.is_too_late(claim) {
        return;
    }
    let args = LinearArgs::unpack(&worker.machine.record(claim.task));
    let step = super::step(worker);
    let row_count = args.token_rows.count(worker.machine.step_counts(step)) as usize;
    let x = Input::new(worker, claim, &args, step, row_count);
    let ahead = x.ahead();
    if row_count == 0 {
        worker.announce(claim);
        worker.commit(claim);
        return;
    }
    let task = claim.task;
    let x = x.take(ahead);
    worker.note_input(task);
    worker
        .machine
        .expect(&finish(worker, task, row_count, 0, 0), |token| output(worker, task, 0, token));
    let len = args.row_count() as usize;
    let y = worker.machine.output_rows(super::scratch_output(worker), row_count, len);
    worker.machine.multiply(task, x, row_count, y);
    worker.announce(claim);
    if worker.commit(claim) {
        store(worker, task, y, row_count);
    }
}

/// The input rows of a task, to be brought near.
struct Input<'a, M: Machine> {
    worker: &'a Worker<'a, M>,
    task: &'a Task,
    args: &'a LinearArgs,
    step: Span<StepState>,
    count: usize,
    rows: Rows,
    /// The rows already hold the result of the prologue.
    is_kept: bool,
}

impl<'a, M: Machine> Input<'a, M> {
    #[inline(always)]
    fn new(
        worker: &'a Worker<'a, M>,
        claim: &Claim<'a>,
        args: &'a LinearArgs,
        step: Span<StepState>,
        count: usize,
    ) -> Self {
        let scratch = super::scratch_input(worker);
        let rows = worker.machine.input_rows(scratch, count, args.in_dim as usize);
        let prologue = u64::from(claim.epoch) << 32 | u64::from(args.prologue_key);
        let is_kept = worker.prologue.get() == prologue;
        worker.keep_prologue(prologue);
        Input { worker, task: claim.task, args, step, count, rows, is_kept }
    }

    #[inline(always)]
    fn token_of(&self, row: usize) -> usize {
        match self.args.token_rows {
            TokenRows::All => row,
            TokenRows::Logits => self.step.get(0).logit_tokens[row] as usize,
        }
    }

    /// Row `row` before the norm.
    #[inline(always)]
    fn normed_row(&self, row: usize) -> Span<f32> {
        let first = self.token_of(row) as u64 * u64::from(self.args.x_stride);
        self.worker.heap(self.args.x + first * 4, u64::from(self.args.in_dim))
    }

    #[inline(always)]
    fn norm_weight(&self) -> Span<f32> {
        // SAFETY: the host has bound the norm's weight, `[in_dim] f32`, until the workers end.
        unsafe { Span::<f32>::new(self.args.norm_weight, self.args.in_dim as usize) }
    }

    /// What can be had before the rows are there.
    #[inline(always)]
    fn ahead(&self) -> M::NormAhead {
        if self.args.prologue == Prologue::RmsNorm && !self.is_kept && self.count > 0 {
            return self.worker.machine.norm_ahead(self.normed_row(0), self.norm_weight());
        }
        M::NormAhead::default()
    }

    /// The rows after the prologue.
    #[inline(always)]
    fn take(&self, ahead: M::NormAhead) -> Rows {
        let Input { worker, task, args, step, count, rows: x, is_kept } = *self;
        let dim = args.in_dim as usize;
        match args.prologue {
            Prologue::None => {
                let values = worker.heap(args.x, u64::from(args.x_stride) * count as u64);
                let from = Rows { values, stride: args.x_stride as usize };
                return worker.machine.gather(task, from, count, dim, x, is_kept);
            }
            _ if is_kept => {}
            Prologue::RmsNorm => {
                let (weight, eps) = (self.norm_weight(), worker.header().dims.rms_norm_eps);
                let from = |row| self.normed_row(row);
                worker.machine.rms_norm(from, count, weight, eps, x, ahead);
            }
            Prologue::MergeSplits => {
                let header = worker.header();
                let dims = &header.dims;
                let rows = dims.head_count * SPLIT_ROWS;
                for row in 0..count {
                    let token_idx = self.token_of(row);
                    let split_count =
                        attention_split_count(worker.machine.step_token(step, token_idx).position);
                    let [first, count] = dims.rows_to_merge(split_count);
                    let values = u64::from((rows - first) * dims.split_values());
                    let first = dims.split_idx(token_idx as u32, 0, first);
                    let splits = worker.heap::<f32>(args.x + first * 4, values);
                    worker.machine.merge(dims, splits, count as usize, x, row);
                }
                worker.machine.sync();
            }
        }
        if !is_kept {
            worker.machine.settle(task, x, count, dim);
        }
        x
    }
}

/// What becomes of the products of segment `idx`, whose first row is row `first` of the task.
#[inline(always)]
fn finish<M: Machine>(
    worker: &Worker<M>,
    task: &Task,
    count: usize,
    idx: usize,
    first: usize,
) -> Finish {
    // Again: registers are scarce while a GPU multiplies.
    let task = worker.machine.record(task);
    let args = LinearArgs::unpack(&task);
    let bias = |idx: usize| {
        let segment = task.segment(idx);
        let len = if segment.bias == 0 { 0 } else { segment.row_count as usize };
        // SAFETY: the host has bound the biases, `[row_count] f32`, until the workers end.
        unsafe { Span::<f32>::new(segment.bias, len) }
    };
    let is_gated = args.epilogue == Epilogue::SiluMul;
    Finish {
        count,
        first,
        len: task.segment(idx).row_count as usize,
        bias: bias(idx),
        is_gated,
        up_bias: bias(if is_gated { 1 } else { idx }),
        adds: args.epilogue == Epilogue::AddResidual,
        residual_age: args.residual_age,
        norm_dim: if args.prologue == Prologue::RmsNorm { args.in_dim } else { 0 },
        leaves_best: args.leaves_best(),
    }
}

/// Where the best of a token's products goes, if the task leaves it.
#[inline(always)]
fn best_place<M: Machine>(worker: &Worker<M>, task: &Task, token: usize) -> BestPlace {
    let args = LinearArgs::unpack(&worker.machine.record(task));
    let header = worker.header();
    let idx = token as u64 * u64::from(header.dims.head_task_count) + u64::from(args.best_idx);
    let word = worker.heap::<u64>(header.plan.bests + idx * 8, 1);
    BestPlace { word, first: args.segments[0].out_first }
}

/// Where the products of segment `idx` go for a token.
#[inline(always)]
fn output<M: Machine>(worker: &Worker<M>, task: &Task, idx: usize, token: usize) -> Span<f32> {
    let task = worker.machine.record(task);
    let (args, segment) = (LinearArgs::unpack(&task), task.segment(idx));
    let column = token as u64 * u64::from(args.y_stride) + u64::from(segment.out_first);
    worker.heap::<f32>(args.y + column * 4, u64::from(segment.row_count))
}

#[inline(always)]
fn store<M: Machine>(worker: &Worker<M>, task: &Task, y: Rows, count: usize) {
    let (is_gated, segment_count) = {
        let task = worker.machine.record(task);
        (LinearArgs::unpack(&task).epilogue == Epilogue::SiluMul, task.segment_count())
    };
    let mut first = 0;
    for idx in 0..if is_gated { 1 } else { segment_count } {
        let finish = finish(worker, task, count, idx, first);
        let out = |token| output(worker, task, idx, token);
        worker.machine.store(y, &finish, out, |token| best_place(worker, task, token));
        first += finish.len;
    }
}
