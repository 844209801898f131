//! Attention on AVX-512: what `lanes::attend` does, in the same order, for several queries at once.
//!
//! Queries share the loads of keys and values, whether they are of one token or of several. Those of later
//! tokens see more of the last block: its keys are multiplied with all queries, its values with those that see them.

use std::arch::x86_64::{
    __m512, _CMP_LT_OQ, _CMP_UNORD_Q, _mm512_add_epi32, _mm512_add_ps, _mm512_castsi512_ps,
    _mm512_cmp_ps_mask, _mm512_cvtss_f32, _mm512_cvttps_epi32, _mm512_fmadd_ps, _mm512_loadu_ps,
    _mm512_mask_blend_ps, _mm512_maskz_mov_ps, _mm512_max_ps, _mm512_min_ps, _mm512_mul_ps,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_shuffle_f32x4, _mm512_shuffle_ps,
    _mm512_slli_epi32, _mm512_storeu_ps, _mm512_sub_ps,
};
use std::ops::Range;

use super::{FOLDED, dots, fold};
use crate::machine::cpu::lanes::{EXP_TERMS, SCORE_BLOCK, SCORE_STEP, VECTOR, add_rest};
use crate::machine::cpu::{ATTEND_QUERIES_MAX, Query};

/// Vectors of a block's weights.
const WEIGHT_VECTORS: usize = SCORE_BLOCK / VECTOR;
/// Queries whose sums registers hold.
const GROUP: usize = 4;
/// Groups that go through a block together: they find it in the first level of cache.
const GROUPS: usize = ATTEND_QUERIES_MAX / GROUP;

/// A query between blocks.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct State {
    /// Scores of the block's positions, then their weights.
    weights: [f32; SCORE_BLOCK],
    /// The largest score so far, in all lanes.
    largest: __m512,
    /// The sum of weights so far, likewise.
    total: __m512,
    /// What the values of earlier blocks are multiplied by, likewise.
    keep: __m512,
}

/// A block's positions.
#[derive(Clone, Copy)]
struct Block<'a> {
    /// Positions before it, from the split's first on.
    first: usize,
    /// `[positions, dim]`.
    keys: &'a [f32],
    /// Likewise.
    values: &'a [f32],
}

impl Block<'_> {
    /// Positions that a query sees.
    #[inline(always)]
    fn count(&self, query: &Query) -> usize {
        (query.count - self.first).min(SCORE_BLOCK)
    }
}

/// See `cpu::attend`.
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
pub(in crate::machine::cpu) fn attend(queries: &[Query], keys: &[f32], values: &[f32], scale: f32) {
    let mut rest = queries;
    while !rest.is_empty() {
        let done = match rest.len() {
            1 => attend_together::<1, 1>(rest, keys, values, scale),
            2 | 3 => attend_together::<1, 2>(rest, keys, values, scale),
            len if len < 2 * GROUP => attend_together::<1, GROUP>(rest, keys, values, scale),
            _ => attend_together::<GROUPS, GROUP>(rest, keys, values, scale),
        };
        rest = &rest[done..];
    }
}

/// The first groups of `Q` queries, at most `G`; returns how many queries they are.
#[inline]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
fn attend_together<const G: usize, const Q: usize>(
    queries: &[Query],
    keys: &[f32],
    values: &[f32],
    scale: f32,
) -> usize {
    let dim = queries[0].values.len();
    let start = State {
        weights: [0.0; SCORE_BLOCK],
        largest: _mm512_set1_ps(f32::NEG_INFINITY),
        total: _mm512_setzero_ps(),
        keep: _mm512_setzero_ps(),
    };
    let mut states = [[start; Q]; G];
    let count = queries.len() / Q;
    let states = &mut states[..count.min(G)];
    let queries = &queries[..states.len() * Q];
    for query in queries {
        query.out.sub(0, dim).as_mut_slice().fill(0.0);
    }
    let blocks = keys.chunks(SCORE_STEP * dim).zip(values.chunks(SCORE_STEP * dim));
    for (first, (keys, values)) in (0..).step_by(SCORE_STEP).zip(blocks) {
        let len = keys.len().min(SCORE_BLOCK * dim);
        let block = Block { first, keys: &keys[..len], values: &values[..len] };
        score(queries, &block, states);
        for state in states.iter_mut().flatten() {
            weigh(state, scale);
        }
        add_values(queries, &block, states);
    }
    for (query, state) in queries.iter().zip(states.iter().flatten()) {
        query.out.write(dim, _mm512_cvtss_f32(state.largest));
        query.out.write(dim + 1, _mm512_cvtss_f32(state.total));
    }
    queries.len()
}

