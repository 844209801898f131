//! Products on AVX2.
//!
//! The order of additions is that of `lanes`, lane by lane and in the fold, so the bits are the
//! same. A vector has 8 of the 32 lanes. Up to three tokens are multiplied row by row with all lanes at
//! once, so that weights are one stream. More tokens share rows: there are registers for the sums of
//! 8 lanes, so these are taken one after the other, over as many columns as stay in the first-level
//! cache (`panels`).

pub(super) mod panels;

use std::arch::x86_64::{
    __m256, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_loadu_si128, _mm_movehdup_ps, _mm_movehl_ps,
    _mm256_add_ps, _mm256_castps256_ps128, _mm256_castsi256_ps, _mm256_cvtepu16_epi32,
    _mm256_cvtph_ps, _mm256_extractf128_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_setzero_ps,
    _mm256_slli_epi32,
};
use std::ops::Range;

use half::f16;
use tilert_mk_shared::task::WeightFormat;

use super::Matrix;
use super::inputs::paneled;
use super::lanes::{Bf16, LANES, Stored, weights};
use crate::machine::Rows;

/// Lanes of a vector.
const WIDTH: usize = 8;
/// Vectors of a row's lanes.
const VECTORS: usize = LANES / WIDTH;
/// Rows of a block.
const ROWS: usize = 2;
/// Rows of models so small that their weights stay in the caches: two side by side.
const SHORT_ROW_BYTES: usize = 1 << 9;

/// Sums of a row and a token.
type Sums = [__m256; VECTORS];

/// See `super::matmul`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn matmul(m: Matrix, x: Rows, token_count: usize, y: Rows, out_first: usize) {
    match m.format {
        WeightFormat::F32 => matmul_stored::<f32>(&m, &x, token_count, &y, out_first),
        WeightFormat::F16 => matmul_stored::<f16>(&m, &x, token_count, &y, out_first),
        WeightFormat::Bf16 => matmul_stored::<Bf16>(&m, &x, token_count, &y, out_first),
        WeightFormat::Q8 | WeightFormat::Q4 | WeightFormat::Fp8 => {}
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn matmul_stored<W: Wide>(m: &Matrix, x: &Rows, token_count: usize, y: &Rows, out_first: usize) {
    let token = paneled(token_count);
    if token > 0 {
        panels::matmul::<W>(m, x, token, y, out_first);
    }
    match token_count - token {
        1 if m.in_dim * size_of::<W>() <= SHORT_ROW_BYTES => {
            let paired = m.row_count - m.row_count % ROWS;
            products::<W, ROWS, 1>(m, 0..paired, x, token, y, out_first);
            products::<W, 1, 1>(m, paired..m.row_count, x, token, y, out_first);
        }
        1 => products::<W, 1, 1>(m, 0..m.row_count, x, token, y, out_first),
        2 => products::<W, 1, 2>(m, 0..m.row_count, x, token, y, out_first),
        3 => products::<W, 1, 3>(m, 0..m.row_count, x, token, y, out_first),
        _ => {}
    }
}

/// Products of `rows`, `R` side by side, with `T` tokens from `token` on.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn products<W: Wide, const R: usize, const T: usize>(
    m: &Matrix,
    rows: Range<usize>,
    x: &Rows,
    token: usize,
    y: &Rows,
    out_first: usize,
) {
    let (weights, inputs) = (weights::<W>(m), x.values.as_slice());
    let mut input = [&inputs[..0]; T];
    for t in 0..T {
        input[t] = &inputs[(token + t) * x.stride..][..m.in_dim];
    }
    for row in rows.step_by(R) {
        let stored = &weights.as_slice()[row * m.in_dim..][..R * m.in_dim];
        let mut w = [stored; R];
        for r in 0..R {
            w[r] = &stored[r * m.in_dim..][..m.in_dim];
        }
        let sums = dots::<W, R, T>(&w, &input);
        for r in 0..R {
            for t in 0..T {
                let out = (token + t) * y.stride + out_first + row + r;
                y.values.write(out, fold(&sums[r][t]));
            }
        }
    }
}

/// Sums of products of rows with inputs, all of one length.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dots<W: Wide, const R: usize, const T: usize>(w: &[&[W]; R], x: &[&[f32]; T]) -> [[Sums; T]; R] {
    let len = x[0].len();
    let whole = len - len % LANES;
    let mut sums = [[[_mm256_setzero_ps(); VECTORS]; T]; R];
    all_lanes(w, x, 0..whole, &mut sums);
    if whole < len {
        let mut weights = [[W::default(); LANES]; R];
        let mut inputs = [[0.0; LANES]; T];
        for r in 0..R {
            weights[r][..len - whole].copy_from_slice(&w[r][whole..]);
        }
        for t in 0..T {
            inputs[t][..len - whole].copy_from_slice(&x[t][whole..]);
        }
        all_lanes(&slices(&weights), &slices(&inputs), 0..LANES, &mut sums);
    }
    sums
}

/// The arrays as slices.
#[inline]
fn slices<V, const N: usize>(arrays: &[[V; LANES]; N]) -> [&[V]; N] {
    arrays.each_ref().map(|row| &row[..])
}

/// Adds the products of `columns`, a multiple of `LANES`, to all lanes' sums.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn all_lanes<W: Wide, const R: usize, const T: usize>(
    w: &[&[W]; R],
    x: &[&[f32]; T],
    columns: Range<usize>,
    sums: &mut [[Sums; T]; R],
) {
    check_columns(w, x, columns.end);
    for at in columns.step_by(LANES) {
        for vector in 0..VECTORS {
            let at = at + vector * WIDTH;
            for r in 0..R {
                // SAFETY: `WIDTH` values from `at` on, which is checked above, of each row.
                let weights = unsafe { W::vector(w[r].as_ptr().add(at)) };
                for t in 0..T {
                    // SAFETY: as above.
                    let input = unsafe { f32::vector(x[t].as_ptr().add(at)) };
                    let sum = &mut sums[r][t][vector];
                    *sum = _mm256_fmadd_ps(weights, input, *sum);
                }
            }
        }
    }
}

/// Panics if a row ends before column `end`. Once, not for each load: the loops are that short.
#[inline]
fn check_columns<W, const R: usize, const T: usize>(w: &[&[W]; R], x: &[&[f32]; T], end: usize) {
    for row in w {
        assert!(end <= row.len());
    }
    for row in x {
        assert!(end <= row.len());
    }
}

/// The sum of all lanes: the upper half onto the lower, then quarters and so on.
#[inline]
#[target_feature(enable = "avx2")]
fn fold(sums: &Sums) -> f32 {
    let [a, b, c, d] = *sums;
    let eight = _mm256_add_ps(_mm256_add_ps(a, c), _mm256_add_ps(b, d));
    let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

/// Stored values that AVX2 widens.
trait Wide: Stored + Default {
    /// Values `0..8` after `at`.
    ///
    /// # Safety
    /// They can be read, and the chip has AVX2 and F16C.
    unsafe fn vector(at: *const Self) -> __m256;
}
impl Wide for f32 {
    #[inline(always)]
    unsafe fn vector(at: *const f32) -> __m256 {
        // SAFETY: by the contract of `Wide::vector`.
        unsafe { _mm256_loadu_ps(at) }
    }
}
impl Wide for f16 {
    #[inline(always)]
    unsafe fn vector(at: *const f16) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(at.cast())) }
    }
}
impl Wide for Bf16 {
    #[inline(always)]
    unsafe fn vector(at: *const Bf16) -> __m256 {
        // SAFETY: as above.
        unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        }
    }
}
