//! Products of bf16 weights with inputs that are rounded to bf16, by tiles (AMX).
//!
//! A tile of weights is 16 rows as they are stored, 32 columns of each; a tile of inputs is as many
//! columns of up to 16 tokens, in pairs of columns, and `pack` leaves tokens so. For each row and
//! token a product of tiles adds those of even columns in order, then those of odd ones, and both
//! to the sum of the columns before. Nothing in that depends on the shapes of tiles: a token's bits
//! are the same alone and beside others. They are not those of other instruction sets; subnormal
//! numbers are zeros.

mod tiles;

use std::arch::x86_64::{
    __m512i, _mm512_castsi512_ps, _mm512_cvtne2ps_pbh, _mm512_loadu_si512,
    _mm512_mask_storeu_epi32, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_setzero_si512,
    _mm512_shuffle_i32x4, _mm512_storeu_si512, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64,
    _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};
use std::mem::transmute;

use super::Matrix;
use crate::machine::Rows;
use crate::machine::memory::Span;
use tiles::{Counts, Shapes, add, load, release, store, sums_tile, zero};
pub(super) use tiles::{is_usable, touch};

/// Rows of a tile: of weights and sums.
const ROWS: usize = 16;
/// Tokens of a tile, of inputs and sums.
const TOKENS: usize = 16;
/// Columns that a product of tiles adds.
const COLUMNS: usize = 32;
/// Tiles of weights that are multiplied by as many of inputs: four of sums, eight in all.
const SIDE: usize = 2;

/// See `cpu::matmul`; input rows are `InputForm::Tiles`, of as many tokens as were packed.
///
/// # Safety
/// The chip has tiles, `is_usable`.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn matmul(m: &Matrix, x: &Rows, token_count: usize, y: &Rows, out_first: usize) {
    // SAFETY: a linear task names weights that the host has bound and keeps until the workers end.
    let weights = unsafe { Span::<u16>::new(m.address, m.row_count * m.in_dim) };
    let mut counts = Counts::default();
    for row in (0..m.row_count).step_by(SIDE * ROWS) {
        let row_count = (m.row_count - row).min(SIDE * ROWS);
        let block = Block {
            weights: weights.sub(row * m.in_dim, row_count * m.in_dim),
            in_dim: m.in_dim,
            row_count,
        };
        for token in (0..token_count).step_by(SIDE * TOKENS) {
            let mut inputs = [Inputs::NONE; SIDE];
            for (t, first) in (token..token_count).step_by(TOKENS).take(SIDE).enumerate() {
                inputs[t] = Inputs::of(x, m.in_dim, first, token_count);
            }
            // SAFETY: by the caller's word.
            unsafe { block.begin(&inputs, &mut counts) };
            let out = out_first + row;
            // SAFETY: `begin` has given the tiles their shapes, of as many rows and tokens.
            unsafe {
                match (row_count > ROWS, inputs[1].token_count > 0) {
                    (true, true) => block.multiply::<2, 2>(token, &inputs, y, out),
                    (true, false) => block.multiply::<2, 1>(token, &inputs, y, out),
                    (false, true) => block.multiply::<1, 2>(token, &inputs, y, out),
                    (false, false) => block.multiply::<1, 1>(token, &inputs, y, out),
                }
            }
        }
    }
    // SAFETY: by the caller's word.
    unsafe { release() };
}

/// Packed tokens.
#[derive(Clone, Copy)]
struct Inputs {
    /// The first tile: rows of a pair of columns of each token. Others follow.
    at: *const u8,
    token_count: usize,
}

impl Inputs {
    const NONE: Inputs = Inputs { at: std::ptr::null(), token_count: 0 };

    /// The tile's worth of tokens, or what is left of them, from `first` on.
    fn of(x: &Rows, in_dim: usize, first: usize, token_count: usize) -> Inputs {
        let token_count = TOKENS.min(token_count - first);
        let values = packed(x, in_dim, first, token_count);
        Inputs { at: values.address() as *const u8, token_count }
    }
}

/// Where a tile's worth of tokens is packed: half of its rows' memory.
fn packed(x: &Rows, in_dim: usize, first: usize, token_count: usize) -> Span<f32> {
    let [lower, upper] = halves(x, in_dim, first, token_count);
    if token_count == 1 { lower } else { upper }
}

/// The memory of a tile's worth of rows, in halves.
fn halves(x: &Rows, in_dim: usize, first: usize, token_count: usize) -> [Span<f32>; 2] {
    let half = token_count * in_dim.next_multiple_of(COLUMNS) / 2;
    [0, half].map(|at| x.values.sub(first * x.stride + at, half))
}

/// Rows that are multiplied side by side.
struct Block {
    weights: Span<u16>,
    in_dim: usize,
    row_count: usize,
}

