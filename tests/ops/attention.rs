//! Attention tasks: grouped heads, norms, several slots, one split and many.

use tilert_mk_device::machine::memory::Span;
use tilert_mk_model::reference::{self, AttentionShape};
use tilert_mk_shared::kv::attention_split_count;
use tilert_mk_shared::limits::{ATTENTION_BLOCK, ATTENTION_SPLIT_MAX};
use tilert_mk_shared::sequence::{NO_LOGITS, StepToken};
use tilert_mk_shared::task::AttentionArgs;

use crate::rig::{Memory, Near, Random, Rig, UNIT, dims};

const CONTEXT_MAX: u32 = 2100;
const LAYER_IDX: u32 = 1;

/// Tokens of a step as `(slot, position)`; those of a slot are adjacent and ascend.
const STEPS: [&[(u32, u32)]; 5] = [
    &[(0, 0), (0, 1), (2, 5)],
    &[(1, 62), (1, 63), (1, 64), (1, 65), (0, 30)],
    &[(2, 1022), (2, 1023), (2, 1024), (2, 1025)],
    &[(0, 200), (1, 1500), (2, 0)],
    &[(1, 2047), (1, 2048)],
];

/// Keys or values of one slot's sequence, `[positions, kv_head_count, head_dim]`.
type Cache = Vec<f32>;

struct Setup<'a> {
    rig: &'a Rig,
    shape: AttentionShape,
    /// Query and key norms, if the model has them.
    norms: Option<[Vec<f32>; 2]>,
    /// Keys and values of each slot; those of the step's tokens are put in by `tokens`.
    caches: Vec<[Cache; 2]>,
    /// `[context_max, head_dim / 2]`.
    turns: [Vec<f32>; 2],
}

