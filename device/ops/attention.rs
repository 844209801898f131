//! Attention of one KV head.
//!
//! This task alone appends to and reads its head's part of the cache, so the cache needs no event of
//! its own within a step.

use tilert_mk_shared::kv::{attention_span, attention_split_count};
use tilert_mk_shared::sequence::StepToken;
use tilert_mk_shared::task::AttentionArgs;

use crate::machine::cpu::{attend, rms_norm, rope};
use crate::machine::memory::Span;
use crate::worker::{Claim, Worker};

pub(super) fn run(worker: &mut Worker, claim: &Claim) {
    let args = AttentionArgs::unpack(&claim.task);
    let step_view = super::step(worker);
    let step = &step_view.as_slice()[0];
    let tokens = &step.tokens[..step.token_count as usize];
    // The scratch is about to hold queries, not a prologue's rows.
    worker.prologue = None;
    for (token_idx, token) in tokens.iter().enumerate() {
        append(worker, &args, token_idx as u32, token);
    }
    for (token_idx, token) in tokens.iter().enumerate() {
        attend_token(worker, &args, token_idx as u32, token);
    }
}

/// One head of the token's queries, keys and values.
fn head(worker: &Worker, args: &AttentionArgs, token_idx: u32, head_idx: u32) -> Span<f32> {
    let dims = &worker.header.dims;
    let dim = u64::from(dims.kv.head_dim);
    let first = u64::from(token_idx) * u64::from(dims.qkv_dim()) + u64::from(head_idx) * dim;
    worker.heap(args.qkv + first * 4, dim)
}

/// Keys (plane 0) or values (plane 1) of the token's sequence.
fn plane(worker: &Worker, args: &AttentionArgs, slot: u32, plane_idx: u64) -> Span<f32> {
    let kv = &worker.header.dims.kv;
    let first = kv.key_idx(args.layer_idx, slot, args.kv_head_idx);
    let first = first + plane_idx * kv.plane_values();
    worker.heap(worker.header.plan.kv + first * 4, kv.plane_values())
}

/// The head's norm, if any, and its rotation by the position.
fn rotate(worker: &Worker, from: Span<f32>, norm: u64, position: u32, out: Span<f32>) {
    let dims = &worker.header.dims;
    let dim = dims.kv.head_dim as usize;
    if norm == 0 {
        out.as_mut_slice().copy_from_slice(from.as_slice());
    } else {
        // SAFETY: the host has bound the norm's weight, `[head_dim] f32`, until the workers end.
        let weight = unsafe { Span::<f32>::new(norm, dim) };
        let eps = dims.rms_norm_eps;
        rms_norm(worker.isa, from.as_slice(), weight.as_slice(), eps, out.as_mut_slice());
    }
    let half = u64::from(dims.kv.head_dim / 2);
    let row = u64::from(position) * half * 4;
    let cos = worker.heap::<f32>(worker.header.plan.rope_cos + row, half);
    let sin = worker.heap::<f32>(worker.header.plan.rope_sin + row, half);
    rope(worker.isa, out.as_mut_slice(), cos.as_slice(), sin.as_slice());
}

/// Appends the token's key and value to the cache.
fn append(worker: &Worker, args: &AttentionArgs, token_idx: u32, token: &StepToken) {
    let dims = &worker.header.dims;
    let dim = dims.kv.head_dim as usize;
    let first = token.position as usize * dim;
    let key = plane(worker, args, token.slot, 0).sub(first, dim);
    let value = plane(worker, args, token.slot, 1).sub(first, dim);
    let key_head = dims.head_count + args.kv_head_idx;
    let value_head = key_head + dims.kv.kv_head_count;
    let from = head(worker, args, token_idx, key_head);
    rotate(worker, from, args.key_norm, token.position, key);
    value.as_mut_slice().copy_from_slice(head(worker, args, token_idx, value_head).as_slice());
}

fn attend_token(worker: &Worker, args: &AttentionArgs, token_idx: u32, token: &StepToken) {
    let dims = &worker.header.dims;
    let dim = dims.kv.head_dim as usize;
    let span = attention_span(token.position) as usize;
    let split_count = attention_split_count(token.position);
    let keys = plane(worker, args, token.slot, 0);
    let values = plane(worker, args, token.slot, 1);
    for group in 0..dims.heads_per_kv() {
        let head_idx = args.kv_head_idx * dims.heads_per_kv() + group;
        let query = super::scratch_input(worker).sub(0, dim);
        let from = head(worker, args, token_idx, head_idx);
        rotate(worker, from, args.query_norm, token.position, query);
        for split in 0..split_count {
            let first = split as usize * span;
            let count = span.min(token.position as usize + 1 - first);
            let offset = args.splits + dims.split_idx(token_idx, head_idx, split) * 4;
            let out = worker.heap::<f32>(offset, u64::from(dims.split_values()));
            let (largest, total) = attend(
                worker.isa,
                query.as_slice(),
                keys.sub(first * dim, count * dim).as_slice(),
                values.sub(first * dim, count * dim).as_slice(),
                dims.attention_scale,
                out.sub(0, dim).as_mut_slice(),
            );
            out.write(dim, largest);
            out.write(dim + 1, total);
        }
    }
}
