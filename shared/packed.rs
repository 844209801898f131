//! Bf16 weights of a linear task, and codes of fewer bits, as a GPU's tensor cores take them.
//!
//! The rows of all segments, one after the other and padded with zeros to a multiple of 8, are cut
//! into blocks of 256 columns. A block is cut into units of 32 columns, one for each computing warp;
//! the last block has as many units as it has columns for. A unit holds *fragments*, groups of 16
//! rows one after the other and two of `k` for each: what the 32 lanes give to one `mma`, 16 bytes a
//! lane. If the last group has 8 rows, its fragments have 8 bytes a lane.
//!
//! Lane `4 * g + t` of a group's fragment `e` has columns `8 * t + 4 * e ..` of its unit: two of row
//! `g`, the same two of row `g + 8`, the next two of row `g`, those of row `g + 8`. So a warp's loads
//! are contiguous, and a lane's inputs are 8 adjacent columns.
//!
//! E4M3 weights take one byte: a lane's two fragments lie together, 16 bytes, or 8 for 8 rows. A
//! half of a word has the codes of one column of rows `g` and `g + 8`, or of 8 rows, of row `g` and
//! two columns, the second two further on. Their bits are spread (`spread_e4m3`) such that few
//! instructions make bf16 of them. A block begins with its scales, `[2, rows] f32`: those of the
//! first half of its columns, then those of the other.
//!
//! Integers of 8 bits lie likewise, spread by `spread_q8`. Those of 4 bits take half as many bytes:
//! 4 for a lane's fragment, or for both if there are 8 rows. The low half of such a word has the
//! first column of each of the fragment's pairs, four bits each, the high half the second. Each has
//! 8 added to it. Of both, a unit ends with its scales, `[rows] f16`, for each group those of rows
//! `g` and `g + 8` side by side.
//!
//! Whole blocks fill pages, as many as fit.

use crate::blocks::{FP8_BLOCK, Q_COLUMNS, Q4_OFFSET};
use crate::task::WeightFormat;
use crate::tile::{COMPUTE_WARPS, WARP_LANES};

/// Columns of a unit.
pub const UNIT_COLUMNS: u32 = 32;
/// Columns of a block.
pub const BLOCK_COLUMNS: u32 = UNIT_COLUMNS * COMPUTE_WARPS;
/// Columns of a block that share a row's scale.
pub const HALF_COLUMNS: u32 = BLOCK_COLUMNS / 2;
/// Rows of a group.
pub const GROUP_ROWS: u32 = 16;
/// Rows that are padded to.
pub const PAD_ROWS: u32 = 8;
/// Columns of a lane in a unit.
pub const LANE_COLUMNS: u32 = 8;
/// Bytes of a lane in a fragment of 16 rows.
pub const LANE_BYTES: u32 = 16;
/// Bytes of a fragment of 16 rows.
pub const FRAGMENT_BYTES: u32 = LANE_BYTES * WARP_LANES;

/// Bytes of a row in a unit of integers of 8 bits: codes and a scale.
pub const Q8_ROW_BYTES: u32 = UNIT_COLUMNS + UNIT_SCALE_BYTES;
/// The same of 4 bits.
pub const Q4_ROW_BYTES: u32 = UNIT_COLUMNS / 2 + UNIT_SCALE_BYTES;

/// Bytes of a bf16.
const BF16_BYTES: u32 = 2;
/// Bytes of a row's scales in a block of E4M3.
const SCALE_BYTES: u32 = 8;
/// Bytes of a row's scale in a unit of integers.
pub const UNIT_SCALE_BYTES: u32 = 2;

const _: () = assert!(HALF_COLUMNS == FP8_BLOCK as u32 && UNIT_COLUMNS == Q_COLUMNS as u32);

/// The bits of an E4M3 code in the two bytes that it shares with another. The first code has its
/// sign, its exponent and its fraction where a bf16 has them; the second has its sign in bit 11,
/// the upper bits of its exponent in bits 12 to 14, the rest in bits 0 to 3.
#[inline]
pub const fn spread_e4m3(code: u8, is_second: bool) -> u16 {
    let code = code as u16;
    if is_second {
        (code & 0x80) << 4 | (code & 0x70) << 8 | code & 0x0f
    } else {
        (code & 0x80) << 8 | (code & 0x7f) << 4
    }
}