/// Products of queries with a block's keys, `-inf` where a query does not see the key.
#[inline]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
fn score<const Q: usize>(queries: &[Query], block: &Block<'_>, states: &mut [[State; Q]]) {
    let batch = FOLDED / Q;
    let mut sums = [_mm512_setzero_ps(); FOLDED];
    for first in (0..SCORE_BLOCK).step_by(batch) {
        for (group, states) in queries.chunks_exact(Q).zip(states.iter_mut()) {
            let count = block.count(&group[Q - 1]);
            if first < count {
                let products = products::<Q>(group, block.keys, first..count, &mut sums);
                for q in 0..Q {
                    let products = &products[q * batch..][..batch];
                    states[q].weights[first..first + batch].copy_from_slice(products);
                }
            }
        }
    }
    for (query, state) in queries.iter().zip(states.iter_mut().flatten()) {
        state.weights[block.count(query)..].fill(f32::NEG_INFINITY);
    }
}

/// Products of each of `Q` queries with the first `FOLDED / Q` keys of `range`; if they are fewer, with the last of
/// them again. `sums` is room for as many.
///
/// Not part of its callers: sums that are kept for the fold would take registers from those that are added to.
#[inline(never)]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
fn products<const Q: usize>(
    queries: &[Query],
    keys: &[f32],
    range: Range<usize>,
    sums: &mut [__m512; FOLDED],
) -> [f32; FOLDED] {
    let mut values: [&[f32]; Q] = [&[]; Q];
    for q in 0..Q {
        values[q] = queries[q].values.as_slice();
    }
    let dim = values[0].len();
    for first in (0..FOLDED / Q).step_by(2) {
        let mut pair: [&[f32]; 2] = [&[]; 2];
        for k in 0..2 {
            let key = (range.start + first + k).min(range.end - 1);
            pair[k] = &keys[key * dim..][..dim];
        }
        let products = dots::<f32, 2, Q>(pair, values, 0);
        for q in 0..Q {
            for k in 0..2 {
                sums[q * (FOLDED / Q) + first + k] = products[k][q];
            }
        }
    }
    fold(sums)
}

/// Makes weights of a block's scores.
#[inline]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
fn weigh(state: &mut State, scale: f32) {
    let mut scaled = [_mm512_setzero_ps(); WEIGHT_VECTORS];
    let mut most = state.largest;
    for i in 0..WEIGHT_VECTORS {
        let scores = load(&state.weights[i * VECTOR..]);
        scaled[i] = _mm512_mul_ps(scores, _mm512_set1_ps(scale));
        most = _mm512_max_ps(scaled[i], most);
    }
    let most = largest_lane(most);
    let mut sum = _mm512_setzero_ps();
    for i in 0..WEIGHT_VECTORS {
        let weights = exp(_mm512_sub_ps(scaled[i], most));
        store(&mut state.weights[i * VECTOR..], weights);
        sum = _mm512_add_ps(sum, weights);
    }
    state.keep = exp(_mm512_sub_ps(state.largest, most));
    state.largest = most;
    state.total = _mm512_add_ps(_mm512_mul_ps(state.total, state.keep), sum_of_lanes(sum));
}

/// `out = out * keep + sum of weights[i] * values[i]`, in the order of `i`, for each query.
#[inline]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
fn add_values<const Q: usize>(queries: &[Query], block: &Block<'_>, states: &[[State; Q]]) {
    let dim = queries[0].values.len();
    let mut first = 0;
    while first + 4 * VECTOR <= dim {
        for (queries, states) in queries.chunks_exact(Q).zip(states) {
            add_columns::<Q, 4>(queries, block, states, first);
        }
        first += 4 * VECTOR;
    }
    while first + VECTOR <= dim {
        for (queries, states) in queries.chunks_exact(Q).zip(states) {
            add_columns::<Q, 1>(queries, block, states, first);
        }
        first += VECTOR;
    }
    if first < dim {
        for (query, state) in queries.iter().zip(states.iter().flatten()) {
            let (row, count) = (query.out.sub(0, dim), block.count(query));
            let keep = _mm512_cvtss_f32(state.keep);
            add_rest(row.as_mut_slice(), first, keep, &state.weights[..count], block.values);
        }
    }
}

