//! The bodies that every chip runs, and what the others must equal.

use super::{
    FP8_BLOCK, FP8_CODE_BYTES, FP8_SCALE_BYTES, Halves, LOWER_BITS, Q_COLUMNS, Q_SCALE_BYTES, ROWS,
    exponent, factors, q_code_bytes,
};
use half::f16;
use tilert_mk_shared::blocks::code_byte;

/// The parts of a block of values, and what sums of products with codes of this offset begin with.
#[inline(always)]
pub(super) fn split(values: &[f32; Q_COLUMNS], offset: i32, bits: u32) -> Halves {
    let magnitudes = values.iter().map(|value| value.to_bits() & 0x7fff_ffff);
    let [factor, scale] = factors(exponent(magnitudes.max().unwrap_or(0)), bits);
    let (mut low, mut high, mut start) = ([0; Q_COLUMNS], [0; Q_COLUMNS], [0; 2]);
    for (column, value) in values.iter().enumerate() {
        let integer = (value * factor).round_ties_even() as i32;
        low[column] = integer as i16;
        high[column] = ((integer - i32::from(low[column])) >> LOWER_BITS) as i8;
        start[0] -= offset * i32::from(low[column]);
        start[1] -= offset * i32::from(high[column]);
    }
    Halves { low, high, start, scale, reserved: [0; 5] }
}

/// Products of a strip of `Q8`, or else `Q4`, with `T` inputs.
pub(super) fn integers<const T: usize, const IS_Q8: bool>(
    strip: &[u8],
    x: [&[Halves]; T],
) -> [[f32; ROWS]; T] {
    let code_bytes = q_code_bytes::<IS_Q8>();
    let mut totals = [[0.0f32; ROWS]; T];
    for (idx, block) in strip.chunks_exact(code_bytes + Q_SCALE_BYTES).enumerate() {
        let (codes, scales) = block.split_at(code_bytes);
        for (totals, x) in totals.iter_mut().zip(x) {
            let x = &x[idx];
            for (row, (total, scale)) in totals.iter_mut().zip(scales.chunks_exact(2)).enumerate() {
                let [mut low, mut high] = x.start;
                for column in 0..Q_COLUMNS {
                    let code = code::<IS_Q8>(codes, row, column);
                    low += code * i32::from(x.low[column]);
                    high += code * i32::from(x.high[column]);
                }
                let sum = (i64::from(high) << LOWER_BITS) + i64::from(low);
                let scale = f16::from_le_bytes([scale[0], scale[1]]).to_f32();
                *total = (sum as f32).mul_add(scale * x.scale, *total);
            }
        }
    }
    totals
}

/// The code of a row and a column, with its offset.
#[inline(always)]
fn code<const IS_Q8: bool>(codes: &[u8], row: usize, column: usize) -> i32 {
    if IS_Q8 {
        return codes[code_byte(row, column)].into();
    }
    let byte = codes[code_byte(row, column % 16)];
    (if column < 16 { byte & 15 } else { byte >> 4 }).into()
}

/// Products of a strip of `Fp8` with `T` inputs. Columns have four sums of their own in a block.
pub(super) fn floats<const T: usize>(strip: &[u8], x: [&[f32]; T]) -> [[f32; ROWS]; T] {
    let mut totals = [[0.0f32; ROWS]; T];
    for (idx, block) in strip.chunks_exact(FP8_CODE_BYTES + FP8_SCALE_BYTES).enumerate() {
        let (codes, scales) = block.split_at(FP8_CODE_BYTES);
        for t in 0..T {
            let x = &x[t][idx * FP8_BLOCK..];
            let mut sums = [[0.0f32; ROWS]; 4];
            for (column, (x, codes)) in x.iter().zip(codes.chunks_exact(ROWS)).enumerate() {
                let sums = &mut sums[column % 4];
                for row in 0..ROWS {
                    sums[row] = e4m3(codes[row]).mul_add(*x, sums[row]);
                }
            }
            let [a, b, c, d] = sums;
            for (row, scale) in scales.as_chunks().0.iter().enumerate() {
                let sum = (a[row] + b[row]) + (c[row] + d[row]);
                totals[t][row] = sum.mul_add(f32::from_le_bytes(*scale), totals[t][row]);
            }
        }
    }
    totals
}

/// The value of an E4M3 code that is a number.
#[inline(always)]
fn e4m3(code: u8) -> f32 {
    // Shifted into place the exponent is 120 too small, also of subnormal values, which the product
    // puts right.
    const SCALE: f32 = f32::from_bits((127 + 120) << 23);
    let bits = i32::from(code as i8) << 20;
    f32::from_bits(bits as u32 & 0x87f0_0000) * SCALE
}
