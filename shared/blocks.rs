//! Weights with scales as a CPU reads them: strips of blocks.
//!
//! The rows of all segments of a linear task, one after the other and padded with zeros to a multiple
//! of 16, are cut into *strips* of 16 rows, and a strip into *blocks* of columns, the last padded
//! with zeros. Blocks follow each other, so a task's weights are one stream. A block holds codes and
//! then a scale for each of its rows:
//!
//! - `Q8`, 32 columns: eight vectors of 64 bytes; byte `4 * r + c` of vector `j` is the code of row
//!   `r` and column `4 * j + c`, an integer from -127 to 127 plus 128. Then `[16] f16`.
//! - `Q4`, 32 columns: four such vectors of codes from -8 to 7 plus 8, two in a byte: the low half of
//!   vector `j` has the columns from `4 * j` on, the high half those from `16 + 4 * j` on. Then
//!   `[16] f16`.
//! - `Fp8`, 128 columns: byte `16 * c + r` is the E4M3 code of row `r` and column `c`. Then `[16] f32`.
//!
//! A weight is its code times its scale. So one vector instruction multiplies four columns of 16 rows
//! by inputs that are the same for all rows, and sums need no folding.

use crate::task::WeightFormat;

/// Rows of a strip.
pub const STRIP_ROWS: u32 = 16;
/// What is added to a code of `Q8`.
pub const Q8_OFFSET: i32 = 128;
/// What is added to a code of `Q4`.
pub const Q4_OFFSET: i32 = 8;
/// Columns of a block of `Q8` and `Q4`.
pub const Q_COLUMNS: usize = 32;
/// Columns, and rows of a matrix, that share a scale of `Fp8`.
pub const FP8_BLOCK: usize = 128;

/// A block of one format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockShape {
    /// Columns.
    pub columns: u32,
    /// Bytes of the codes.
    pub code_bytes: u32,
    /// Bytes of the scales.
    pub scale_bytes: u32,
}

impl BlockShape {
    /// That of a format; none if its values have no scales.
    #[inline]
    pub const fn of(format: WeightFormat) -> Option<BlockShape> {
        let (columns, code_bits, scale_bytes) = match format {
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => return None,
            WeightFormat::Q8 => (Q_COLUMNS as u32, 8, 2),
            WeightFormat::Q4 => (Q_COLUMNS as u32, 4, 2),
            WeightFormat::Fp8 => (FP8_BLOCK as u32, 8, 4),
        };
        Some(BlockShape {
            columns,
            code_bytes: columns * code_bits / 8 * STRIP_ROWS,
            scale_bytes: scale_bytes * STRIP_ROWS,
        })
    }

    /// Bytes of a block.
    #[inline]
    pub const fn bytes(&self) -> u32 {
        self.code_bytes + self.scale_bytes
    }

    /// Blocks of a strip of `in_dim` columns.
    #[inline]
    pub const fn block_count(&self, in_dim: u32) -> u32 {
        in_dim.div_ceil(self.columns)
    }

    /// Bytes of a strip.
    #[inline]
    pub const fn strip_bytes(&self, in_dim: u32) -> u64 {
        self.block_count(in_dim) as u64 * self.bytes() as u64
    }

    /// A row's share of its strip.
    #[inline]
    pub const fn row_bytes(&self, in_dim: u32) -> u64 {
        self.strip_bytes(in_dim) / STRIP_ROWS as u64
    }

    /// Bytes of a task's `row_count` rows.
    #[inline]
    pub const fn byte_count(&self, row_count: u32, in_dim: u32) -> u64 {
        row_count.div_ceil(STRIP_ROWS) as u64 * self.strip_bytes(in_dim)
    }
}

/// Where the code of a row and a column is in its block: the byte, and the bits to shift it by.
#[inline]
pub const fn code_place(format: WeightFormat, row: usize, column: usize) -> (usize, u32) {
    match format {
        WeightFormat::Q4 => (code_byte(row, column % 16), if column < 16 { 0 } else { 4 }),
        WeightFormat::Fp8 => (column * STRIP_ROWS as usize + row, 0),
        _ => (code_byte(row, column), 0),
    }
}

/// Which byte of vectors of 16 rows and 4 columns is that of a row and a column.
#[inline]
pub const fn code_byte(row: usize, column: usize) -> usize {
    column / 4 * 4 * STRIP_ROWS as usize + row * 4 + column % 4
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use std::vec;

    #[test]
    fn codes_fill_their_block_and_do_not_overlap() {
        for (format, bits) in [(WeightFormat::Q8, 8), (WeightFormat::Q4, 4), (WeightFormat::Fp8, 8)]
        {
            let shape = BlockShape::of(format).unwrap();
            let mut taken = vec![0u8; shape.code_bytes as usize];
            for row in 0..STRIP_ROWS as usize {
                for column in 0..shape.columns as usize {
                    let (byte, shift) = code_place(format, row, column);
                    let mask = ((1u16 << bits) - 1) as u8;
                    assert_eq!(taken[byte] & mask << shift, 0, "{format:?} {row} {column}");
                    taken[byte] |= mask << shift;
                }
            }
            assert!(taken.iter().all(|byte| *byte == 0xff), "{format:?}");
        }
    }

    #[test]
    fn sizes_are_those_of_the_formats() {
        assert_eq!(WeightFormat::Q8.row_bytes(1024), 1024 / 32 * 34);
        assert_eq!(WeightFormat::Q4.row_bytes(1000), 32 * 18);
        assert_eq!(WeightFormat::Fp8.row_bytes(72), 132);
        assert_eq!(BlockShape::of(WeightFormat::Q8).unwrap().byte_count(17, 64), 2 * 2 * 544);
    }
}
