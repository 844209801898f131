//! Products of many tokens.
//!
//! What 8 lanes need of two tokens is in one piece, a panel, in the order in which it is
//! multiplied. Sums of two rows and six tokens stay in registers while a block of columns goes by:
//! each weight is widened once for six tokens, and more rows share the panels that are in the
//! first-level cache. A sum's products are added in the order of columns, block after block.

use std::arch::x86_64::{
    __m256, _mm256_add_ps, _mm256_castpd_ps, _mm256_castps_pd, _mm256_fmadd_ps, _mm256_movehdup_ps,
    _mm256_permute2f128_ps, _mm256_setzero_ps, _mm256_storeu_ps, _mm256_unpackhi_pd,
    _mm256_unpacklo_pd,
};
use std::ops::Range;

use super::super::Matrix;
use super::super::inputs::PANEL_ROWS as PAIR;
use super::super::lanes::{LANES, weights};
use super::{ROWS, VECTORS, WIDTH, Wide};
use crate::machine::Rows;

/// Pairs of tokens of a tile at most. With two rows its sums are 12 vectors; two of weights and one
/// of inputs take other registers.
const PAIRS: usize = 3;
/// Tokens of a tile at most.
const TOKENS: usize = PAIR * PAIRS;
/// Tiles that share panels: their weights stay in the first-level cache beside these.
const TILES: usize = 2;
/// Columns of a block: a panel is 2 KiB.
const COLUMNS: usize = 1024;
/// Sums that are folded at once.
const FOLDED: usize = 4;
/// Bytes that a request brings.
const LINE_BYTES: usize = 64;

// The panels of a pair take the place of its rows.
const _: () = assert!(PAIR * 2 == VECTORS);

/// A tile's sums of 8 lanes, `[rows, tokens]`; a smaller tile leaves the end alone.
type Sums = [__m256; ROWS * TOKENS];

/// Packs `token_count` input rows, whole pairs, for `matmul`; `to` may be the same rows.
///
/// In each block of columns the pair's first row becomes the panels of the first two vectors of
/// lanes, `[steps, PAIR]` each, and the other row those of the others.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn pack(from: &Rows, to: &Rows, token_count: usize, in_dim: usize) {
    let mut block = [[0.0; COLUMNS]; PAIR];
    for token in (0..token_count).step_by(PAIR) {
        for first in (0..in_dim).step_by(COLUMNS) {
            let count = COLUMNS.min(in_dim - first);
            for (t, block) in block.iter_mut().enumerate() {
                let row = from.row(token + t, first + count).sub(first, count);
                block[..count].copy_from_slice(row.as_slice());
                block[count..count.next_multiple_of(LANES)].fill(0.0);
            }
            for vector in 0..VECTORS {
                let range = panel(to, token, &(first..first + count), vector);
                let panel = to.values.sub(range.start, range.len());
                let steps = panel.as_mut_slice().chunks_exact_mut(PAIR * WIDTH);
                for (step, panel) in steps.enumerate() {
                    let at = step * LANES + vector * WIDTH;
                    for (values, block) in panel.chunks_exact_mut(WIDTH).zip(&block) {
                        values.copy_from_slice(&block[at..][..WIDTH]);
                    }
                }
            }
        }
    }
}

/// Where the pair of tokens from `token` on has its panel of a block's columns.
#[inline(always)]
fn panel(x: &Rows, token: usize, columns: &Range<usize>, vector: usize) -> Range<usize> {
    let len = columns.len().next_multiple_of(LANES) / 2;
    let first = (token + vector / 2) * x.stride + columns.start + vector % 2 * len;
    first..first + len
}

