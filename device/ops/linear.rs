//! Linear: a prologue, rows of up to three matrices times the step's activations, an epilogue.

use tilert_mk_shared::kv::attention_split_count;
use tilert_mk_shared::limits::ATTENTION_SPLIT_MAX;
use tilert_mk_shared::sequence::StepState;
use tilert_mk_shared::task::{Epilogue, LinearArgs, Prologue, Task, TokenRows};

use crate::machine::memory::Span;
use crate::machine::{Finish, Machine, Rows};
use crate::worker::{Claim, Worker};

#[inline(always)]
pub(super) fn run<M: Machine>(worker: &Worker<M>, claim: &Claim) {
    if worker.is_too_late(claim) {
        return;
    }
    let args = LinearArgs::unpack(claim.task);
    let step_view = super::step(worker);
    let step = step_view.get(0);
    let row_count = step.row_count(args.token_rows) as usize;
    if row_count == 0 {
        worker.machine.discard(claim.task);
        worker.commit(claim);
        return;
    }
    let task = claim.task;
    worker.machine.expect(&finish(task, row_count, 0, 0), |token| output(worker, task, 0, token));
    let x = input(worker, claim, &args, step, row_count);
    let len = args.row_count() as usize;
    let y = worker.machine.output_rows(super::scratch_output(worker), row_count, len);
    worker.machine.multiply(task, x, row_count, y);
    if worker.commit(claim) {
        store(worker, task, y, row_count);
    }
}

/// The input rows after the prologue.
#[inline(always)]
fn input<M: Machine>(
    worker: &Worker<M>,
    claim: &Claim,
    args: &LinearArgs,
    step: &StepState,
    count: usize,
) -> Rows {
    let dim = args.in_dim as usize;
    let token_of = |row: usize| match args.token_rows {
        TokenRows::All => row,
        TokenRows::Logits => step.logit_tokens[row] as usize,
    };
    let x = worker.machine.input_rows(super::scratch_input(worker), count, dim);
    let prologue = u64::from(claim.epoch) << 32 | u64::from(args.prologue_key);
    let is_kept = worker.prologue.get() == prologue;
    worker.keep_prologue(prologue);
    match args.prologue {
        Prologue::None => {
            let values = worker.heap(args.x, u64::from(args.x_stride) * count as u64);
            let from = Rows { values, stride: args.x_stride as usize };
            return worker.machine.gather(claim.task, from, count, dim, x, is_kept);
        }
        _ if is_kept => {}
        Prologue::RmsNorm => {
            let from = |row| {
                let first = token_of(row) as u64 * u64::from(args.x_stride);
                worker.heap::<f32>(args.x + first * 4, dim as u64)
            };
            // SAFETY: the host has bound the norm's weight, `[in_dim] f32`, until the workers end.
            let weight = unsafe { Span::<f32>::new(args.norm_weight, dim) };
            let eps = worker.header.dims.rms_norm_eps;
            worker.machine.rms_norm(from, count, weight, eps, x);
        }
        Prologue::MergeSplits => {
            let dims = &worker.header.dims;
            let values = u64::from(dims.head_count * ATTENTION_SPLIT_MAX * dims.split_values());
            for row in 0..count {
                let token_idx = token_of(row);
                let first = dims.split_idx(token_idx as u32, 0, 0);
                let splits = worker.heap::<f32>(args.x + first * 4, values);
                let split_count = attention_split_count(step.tokens[token_idx].position);
                worker.machine.merge(dims, splits, split_count as usize, x, row);
            }
            worker.machine.sync();
        }
    }
    if !is_kept {
        worker.machine.settle(claim.task, x, count, dim);
    }
    x
}

/// What becomes of the products of segment `idx`, whose first row is row `first` of the task.
#[inline(always)]
fn finish(task: &Task, count: usize, idx: usize, first: usize) -> Finish {
    // Again: registers are scarce while a GPU multiplies.
    let args = LinearArgs::unpack(task);
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
    }
}

/// Where the products of segment `idx` go for a token.
#[inline(always)]
fn output<M: Machine>(worker: &Worker<M>, task: &Task, idx: usize, token: usize) -> Span<f32> {
    let (args, segment) = (LinearArgs::unpack(task), task.segment(idx));
    let column = token as u64 * u64::from(args.y_stride) + u64::from(segment.out_first);
    worker.heap::<f32>(args.y + column * 4, u64::from(segment.row_count))
}

#[inline(always)]
fn store<M: Machine>(worker: &Worker<M>, task: &Task, y: Rows, count: usize) {
    let is_gated = LinearArgs::unpack(task).epilogue == Epilogue::SiluMul;
    let mut first = 0;
    for idx in 0..if is_gated { 1 } else { task.segment_count() } {
        let finish = finish(task, count, idx, first);
        worker.machine.store(y, &finish, |token| output(worker, task, idx, token));
        first += finish.len;
    }
}
