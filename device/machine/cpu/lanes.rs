//! The bodies of the tile primitives, over 32 lanes that the compiler maps to vectors.

use super::{Matrix, Query};
use crate::machine::Rows;
use crate::machine::memory::Span;
use half::f16;
use tilert_mk_shared::limits::{ATTENTION_BLOCK, ATTENTION_SPLIT_MAX};
use tilert_mk_shared::task::WeightFormat;

pub(super) const LANES: usize = 32;
/// Lanes of a vector of the widest instruction set.
pub(super) const VECTOR: usize = LANES / 2;
/// Two vectors: sums that do not wait for each other.
pub(super) type Lanes = [[f32; VECTOR]; 2];

/// Positions that attention scores before it adds their values.
pub(super) const SCORE_BLOCK: usize = ATTENTION_BLOCK as usize;
/// Positions from one block of a split to the next.
pub(super) const SCORE_STEP: usize = SCORE_BLOCK * ATTENTION_SPLIT_MAX as usize;
/// Keys whose products with a query run side by side.
const KEY_GROUP: usize = 4;

/// A stored value that widens to f32.
pub(super) trait Stored: Copy {
    fn to_f32(self) -> f32;
}
impl Stored for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub(super) struct Bf16(u16);
impl Stored for Bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits((self.0 as u32) << 16)
    }
}
impl Stored for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        // In steps that become vectors. Shifted into place the exponent is 112 too small, also of
        // subnormal values, which the product puts right; infinities and the rest keep theirs.
        const SCALE: f32 = f32::from_bits((127 + 112) << 23);
        let (sign, rest) = (u32::from(self.to_bits()) >> 15, u32::from(self.to_bits()) & 0x7fff);
        let scaled = (f32::from_bits(rest << 13) * SCALE).to_bits();
        let value = if rest < 0x7c00 { scaled } else { 0x7f80_0000 | rest << 13 };
        f32::from_bits(sign << 31 | value)
    }
}

#[inline(always)]
fn fold(lanes: &Lanes) -> f32 {
    let [mut sums, high] = *lanes;
    for (sum, high) in sums.iter_mut().zip(high) {
        *sum += high;
    }
    fold_vector(sums)
}

/// The sum of a vector's lanes: the upper half onto the lower, then quarters and so on.
#[inline(always)]
pub(super) fn fold_vector(mut sums: [f32; VECTOR]) -> f32 {
    let mut width = VECTOR / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0]
}

/// At most `LANES` values; zero where there are fewer.
#[inline(always)]
pub(super) fn load<W: Stored>(values: &[W]) -> Lanes {
    let mut lanes = [[0.0; VECTOR]; 2];
    if values.len() == LANES {
        for (half, values) in lanes.iter_mut().zip(values.chunks_exact(VECTOR)) {
            for (lane, value) in half.iter_mut().zip(values) {
                *lane = value.to_f32();
            }
        }
    } else {
        for (lane, value) in lanes.as_flattened_mut().iter_mut().zip(values) {
            *lane = value.to_f32();
        }
    }
    lanes
}

/// Products of `R` rows with `T` inputs. The order of additions depends on neither.
///
/// In loops, not in closures: a closure has no instruction set of its own.
#[inline(always)]
fn dots<W: Stored, const R: usize, const T: usize>(w: [&[W]; R], x: [&[f32]; T]) -> [[f32; T]; R] {
    let len = x[0].len();
    let whole = len - len % LANES;
    let mut sums = [[[[0.0f32; VECTOR]; 2]; T]; R];
    let mut at = 0;
    while at < whole {
        add(&mut sums, &w, &x, at, at + LANES);
        at += LANES;
    }
    if whole < len {
        add(&mut sums, &w, &x, whole, len);
    }
    let mut products = [[0.0; T]; R];
    for r in 0..R {
        for t in 0..T {
            products[r][t] = fold(&sums[r][t]);
        }
    }
    products
}

