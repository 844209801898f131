//! Weights quantised into the strips of blocks that a CPU multiplies (`shared/blocks.rs`).

use half::f16;
use tilert_mk_shared::blocks::{
    BlockShape, FP8_BLOCK, Q_COLUMNS, Q4_OFFSET, Q8_OFFSET, STRIP_ROWS, code_place,
};
use tilert_mk_shared::task::WeightFormat;

use crate::quantise::{E4M3_NAN, fp8_code, quantise_block};
use crate::weights::{Dtype, TensorView};

/// Rows of a strip.
const ROWS: usize = STRIP_ROWS as usize;

/// Rows of one matrix, as the checkpoint stores them.
pub struct StoredRows<'a> {
    /// Type of the values.
    pub dtype: Dtype,
    /// `[rows, in_dim]`.
    pub values: &'a [u8],
    /// The first one's index in the matrix.
    pub first: usize,
    /// The matrix's scales if the format is `Fp8`, else empty: the checkpoint's if `dtype` is FP8,
    /// else those of `quantise::fp8_scales`.
    pub scales: &'a [f32],
}

impl StoredRows<'_> {
    /// Gives the E4M3 codes of row `idx` with their columns to `put`: those that are stored, or
    /// those next to what is. The scales of the row's blocks of `FP8_BLOCK` columns, and whether
    /// all are finite.
    pub fn fp8_row(
        &self,
        idx: usize,
        in_dim: usize,
        mut put: impl FnMut(usize, u8),
    ) -> (&[f32], bool) {
        let per_row = in_dim.div_ceil(FP8_BLOCK);
        let scales = &self.scales[(self.first + idx) / FP8_BLOCK * per_row..][..per_row];
        let row_bytes = in_dim * self.dtype.byte_count() as usize;
        let mut is_finite = scales.iter().all(|scale| scale.is_finite());
        let mut put = |column: usize, code: u8| {
            put(column, code);
            is_finite &= code & 0x7f != E4M3_NAN;
        };
        let stored = &self.values[idx * row_bytes..][..row_bytes];
        if self.dtype == Dtype::F8E4m3 {
            stored.iter().enumerate().for_each(|(column, code)| put(column, *code));
        } else {
            for (column, value) in widened(self.dtype, stored).into_iter().enumerate() {
                put(column, fp8_code(value, scales[column / FP8_BLOCK]));
            }
        }
        (scales, is_finite)
    }
}

/// Gives the integers of a row of `Q8` or `Q4`, with the scale of each block of `Q_COLUMNS`
/// columns, to `put`, which hears of the block's index; whether all scales are finite.
pub fn integer_row(
    format: WeightFormat,
    dtype: Dtype,
    stored: &[u8],
    mut put: impl FnMut(usize, &[i8; Q_COLUMNS], f16),
) -> bool {
    let mut is_finite = true;
    for (idx, values) in widened(dtype, stored).chunks(Q_COLUMNS).enumerate() {
        let mut integers = [0; Q_COLUMNS];
        let scale = quantise_block(format, values, &mut integers);
        put(idx, &integers, scale);
        is_finite &= scale.is_finite();
    }
    is_finite
}

/// How the weights of one linear task become strips.
pub struct Quantiser {
    format: WeightFormat,
    shape: BlockShape,
    in_dim: usize,
}

impl Quantiser {
    /// For rows of `in_dim` values; none for a format whose values have no scales.
    pub const fn new(format: WeightFormat, in_dim: usize) -> Option<Quantiser> {
        match BlockShape::of(format) {
            Some(shape) => Some(Quantiser { format, shape, in_dim }),
            None => None,
        }
    }

    /// Bytes of a task's `row_count` rows.
    pub const fn byte_count(&self, row_count: u32) -> usize {
        self.shape.byte_count(row_count, self.in_dim as u32) as usize
    }

