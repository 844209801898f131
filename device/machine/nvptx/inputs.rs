//! Input rows of linear tasks in shared memory, in the layout that the product wants.
//!
//! Products with bf16 weights run on tensor cores, which take bf16 inputs. An f32 is the exact sum of
//! three bf16: its significand has 24 bits, and each part takes the next 8. One or two rows are kept
//! as parts; more rows are kept as they are, and split when they are used.

use tilert_mk_shared::packed::BLOCK_COLUMNS;
use tilert_mk_shared::tile::{
    BLOCKS_TOGETHER_MAX, INPUTS, PART_PADDING, PART_ROWS_MAX, PARTS, PIECE_VALUES, part_bytes,
    part_pitch,
};

use super::memory::{Quad, store_shared_pair, upper_halves};
use crate::machine::Rows;

/// How input rows are kept.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Near, `[PARTS, rows, pitch] bf16`.
    Parts {
        /// Rows.
        rows: u32,
        /// Values from one row to the next.
        pitch: u32,
    },
    /// Near, rows of f32, each block of 256 values swizzled.
    Near,
    /// In the heap, as they are.
    Far,
    /// In the heap, where the stage before has left them: as stamped words.
    Stamped,
}

impl Layout {
    /// The layout of up to `columns` values of each of `rows` rows, up to `PART_ROWS_MAX`, as parts.
    #[inline(always)]
    pub fn parts(rows: u32, columns: u32) -> Layout {
        Layout::Parts { rows, pitch: part_pitch(columns) }
    }

    /// The layout of `rows` rows of `dim` values in an area of `bytes`, as they are.
    #[inline(always)]
    pub fn whole(rows: u32, dim: u32, bytes: u32) -> Layout {
        if rows * dim.next_multiple_of(256) * 4 <= bytes { Layout::Near } else { Layout::Far }
    }
}

/// Whether `rows` rows of `dim` values are kept as parts in an area of `bytes`, if they are
/// multiplied with weights for tensor cores.
#[inline(always)]
pub fn is_narrow(rows: u32, dim: u32, bytes: u32) -> bool {
    rows <= PART_ROWS_MAX && rows * part_bytes(dim) <= bytes
}

/// Blocks of columns of a piece of `rows` rows, up to `PART_ROWS_MAX`, in an area of `bytes`.
#[inline(always)]
pub fn piece_blocks(rows: u32, bytes: u32) -> u32 {
    // One is multiplied while the next one comes.
    let pitch_max = bytes / (2 * PARTS * 2 * rows);
    let columns = (pitch_max - PART_PADDING).min(PIECE_VALUES / rows);
    columns / BLOCK_COLUMNS & !(BLOCKS_TOGETHER_MAX - 1)
}

/// Where the value of `column` is in a near row of f32: of every 256 columns, the first halves of
/// all groups of 8 come before the second halves, so that 32 lanes that each read a half of their
/// group read 512 adjacent bytes.
#[inline(always)]
pub fn swizzled(column: u32) -> u32 {
    (column & !255) | (column >> 2 & 1) << 7 | (column & 255) >> 3 << 2 | (column & 3)
}

/// The parts of a pair of values, packed two and two, the largest first.
#[inline(always)]
pub fn split_pair(a: f32, b: f32) -> [u32; 3] {
    const TOP: u32 = 0xffff_0000;
    let (mut a, mut b) = (a, b);
    let mut parts = [0; PARTS as usize];
    for part in &mut parts {
        let (high_a, high_b) = (a.to_bits() & TOP, b.to_bits() & TOP);
        *part = upper_halves(a.to_bits(), b.to_bits());
        // Exact: the rest has fewer significant bits.
        a -= f32::from_bits(high_a);
        b -= f32::from_bits(high_b);
    }
    parts
}

/// Stores the values of `column..column + 4` of an input row; `column` is a multiple of 4.
#[inline(always)]
pub fn put(shared: u32, layout: Layout, out: &Rows, row: u32, column: u32, quad: Quad) {
    if let Layout::Parts { rows, pitch } = layout {
        return put_parts(shared, [rows, pitch], row, column, quad);
    }
    let column = if layout == Layout::Near { swizzled(column) } else { column };
    let place = out.values.address() + u64::from(row * out.stride as u32 + column) * 4;
    // SAFETY: four adjacent values of the row, this lane's own.
    unsafe { (place as *mut Quad).write(quad) };
}

/// The same of one of `rows` rows that are kept as parts, `pitch` values apart.
#[inline(always)]
pub fn put_parts(shared: u32, [rows, pitch]: [u32; 2], row: u32, column: u32, quad: Quad) {
    let (low, high) = (split_pair(quad[0], quad[1]), split_pair(quad[2], quad[3]));
    for part in 0..PARTS {
        let value = (part * rows + row) * pitch + column;
        let place = shared + INPUTS + value * 2;
        // SAFETY: four adjacent values of a part's row, this lane's own.
        unsafe { store_shared_pair(place, [low[part as usize], high[part as usize]]) };
    }
}