/// Adds the products of values `at..end`, at most `LANES`.
#[inline(always)]
fn add<W: Stored, const R: usize, const T: usize>(
    sums: &mut [[Lanes; T]; R],
    w: &[&[W]; R],
    x: &[&[f32]; T],
    at: usize,
    end: usize,
) {
    let mut inputs = [[[0.0; VECTOR]; 2]; T];
    for t in 0..T {
        inputs[t] = load(&x[t][at..end]);
    }
    for r in 0..R {
        let weights = load(&w[r][at..end]);
        for t in 0..T {
            for half in 0..2 {
                for lane in 0..VECTOR {
                    let sum = &mut sums[r][t][half][lane];
                    *sum = weights[half][lane].mul_add(inputs[t][half][lane], *sum);
                }
            }
        }
    }
}

#[inline(always)]
pub(super) fn weights<W: Stored>(m: &Matrix) -> Span<W> {
    // SAFETY: a linear task names weights that the host has bound and keeps until the workers end.
    unsafe { Span::new(m.address, m.row_count * m.in_dim) }
}

/// Products of a row with `T` tokens.
#[inline(always)]
fn row_products<W: Stored, const T: usize>(
    row: &[W],
    x: &Rows,
    token: usize,
    y: &Rows,
    out: usize,
) {
    let inputs = x.values.as_slice();
    let input = std::array::from_fn(|t| &inputs[(token + t) * x.stride..][..row.len()]);
    let [products] = dots::<W, 1, T>([row], input);
    for (t, product) in products.iter().enumerate() {
        y.values.write((token + t) * y.stride + out, *product);
    }
}

/// Row by row, so that weights are one stream, which the chip's own prefetcher follows at the speed
/// of memory: measured, rows side by side reach half of it, and with requests ahead four fifths.
#[inline(always)]
fn matmul_stored<W: Stored>(m: Matrix, x: Rows, token_count: usize, y: Rows, out_first: usize) {
    let span = weights::<W>(&m);
    for (row, out) in span.as_slice().chunks_exact(m.in_dim).zip(out_first..) {
        let mut token = 0;
        while token + 2 <= token_count {
            row_products::<W, 2>(row, &x, token, &y, out);
            token += 2;
        }
        if token < token_count {
            row_products::<W, 1>(row, &x, token, &y, out);
        }
    }
}

#[inline(always)]
pub(super) fn matmul(m: Matrix, x: Rows, token_count: usize, y: Rows, out_first: usize) {
    match m.format {
        WeightFormat::F32 => matmul_stored::<f32>(m, x, token_count, y, out_first),
        WeightFormat::F16 => matmul_stored::<f16>(m, x, token_count, y, out_first),
        WeightFormat::Bf16 => matmul_stored::<Bf16>(m, x, token_count, y, out_first),
        WeightFormat::Q8 | WeightFormat::Q4 | WeightFormat::Fp8 => {}
    }
}

#[inline(always)]
pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let [[sum]] = dots([x], [x]);
    let scale = 1.0 / (sum / x.len() as f32 + eps).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}

#[inline(always)]
pub(super) fn rope(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (low, high) = x.split_at_mut(cos.len());
    for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        let (a, b) = (*low, *high);
        *low = a * cos - b * sin;
        *high = b * cos + a * sin;
    }
}

#[inline(always)]
pub(super) fn silu_mul(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + exp(-*gate)) * up;
    }
}

/// Products of a query with as many keys as `scores` holds, `[scores.len(), query.len()]`.
#[inline(always)]
fn score(query: &[f32], keys: &[f32], scores: &mut [f32]) {
    let dim = query.len();
    let mut key_groups = keys.chunks_exact(KEY_GROUP * dim);
    let mut score_groups = scores.chunks_exact_mut(KEY_GROUP);
    for (scores, keys) in score_groups.by_ref().zip(key_groups.by_ref()) {
        let group: [&[f32]; KEY_GROUP] = std::array::from_fn(|idx| &keys[idx * dim..][..dim]);
        for (score, [product]) in scores.iter_mut().zip(dots(group, [query])) {
            *score = product;
        }
    }
    let rest = key_groups.remainder().chunks_exact(dim);
    for (score, key) in score_groups.into_remainder().iter_mut().zip(rest) {
        [[*score]] = dots([key], [query]);
    }
}