    /// Packs one task's rows into `out`, which is all zeros. FP8 codes and scales stay as they are.
    ///
    /// Errors:  the first segment of which a value or a scale is not finite, or a value too large
    ///          for a scale.
    pub fn pack(&self, segments: &[StoredRows<'_>], out: &mut [u8]) -> Result<(), usize> {
        let strip_bytes = self.shape.strip_bytes(self.in_dim as u32) as usize;
        // Codes of rows that pad the last strip are zeros too, with their offset.
        let padding = match self.format {
            WeightFormat::Q8 => Q8_OFFSET as u8,
            WeightFormat::Q4 => (Q4_OFFSET | Q4_OFFSET << 4) as u8,
            _ => 0,
        };
        for block in out.chunks_exact_mut(self.shape.bytes() as usize) {
            block[..self.shape.code_bytes as usize].fill(padding);
        }
        let mut row_idx = 0;
        for (segment_idx, segment) in segments.iter().enumerate() {
            let mut is_finite = true;
            let row_bytes = self.in_dim * segment.dtype.byte_count() as usize;
            for (idx, values) in segment.values.chunks_exact(row_bytes).enumerate() {
                let strip = &mut out[row_idx / ROWS * strip_bytes..][..strip_bytes];
                let row = row_idx % ROWS;
                is_finite &= if self.format == WeightFormat::Fp8 {
                    self.fp8_row(segment, idx, row, strip)
                } else {
                    self.row(segment.dtype, values, row, strip)
                };
                row_idx += 1;
            }
            if !is_finite {
                return Err(segment_idx);
            }
        }
        Ok(())
    }

    /// Puts the codes of row `idx` in their places, with the scales of its blocks.
    fn fp8_row(&self, rows: &StoredRows<'_>, idx: usize, row: usize, strip: &mut [u8]) -> bool {
        let (block_bytes, code_bytes) =
            (self.shape.bytes() as usize, self.shape.code_bytes as usize);
        let (scales, is_finite) = rows.fp8_row(idx, self.in_dim, |column, code| {
            let place = code_place(self.format, row, column % FP8_BLOCK).0;
            strip[column / FP8_BLOCK * block_bytes + place] = code;
        });
        for (block, scale) in strip.chunks_exact_mut(block_bytes).zip(scales) {
            block[code_bytes + row * 4..][..4].copy_from_slice(&scale.to_le_bytes());
        }
        is_finite
    }

    /// Puts the integers of a strip's row in their places, with the scales of its blocks.
    fn row(&self, dtype: Dtype, values: &[u8], row: usize, strip: &mut [u8]) -> bool {
        let block_bytes = self.shape.bytes() as usize;
        integer_row(self.format, dtype, values, |idx, integers, scale| {
            let block = &mut strip[idx * block_bytes..][..block_bytes];
            let (codes, scales) = block.split_at_mut(self.shape.code_bytes as usize);
            self.place(integers, row, codes);
            scales[row * 2..][..2].copy_from_slice(&scale.to_le_bytes());
        })
    }

    /// Puts the codes of a row's block in their places.
    fn place(&self, integers: &[i8; Q_COLUMNS], row: usize, codes: &mut [u8]) {
        for (column, code) in integers.iter().enumerate() {
            let (byte, shift) = code_place(self.format, row, column);
            if self.format == WeightFormat::Q4 {
                let code = (i32::from(*code) + Q4_OFFSET) as u8;
                codes[byte] = codes[byte] & !(15 << shift) | code << shift;
            } else {
                codes[byte] = (i32::from(*code) + Q8_OFFSET) as u8;
            }
        }
    }
}

/// Stored values in f32.
fn widened(dtype: Dtype, values: &[u8]) -> Vec<f32> {
    let shape = &[values.len() as u64 / dtype.byte_count()];
    TensorView { dtype, shape, data: values }.to_f32()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantise::fp8_scales;

    const COLUMNS: usize = 136;
    const MATRIX_ROWS: usize = 150;

    /// A matrix in f32 and its scales, and the codes that it has with them.
    fn matrix() -> (Vec<u8>, Vec<f32>, Vec<u8>) {
        let value = |idx: usize| ((idx * 7919 % 1009) as f32 - 500.0) * (1 + idx / 4000) as f32;
        let values: Vec<f32> = (0..MATRIX_ROWS * COLUMNS).map(value).collect();
        let scales = fp8_scales(&values, COLUMNS);
        let code = |(idx, value): (usize, &f32)| {
            let (row, column) = (idx / COLUMNS, idx % COLUMNS);
            fp8_code(*value, scales[row / FP8_BLOCK * 2 + column / FP8_BLOCK])
        };
        let codes = values.iter().enumerate().map(code).collect();
        (values.iter().flat_map(|value| value.to_le_bytes()).collect(), scales, codes)
    }

    /// Rows 100 to 149 and 0 to 6 in strips.
    fn packed(dtype: Dtype, values: &[u8], scales: &[f32]) -> Result<Vec<u8>, usize> {
        let quantiser = Quantiser::new(WeightFormat::Fp8, COLUMNS).unwrap();
        let row_bytes = COLUMNS * dtype.byte_count() as usize;
        let rows = |first: usize, end: usize| StoredRows {
            dtype,
            values: &values[first * row_bytes..end * row_bytes],
            first,
            scales,
        };
        let mut out = vec![0; quantiser.byte_count(57)];
        quantiser.pack(&[rows(100, MATRIX_ROWS), rows(0, 7)], &mut out).map(|()| out)
    }

    #[test]
    fn stored_codes_and_scales_are_those_that_are_multiplied() {
        let (values, scales, codes) = matrix();
        let stored = packed(Dtype::F8E4m3, &codes, &scales).unwrap();
        assert!(stored == packed(Dtype::F32, &values, &scales).unwrap());
        let shape = BlockShape::of(WeightFormat::Fp8).unwrap();
        let (strip_bytes, block_bytes) =
            (shape.strip_bytes(COLUMNS as u32) as usize, shape.bytes() as usize);
        for (at, matrix_row) in (100..MATRIX_ROWS).chain(0..7).enumerate() {
            for column in 0..COLUMNS {
                let block = &stored[at / ROWS * strip_bytes + column / FP8_BLOCK * block_bytes..];
                let (row, in_block) = (at % ROWS, column % FP8_BLOCK);
                let code = block[code_place(WeightFormat::Fp8, row, in_block).0];
                let scale = &block[shape.code_bytes as usize + 4 * row..][..4];
                let expected = scales[matrix_row / FP8_BLOCK * 2 + column / FP8_BLOCK];
                assert_eq!(code, codes[matrix_row * COLUMNS + column]);
                assert_eq!(scale, expected.to_le_bytes());
            }
        }
    }

    #[test]
    fn codes_and_scales_that_are_no_numbers_are_noticed() {
        let (_, scales, codes) = matrix();
        for (at, segment_idx) in [(120 * COLUMNS + 3, 0), (6 * COLUMNS + 135, 1)] {
            for code in [0x7f, 0xff] {
                let mut codes = codes.clone();
                codes[at] = code;
                assert_eq!(packed(Dtype::F8E4m3, &codes, &scales), Err(segment_idx));
            }
        }
        for scale in [f32::NAN, f32::INFINITY] {
            let mut scales = scales.clone();
            scales[3] = scale;
            assert_eq!(packed(Dtype::F8E4m3, &codes, &scales), Err(0));
        }
        // Zeros and negative scales mean what they say.
        assert!(packed(Dtype::F8E4m3, &codes, &[0.0, -1.0, -0.0, 1e-40]).is_ok());
    }
}
