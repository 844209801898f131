//! Weights quantised into the strips of blocks that a CPU multiplies (`shared/blocks.rs`).

use tilert_mk_shared::blocks::{
    BlockShape, FP8_BLOCK, Q_COLUMNS, Q4_OFFSET, Q8_OFFSET, STRIP_ROWS, code_place,
};
use tilert_mk_shared::task::WeightFormat;

use crate::quantise::{fp8_code, quantise_block};
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
    /// The matrix's scales (`quantise::fp8_scales`) if the format is `Fp8`, else empty.
    pub scales: &'a [f32],
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

    /// Packs one task's rows into `out`, which is all zeros; whether all scales are finite, as they
    /// are not if a value is not, or is too large for its scale.
    pub fn pack(&self, segments: &[StoredRows<'_>], out: &mut [u8]) -> bool {
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
        let mut is_finite = true;
        let mut row_idx = 0;
        for segment in segments {
            let row_bytes = self.in_dim * segment.dtype.byte_count() as usize;
            for (idx, values) in segment.values.chunks_exact(row_bytes).enumerate() {
                let shape = &[self.in_dim as u64];
                let view = TensorView { dtype: segment.dtype, shape, data: values };
                let strip = &mut out[row_idx / ROWS * strip_bytes..][..strip_bytes];
                is_finite &= self.row(&view.to_f32(), row_idx % ROWS, strip, |block| {
                    let per_row = self.in_dim.div_ceil(FP8_BLOCK);
                    segment.scales[(segment.first + idx) / FP8_BLOCK * per_row + block]
                });
                row_idx += 1;
            }
        }
        is_finite
    }

    /// Puts the values of a strip's row in their places.
    fn row(
        &self,
        values: &[f32],
        row: usize,
        strip: &mut [u8],
        fp8_scale: impl Fn(usize) -> f32,
    ) -> bool {
        let blocks = strip.chunks_exact_mut(self.shape.bytes() as usize);
        let mut is_finite = true;
        for (idx, (block, values)) in
            blocks.zip(values.chunks(self.shape.columns as usize)).enumerate()
        {
            let (codes, scales) = block.split_at_mut(self.shape.code_bytes as usize);
            if self.format == WeightFormat::Fp8 {
                let scale = fp8_scale(idx);
                for (column, value) in values.iter().enumerate() {
                    codes[code_place(self.format, row, column).0] = fp8_code(*value, scale);
                }
                scales[row * 4..][..4].copy_from_slice(&scale.to_le_bytes());
                is_finite &= scale.is_finite();
                continue;
            }
            let mut integers = [0; Q_COLUMNS];
            let scale = quantise_block(self.format, values, &mut integers);
            self.place(&integers, row, codes);
            scales[row * 2..][..2].copy_from_slice(&scale.to_le_bytes());
            is_finite &= scale.is_finite();
        }
        is_finite
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
