//! Products on AVX-512.
//!
//! As plain arrays, which the other primitives use, the compiler keeps sums in memory. The order of
//! additions is that of `lanes`, lane by lane and in the fold, so the bits are the same.

// Their loops count: closures have no instruction set of their own.
#[allow(clippy::needless_range_loop)]
pub(super) mod attend;
#[allow(clippy::needless_range_loop)]
mod bf16;

use std::arch::x86_64::{
    __m512, _mm256_loadu_si256, _mm512_add_ps, _mm512_castsi512_ps, _mm512_cvtepu16_epi32,
    _mm512_cvtph_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_permutex2var_ps, _mm512_setr_epi32,
    _mm512_setzero_ps, _mm512_shuffle_f32x4, _mm512_shuffle_ps, _mm512_slli_epi32,
    _mm512_storeu_ps,
};
use std::ops::Range;

use half::f16;
use tilert_mk_shared::task::WeightFormat;

use super::lanes::{Bf16, LANES, Stored, VECTOR, weights};
use super::{InputForm, Matrix, STREAM_AHEAD, amx};
use crate::machine::Rows;

/// Rows of a block.
const ROWS: usize = 3;
/// Tokens of a block: its sums are 24 vectors, which the 32 registers hold.
const TOKENS: usize = 4;
/// Weight bytes between those that are multiplied and those that are requested, where rows are read
/// side by side: streams too short for the prefetcher of the chip.
const SIDE_BY_SIDE_AHEAD: usize = 16 << 10;
/// Rows of models so small that their weights stay in the caches: four side by side share inputs.
const SHORT_ROW_BYTES: usize = 1 << 9;
/// Sums that are folded at once.
const FOLDED: usize = 16;

/// Bytes ahead of which weights that are one stream are requested; 0 for no requests. On a Zen 5 such reads take 50 to
/// 90% of a core's bandwidth without them and all of it with them; a Zen 4, which has no AVX-VNNI, follows the stream
/// by itself, and requests take up to half of its speed.
pub(super) fn stream_ahead() -> usize {
    if is_x86_feature_detected!("avxvnni") { STREAM_AHEAD } else { 0 }
}

/// See `super::matmul`.
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
pub(super) fn matmul(m: Matrix, x: Rows, token_count: usize, y: Rows, out_first: usize) {
    match m.inputs {
        // SAFETY: `InputForm::of` has found the instructions.
        InputForm::Tiles => return unsafe { amx::matmul(&m, &x, token_count, &y, out_first) },
        // SAFETY: as above.
        InputForm::Packed => return unsafe { bf16::matmul(&m, &x, token_count, &y, out_first) },
        _ => {}
    }
    match m.format {
        WeightFormat::F32 => matmul_stored::<f32>(m, x, token_count, y, out_first),
        WeightFormat::F16 => matmul_stored::<f16>(m, x, token_count, y, out_first),
        WeightFormat::Bf16 => matmul_stored::<Bf16>(m, x, token_count, y, out_first),
        WeightFormat::Q8 | WeightFormat::Q4 | WeightFormat::Fp8 => {}
    }
}

/// Few tokens are multiplied row by row, so that weights are one stream, which the chip's own
/// prefetcher follows at the speed of memory: measured, rows side by side reach half of that, and
/// four fifths with requests ahead.
#[inline]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
fn matmul_stored<W: Wide>(m: Matrix, x: Rows, token_count: usize, y: Rows, out_first: usize) {
    let (all, whole) = (m.row_count, m.row_count - m.row_count % ROWS);
    let mut token = 0;
    while token + TOKENS <= token_count {
        // The first tokens bring the rows into the cache for the others.
        let ahead = if token == 0 { SIDE_BY_SIDE_AHEAD } else { 0 };
        products::<W, ROWS, TOKENS>(&m, 0..whole, &x, token, &y, out_first, ahead);
        products::<W, 1, TOKENS>(&m, whole..all, &x, token, &y, out_first, 0);
        token += TOKENS;
    }
    let ahead = stream_ahead();
    match token_count - token {
        1 if m.in_dim * size_of::<W>() <= SHORT_ROW_BYTES => {
            let fours = all - all % 4;
            products::<W, 4, 1>(&m, 0..fours, &x, token, &y, out_first, 0);
            products::<W, 1, 1>(&m, fours..all, &x, token, &y, out_first, 0);
        }
        1 => products::<W, 1, 1>(&m, 0..all, &x, token, &y, out_first, ahead),
        2 => products::<W, 1, 2>(&m, 0..all, &x, token, &y, out_first, ahead),
        3 => products::<W, 1, 3>(&m, 0..all, &x, token, &y, out_first, ahead),
        _ => {}
    }
}