/// See `super::matmul`; input rows are at least two pairs, packed.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn matmul<W: Wide>(
    m: &Matrix,
    x: &Rows,
    token_count: usize,
    y: &Rows,
    out_first: usize,
) {
    // Once, not for each load.
    assert!(x.stride >= m.in_dim.next_multiple_of(LANES));
    assert!(x.values.len() >= token_count * x.stride);
    let pair_count = token_count / PAIR;
    assert!(pair_count >= PAIRS - 1);
    // All of two pairs or three.
    let group_count = pair_count.div_ceil(PAIRS);
    let mut sums = [[[_mm256_setzero_ps(); ROWS * TOKENS]; VECTORS]; TILES];
    for row in (0..m.row_count).step_by(TILES * ROWS) {
        let rows = row..m.row_count.min(row + TILES * ROWS);
        let mut ahead = Ahead::new::<W>(m, &rows, group_count);
        let mut pair = 0;
        for group in 0..group_count {
            let len = (pair_count - pair).div_ceil(group_count - group);
            let block = Block { m, x, rows: rows.clone(), token: pair * PAIR };
            if len == PAIRS {
                block.multiply::<W, PAIRS>(&mut sums, &mut ahead);
                block.finish::<PAIRS>(&sums, y, out_first);
            } else {
                block.multiply::<W, { PAIRS - 1 }>(&mut sums, &mut ahead);
                block.finish::<{ PAIRS - 1 }>(&sums, y, out_first);
            }
            pair += len;
        }
    }
}

/// Rows of up to `TILES` tiles, and the tokens of one from `token` on.
struct Block<'a> {
    m: &'a Matrix,
    x: &'a Rows,
    rows: Range<usize>,
    token: usize,
}

impl Block<'_> {
    /// The sums of the products with `P` pairs.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn multiply<W: Wide, const P: usize>(
        &self,
        sums: &mut [[Sums; VECTORS]; TILES],
        ahead: &mut Ahead,
    ) {
        let (span, in_dim) = (weights::<W>(self.m), self.m.in_dim);
        let rows = &span.as_slice()[self.rows.start * in_dim..self.rows.end * in_dim];
        for first in (0..in_dim).step_by(COLUMNS) {
            let columns = first..in_dim.min(first + COLUMNS);
            let whole = columns.len() / LANES;
            if whole > 0 {
                // SAFETY: so many steps of these columns, in rows of `in_dim`.
                let weights = unsafe { rows.as_ptr().add(first) };
                // SAFETY: as above.
                unsafe { self.add::<W, P>(weights, in_dim, &columns, 0..whole, sums, ahead) };
            }
            let tail = columns.len() % LANES;
            if tail > 0 {
                let mut padded = [[W::default(); LANES]; TILES * ROWS];
                for (padded, row) in padded.iter_mut().zip(rows.chunks_exact(in_dim)) {
                    padded[..tail].copy_from_slice(&row[in_dim - tail..]);
                }
                let weights = padded.as_ptr().cast::<W>();
                // SAFETY: a step, in rows of `LANES`.
                unsafe {
                    self.add::<W, P>(weights, LANES, &columns, whole..whole + 1, sums, ahead)
                };
            }
        }
    }

    /// Adds the products of some `steps` of a block's `columns`; sums begin with the first of all.
    ///
    /// # Safety
    /// At `weights` are those of these steps for each row, `row_len` values apart.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn add<W: Wide, const P: usize>(
        &self,
        weights: *const W,
        row_len: usize,
        columns: &Range<usize>,
        steps: Range<usize>,
        sums: &mut [[Sums; VECTORS]; TILES],
        ahead: &mut Ahead,
    ) {
        let pair_len = PAIR * self.x.stride;
        let is_first = columns.start == 0 && steps.start == 0;
        for vector in 0..VECTORS {
            ahead.request();
            let at = panel(self.x, self.token, columns, vector).start + steps.start * PAIR * WIDTH;
            let panel = (self.x.values.address() as *const f32).wrapping_add(at);
            for (tile, sums) in sums.iter_mut().enumerate() {
                let (row, sums) = (tile * ROWS, &mut sums[vector]);
                let weights = weights.wrapping_add(row * row_len + vector * WIDTH);
                let add = match self.rows.len().saturating_sub(row) {
                    0 => break,
                    1 => add::<W, 1, P>,
                    _ => add::<W, ROWS, P>,
                };
                // SAFETY: rows by the caller's word; `matmul` has checked that input rows have
                // room for the panels of all columns.
                unsafe { add(weights, row_len, panel, pair_len, steps.len(), is_first, sums) };
            }
        }
    }

    /// Writes the products with `P` pairs.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn finish<const P: usize>(&self, sums: &[[Sums; VECTORS]; TILES], y: &Rows, out_first: usize) {
        for (row, sums) in self.rows.clone().step_by(ROWS).zip(sums) {
            let count = ROWS.min(self.rows.end - row) * P * PAIR;
            for first in (0..count).step_by(FOLDED) {
                let mut lanes = [[_mm256_setzero_ps(); VECTORS]; FOLDED];
                for idx in 0..FOLDED {
                    for vector in 0..VECTORS {
                        lanes[idx][vector] = sums[vector][first + idx];
                    }
                }
                let folded = fold(&lanes);
                for idx in 0..FOLDED.min(count - first) {
                    let (r, t) = ((first + idx) / (P * PAIR), (first + idx) % (P * PAIR));
                    y.values.write((self.token + t) * y.stride + out_first + row + r, folded[idx]);
                }
            }
        }
    }
}

