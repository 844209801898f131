//! Attention of one KV head, or of a part of its splits.
//!
//! This task alone appends to and reads the positions of its splits in the cache, so the cache needs
//! no event of its own within a step; what earlier steps have left there may be read before the
//! task's input is ready.

use tilert_mk_shared::kv::attention_split_count;
use tilert_mk_shared::limits::{ATTENTION_BLOCK, SPLIT_ROWS};
use tilert_mk_shared::sequence::{StepState, StepToken};
use tilert_mk_shared::task::AttentionArgs;

use crate::machine::memory::Span;
use crate::machine::{Attention, Join, Machine};
use crate::worker::{Claim, Worker};

/// Bytes of an `f32`.
const VALUE_BYTES: u32 = size_of::<f32>() as u32;

#[inline(always)]
pub(crate) fn run<M: Machine>(worker: &Worker<M>, claim: &Claim) {
    let step = super::step(worker);
    // The memory of input rows is about to be used.
    worker.keep_prologue(0);
    if M::ATTENDS_RUNS {
        attend_runs(worker, claim, step);
        return worker.announce(claim);
    }
    let (mut token_idx, mut is_begun) = (0, false);
    while token_idx < token_count(worker, step) {
        let token = worker.machine.step_token(step, token_idx as usize);
        // Again for each token: a GPU has few registers to keep them in.
        let args = AttentionArgs::unpack(&worker.machine.record(claim.task));
        // Short sequences have positions in the first parts alone.
        if args.part_idx < attention_split_count(token.position) {
            if is_begun {
                // What the token before has appended is there.
                worker.machine.sync();
            }
            is_begun = true;
            let attention = attention(worker, &args, token_idx, &token);
            worker.machine.attend(&attention);
        }
        token_idx += 1;
    }
    if M::JOINS {
        join(worker, claim);
    }
    worker.announce(claim);
}

/// Attends run by run. Of two tokens whose positions are in one block, both or neither have positions in the
/// task's splits.
#[inline(always)]
fn attend_runs<M: Machine>(worker: &Worker<M>, claim: &Claim, step: Span<StepState>) {
    let args = AttentionArgs::unpack(&worker.machine.record(claim.task));
    let token = |token_idx: u32| worker.machine.step_token(step, token_idx as usize);
    let mut token_idx = 0;
    while token_idx < token_count(worker, step) {
        let first = token(token_idx);
        let room = ATTENTION_BLOCK - first.position % ATTENTION_BLOCK;
        let count_max = room.min(token_count(worker, step) - token_idx);
        let follows = |idx: u32| {
            let token = token(token_idx + idx);
            token.slot == first.slot && token.position == first.position + idx
        };
        let mut count = 1;
        while count < count_max && follows(count) {
            count += 1;
        }
        if args.part_idx < attention_split_count(first.position) {
            worker.machine.attend_run(count, |idx| {
                attention(worker, &args, token_idx + idx, &token(token_idx + idx))
            });
        }
        token_idx += count;
    }
}

/// Merges the splits of the task's KV head, together with the tasks that have its other parts.
#[inline(always)]
fn join<M: Machine>(worker: &Worker<M>, claim: &Claim) {
    // Again: a GPU has no registers to keep it in while it attends.
    let (step, header) = (super::step(worker), worker.header());
    let (dims, args) = (&header.dims, AttentionArgs::unpack(&worker.machine.record(claim.task)));
    worker.machine.join(&Join {
        count: token_count(worker, step) as usize,
        split_count: |token: usize| {
            let count = attention_split_count(worker.machine.step_token(step, token).position);
            if dims.joins_splits(count) { count } else { 0 }
        },
        columns: args.columns,
        head_dim: dims.kv.head_dim,
        split_values: dims.split_values(),
        splits: header.heap + args.splits,
        pitch: dims.split_idx(1, 0, 0) as u32 * VALUE_BYTES,
    });
}

/// Tokens of the step.
#[inline(always)]
fn token_count<M: Machine>(worker: &Worker<M>, step: Span<StepState>) -> u32 {
    let [count, _] = worker.machine.step_counts(step);
    count
}

/// What the task does for a token.
#[inline(always)]
fn attention<M: Machine>(
    worker: &Worker<M>,
    args: &AttentionArgs,
    token_idx: u32,
    token: &StepToken,
) -> Attention {
    let header = worker.header();
    let dims = &header.dims;
    let (kv, plan, dim) = (&dims.kv, &header.plan, u64::from(dims.kv.head_dim));
    let group = dims.heads_per_kv();
    // Heads of the token: queries, then keys, then values.
    let heads = |head_idx: u32, count: u32| {
        let first = u64::from(token_idx) * u64::from(dims.qkv_dim()) + u64::from(head_idx) * dim;
        worker.heap::<f32>(args.qkv + first * 4, u64::from(count) * dim)
    };
    let norm = |address: u64| {
        let len = if address == 0 { 0 } else { dim as usize };
        // SAFETY: the host has bound the norm's weight, `[head_dim] f32`, until the workers end.
        unsafe { Span::<f32>::new(address, len) }
    };
    let half = dim / 2;
    let turns = |table: u64| worker.heap(table + u64::from(token.position) * half * 4, half);
    let plane = |idx: u64| {
        let first = kv.key_idx(args.layer_idx, token.slot, args.kv_head_idx);
        worker.heap(plan.kv + (first + idx * kv.plane_values()) * 4, kv.plane_values())
    };
    let out = dims.split_idx(token_idx, 0, 0) * u64::from(VALUE_BYTES);
    let out_values = u64::from(group * SPLIT_ROWS * dims.split_values());
    Attention {
        head_dim: dim as usize,
        query_count: group as usize,
        queries: heads(args.kv_head_idx * group, group),
        key: heads(dims.head_count + args.kv_head_idx, 1),
        value: heads(dims.head_count + kv.kv_head_count + args.kv_head_idx, 1),
        query_norm: norm(args.query_norm),
        key_norm: norm(args.key_norm),
        eps: dims.rms_norm_eps,
        cos: turns(plan.rope_cos),
        sin: turns(plan.rope_sin),
        keys: plane(0),
        values: plane(1),
        position: token.position,
        scale: dims.attention_scale,
        part_idx: args.part_idx,
        part_count: args.part_count,
        out: worker.heap(args.splits + out, out_values),
        split_values: dims.split_values() as usize,
        scratch: super::scratch_input(worker),
    }
}
