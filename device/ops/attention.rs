//! Attention of one KV head, or of a part of its splits.
//!
//! This task alone appends to and reads the positions of its splits in the cache, so the cache needs
//! no event of its own within a step.

use tilert_mk_shared::kv::{attention_split, attention_split_count};
use tilert_mk_shared::sequence::StepToken;
use tilert_mk_shared::task::{AttentionArgs, Task};

use crate::machine::memory::Span;
use crate::machine::{Machine, Rotation, Rows, Split};
use crate::worker::{Claim, Worker};

#[inline(always)]
pub(super) fn run<M: Machine>(worker: &Worker<M>, claim: &Claim) {
    let args = AttentionArgs::unpack(claim.task);
    let dims = &worker.header.dims;
    let step_view = super::step(worker);
    let step = step_view.get(0);
    let count = step.token_count as usize;
    let is_mine =
        |token_idx: usize| args.part_idx < attention_split_count(step.tokens[token_idx].position);
    // Short sequences have positions in the first parts alone.
    if !(0..count).any(is_mine) {
        return;
    }
    let (dim, group) = (dims.kv.head_dim as usize, dims.heads_per_kv() as usize);
    // The input rows are about to hold queries.
    worker.keep_prologue(0);
    let queries = queries(worker, count);
    // Per token: its key, its value, the group's queries.
    let item_count = group + 2;
    // In 32 bits: a GPU has no other division.
    let parts = |item: usize| {
        let (item, count) = (item as u32, item_count as u32);
        ((item / count) as usize, (item % count) as usize)
    };
    let is_wanted = |item: usize| {
        let (token_idx, which) = parts(item);
        let split = attention_split(step.tokens[token_idx].position);
        if which < 2 { split % args.part_count == args.part_idx } else { is_mine(token_idx) }
    };
    worker.machine.rotate(dims, count * item_count, is_wanted, |item| {
        let (token_idx, which) = parts(item);
        let token = &step.tokens[token_idx];
        let row = token.position as usize * dim;
        if which >= 2 {
            let idx = which - 2;
            let head_idx = args.kv_head_idx * dims.heads_per_kv() + idx as u32;
            let out = queries.values.sub(token_idx * queries.stride + idx * dim, dim);
            rotation(worker, head(worker, &args, token_idx, head_idx), args.query_norm, token, out)
        } else if which == 0 {
            let from = head(worker, &args, token_idx, dims.head_count + args.kv_head_idx);
            let out = plane(worker, &args, token.slot, 0).sub(row, dim);
            rotation(worker, from, args.key_norm, token, out)
        } else {
            let head_idx = dims.head_count + dims.kv.kv_head_count + args.kv_head_idx;
            let from = head(worker, &args, token_idx, head_idx);
            let out = plane(worker, &args, token.slot, 1).sub(row, dim);
            let none = from.sub(0, 0);
            Rotation { from, out, norm: none, cos: none, sin: none }
        }
    });
    let mut token_idx = 0;
    while token_idx < super::step(worker).get(0).token_count {
        worker.machine.run_token(worker, claim.task, token_idx);
        token_idx += 1;
    }
}

/// The queries of `count` tokens.
#[inline(always)]
fn queries<M: Machine>(worker: &Worker<M>, count: usize) -> Rows {
    let dims = &worker.header.dims;
    let len = dims.heads_per_kv() as usize * dims.kv.head_dim as usize;
    worker.machine.input_rows(super::scratch_input(worker), count, len)
}

/// One head of the token's queries, keys and values.
#[inline(always)]
fn head<M: Machine>(
    worker: &Worker<M>,
    args: &AttentionArgs,
    token_idx: usize,
    head_idx: u32,
) -> Span<f32> {
    let dims = &worker.header.dims;
    let dim = u64::from(dims.kv.head_dim);
    let first = token_idx as u64 * u64::from(dims.qkv_dim()) + u64::from(head_idx) * dim;
    worker.heap(args.qkv + first * 4, dim)
}

/// Keys (plane 0) or values (plane 1) of the token's sequence.
#[inline(always)]
fn plane<M: Machine>(
    worker: &Worker<M>,
    args: &AttentionArgs,
    slot: u32,
    plane_idx: u64,
) -> Span<f32> {
    let kv = &worker.header.dims.kv;
    let first = kv.key_idx(args.layer_idx, slot, args.kv_head_idx);
    let first = first + plane_idx * kv.plane_values();
    worker.heap(worker.header.plan.kv + first * 4, kv.plane_values())
}

/// The head's norm, if any, and its rotation by the token's position.
#[inline(always)]
fn rotation<M: Machine>(
    worker: &Worker<M>,
    from: Span<f32>,
    norm: u64,
    token: &StepToken,
    out: Span<f32>,
) -> Rotation {
    let dims = &worker.header.dims;
    let half = u64::from(dims.kv.head_dim / 2);
    let row = u64::from(token.position) * half * 4;
    let norm_len = if norm == 0 { 0 } else { dims.kv.head_dim as usize };
    // SAFETY: the host has bound the norm's weight, `[head_dim] f32`, until the workers end.
    let norm = unsafe { Span::<f32>::new(norm, norm_len) };
    let cos = worker.heap(worker.header.plan.rope_cos + row, half);
    let sin = worker.heap(worker.header.plan.rope_sin + row, half);
    Rotation { from, out, norm, cos, sin }
}

/// Attends from a token's queries to the positions of the task's splits, split by split.
///
/// Registers are scarce on a GPU meanwhile: what is near is looked up again for each split.
#[inline(always)]
pub fn attend<M: Machine>(worker: &Worker<M>, task: &Task, token_idx: u32) {
    let mut split = AttentionArgs::unpack(task).part_idx;
    loop {
        let step_view = super::step(worker);
        let (step, token_idx) = (step_view.get(0), worker.machine.again(token_idx) as usize);
        let token = &step.tokens[token_idx];
        if split >= attention_split_count(token.position) {
            return;
        }
        let (args, dims) = (AttentionArgs::unpack(task), &worker.header.dims);
        let (dim, group) = (dims.kv.head_dim as usize, dims.heads_per_kv() as usize);
        let queries = queries(worker, step.token_count as usize);
        let stride = dims.split_idx(0, 1, 0);
        let head_idx = args.kv_head_idx * dims.heads_per_kv();
        let offset = args.splits + dims.split_idx(token_idx as u32, head_idx, split) * 4;
        let len = stride * (group as u64 - 1) + u64::from(dims.split_values());
        worker.machine.attend(Split {
            queries: Rows {
                values: queries.values.sub(token_idx * queries.stride, group * dim),
                stride: dim,
            },
            query_count: group,
            keys: plane(worker, &args, token.slot, 0),
            values: plane(worker, &args, token.slot, 1),
            split,
            position: token.position,
            scale: dims.attention_scale,
            out: Rows { values: worker.heap(offset, len), stride: stride as usize },
            head_dim: dim,
        });
        split += AttentionArgs::unpack(task).part_count;
    }
}