/// `out = out * keep + sum of weights[i] * values[i]`, in the order of `i`; `out` is held in `N`
/// vectors at a time.
#[inline(always)]
fn accumulate<const N: usize>(
    out: &mut [f32],
    first: usize,
    keep: f32,
    weights: &[f32],
    values: &[f32],
) {
    let dim = out.len();
    let out = &mut out[first..][..N * VECTOR];
    let mut sums = [[0.0; VECTOR]; N];
    sums.as_flattened_mut().copy_from_slice(out);
    for sum in sums.iter_mut().flatten() {
        *sum *= keep;
    }
    for (weight, value) in weights.iter().zip(values.chunks_exact(dim)) {
        let value = &value[first..][..N * VECTOR];
        for (sums, value) in sums.iter_mut().zip(value.chunks_exact(VECTOR)) {
            for (sum, value) in sums.iter_mut().zip(value) {
                *sum = value.mul_add(*weight, *sum);
            }
        }
    }
    out.copy_from_slice(sums.as_flattened());
}

/// The blocks of a split in one plane, `[positions, dim]` from the split's first position on.
#[inline(always)]
fn blocks(plane: &[f32], dim: usize) -> impl Iterator<Item = &[f32]> {
    let steps = plane.chunks(SCORE_STEP * dim);
    steps.map(move |step| &step[..step.len().min(SCORE_BLOCK * dim)])
}

/// Blocks are always whole, with weights of zero where there are no positions.
#[inline(always)]
pub(super) fn attend(queries: &[Query], keys: &[f32], values: &[f32], scale: f32) {
    for query in queries {
        let dim = query.values.len();
        let [keys, values] = [keys, values].map(|plane| &plane[..query.count * dim]);
        let sums = query.out.sub(0, dim);
        let (largest, total) =
            attend_query(query.values.as_slice(), keys, values, scale, sums.as_mut_slice());
        query.out.write(dim, largest);
        query.out.write(dim + 1, total);
    }
}

#[inline(always)]
fn attend_query(
    query: &[f32],
    keys: &[f32],
    values: &[f32],
    scale: f32,
    out: &mut [f32],
) -> (f32, f32) {
    let dim = query.len();
    let (mut largest, mut total) = (f32::NEG_INFINITY, 0.0f32);
    out.fill(0.0);
    for (keys, values) in blocks(keys, dim).zip(blocks(values, dim)) {
        let count = keys.len() / dim;
        let mut weights = [f32::NEG_INFINITY; SCORE_BLOCK];
        score(query, keys, &mut weights[..count]);
        let mut block_largest = largest;
        for score in &mut weights {
            *score *= scale;
            block_largest = block_largest.max(*score);
        }
        let keep = exp(largest - block_largest);
        largest = block_largest;
        let mut sums = [0.0; VECTOR];
        for weights in weights.chunks_exact_mut(VECTOR) {
            for (weight, sum) in weights.iter_mut().zip(&mut sums) {
                *weight = exp(*weight - largest);
                *sum += *weight;
            }
        }
        total = total * keep + fold_vector(sums);
        add_values(out, keep, &weights[..count], values);
    }
    (largest, total)
}

/// `out = out * keep + sum of weights[i] * values[i]`, in the order of `i`.
#[inline(always)]
fn add_values(out: &mut [f32], keep: f32, weights: &[f32], values: &[f32]) {
    let (dim, mut first) = (out.len(), 0);
    while first + 4 * VECTOR <= dim {
        accumulate::<4>(out, first, keep, weights, values);
        first += 4 * VECTOR;
    }
    while first + VECTOR <= dim {
        accumulate::<1>(out, first, keep, weights, values);
        first += VECTOR;
    }
    add_rest(out, first, keep, weights, values);
}

/// `add_values` for the columns from `first` on, fewer than a vector.
#[inline(always)]
pub(super) fn add_rest(out: &mut [f32], first: usize, keep: f32, weights: &[f32], values: &[f32]) {
    let dim = out.len();
    let rest = &mut out[first..];
    for value in rest.iter_mut() {
        *value *= keep;
    }
    for (weight, value) in weights.iter().zip(values.chunks_exact(dim)) {
        add_scaled(rest, &value[first..], *weight);
    }
}