/// Adds the products of `steps` times 8 lanes of `R` rows, `row_len` apart, with panels of `P`
/// pairs, `pair_len` apart, to their sums, which begin with them if `is_first`. Not part of its
/// caller, which would leave it fewer registers.
///
/// # Safety
/// There are as many weights, `LANES` from one step to the next, and inputs.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add<W: Wide, const R: usize, const P: usize>(
    weights: *const W,
    row_len: usize,
    panel: *const f32,
    pair_len: usize,
    steps: usize,
    is_first: bool,
    sums: &mut Sums,
) {
    const { assert!(R <= ROWS && P <= PAIRS) };
    let place = sums.as_mut_ptr().cast::<[[[__m256; PAIR]; P]; R]>();
    let mut own = [[[_mm256_setzero_ps(); PAIR]; P]; R];
    if !is_first {
        // SAFETY: no more vectors than `Sums` has, by the assertion.
        own = unsafe { place.read() };
    }
    for step in 0..steps {
        let mut vectors = [_mm256_setzero_ps(); R];
        for r in 0..R {
            // SAFETY: by the caller's word.
            vectors[r] = unsafe { W::vector(weights.add(r * row_len + step * LANES)) };
        }
        for p in 0..P {
            for t in 0..PAIR {
                let at = p * pair_len + (step * PAIR + t) * WIDTH;
                // SAFETY: as above.
                let input = unsafe { f32::vector(panel.add(at)) };
                for r in 0..R {
                    own[r][p][t] = _mm256_fmadd_ps(vectors[r], input, own[r][p][t]);
                }
            }
        }
    }
    // SAFETY: as above.
    unsafe { place.write(own) };
}