impl Block {
    /// Rows of each tile.
    fn row_counts(&self) -> [usize; SIDE] {
        [self.row_count.min(ROWS), self.row_count.saturating_sub(ROWS)]
    }

    /// Gives the tiles the shapes of these rows and tokens, if they have not got them: `counts` is
    /// what they have. It takes the chip as long as three products.
    ///
    /// # Safety
    /// The chip has tiles.
    unsafe fn begin(&self, inputs: &[Inputs; SIDE], counts: &mut Counts) {
        let tokens = inputs.map(|inputs| inputs.token_count);
        let wanted = Counts { rows: self.row_counts(), tokens };
        if *counts != wanted {
            *counts = wanted;
            // SAFETY: by the caller's word.
            unsafe { Shapes::new(wanted).apply() };
        }
    }

    /// Products with tokens from `token` on, to columns from `out` on: of `R` tiles of rows and `T`
    /// of tokens.
    ///
    /// # Safety
    /// `begin` has given the tiles their shapes, of `R` tiles of rows and `T` of tokens.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn multiply<const R: usize, const T: usize>(
        &self,
        token: usize,
        inputs: &[Inputs; SIDE],
        y: &Rows,
        out: usize,
    ) {
        // SAFETY: by the caller's word.
        unsafe { zero_sums::<R, T>() };
        let (at, row_bytes) = (self.weights.address() as *const u8, self.in_dim * 2);
        let whole = self.in_dim / COLUMNS;
        for step in 0..whole {
            // SAFETY: a step's columns of all rows, and of the tokens as they are packed.
            unsafe { add_step::<R, T>(at.add(step * COLUMNS * 2), row_bytes, inputs, step) };
        }
        if self.in_dim > whole * COLUMNS {
            let mut tail = [[0u16; COLUMNS]; SIDE * ROWS];
            let rows = self.weights.as_slice().chunks_exact(self.in_dim);
            for (tail, row) in tail.iter_mut().zip(rows) {
                tail[..self.in_dim - whole * COLUMNS].copy_from_slice(&row[whole * COLUMNS..]);
            }
            // SAFETY: as above; `pack` has left zeros after the tokens' values too.
            unsafe { add_step::<R, T>(tail.as_ptr().cast(), COLUMNS * 2, inputs, whole) };
        }
        for (t, inputs) in inputs.iter().enumerate().take(T) {
            for (r, row_count) in self.row_counts().into_iter().enumerate().take(R) {
                let (token, out) = (token + t * TOKENS, out + r * ROWS);
                // SAFETY: the tiles of sums that `Shapes` has made for these.
                unsafe {
                    match (r, t) {
                        (0, 0) => finish::<{ sums_tile(0, 0) }>(row_count, inputs, y, token, out),
                        (0, _) => finish::<{ sums_tile(0, 1) }>(row_count, inputs, y, token, out),
                        (_, 0) => finish::<{ sums_tile(1, 0) }>(row_count, inputs, y, token, out),
                        (..) => finish::<{ sums_tile(1, 1) }>(row_count, inputs, y, token, out),
                    }
                }
            }
        }
    }
}

/// Begins the sums of `R` tiles of rows and `T` of tokens.
///
/// # Safety
/// `Shapes::apply` has made these tiles.
#[inline(always)]
unsafe fn zero_sums<const R: usize, const T: usize>() {
    // SAFETY: by the caller's word.
    unsafe {
        zero::<{ sums_tile(0, 0) }>();
        if T == 2 {
            zero::<{ sums_tile(0, 1) }>();
        }
        if R == 2 {
            zero::<{ sums_tile(1, 0) }>();
        }
        if R == 2 && T == 2 {
            zero::<{ sums_tile(1, 1) }>();
        }
    }
}

/// Adds the products of `COLUMNS` columns: those at `weights`, whose rows are `row_bytes` apart, with
/// the inputs' `step`th.
///
/// # Safety
/// `Shapes::apply` has made `R` tiles of rows and `T` of tokens, which can be read.
#[inline(always)]
unsafe fn add_step<const R: usize, const T: usize>(
    weights: *const u8,
    row_bytes: usize,
    inputs: &[Inputs; SIDE],
    step: usize,
) {
    let [first, second] = inputs.map(|inputs| {
        let pair_bytes = inputs.token_count * 4;
        (inputs.at.wrapping_add(step * COLUMNS / 2 * pair_bytes), pair_bytes)
    });
    // SAFETY: by the caller's word.
    unsafe {
        load::<6>(first.0, first.1);
        load::<4>(weights, row_bytes);
        add::<{ sums_tile(0, 0) }, 4, 6>();
        if T == 2 {
            load::<7>(second.0, second.1);
            add::<{ sums_tile(0, 1) }, 4, 7>();
        }
        if R == 2 {
            load::<5>(weights.add(ROWS * row_bytes), row_bytes);
            add::<{ sums_tile(1, 0) }, 5, 6>();
        }
        if R == 2 && T == 2 {
            add::<{ sums_tile(1, 1) }, 5, 7>();
        }
    }
}