/// The bits of an integer from -127 to 127 in the two bytes that it shares with another: signs in
/// bits 15 and 14, of the first and the second, magnitudes in bits 0 to 6 and 7 to 13.
#[inline]
pub const fn spread_q8(code: i8, is_second: bool) -> u16 {
    let (sign, magnitude) = ((code < 0) as u16, code.unsigned_abs() as u16 & 0x7f);
    if is_second { sign << 14 | magnitude << 7 } else { sign << 15 | magnitude }
}

/// The four bits of an integer from -8 to 7.
#[inline]
pub const fn nibble(code: i8) -> u8 {
    (code as i32 + Q4_OFFSET) as u8 & 15
}

/// A place among a lane's codes.
struct Spot {
    /// Offset of the unit.
    unit: u32,
    /// The lane.
    lane: u32,
    /// The fragment, and the pair of columns in it.
    fragment: u32,
    pair: u32,
}

/// How the weights of one task are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packing {
    /// Rows with padding.
    pub row_count: u32,
    /// Columns; a multiple of 8.
    pub in_dim: u32,
    /// Format of the weights.
    pub format: WeightFormat,
}

impl Packing {
    /// Whether weights of a format are packed.
    #[inline]
    pub const fn is_for(format: WeightFormat) -> bool {
        matches!(
            format,
            WeightFormat::Bf16 | WeightFormat::Fp8 | WeightFormat::Q8 | WeightFormat::Q4
        )
    }

    /// The packing of `row_count` rows of `in_dim` columns in `format`, which is packed.
    #[inline]
    pub const fn new(row_count: u32, in_dim: u32, format: WeightFormat) -> Packing {
        Packing { row_count: row_count.next_multiple_of(PAD_ROWS), in_dim, format }
    }

    /// Bytes of a row in a unit.
    const fn row_bytes(&self) -> u32 {
        match self.format {
            WeightFormat::Q8 => Q8_ROW_BYTES,
            WeightFormat::Q4 => Q4_ROW_BYTES,
            format => UNIT_COLUMNS * format.value_bytes() as u32,
        }
    }

    /// Bytes of the scales at a block's begin.
    #[inline]
    pub const fn scale_bytes(&self) -> u32 {
        if matches!(self.format, WeightFormat::Fp8) { self.row_count * SCALE_BYTES } else { 0 }
    }

    /// Bytes of a block, but for the last.
    #[inline]
    pub const fn block_bytes(&self) -> u32 {
        self.scale_bytes() + self.unit_bytes() * COMPUTE_WARPS
    }

    /// Groups of rows, with a last one of 8 rows.
    #[inline]
    pub const fn group_count(&self) -> u32 {
        self.row_count.div_ceil(GROUP_ROWS)
    }

    /// Whether the last group has 8 rows.
    #[inline]
    pub const fn ends_in_half(&self) -> bool {
        !self.row_count.is_multiple_of(GROUP_ROWS)
    }

    /// Bytes of a unit.
    #[inline]
    pub const fn unit_bytes(&self) -> u32 {
        self.row_count * self.row_bytes()
    }

    /// Blocks, with a last one that may have fewer units.
    #[inline]
    pub const fn block_count(&self) -> u32 {
        self.in_dim.div_ceil(BLOCK_COLUMNS)
    }

    /// Blocks of a page that has room for `room` bytes.
    #[inline]
    pub const fn page_blocks(&self, room: u32) -> u32 {
        room / self.block_bytes()
    }

    /// Bytes of such a page, but for the last.
    #[inline]
    pub const fn page_bytes(&self, room: u32) -> u32 {
        self.page_blocks(room) * self.block_bytes()
    }

    /// Bytes in all.
    #[inline]
    pub const fn byte_count(&self) -> u32 {
        self.in_dim.div_ceil(UNIT_COLUMNS) * self.unit_bytes()
            + self.block_count() * self.scale_bytes()
    }

    /// Offset of the unit that has a column.
    const fn unit(&self, column: u32) -> u32 {
        let (block, unit) = (column / BLOCK_COLUMNS, column % BLOCK_COLUMNS / UNIT_COLUMNS);
        block * self.block_bytes() + self.scale_bytes() + unit * self.unit_bytes()
    }