/// Four times what `super::fold` does, at once.
#[inline]
#[target_feature(enable = "avx2")]
fn fold(lanes: &[[__m256; VECTORS]; FOLDED]) -> [f32; FOLDED] {
    let mut eight = [_mm256_setzero_ps(); FOLDED];
    for idx in 0..FOLDED {
        let [a, b, c, d] = lanes[idx];
        eight[idx] = _mm256_add_ps(_mm256_add_ps(a, c), _mm256_add_ps(b, d));
    }
    let mut four = [_mm256_setzero_ps(); 2];
    for pair in 0..2 {
        let (x, y) = (eight[2 * pair], eight[2 * pair + 1]);
        let low = _mm256_permute2f128_ps::<0x20>(x, y);
        four[pair] = _mm256_add_ps(low, _mm256_permute2f128_ps::<0x31>(x, y));
    }
    let [x, y] = [_mm256_castps_pd(four[0]), _mm256_castps_pd(four[1])];
    let low = _mm256_castpd_ps(_mm256_unpacklo_pd(x, y));
    let two = _mm256_add_ps(low, _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
    let mut one = [0.0; WIDTH];
    // SAFETY: an array of 8 values is what is written.
    unsafe { _mm256_storeu_ps(one.as_mut_ptr(), _mm256_add_ps(two, _mm256_movehdup_ps(two))) };
    // The lower half is of the first and the third.
    [one[0], one[4], one[2], one[6]]
}

/// Requests of the weights of the rows that follow, spread over the products of a block: the chip
/// has room for few at a time.
struct Ahead {
    /// Of the next line.
    address: usize,
    /// Lines that are left.
    line_count: usize,
    /// Lines of a request.
    step: usize,
}

impl Ahead {
    /// Of as many rows as `rows`, in the time of their products with `group_count` groups.
    fn new<W>(m: &Matrix, rows: &Range<usize>, group_count: usize) -> Ahead {
        let row_bytes = m.in_dim * size_of::<W>();
        let row_count = (m.row_count - rows.end).min(TILES * ROWS);
        let line_count = (row_count * row_bytes).div_ceil(LINE_BYTES);
        let times = group_count * m.in_dim.div_ceil(COLUMNS) * VECTORS;
        let address = m.address as usize + rows.end * row_bytes;
        Ahead { address, line_count, step: line_count.div_ceil(times) }
    }

    /// Requests the next lines into the second-level cache.
    #[inline(always)]
    fn request(&mut self) {
        let count = self.step.min(self.line_count);
        super::super::prefetch(self.address as u64, (count * LINE_BYTES) as u64);
        self.address += count * LINE_BYTES;
        self.line_count -= count;
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::{InputForm, Isa, Matrix, matmul};
    use crate::machine::Rows;
    use crate::machine::memory::Span;
    use half::{bf16, f16};
    use tilert_mk_shared::task::{Precision, WeightFormat};

    /// Values whose products and sums are rounded, in a fixed order without a pattern.
    fn values(count: usize) -> Vec<f32> {
        let value = |idx: usize| (idx as u32).wrapping_mul(2_654_435_761) >> 8;
        (0..count).map(|idx| value(idx) as f32 / (1 << 23) as f32 - 1.0).collect()
    }

    /// Bytes of weights.
    fn stored(format: WeightFormat, count: usize) -> Vec<u8> {
        let bytes = |value: f32| match format {
            WeightFormat::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
            WeightFormat::Bf16 => bf16::from_f32(value).to_le_bytes().to_vec(),
            _ => value.to_le_bytes().to_vec(),
        };
        values(count).into_iter().flat_map(bytes).collect()
    }

    /// Shapes and formats of a product.
    #[derive(Clone, Copy, Debug)]
    struct Case {
        format: WeightFormat,
        precision: Precision,
        row_count: usize,
        in_dim: usize,
        token_count: usize,
        is_in_place: bool,
    }

    /// The products' bits, with a column on each side that is somebody else's.
    fn products(isa: Isa, case: Case) -> Vec<u32> {
        let Case { format, row_count, in_dim, token_count, .. } = case;
        let span = |values: &mut [f32]| {
            // SAFETY: values that the caller keeps and reads only when all is done.
            unsafe { Span::new(values.as_mut_ptr().expose_provenance() as u64, values.len()) }
        };
        // Words, which any weights may begin at.
        let weights: Vec<u32> = stored(format, row_count * in_dim)
            .chunks(4)
            .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
            .collect();
        let stride = in_dim.next_multiple_of(32);
        let mut from = values(token_count * stride);
        let mut converted = vec![f32::NAN; from.len()];
        let from = Rows { values: span(&mut from), stride };
        let to = Rows { values: span(&mut converted), stride };
        let x = if case.is_in_place { from } else { to };
        let inputs = InputForm::of(isa, format, case.precision);
        let is_plain = inputs.is_plain(token_count);
        if !is_plain {
            inputs.convert(isa, from, x, token_count, in_dim);
        }
        let address = weights.as_ptr().expose_provenance() as u64;
        let m = Matrix { address, format, inputs, row_count, in_dim };
        let mut y = vec![7.0f32; token_count * (row_count + 2)];
        let rows = Rows { values: span(&mut y), stride: row_count + 2 };
        matmul(isa, m, if is_plain { from } else { x }, token_count, rows, 1);
        y.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn any_shape_gives_the_bits_of_the_portable_body() {
        if !Isa::Avx2.is_supported() {
            println!("not tested: this machine has no AVX2");
            return;
        }
        for format in [WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16] {
            for precision in [Precision::Exact, Precision::Bf16] {
                for row_count in [1, 2, 3, 4, 5, 22] {
                    for in_dim in [8, 32, 72, 1024, 1032, 2080] {
                        for token_count in [3, 4, 5, 6, 9, 14, 64] {
                            let is_in_place = (row_count + token_count) % 2 == 0;
                            let case = Case {
                                format,
                                precision,
                                row_count,
                                in_dim,
                                token_count,
                                is_in_place,
                            };
                            let expected = products(Isa::Portable, case);
                            assert!(products(Isa::Avx2, case) == expected, "{case:?}");
                        }
                    }
                }
            }
        }
    }
}
