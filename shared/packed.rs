//! Bf16 weights of a linear task as a GPU's tensor cores take them.
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
//! Whole blocks fill pages, as many as fit.

use crate::tile::{COMPUTE_WARPS, PAGE_BYTES, WARP_LANES};

/// Columns of a unit.
pub const UNIT_COLUMNS: u32 = 32;
/// Columns of a block.
pub const BLOCK_COLUMNS: u32 = UNIT_COLUMNS * COMPUTE_WARPS;
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

const VALUE_BYTES: u32 = 2;

/// How the weights of one task are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packing {
    /// Rows with padding.
    pub row_count: u32,
    /// Columns; a multiple of 8.
    pub in_dim: u32,
}

impl Packing {
    /// The packing of `row_count` rows of `in_dim` columns.
    #[inline]
    pub const fn new(row_count: u32, in_dim: u32) -> Packing {
        Packing { row_count: row_count.next_multiple_of(PAD_ROWS), in_dim }
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
        self.row_count * UNIT_COLUMNS * VALUE_BYTES
    }

    /// Blocks, with a last one that may have fewer units.
    #[inline]
    pub const fn block_count(&self) -> u32 {
        self.in_dim.div_ceil(BLOCK_COLUMNS)
    }

    /// Blocks of a page.
    #[inline]
    pub const fn page_blocks(&self) -> u32 {
        PAGE_BYTES / (self.unit_bytes() * COMPUTE_WARPS)
    }

    /// Bytes of a page, but for the last.
    #[inline]
    pub const fn page_bytes(&self) -> u32 {
        self.page_blocks() * self.unit_bytes() * COMPUTE_WARPS
    }

    /// Pages.
    #[inline]
    pub const fn page_count(&self) -> u32 {
        self.block_count().div_ceil(self.page_blocks())
    }

    /// Bytes in all.
    #[inline]
    pub const fn byte_count(&self) -> u32 {
        self.in_dim.div_ceil(UNIT_COLUMNS) * self.unit_bytes()
    }

    /// Where four adjacent columns of a row are: the bytes' offsets of the first and of the last two.
    /// `column` is a multiple of 4.
    #[inline]
    pub const fn place(&self, row: u32, column: u32) -> [u32; 2] {
        let (group, row) = (row / GROUP_ROWS, row % GROUP_ROWS);
        let is_half = self.ends_in_half() && group + 1 == self.group_count();
        let fragment = if is_half { FRAGMENT_BYTES / 2 } else { FRAGMENT_BYTES };
        let (unit, column) = (column / UNIT_COLUMNS, column % UNIT_COLUMNS);
        let lane = row % 8 * 4 + column / LANE_COLUMNS;
        let first = unit * self.unit_bytes()
            + group * 2 * FRAGMENT_BYTES
            + column / 4 % 2 * fragment
            + lane * (fragment / WARP_LANES);
        let pair = 2 * VALUE_BYTES;
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
    use crate::tile::TILE_ROWS_MAX;
    use std::vec;

    #[test]
    fn places_cover_every_byte_once() {
        for (row_count, in_dim) in [(1, 8), (8, 64), (17, 72), (24, 256), (47, 904), (64, 2048)] {
            let packing = Packing::new(row_count, in_dim);
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

    #[test]
    fn pages_hold_whole_blocks() {
        for row_count in 1..=TILE_ROWS_MAX {
            for in_dim in [8, 256, 2048, 14336] {
                let packing = Packing::new(row_count, in_dim);
                assert!(packing.page_blocks() > 0 && packing.page_bytes() <= PAGE_BYTES);
                let pages = packing.page_count();
                assert!(packing.byte_count() <= pages * packing.page_bytes());
                assert!(packing.byte_count() > (pages - 1) * packing.page_bytes());
            }
        }
    }
}