/// `add_values` for a group and `N` vectors of columns, whose sums are in registers.
#[inline]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
fn add_columns<const Q: usize, const N: usize>(
    queries: &[Query],
    block: &Block<'_>,
    states: &[State; Q],
    first: usize,
) {
    let dim = queries[0].values.len();
    let mut sums = [[_mm512_setzero_ps(); N]; Q];
    for q in 0..Q {
        let row = queries[q].out.sub(first, N * VECTOR);
        for n in 0..N {
            sums[q][n] = _mm512_mul_ps(load(&row.as_slice()[n * VECTOR..]), states[q].keep);
        }
    }
    let shared = block.count(&queries[0]);
    for (position, value) in block.values.chunks_exact(dim).take(shared).enumerate() {
        for n in 0..N {
            let value = load(&value[first + n * VECTOR..]);
            for q in 0..Q {
                let weight = _mm512_set1_ps(states[q].weights[position]);
                sums[q][n] = _mm512_fmadd_ps(value, weight, sums[q][n]);
            }
        }
    }
    for q in 0..Q {
        for position in shared..block.count(&queries[q]) {
            let weight = _mm512_set1_ps(states[q].weights[position]);
            for n in 0..N {
                let value = load(&block.values[position * dim + first + n * VECTOR..]);
                sums[q][n] = _mm512_fmadd_ps(value, weight, sums[q][n]);
            }
        }
    }
    for q in 0..Q {
        let row = queries[q].out.sub(first, N * VECTOR);
        for n in 0..N {
            store(&mut row.as_mut_slice()[n * VECTOR..], sums[q][n]);
        }
    }
}

/// The largest lane, in all of them.
#[inline]
#[target_feature(enable = "avx512f")]
fn largest_lane(x: __m512) -> __m512 {
    let x = _mm512_max_ps(x, _mm512_shuffle_f32x4::<0x4E>(x, x));
    let x = _mm512_max_ps(x, _mm512_shuffle_f32x4::<0xB1>(x, x));
    let x = _mm512_max_ps(x, _mm512_shuffle_ps::<0x4E>(x, x));
    _mm512_max_ps(x, _mm512_shuffle_ps::<0xB1>(x, x))
}

/// `lanes::fold_vector`, in all lanes.
#[inline]
#[target_feature(enable = "avx512f")]
fn sum_of_lanes(x: __m512) -> __m512 {
    let x = _mm512_add_ps(x, _mm512_shuffle_f32x4::<0x4E>(x, x));
    let x = _mm512_add_ps(x, _mm512_shuffle_f32x4::<0xB1>(x, x));
    let x = _mm512_add_ps(x, _mm512_shuffle_ps::<0x4E>(x, x));
    _mm512_add_ps(x, _mm512_shuffle_ps::<0xB1>(x, x))
}

/// `lanes::exp` of each lane.
#[inline]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
fn exp(x: __m512) -> __m512 {
    let all = |value: f32| _mm512_set1_ps(value);
    let is_low = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, all(-87.0));
    let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
    let bounded = _mm512_min_ps(x, all(88.0));
    let rounder = all(12_582_912.0);
    let power = _mm512_fmadd_ps(bounded, all(std::f32::consts::LOG2_E), rounder);
    let power = _mm512_sub_ps(power, rounder);
    let rest = _mm512_fmadd_ps(power, all(-0.693_359_4), bounded);
    let rest = _mm512_fmadd_ps(power, all(2.121_944_4e-4), rest);
    let mut sum = all(EXP_TERMS[0]);
    for term in &EXP_TERMS[1..] {
        sum = _mm512_fmadd_ps(sum, rest, all(*term));
    }
    let biased = _mm512_add_epi32(_mm512_cvttps_epi32(power), _mm512_set1_epi32(127));
    let scale = _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased));
    let value = _mm512_maskz_mov_ps(!is_low, _mm512_mul_ps(sum, scale));
    _mm512_mask_blend_ps(is_nan, value, x)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(values: &[f32]) -> __m512 {
    let values = &values[..VECTOR];
    // SAFETY: as many values as are read.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(values: &mut [f32], vector: __m512) {
    let values = &mut values[..VECTOR];
    // SAFETY: as many values as are written.
    unsafe { _mm512_storeu_ps(values.as_mut_ptr(), vector) }
}