/// Products of `rows`, `R` side by side, with `T` tokens from `token` on. Weights are requested `ahead` bytes before
/// they are multiplied, unless that is 0.
#[inline]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
fn products<W: Wide, const R: usize, const T: usize>(
    m: &Matrix,
    rows: Range<usize>,
    x: &Rows,
    token: usize,
    y: &Rows,
    out_first: usize,
    ahead: usize,
) {
    let span = weights::<W>(m);
    let (weights, inputs) = (span.as_slice(), x.values.as_slice());
    let input = side_by_side::<f32, T>(&inputs[token * x.stride..], x.stride, m.in_dim);
    // Zeroed once: what a block of fewer sums leaves alone is folded and not used.
    let mut sums = [_mm512_setzero_ps(); FOLDED];
    let mut first = rows.start;
    while first < rows.end {
        let end = rows.end.min(first + FOLDED / T / R * R);
        for row in (first..end).step_by(R) {
            let w = side_by_side::<W, R>(&weights[row * m.in_dim..], m.in_dim, m.in_dim);
            let row_sums = dots::<W, R, T>(w, input, ahead);
            // A constant if a block is all that is folded at once: the sums then stay in registers.
            let base = if 2 * R * T > FOLDED { 0 } else { (row - first) * T };
            for r in 0..R {
                for t in 0..T {
                    sums[base + r * T + t] = row_sums[r][t];
                }
            }
        }
        let folded = fold(&sums);
        for row in first..end {
            for t in 0..T {
                let out = (token + t) * y.stride + out_first + row;
                y.values.write(out, folded[(row - first) * T + t]);
            }
        }
        first = end;
    }
}

/// The first `len` values of `N` rows that are `stride` apart.
#[inline(always)]
fn side_by_side<W, const N: usize>(values: &[W], stride: usize, len: usize) -> [&[W]; N] {
    let mut rows = [&values[..0]; N];
    for (idx, row) in rows.iter_mut().enumerate() {
        *row = &values[idx * stride..][..len];
    }
    rows
}

/// Sums of products of rows with inputs, all of one length; the upper half of the lanes is added to
/// the lower. As many bytes as it reads of `w` are requested `ahead` bytes after them, none if that is 0.
///
/// In loops, not in closures: code for AVX-512 is not inlined into the functions that take those.
#[inline]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
fn dots<W: Wide, const R: usize, const T: usize>(
    w: [&[W]; R],
    x: [&[f32]; T],
    ahead: usize,
) -> [[__m512; T]; R] {
    let len = x[0].len();
    assert!(w.iter().all(|w| w.len() == len) && x.iter().all(|x| x.len() == len));
    let whole = len - len % LANES;
    let mut sums = [[[_mm512_setzero_ps(); 2]; T]; R];
    let mut at = 0;
    while at < whole {
        if ahead > 0 {
            let bytes = R * LANES * size_of::<W>();
            let address = w[0].as_ptr().wrapping_add(at * R).wrapping_byte_add(ahead);
            super::prefetch(address as u64, bytes as u64);
        }
        for half in 0..2 {
            // SAFETY: all slices have `len` values, as asserted above: checks of each would take a tenth of the time.
            unsafe { add(&mut sums, half, &w, &x, at + half * VECTOR) };
        }
        at += LANES;
    }
    if whole < len {
        let (mut weights, mut inputs) = ([[W::default(); LANES]; R], [[0.0; LANES]; T]);
        let mut tails: ([&[W]; R], [&[f32]; T]) = ([&[]; R], [&[]; T]);
        for (r, padded) in weights.iter_mut().enumerate() {
            padded[..len - whole].copy_from_slice(&w[r][whole..]);
            tails.0[r] = padded;
        }
        for (t, padded) in inputs.iter_mut().enumerate() {
            padded[..len - whole].copy_from_slice(&x[t][whole..]);
            tails.1[t] = padded;
        }
        for half in 0..2 {
            // SAFETY: arrays of `LANES` values.
            unsafe { add(&mut sums, half, &tails.0, &tails.1, half * VECTOR) };
        }
    }
    let mut folded = [[_mm512_setzero_ps(); T]; R];
    for r in 0..R {
        for t in 0..T {
            folded[r][t] = _mm512_add_ps(sums[r][t][0], sums[r][t][1]);
        }
    }
    folded
}