    /// Offset of the scale of a row's column, if rows have scales: an f32 of E4M3, else an f16.
    #[inline]
    pub const fn scale_place(&self, row: u32, column: u32) -> u32 {
        if matches!(self.format, WeightFormat::Fp8) {
            let half = column % BLOCK_COLUMNS / HALF_COLUMNS;
            return column / BLOCK_COLUMNS * self.block_bytes() + (half * self.row_count + row) * 4;
        }
        let codes = self.row_count * (self.row_bytes() - UNIT_SCALE_BYTES);
        let (group, row) = (row / GROUP_ROWS, row % GROUP_ROWS);
        let place =
            if self.is_half(group) { row } else { row % 8 * 2 + row / 8 } + group * GROUP_ROWS;
        self.unit(column) + codes + place * UNIT_SCALE_BYTES
    }

    /// Whether a group has 8 rows.
    const fn is_half(&self, group: u32) -> bool {
        self.ends_in_half() && group + 1 == self.group_count()
    }

    /// Which of a lane's codes that of a group's row `row` and a column is.
    const fn spot(&self, row: u32, column: u32) -> Spot {
        Spot {
            unit: self.unit(column),
            lane: row % 8 * 4 + column % UNIT_COLUMNS / LANE_COLUMNS,
            fragment: column / 4 % 2,
            pair: column / 2 % 2,
        }
    }

    /// Where the code of a row's column is, of E4M3 and integers of 8 bits: the offset of two
    /// bytes, and whether it is their second.
    #[inline]
    pub const fn code_place(&self, row: u32, column: u32) -> (u32, bool) {
        let (group, row) = (row / GROUP_ROWS, row % GROUP_ROWS);
        let Spot { unit, lane, fragment, pair } = self.spot(row, column);
        let is_half = self.is_half(group);
        let group = unit + group * FRAGMENT_BYTES;
        if is_half {
            (group + lane * LANE_BYTES / 2 + fragment * 4 + column % 2 * 2, pair == 1)
        } else {
            let first = group + lane * LANE_BYTES + fragment * 8 + pair * 4;
            (first + column % 2 * 2, row >= 8)
        }
    }

    /// Where the code of a row's column is, of integers of 4 bits: the byte's offset, and the bits
    /// to shift it by.
    #[inline]
    pub const fn nibble_place(&self, row: u32, column: u32) -> (u32, u32) {
        let (group, row) = (row / GROUP_ROWS, row % GROUP_ROWS);
        let Spot { unit, lane, fragment, pair } = self.spot(row, column);
        let first = unit + group * (FRAGMENT_BYTES / 2);
        // A fragment has a word, and its pairs are rows and columns; or both have one.
        let (word, idx) = if self.is_half(group) {
            (first + lane * LANE_BYTES / 4, fragment * 2 + pair)
        } else {
            (first + lane * LANE_BYTES / 2 + fragment * 4, pair * 2 + row / 8)
        };
        (word + column % 2 * 2 + idx / 2, idx % 2 * 4)
    }

