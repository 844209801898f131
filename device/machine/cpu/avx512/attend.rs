//! Attention on AVX-512: what `lanes::attend` does, in the same order, for several queries at once.

use std::arch::x86_64::{
    __m512, _CMP_LT_OQ, _CMP_UNORD_Q, _mm512_add_epi32, _mm512_add_ps, _mm512_castsi512_ps,
    _mm512_cmp_ps_mask, _mm512_cvttps_epi32, _mm512_fmadd_ps, _mm512_loadu_ps,
    _mm512_mask_blend_ps, _mm512_maskz_mov_ps, _mm512_max_ps, _mm512_min_ps, _mm512_mul_ps,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_slli_epi32, _mm512_storeu_ps,
    _mm512_sub_ps,
};

use super::{FOLDED, dots, fold, side_by_side};
use crate::machine::Rows;
use crate::machine::cpu::lanes::{
    EXP_TERMS, SCORE_BLOCK, VECTOR, add_rest, blocks, exp, fold_vector,
};

/// Vectors of a block's weights.
const WEIGHT_VECTORS: usize = SCORE_BLOCK / VECTOR;

/// Weights of a block's positions, or their scores.
type Weights = [f32; SCORE_BLOCK];

/// See `cpu::attend`.
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
pub(in crate::machine::cpu) fn attend(
    queries: Rows,
    query_count: usize,
    keys: &[f32],
    values: &[f32],
    scale: f32,
    out: Rows,
) {
    let mut first = 0;
    while first < query_count {
        let [queries, out] = [queries, out].map(|rows| {
            let at = first * rows.stride;
            Rows { values: rows.values.sub(at, rows.values.len() - at), ..rows }
        });
        first += match query_count - first {
            1 => group::<1>(queries, keys, values, scale, out),
            2 | 3 => group::<2>(queries, keys, values, scale, out),
            _ => group::<4>(queries, keys, values, scale, out),
        };
    }
}

/// The first `Q` queries, which share the loads of keys and values; returns `Q`.
#[inline]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
fn group<const Q: usize>(
    queries: Rows,
    keys: &[f32],
    values: &[f32],
    scale: f32,
    out: Rows,
) -> usize {
    let dim = queries.stride;
    let query = side_by_side::<f32, Q>(queries.values.as_slice(), dim, dim);
    let (mut largest, mut totals) = ([f32::NEG_INFINITY; Q], [0.0f32; Q]);
    for q in 0..Q {
        out.row(q, dim).as_mut_slice().fill(0.0);
    }
    for (keys, values) in blocks(keys, dim).zip(blocks(values, dim)) {
        let mut weights = [[f32::NEG_INFINITY; SCORE_BLOCK]; Q];
        score(query, keys, &mut weights);
        let mut keep = [0.0; Q];
        for q in 0..Q {
            let before = largest[q];
            let sum = weigh(&mut weights[q], scale, &mut largest[q]);
            keep[q] = exp(before - largest[q]);
            totals[q] = totals[q] * keep[q] + sum;
        }
        add_values(&out, dim, &keep, &weights, values);
    }
    for q in 0..Q {
        out.values.write(q * out.stride + dim, largest[q]);
        out.values.write(q * out.stride + dim + 1, totals[q]);
    }
    Q
}

/// Products of `Q` queries with a block's keys.
#[inline]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
fn score<const Q: usize>(query: [&[f32]; Q], keys: &[f32], scores: &mut [Weights; Q]) {
    let dim = query[0].len();
    let batch = FOLDED / Q;
    let mut sums = [_mm512_setzero_ps(); FOLDED];
    for (first, keys) in (0..).step_by(batch).zip(keys.chunks(batch * dim)) {
        for (idx, key) in keys.chunks_exact(dim).enumerate() {
            let [row] = dots::<f32, 1, Q>([key], query, 0);
            for q in 0..Q {
                sums[idx * Q + q] = row[q];
            }
        }
        let folded = fold(&sums);
        for idx in 0..keys.len() / dim {
            for q in 0..Q {
                scores[q][first + idx] = folded[idx * Q + q];
            }
        }
    }
}

/// Makes weights of scores, given the largest score of the blocks before; returns their sum.
#[inline]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
fn weigh(weights: &mut Weights, scale: f32, largest: &mut f32) -> f32 {
    let mut scaled = [_mm512_setzero_ps(); WEIGHT_VECTORS];
    let mut most = _mm512_set1_ps(*largest);
    for i in 0..WEIGHT_VECTORS {
        scaled[i] = _mm512_mul_ps(load(&weights[i * VECTOR..]), _mm512_set1_ps(scale));
        most = _mm512_max_ps(scaled[i], most);
    }
    let mut lanes = [0.0; VECTOR];
    store(&mut lanes, most);
    for lane in lanes {
        *largest = largest.max(lane);
    }
    let mut sum = _mm512_setzero_ps();
    for i in 0..WEIGHT_VECTORS {
        let weight = exp_vector(_mm512_sub_ps(scaled[i], _mm512_set1_ps(*largest)));
        store(&mut weights[i * VECTOR..], weight);
        sum = _mm512_add_ps(sum, weight);
    }
    store(&mut lanes, sum);
    fold_vector(lanes)
}

/// `out = out * keep + sum of weights[i] * values[i]`, in the order of `i`.
#[inline]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
fn add_values<const Q: usize>(
    out: &Rows,
    dim: usize,
    keep: &[f32; Q],
    weights: &[Weights; Q],
    values: &[f32],
) {
    let mut first = 0;
    while first + 4 * VECTOR <= dim {
        add_columns::<Q, 4>(out, dim, first, keep, weights, values);
        first += 4 * VECTOR;
    }
    if first + 2 * VECTOR <= dim {
        add_columns::<Q, 2>(out, dim, first, keep, weights, values);
        first += 2 * VECTOR;
    }
    if first + VECTOR <= dim {
        add_columns::<Q, 1>(out, dim, first, keep, weights, values);
        first += VECTOR;
    }
    if first < dim {
        for q in 0..Q {
            let row = out.row(q, dim);
            add_rest(row.as_mut_slice(), first, keep[q], &weights[q], values);
        }
    }
}

/// `add_values` for `N` vectors of columns, whose sums are in registers.
#[inline]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
fn add_columns<const Q: usize, const N: usize>(
    out: &Rows,
    dim: usize,
    first: usize,
    keep: &[f32; Q],
    weights: &[Weights; Q],
    values: &[f32],
) {
    let mut sums = [[_mm512_setzero_ps(); N]; Q];
    for (q, sums) in sums.iter_mut().enumerate() {
        let row = out.row(q, dim);
        for (n, sum) in sums.iter_mut().enumerate() {
            let before = load(&row.as_slice()[first + n * VECTOR..]);
            *sum = _mm512_mul_ps(before, _mm512_set1_ps(keep[q]));
        }
    }
    for (position, value) in values.chunks_exact(dim).enumerate() {
        for n in 0..N {
            let value = load(&value[first + n * VECTOR..]);
            for q in 0..Q {
                let weight = _mm512_set1_ps(weights[q][position]);
                sums[q][n] = _mm512_fmadd_ps(value, weight, sums[q][n]);
            }
        }
    }
    for (q, sums) in sums.iter().enumerate() {
        let row = out.row(q, dim);
        for (n, sum) in sums.iter().enumerate() {
            store(&mut row.as_mut_slice()[first + n * VECTOR..], *sum);
        }
    }
}

/// `lanes::exp` of each lane.
#[inline]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
fn exp_vector(x: __m512) -> __m512 {
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