impl<'a> Setup<'a> {
    fn new(rig: &'a Rig, random: &mut Random, has_norm: bool) -> Setup<'a> {
        let dims = &rig.header.dims;
        let (kv, dim) = (&dims.kv, dims.kv.head_dim as usize);
        let angles: Vec<f32> =
            (0..CONTEXT_MAX as usize * dim / 2).map(|_| random.next() * 3.0).collect();
        let turns = [f32::cos, f32::sin].map(|f| angles.iter().map(|a| f(*a)).collect::<Vec<_>>());
        for (table, offset) in
            turns.iter().zip([rig.header.plan.rope_cos, rig.header.plan.rope_sin])
        {
            rig.heap::<f32>(offset, table.len() as u64).as_mut_slice().copy_from_slice(table);
        }
        let caches: Vec<[Cache; 2]> = (0..kv.slot_count)
            .map(|_| {
                [(); 2].map(|()| random.values((CONTEXT_MAX * kv.kv_head_count) as usize * dim))
            })
            .collect();
        let setup = Setup {
            rig,
            shape: AttentionShape {
                head_count: dims.head_count,
                kv_head_count: kv.kv_head_count,
                head_dim: kv.head_dim,
                sliding_window: None,
            },
            norms: has_norm.then(|| [(); 2].map(|()| random.values(dim))),
            caches,
            turns,
        };
        setup.fill_heap();
        setup
    }

    /// Offset of a key (plane 0) or value (plane 1) in the heap.
    fn row_offset(&self, slot: u32, kv_head_idx: u32, plane: u64, position: u32) -> u64 {
        let kv = &self.rig.header.dims.kv;
        let first = kv.key_idx(LAYER_IDX, slot, kv_head_idx) + plane * kv.plane_values();
        self.rig.header.plan.kv + (first + u64::from(position * kv.head_dim)) * 4
    }

    fn row(&self, slot: u32, kv_head_idx: u32, plane: usize, position: u32) -> &[f32] {
        let dim = self.shape.head_dim as usize;
        let first = (position * self.shape.kv_head_count + kv_head_idx) as usize * dim;
        &self.caches[slot as usize][plane][first..first + dim]
    }

    fn fill_heap(&self) {
        let dim = u64::from(self.shape.head_dim);
        for slot in 0..self.caches.len() as u32 {
            for kv_head_idx in 0..self.shape.kv_head_count {
                for (plane, position) in
                    (0..2).flat_map(|plane| (0..CONTEXT_MAX).map(move |p| (plane, p)))
                {
                    let offset = self.row_offset(slot, kv_head_idx, plane as u64, position);
                    let row = self.row(slot, kv_head_idx, plane, position);
                    self.rig.heap::<f32>(offset, dim).as_mut_slice().copy_from_slice(row);
                }
            }
        }
    }

    /// A head after its norm, if any, and its rotation.
    fn rotated(&self, head: &[f32], which: usize, position: u32) -> Vec<f32> {
        let half = self.shape.head_dim as usize / 2;
        let turn = |table: &'_ [f32]| table[position as usize * half..][..half].to_vec();
        let eps = self.rig.header.dims.rms_norm_eps;
        let mut head = match &self.norms {
            Some(norms) => reference::rms_norm(head, &norms[which], eps),
            None => head.to_vec(),
        };
        reference::rope(&mut head, &turn(&self.turns[0]), &turn(&self.turns[1]));
        head
    }

    /// Relative error of a rotated pair's length: the norm's, and three operations of the rotation,
    /// each of at most the pair's length; the twin rounds both too.
    fn rotated_units(&self) -> f64 {
        let norm = f64::from(self.shape.head_dim) / 32.0 + 10.0;
        if self.norms.is_some() { norm + 6.0 } else { 6.0 }
    }

    /// Puts a token's keys and values into the cache of the twin.
    fn append(&mut self, qkv: &[f32], slot: u32, position: u32) {
        let shape = self.shape;
        let dim = shape.head_dim as usize;
        for kv_head_idx in 0..shape.kv_head_count {
            let head = |idx: u32| &qkv[idx as usize * dim..][..dim];
            let key = self.rotated(head(shape.head_count + kv_head_idx), 1, position);
            let value = head(shape.head_count + shape.kv_head_count + kv_head_idx).to_vec();
            let first = (position * shape.kv_head_count + kv_head_idx) as usize * dim;
            for (cache, row) in self.caches[slot as usize].iter_mut().zip([key, value]) {
                cache[first..first + dim].copy_from_slice(&row);
            }
        }
    }

    /// The largest error of a score, given its query.
    fn score_error(&self, query: &[f32], keys: &[f32]) -> f64 {
        let dims = &self.rig.header.dims;
        let length = |v: &[f32]| reference::dot(v, v).sqrt();
        let longest = keys.chunks(query.len()).map(length).fold(0.0, f64::max);
        // Key and query are off by `rotated_units`; 16 lanes, their fold, the scale, the twin.
        let units = 2.0 * self.rotated_units() + query.len() as f64 / 16.0 + 8.0;
        // Cauchy and Schwarz: the sum of magnitudes is at most the product of the lengths.
        units * UNIT * length(query) * longest * f64::from(dims.attention_scale)
    }

    /// Result of the twin for a token, with bounds: `[head_count, head_dim]`.
    fn expected(&self, qkv: &[f32], slot: u32, position: u32) -> Vec<Near> {
        let shape = self.shape;
        let (dim, count) = (shape.head_dim as usize, position as usize + 1);
        let row = dim * shape.kv_head_count as usize;
        let heads = qkv[..dim * shape.head_count as usize].chunks(dim);
        let query: Vec<f32> = heads.flat_map(|head| self.rotated(head, 0, position)).collect();
        let [keys, values] = &self.caches[slot as usize];
        let (keys, values) = (&keys[..count * row], &values[..count * row]);
        let sizes: Vec<f32> = values.iter().map(|value| value.abs()).collect();
        let found = reference::attention(&shape, &query, keys, values);
        let size = reference::attention(&shape, &query, keys, &sizes);
        // Of the split that has most.
        let blocks = f64::from((position / ATTENTION_BLOCK + 1).div_ceil(ATTENTION_SPLIT_MAX));
        let near = |(idx, (value, size)): (usize, (&f32, &f32))| {
            let head = &query[idx / dim * dim..][..dim];
            // A weight is off by the error of its score and of the exponential's argument, at most
            // 2^3 here; its sum by one rounding for each position and two for each block of 64 and
            // each split. All of it above the division and below it; the twin rounds twice.
            let weight = self.score_error(head, keys) + (4.0 + 8.0) * UNIT;
            let splits = f64::from(attention_split_count(position));
            let positions = blocks * f64::from(ATTENTION_BLOCK);
            let sums = (positions + 14.0 * (blocks + splits)) * UNIT;
            let error = f64::from(*size) * 1.01 * (2.0 * (weight + sums) + 4.0 * UNIT);
            Near { value: f64::from(*value), error }
        };
        found.iter().zip(&size).enumerate().map(near).collect()
    }

    /// What the op has left for a token's head, split by split.
    fn splits(&self, token_idx: u32, head_idx: u32, position: u32) -> Vec<Span<f32>> {
        let (header, dim) = (&self.rig.header, u64::from(self.shape.head_dim));
        let part = |split| {
            let first = header.dims.split_idx(token_idx, head_idx, split);
            self.rig.heap::<f32>(header.plan.splits + first * 4, dim + 2)
        };
        (0..attention_split_count(position)).map(part).collect()
    }

    /// The bits of what the op has left for a token.
    fn bits(&self, token_idx: u32, position: u32) -> Vec<u32> {
        let heads = 0..self.shape.head_count;
        let splits = heads.flat_map(|head_idx| self.splits(token_idx, head_idx, position));
        let bits = |split: Span<f32>| split.as_slice().iter().map(|v| v.to_bits()).collect();
        splits.flat_map(|split| -> Vec<u32> { bits(split) }).collect()
    }

    /// Compares what the op has left for a token with the twin.
    fn check_token(&self, token_idx: u32, qkv: &[f32], (slot, position): (u32, u32)) {
        let dim = u64::from(self.shape.head_dim);
        for kv_head_idx in 0..self.shape.kv_head_count {
            let found = |plane| {
                let offset = self.row_offset(slot, kv_head_idx, plane, position);
                self.rig.heap::<f32>(offset, dim)
            };
            assert_eq!(found(1).as_slice(), self.row(slot, kv_head_idx, 1, position), "value");
            let key = self.row(slot, kv_head_idx, 0, position);
            let error = self.rotated_units() * UNIT * reference::dot(key, key).sqrt();
            for (found, value) in found(0).as_slice().iter().zip(key) {
                Near { value: f64::from(*value), error }.check(*found, &|| "key".into());
            }
        }
        let expected = self.expected(qkv, slot, position);
        for head_idx in 0..self.shape.head_count {
            let parts = self.splits(token_idx, head_idx, position);
            let views: Vec<&[f32]> = parts.iter().map(|part| part.as_slice()).collect();
            let merged = reference::merge(&views);
            let expected = &expected[head_idx as usize * dim as usize..];
            for (column, (found, near)) in merged.iter().zip(expected).enumerate() {
                let what = || format!("slot {slot}, position {position}, [{head_idx}, {column}]");
                near.check(*found, &what);
            }
        }
    }
}

/// Runs steps on one instruction set, each head in so many parts; the bits of all splits, which may have been
/// compared with the twin.
fn run<'a>(
    rig: &Rig,
    has_norm: bool,
    part_count: u32,
    steps: impl IntoIterator<Item = &'a [(u32, u32)]>,
    is_checked: bool,
) -> Vec<u32> {
    let dims = rig.header.dims;
    let mut random = Random::new(u64::from(dims.head_count * 1000 + dims.kv.head_dim));
    let mut setup = Setup::new(rig, &mut random, has_norm);
    let norms = setup.norms.as_ref().map(|norms| [0, 1].map(|idx| Memory::of(&norms[idx])));
    let mut bits = Vec::new();
    for step in steps {
        let token = |(slot, position): &(u32, u32)| StepToken {
            token: 0,
            slot: *slot,
            position: *position,
            logit_row: NO_LOGITS,
        };
        rig.set_step(&step.iter().map(token).collect::<Vec<_>>());
        let qkv_dim = dims.qkv_dim() as usize;
        let qkv = random.values(step.len() * qkv_dim);
        let plan = rig.header.plan;
        rig.heap::<f32>(plan.qkv, qkv.len() as u64).as_mut_slice().copy_from_slice(&qkv);
        let norm = |which: usize| norms.as_ref().map_or(0, |norms| norms[which].address());
        let task = |idx: u32| {
            let args = AttentionArgs {
                layer_idx: LAYER_IDX,
                kv_head_idx: idx / part_count,
                part_idx: idx % part_count,
                part_count,
                columns: [0; 2],
                qkv: plan.qkv,
                splits: plan.splits
                    + dims.split_idx(0, idx / part_count * dims.heads_per_kv(), 0) * 4,
                query_norm: norm(0),
                key_norm: norm(1),
                is_announced: false,
            };
            args.pack()
        };
        let task_count = dims.kv.kv_head_count * part_count;
        rig.run_all(&(0..task_count).map(task).collect::<Vec<_>>());
        for (qkv, (slot, position)) in qkv.chunks(qkv_dim).zip(step) {
            setup.append(qkv, *slot, *position);
        }
        for ((idx, qkv), token) in (0..).zip(qkv.chunks(qkv_dim)).zip(step) {
            if is_checked {
                setup.check_token(idx, qkv, *token);
            }
            bits.extend(setup.bits(idx, token.1));
        }
    }
    bits
}