#[inline(always)]
pub(super) fn merge(splits: &[f32], stride: usize, out: &mut [f32]) {
    let dim = out.len();
    let mut largest = f32::NEG_INFINITY;
    for split in splits.chunks(stride) {
        largest = largest.max(split[dim]);
    }
    out.fill(0.0);
    let mut total = 0.0;
    for split in splits.chunks(stride) {
        let weight = exp(split[dim] - largest);
        total += weight * split[dim + 1];
        add_scaled(out, &split[..dim], weight);
    }
    for value in out {
        *value /= total;
    }
}

#[inline(always)]
pub(super) fn add_scaled(out: &mut [f32], x: &[f32], scale: f32) {
    for (out, x) in out.iter_mut().zip(x) {
        *out = x.mul_add(scale, *out);
    }
}

#[inline(always)]
fn widen_stored<W: Stored>(address: u64, first: u64, out: &mut [f32]) {
    let address = address + first * size_of::<W>() as u64;
    // SAFETY: the host has bound the table and keeps it until the workers end.
    let span = unsafe { Span::<W>::new(address, out.len()) };
    for (out, value) in out.iter_mut().zip(span.as_slice()) {
        *out = value.to_f32();
    }
}

#[inline(always)]
pub(super) fn widen(address: u64, format: WeightFormat, first: u64, out: &mut [f32]) {
    match format {
        WeightFormat::F32 => widen_stored::<f32>(address, first, out),
        WeightFormat::F16 => widen_stored::<f16>(address, first, out),
        WeightFormat::Bf16 => widen_stored::<Bf16>(address, first, out),
        WeightFormat::Q8 | WeightFormat::Q4 | WeightFormat::Fp8 => {}
    }
}

/// Taylor's coefficients of `e^x`, from that of `x^6` down.
pub(super) const EXP_TERMS: [f32; 7] =
    [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];

/// 1.5 * 2^23.
const SHIFT: f32 = 12_582_912.0;

/// Reduction by `ln 2` in two parts, then the degree-6 Taylor polynomial on `|r| <= ln(2)/2`.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    if x.is_nan() {
        return x;
    }
    if x < -87.0 {
        return 0.0;
    }
    let x = x.min(88.0);
    // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, which is in the lower bits in between. As a
    // conversion it would not become vectors.
    let shifted = x.mul_add(std::f32::consts::LOG2_E, SHIFT);
    let power = shifted - SHIFT;
    let rest = power.mul_add(-0.693_359_4, x);
    let rest = power.mul_add(2.121_944_4e-4, rest);
    let mut sum = EXP_TERMS[0];
    for term in &EXP_TERMS[1..] {
        sum = sum.mul_add(rest, *term);
    }
    sum * f32::from_bits(shifted.to_bits().wrapping_sub(SHIFT.to_bits()).wrapping_add(127) << 23)
}

#[cfg(test)]
mod tests {
    use super::super::{Isa, exp};
    use super::Stored;
    use half::f16;

    #[test]
    fn every_binary16_widens_as_it_should() {
        for bits in 0..=u16::MAX {
            let value = f16::from_bits(bits);
            let (found, expected) = (Stored::to_f32(value), value.to_f32());
            let is_same = found.to_bits() == expected.to_bits();
            assert!(is_same || found.is_nan() && expected.is_nan(), "{bits:#x}: {found}");
        }
    }

    #[test]
    fn exp_is_close_and_the_same_for_every_instruction_set() {
        for step in -870..870 {
            let x = step as f32 * 0.1;
            let portable = exp(Isa::Portable, x);
            let exact = f64::from(x).exp();
            assert!((f64::from(portable) / exact - 1.0).abs() < 3e-7, "e^{x} = {portable}");
            for isa in [Isa::Avx2, Isa::Avx512] {
                if isa.is_supported() {
                    assert_eq!(exp(isa, x).to_bits(), portable.to_bits());
                }
            }
        }
    }
}
