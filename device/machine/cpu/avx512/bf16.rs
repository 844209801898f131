//! Products of bf16 weights with inputs that are rounded to bf16, by the instructions for them.
//!
//! These add two products to a sum in an order and with a rounding of their own, so bits are those
//! of chips that have them; they depend on neither the task nor the other tokens.

use std::arch::x86_64::{
    __m512, __m512bh, _MM_HINT_T0, _mm512_add_ps, _mm512_dpbf16_ps, _mm512_loadu_si512,
    _mm512_setzero_ps,
};
use std::mem::transmute;
use std::ops::Range;

use super::{FOLDED, fold};
use crate::machine::Rows;
use crate::machine::cpu::{Matrix, request};
use crate::machine::memory::Span;

/// Values of a vector.
const WIDTH: usize = 32;
/// Columns whose products go to the two sums of a row and a token.
const COLUMNS: usize = 2 * WIDTH;
/// Rows of a block.
const ROWS: usize = 3;
/// Tokens of a block.
const TOKENS: usize = 4;

/// Columns up to which the next tile of a stage is requested while one is multiplied with many tokens: beside the
/// inputs of longer rows there is no room for it in the second-level cache.
const NEXT_COLUMNS_MAX: usize = 1024;
/// Groups of tokens among which the request is shared, at least.
const NEXT_GROUPS_MIN: usize = 8;

/// See `cpu::matmul`; input rows are `InputForm::Packed`.
#[target_feature(enable = "avx512f,avx512bf16,avx2,fma,f16c")]
pub(super) fn matmul(m: &Matrix, x: &Rows, token_count: usize, y: &Rows, out_first: usize) {
    let whole = m.row_count - m.row_count % ROWS;
    let share = next_share(m, token_count / TOKENS);
    let mut token = 0;
    while token + TOKENS <= token_count {
        products::<ROWS, TOKENS>(m, 0..whole, x, [token, share], y, out_first);
        products::<1, TOKENS>(m, whole..m.row_count, x, [token, 0], y, out_first);
        token += TOKENS;
    }
    while token < token_count {
        products::<1, 1>(m, 0..m.row_count, x, [token, 0], y, out_first);
        token += 1;
    }
}

/// Bytes of the worker's next tile that are requested for each row that is multiplied with one of `groups` groups
/// of tokens; 0 if none are.
fn next_share(m: &Matrix, groups: usize) -> usize {
    if groups < NEXT_GROUPS_MIN || m.in_dim > NEXT_COLUMNS_MAX {
        return 0;
    }
    m.in_dim * size_of::<u16>() / groups
}

/// Requests such shares for `rows` and a group of tokens. The next tile is what follows the matrix in memory, unless
/// the stage ends.
#[inline]
#[target_feature(enable = "avx512f")]
fn request_next(m: &Matrix, rows: Range<usize>, group: usize, share: usize) {
    let end = m.address + (m.row_count * m.in_dim * size_of::<u16>()) as u64;
    let at = |row: usize| ((group * m.row_count + row) * share) as u64 & !63;
    let (first, last) = (at(rows.start), at(rows.end));
    request::<_MM_HINT_T0>(end + first, last - first);
}

/// Products of `rows`, `R` side by side, with `T` tokens from `token` on; `share` as in `request_next`.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16,avx2,fma,f16c")]
fn products<const R: usize, const T: usize>(
    m: &Matrix,
    rows: Range<usize>,
    x: &Rows,
    [token, share]: [usize; 2],
    y: &Rows,
    out_first: usize,
) {
    // SAFETY: a linear task names weights that the host has bound and keeps until the workers end.
    let weights = unsafe { Span::<u16>::new(m.address, m.row_count * m.in_dim) };
    let mut inputs: [&[u16]; T] = [&[]; T];
    for t in 0..T {
        let row = x.row(token + t, m.in_dim);
        // SAFETY: `InputForm::convert` has left as many values at the row's begin.
        inputs[t] = unsafe { std::slice::from_raw_parts(row.address() as *const u16, m.in_dim) };
    }
    let mut sums = [_mm512_setzero_ps(); FOLDED];
    for row in rows.step_by(R) {
        let mut w: [&[u16]; R] = [&[]; R];
        for r in 0..R {
            w[r] = &weights.as_slice()[(row + r) * m.in_dim..][..m.in_dim];
        }
        if share > 0 {
            request_next(m, row..row + R, token / T, share);
        }
        let found = dots::<R, T>(&w, &inputs);
        for r in 0..R {
            for t in 0..T {
                sums[r * T + t] = found[r][t];
            }
        }
        let folded = fold(&sums);
        for r in 0..R {
            for t in 0..T {
                let out = (token + t) * y.stride + out_first + row + r;
                y.values.write(out, folded[r * T + t]);
            }
        }
    }
}

/// Sums of products of rows with inputs, all of one length.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16,avx2,fma,f16c")]
fn dots<const R: usize, const T: usize>(w: &[&[u16]; R], x: &[&[u16]; T]) -> [[__m512; T]; R] {
    let len = x[0].len();
    assert!(w.iter().all(|w| w.len() == len) && x.iter().all(|x| x.len() == len));
    let whole = len - len % COLUMNS;
    let mut sums = [[[_mm512_setzero_ps(); 2]; T]; R];
    for at in (0..whole).step_by(COLUMNS) {
        // SAFETY: all slices have `len` values, as asserted above.
        unsafe { add(&mut sums, w, x, at) };
    }
    if whole < len {
        let (mut weights, mut inputs) = ([[0; COLUMNS]; R], [[0; COLUMNS]; T]);
        for r in 0..R {
            weights[r][..len - whole].copy_from_slice(&w[r][whole..]);
        }
        for t in 0..T {
            inputs[t][..len - whole].copy_from_slice(&x[t][whole..]);
        }
        let mut tails: ([&[u16]; R], [&[u16]; T]) = ([&[]; R], [&[]; T]);
        for r in 0..R {
            tails.0[r] = &weights[r];
        }
        for t in 0..T {
            tails.1[t] = &inputs[t];
        }
        // SAFETY: arrays of `COLUMNS` values.
        unsafe { add(&mut sums, &tails.0, &tails.1, 0) };
    }
    let mut totals = [[_mm512_setzero_ps(); T]; R];
    for r in 0..R {
        for t in 0..T {
            totals[r][t] = _mm512_add_ps(sums[r][t][0], sums[r][t][1]);
        }
    }
    totals
}

/// Adds the products of `COLUMNS` columns from `at` on.
///
/// # Safety
/// All slices have as many.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn add<const R: usize, const T: usize>(
    sums: &mut [[[__m512; 2]; T]; R],
    w: &[&[u16]; R],
    x: &[&[u16]; T],
    at: usize,
) {
    for half in 0..2 {
        let at = at + half * WIDTH;
        // SAFETY: by the caller's word.
        let load = |values: &[u16]| unsafe { load(values.as_ptr().add(at)) };
        let mut inputs = [load(x[0]); T];
        for t in 1..T {
            inputs[t] = load(x[t]);
        }
        for r in 0..R {
            let weights = load(w[r]);
            for t in 0..T {
                sums[r][t][half] = _mm512_dpbf16_ps(sums[r][t][half], weights, inputs[t]);
            }
        }
    }
}

/// The 32 values at an address.
///
/// # Safety
/// They can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn load(values: *const u16) -> __m512bh {
    // SAFETY: by the caller's word.
    unsafe { transmute(_mm512_loadu_si512(values.cast())) }
}