    /// Where four adjacent columns of a row are, of bf16: the bytes' offsets of the first and of
    /// the last two. `column` is a multiple of 4.
    #[inline]
    pub const fn place(&self, row: u32, column: u32) -> [u32; 2] {
        let (group, row) = (row / GROUP_ROWS, row % GROUP_ROWS);
        let is_half = self.is_half(group);
        let fragment = if is_half { FRAGMENT_BYTES / 2 } else { FRAGMENT_BYTES };
        let (unit, column) = (self.unit(column), column % UNIT_COLUMNS);
        let lane = row % 8 * 4 + column / LANE_COLUMNS;
        let first = unit
            + group * 2 * FRAGMENT_BYTES
            + column / 4 % 2 * fragment
            + lane * (fragment / WARP_LANES);
        let pair = 2 * BF16_BYTES;
        if is_half {
            [first, first + pair]
        } else {
            [first + row / 8 * pair, first + row / 8 * pair + 2 * pair]
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use crate::tile::{CODE_PAGE_BYTES, TILE_ROWS_MAX, page_bytes};
    use std::vec;

    #[test]
    fn places_cover_every_byte_once() {
        for (row_count, in_dim) in [(1, 8), (8, 64), (17, 72), (24, 256), (47, 904), (64, 2048)] {
            let packing = Packing::new(row_count, in_dim, WeightFormat::Bf16);
            let mut hits = vec![0u8; packing.byte_count() as usize / 4];
            for row in 0..packing.row_count {
                for column in (0..in_dim.next_multiple_of(UNIT_COLUMNS)).step_by(4) {
                    for offset in packing.place(row, column) {
                        hits[offset as usize / 4] += 1;
                    }
                }
            }
            assert!(hits.iter().all(|count| *count == 1), "{row_count} x {in_dim}");
        }
    }

    /// Notes that some bits of a byte are taken.
    fn take(taken: &mut [u8], byte: u32, bits: u8) {
        let byte = &mut taken[byte as usize];
        assert_eq!(*byte & bits, 0);
        *byte |= bits;
    }

    #[test]
    fn codes_and_scales_cover_every_bit_once() {
        let shapes = [(1, 8), (8, 64), (17, 72), (24, 256), (40, 904), (64, 2048)];
        for (format, (row_count, in_dim)) in [WeightFormat::Fp8, WeightFormat::Q8, WeightFormat::Q4]
            .into_iter()
            .flat_map(|format| shapes.map(|shape| (format, shape)))
        {
            let packing = Packing::new(row_count, in_dim, format);
            let mut taken = vec![0u8; packing.byte_count() as usize];
            let columns = in_dim.next_multiple_of(UNIT_COLUMNS);
            for row in 0..packing.row_count {
                for column in 0..columns {
                    let (place, bits) = if format == WeightFormat::Q4 {
                        let (place, shift) = packing.nibble_place(row, column);
                        (place, 15 << shift)
                    } else {
                        let (place, is_second) = packing.code_place(row, column);
                        (place + u32::from(is_second), 0xff)
                    };
                    take(&mut taken, place, bits);
                }
                let (end, step, bytes) = match format {
                    WeightFormat::Fp8 => (packing.block_count() * BLOCK_COLUMNS, HALF_COLUMNS, 4),
                    _ => (columns, UNIT_COLUMNS, 2),
                };
                for column in (0..end).step_by(step as usize) {
                    let first = packing.scale_place(row, column);
                    (first..first + bytes).for_each(|byte| take(&mut taken, byte, 0xff));
                }
            }
            assert!(taken.iter().all(|bits| *bits == 0xff), "{format:?}: {row_count} x {in_dim}");
        }
    }

    #[test]
    fn two_codes_share_no_bit() {
        for code in 0..=u8::MAX {
            let [first, second] = [false, true].map(|is_second| spread_e4m3(code, is_second));
            assert_eq!(first.count_ones() + second.count_ones(), 2 * code.count_ones());
            assert_eq!(first & spread_e4m3(u8::MAX, true), 0);
            assert_eq!(second & spread_e4m3(u8::MAX, false), 0);
        }
        for code in -127..=127 {
            let [first, second] = [false, true].map(|is_second| spread_q8(code, is_second));
            assert_eq!(first & spread_q8(-127, true), 0);
            assert_eq!(second & spread_q8(-127, false), 0);
            let magnitude = i32::from(first & 0x7f);
            assert_eq!(i32::from(code), if first >> 15 == 1 { -magnitude } else { magnitude });
            assert_eq!((second >> 7 & 0x7f, second >> 14), (first & 0x7f, first >> 15));
        }
    }

    #[test]
    fn pages_hold_whole_blocks() {
        let formats = [WeightFormat::Bf16, WeightFormat::Fp8, WeightFormat::Q8, WeightFormat::Q4];
        let of = |row_count| formats.map(|format| (row_count, format));
        for (row_count, format) in (1..=TILE_ROWS_MAX).flat_map(of) {
            for in_dim in [8, 256, 2048, 14336] {
                let packing = Packing::new(row_count, in_dim, format);
                let (room, blocks) = (page_bytes(format), packing.page_blocks(page_bytes(format)));
                assert!(blocks > 0 && packing.page_bytes(room) <= room);
                let pages = packing.block_count().div_ceil(blocks);
                assert!(packing.byte_count() <= pages * packing.page_bytes(room));
                assert!(packing.byte_count() > (pages - 1) * packing.page_bytes(room));
                // Programs whose pages are larger, for other weights, have as many of these blocks in one.
                let is_bf16 = format == WeightFormat::Bf16;
                assert!(!is_bf16 || packing.page_blocks(CODE_PAGE_BYTES) == blocks);
            }
        }
    }
}