#[test]
fn grouped_heads_over_one_split_and_many() {
    for (heads, has_norm) in [
        ([4, 2, 16], false),
        ([4, 2, 32], true),
        ([9, 3, 8], false),
        ([6, 1, 80], true),
        ([2, 2, 128], false),
    ] {
        let mut first: Option<Vec<u32>> = None;
        Rig::for_each_isa(&dims(64, heads, CONTEXT_MAX), |rig| {
            for part_count in [1, 3, ATTENTION_SPLIT_MAX] {
                let bits = run(rig, has_norm, part_count, STEPS, true);
                let is_same = *first.get_or_insert(bits.clone()) == bits;
                assert!(is_same, "{heads:?} in {part_count} parts: bits differ");
            }
        });
    }
}

#[test]
fn a_token_has_the_bits_in_a_run_that_it_has_alone() {
    // Steps of 64: the first positions and a block's end, a whole block, more splits than have positions before.
    let runs = [(0, 0, 30), (1, 50, 34), (2, 960, 64), (1, 84, 3), (0, 30, 40), (2, 1024, 21)];
    let of_run =
        |(slot, first, count)| (first..first + count).map(move |position| (slot, position));
    let tokens: Vec<(u32, u32)> = runs.into_iter().flat_map(of_run).collect();
    for (heads, has_norm) in
        [([4, 2, 16], true), ([3, 3, 8], false), ([7, 1, 72], false), ([2, 2, 128], true)]
    {
        Rig::for_each_isa(&dims(64, heads, CONTEXT_MAX), |rig| {
            let alone = run(rig, has_norm, 3, tokens.chunks(1), false);
            for (step_tokens, part_count) in [(64, 1), (64, 3), (7, 3), (2, ATTENTION_SPLIT_MAX)] {
                let together = run(rig, has_norm, part_count, tokens.chunks(step_tokens), false);
                assert!(alone == together, "{heads:?} in steps of {step_tokens}: bits differ");
            }
        });
    }
}