/// Writes a tile of sums to the rows of its tokens.
///
/// # Safety
/// `Shapes::apply` has given the tile `row_count` rows and the inputs' tokens.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn finish<const TILE: usize>(
    row_count: usize,
    inputs: &Inputs,
    y: &Rows,
    token: usize,
    out: usize,
) {
    if inputs.token_count == 1 {
        let row = y.values.sub(token * y.stride + out, row_count);
        // SAFETY: a value for each row of the tile.
        return unsafe { store::<TILE>(row.address() as *mut u8, size_of::<f32>()) };
    }
    let mut sums = [_mm512_setzero_si512(); ROWS];
    // SAFETY: at most as many rows, of at most as many bytes.
    unsafe { store::<TILE>(sums.as_mut_ptr().cast(), size_of::<__m512i>()) };
    let sums = transpose(sums);
    for (t, sums) in sums.into_iter().enumerate().take(inputs.token_count) {
        let row = y.values.sub((token + t) * y.stride + out, row_count);
        // SAFETY: as many values as the row has.
        unsafe {
            let sums = _mm512_castsi512_ps(sums);
            _mm512_mask_storeu_ps(row.address() as *mut f32, lanes(row_count), sums);
        }
    }
}

/// Packs input rows, rounded to bf16, for `matmul` with as many tokens; `to` may be the same rows.
///
/// In two passes over a tile's worth of rows, so that nothing is written over before it is read:
/// rounded rows into the lower half of the memory, then from there into tiles in the upper half. A
/// tile of one token is its values in order, which need not move.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn pack(from: &Rows, to: &Rows, token_count: usize, in_dim: usize) {
    let row_bytes = in_dim.next_multiple_of(COLUMNS) * 2;
    for first in (0..token_count).step_by(TOKENS) {
        let count = TOKENS.min(token_count - first);
        let [rounded, tiles] =
            halves(to, in_dim, first, count).map(|half| half.address() as *mut u8);
        for t in 0..count {
            let row = from.row(first + t, in_dim);
            // SAFETY: the half is as many rows of `row_bytes`.
            unsafe { round(row, rounded.add(t * row_bytes)) };
        }
        if count == 1 {
            continue;
        }
        for step in 0..in_dim.div_ceil(COLUMNS) {
            let mut columns = [_mm512_setzero_si512(); TOKENS];
            for (t, columns) in columns.iter_mut().enumerate().take(count) {
                // SAFETY: columns of a rounded row, which is whole steps.
                let at = unsafe { rounded.add(t * row_bytes + step * COLUMNS * 2) };
                // SAFETY: as above.
                *columns = unsafe { _mm512_loadu_si512(at.cast()) };
            }
            for (pair, values) in transpose(columns).into_iter().enumerate() {
                let at = (step * COLUMNS / 2 + pair) * count * 4;
                // SAFETY: a pair of columns of each token, which are as many as the half has.
                unsafe {
                    _mm512_mask_storeu_epi32(tiles.add(at).cast(), lanes(count), values);
                }
            }
        }
    }
}

/// Rounds a row to bf16, halves to even, with zeros after it up to a whole number of `COLUMNS`. `to`
/// may be the row's own begin, or before it.
///
/// # Safety
/// There is room for them at `to`.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn round(from: Span<f32>, to: *mut u8) {
    for first in (0..from.len()).step_by(COLUMNS) {
        let count = COLUMNS.min(from.len() - first);
        let values = from.sub(first, count).address() as *const f32;
        // SAFETY: lanes that are read are values of the row; the caller has room.
        unsafe {
            let low = _mm512_maskz_loadu_ps(lanes(count), values);
            let high = lanes(count.saturating_sub(COLUMNS / 2));
            let high = _mm512_maskz_loadu_ps(high, values.wrapping_add(COLUMNS / 2));
            let rounded: __m512i = transmute(_mm512_cvtne2ps_pbh(high, low));
            _mm512_storeu_si512(to.add(first * 2).cast(), rounded);
        }
    }
}

/// A mask of the first `count` of 16 lanes.
#[inline(always)]
fn lanes(count: usize) -> u16 {
    ((1u32 << count.min(16)) - 1) as u16
}