/// Adds the products of the vectors from value `at` on to one of the two sums of each row and input. One after the
/// other: vectors of both halves and the sums of a block are more than there are registers.
///
/// # Safety
/// There are as many values.
#[inline]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
unsafe fn add<W: Wide, const R: usize, const T: usize>(
    sums: &mut [[[__m512; 2]; T]; R],
    half: usize,
    w: &[&[W]; R],
    x: &[&[f32]; T],
    at: usize,
) {
    // SAFETY: by the caller's word.
    unsafe {
        let mut inputs = [_mm512_setzero_ps(); T];
        for t in 0..T {
            inputs[t] = f32::vector(x[t].as_ptr().add(at));
        }
        for r in 0..R {
            let weights = W::vector(w[r].as_ptr().add(at));
            for t in 0..T {
                sums[r][t][half] = _mm512_fmadd_ps(weights, inputs[t], sums[r][t][half]);
            }
        }
    }
}

/// Stored values that AVX-512 widens.
trait Wide: Stored + Default {
    /// Values `0..16` after `at`.
    ///
    /// # Safety
    /// They can be read, and the chip has AVX-512F.
    unsafe fn vector(at: *const Self) -> __m512;
}
impl Wide for f32 {
    #[inline(always)]
    unsafe fn vector(at: *const f32) -> __m512 {
        // SAFETY: by the contract of `Wide::vector`.
        unsafe { _mm512_loadu_ps(at) }
    }
}
impl Wide for f16 {
    #[inline(always)]
    unsafe fn vector(at: *const f16) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())) }
    }
}
impl Wide for Bf16 {
    #[inline(always)]
    unsafe fn vector(at: *const Bf16) -> __m512 {
        // SAFETY: as above.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }
}

/// The sum of each vector's lanes, all at once: the upper half onto the lower, then quarters and so
/// on.
#[inline]
#[target_feature(enable = "avx512f")]
fn fold(sums: &[__m512; FOLDED]) -> [f32; FOLDED] {
    let mut halves = [_mm512_setzero_ps(); 8];
    for i in 0..8 {
        let (a, b) = (sums[i], sums[i + 8]);
        let (low, high) = (_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xEE>(a, b));
        halves[i] = _mm512_add_ps(low, high);
    }
    let low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    let high = _mm512_setr_epi32(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    let mut quarters = [_mm512_setzero_ps(); 4];
    for i in 0..4 {
        let (a, b) = (halves[i], halves[i + 4]);
        let (low, high) = (_mm512_permutex2var_ps(a, low, b), _mm512_permutex2var_ps(a, high, b));
        quarters[i] = _mm512_add_ps(low, high);
    }
    let mut pairs = [_mm512_setzero_ps(); 2];
    for i in 0..2 {
        let (a, b) = (quarters[i], quarters[i + 2]);
        let (low, high) = (_mm512_shuffle_ps::<0x44>(a, b), _mm512_shuffle_ps::<0xEE>(a, b));
        pairs[i] = _mm512_add_ps(low, high);
    }
    let [a, b] = pairs;
    let ends = _mm512_add_ps(_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xDD>(a, b));
    let ends = _mm512_shuffle_ps::<0xD8>(ends, ends);
    let mut folded = [0.0; FOLDED];
    // SAFETY: an array of 16 values is what is written.
    unsafe { _mm512_storeu_ps(folded.as_mut_ptr(), ends) };
    folded
}
