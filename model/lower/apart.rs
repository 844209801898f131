//! Which stages leave the workers of attention's first parts alone.
//!
//! A worker of a GPU that has positions to attend to is behind the others: after its rows of QKV it takes up
//! attention while they already wait for it, and the output projection after that while they have its input.
//! Whoever has none of those rows is never late. The first parts have positions in every sequence, and later
//! ones only in longer sequences. What those workers would have multiplied the others do, which takes longer the
//! more bytes it is, and how a tile fills pages changes too: the limits are from measurements
//! (`PERFORMANCE.md`, "Attention's own workers"), not derived.

use tilert_mk_shared::tile::PAGE_BYTES;

use crate::graph::{Graph, Kind, Linear};
use crate::lower::{Dims, LowerOptions, formats};

/// Parts of each KV head that are kept apart at most: they have the first 256 positions.
const PARTS_MAX: u32 = 4;
/// At most one worker of as many is kept for them.
const WORKERS_OF_ONE: u32 = 4;
/// Values of a head up to which nothing is kept apart: attention of such heads is short.
const SHORT_HEAD: u32 = 64;
/// Bytes of QKV for each worker up to which it leaves attention's workers alone.
const BEFORE_BYTES_MAX: u64 = 2 * PAGE_BYTES as u64;
/// Bytes of the output projection for each worker above which it does, and up to which.
const AFTER_BYTES: [u64; 2] = [2 * PAGE_BYTES as u64, 5 * PAGE_BYTES as u64];

/// What is kept apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Apart {
    /// Parts of each KV head that have workers of their own.
    parts: u32,
    /// Workers without any of them, which are the first ones.
    pub(super) others: u32,
    /// All workers.
    workers: u32,
    is_before: bool,
    is_after: bool,
}

impl Apart {
    /// What is kept apart for a model on the device of `options`: nothing where tiles are not of packs, heads
    /// are short, or another operator has too few rows for each worker to keep tasks that others wait for.
    pub(super) fn new(graph: &Graph, dims: &Dims, options: &LowerOptions) -> Apart {
        let workers = options.worker_count;
        let parts = (workers / WORKERS_OF_ONE / dims.kv.kv_head_count).min(PARTS_MAX);
        let nothing =
            Apart { parts: 0, others: workers, workers, is_before: false, is_after: false };
        if options.packed_rows <= 1 || dims.kv.head_dim <= SHORT_HEAD || parts == 0 {
            return nothing;
        }
        let bytes = |linear: &Linear| {
            let rows: u32 = linear.matrices.iter().map(|matrix| matrix.row_count).sum();
            let format = formats::of_linear(graph, linear, options.format);
            u64::from(rows) * format.row_bytes(linear.in_dim) / u64::from(workers)
        };
        let others = workers - parts * dims.kv.kv_head_count;
        let mut apart = Apart { parts, others, workers, is_before: true, is_after: true };
        for (idx, operator) in graph.operators.iter().enumerate() {
            let Kind::Linear(linear) = &operator.kind else { continue };
            match near_attention(graph, idx) {
                [true, _] => apart.is_before &= bytes(linear) <= BEFORE_BYTES_MAX,
                [_, true] => {
                    let [least, most] = AFTER_BYTES;
                    apart.is_after &= (least + 1..=most).contains(&bytes(linear));
                }
                _ if linear.matrices.iter().any(|matrix| matrix.row_count < workers) => {
                    return nothing;
                }
                _ => {}
            }
        }
        if apart.is_before || apart.is_after { apart } else { nothing }
    }

    /// Workers that get tasks of operator `idx`, a linear one.
    pub(super) fn worker_count(&self, graph: &Graph, idx: usize) -> u32 {
        let [before, after] = near_attention(graph, idx);
        let is_apart = before && self.is_before || after && self.is_after;
        if is_apart { self.others } else { self.workers }
    }

    /// The worker of a part of attention that is kept apart, in each layer the same.
    pub(super) fn home(&self, kv_head_idx: u32, part_idx: u32) -> Option<u32> {
        (part_idx < self.parts).then_some(self.others + kv_head_idx * self.parts + part_idx)
    }
}

/// Whether operator `idx` is right before attention, and right after.
fn near_attention(graph: &Graph, idx: usize) -> [bool; 2] {
    [idx.checked_add(1), idx.checked_sub(1)].map(|idx| {
        let operator = idx.and_then(|idx| graph.operators.get(idx));
        operator.is_some_and(|operator| matches!(operator.kind, Kind::Attention { .. }))
    })
}