/// Lane `j` of row `i` to lane `i` of row `j`: lanes of neighbours, then pairs of lanes, then quarters
/// of rows.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
    let (mut pairs, mut quads, mut columns) = (rows, rows, rows);
    for i in 0..8 {
        let (a, b) = (rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i] = _mm512_unpacklo_epi32(a, b);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(a, b);
    }
    for i in 0..4 {
        for half in 0..2 {
            let (a, b) = (pairs[4 * i + half], pairs[4 * i + half + 2]);
            quads[4 * i + 2 * half] = _mm512_unpacklo_epi64(a, b);
            quads[4 * i + 2 * half + 1] = _mm512_unpackhi_epi64(a, b);
        }
    }
    for j in 0..4 {
        let (a, b, c, d) = (quads[j], quads[4 + j], quads[8 + j], quads[12 + j]);
        let even = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0x88>(c, d));
        let odd = (_mm512_shuffle_i32x4::<0xdd>(a, b), _mm512_shuffle_i32x4::<0xdd>(c, d));
        columns[j] = _mm512_shuffle_i32x4::<0x88>(even.0, even.1);
        columns[4 + j] = _mm512_shuffle_i32x4::<0x88>(odd.0, odd.1);
        columns[8 + j] = _mm512_shuffle_i32x4::<0xdd>(even.0, even.1);
        columns[12 + j] = _mm512_shuffle_i32x4::<0xdd>(odd.0, odd.1);
    }
    columns
}

#[cfg(test)]
mod tests {
    use super::super::{InputForm, Isa, Matrix, matmul};
    use crate::machine::Rows;
    use crate::machine::memory::Span;
    use half::bf16;
    use tilert_mk_shared::task::WeightFormat;

    /// Values whose products and sums are rounded, in a fixed order without a pattern.
    fn values(count: usize) -> Vec<f32> {
        let value = |idx: usize| (idx as u32).wrapping_mul(2_654_435_761) >> 8;
        (0..count).map(|idx| value(idx) as f32 / (1 << 23) as f32 - 1.0).collect()
    }

    /// The slow twin, in the order of sums that the instruction has.
    fn product(weights: &[bf16], x: &[f32]) -> f32 {
        let mut sum = 0.0;
        for (weights, x) in weights.chunks(32).zip(x.chunks(32)) {
            let mut parts = [0.0f32; 2];
            for (idx, (weight, x)) in weights.iter().zip(x).enumerate() {
                let x = bf16::from_f32(*x).to_f32();
                parts[idx % 2] = weight.to_f32().mul_add(x, parts[idx % 2]);
            }
            sum += parts[0] + parts[1];
        }
        sum
    }

    fn check(row_count: usize, in_dim: usize, token_count: usize, is_in_place: bool) {
        let span = |values: &mut [f32]| {
            // SAFETY: values that the caller keeps and reads only when all is done.
            unsafe { Span::new(values.as_mut_ptr().expose_provenance() as u64, values.len()) }
        };
        let weights: Vec<bf16> =
            values(row_count * in_dim).into_iter().map(bf16::from_f32).collect();
        let stride = in_dim.next_multiple_of(32);
        let mut from = values(token_count * stride);
        let expected: Vec<f32> = from
            .chunks(stride)
            .flat_map(|x| weights.chunks(in_dim).map(|row| product(row, &x[..in_dim])))
            .collect();
        let mut packed = vec![f32::NAN; from.len()];
        let from = Rows { values: span(&mut from), stride };
        let x = if is_in_place { from } else { Rows { values: span(&mut packed), stride } };
        InputForm::Tiles.convert(Isa::Amx, from, x, token_count, in_dim);
        let m = Matrix {
            address: weights.as_ptr().expose_provenance() as u64,
            format: WeightFormat::Bf16,
            inputs: InputForm::Tiles,
            row_count,
            in_dim,
        };
        // A column on each side is somebody else's.
        let mut y = vec![7.0; token_count * (row_count + 2)];
        let rows = Rows { values: span(&mut y), stride: row_count + 2 };
        matmul(Isa::Amx, m, x, token_count, rows, 1);
        for (found, expected) in y.chunks(row_count + 2).zip(expected.chunks(row_count)) {
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!((found[0], found[row_count + 1]), (7.0, 7.0));
            assert_eq!(
                bits(&found[1..=row_count]),
                bits(expected),
                "{row_count} rows of {in_dim}, {token_count} tokens"
            );
        }
    }

    #[test]
    fn any_shape_gives_the_bits_of_the_twin() {
        if !Isa::Amx.is_supported() {
            println!("not tested: this machine has no AMX, or may not use it");
            return;
        }
        for row_count in [1, 9, 16, 17, 32, 41, 64] {
            for in_dim in [8, 32, 72, 256, 1032] {
                for token_count in [1, 2, 5, 15, 16, 17, 31, 32, 33, 48, 50, 64] {
                    check(row_count, in_dim, token_count, token_count % 2 == 0);
                }
            }
        }
    }
}
