//! Products of one or two tokens whose input rows have no room near: a piece of them after the other.
//!
//! Rows that have come out of a prologue are near as a whole; others are read from the heap by every block, and
//! what does not take room near is left to the ring of pages. While a piece is multiplied the next one is on its
//! way, in registers. Ops of their own do this: what is not run slows down the others.

use tilert_mk_shared::packed::BLOCK_COLUMNS;
use tilert_mk_shared::task::LinearArgs;
use tilert_mk_shared::tile::{
    BLOCKS_TOGETHER_MAX, PART_ROWS_MAX, PIECE_VALUES, part_bytes, part_pitch,
};

use super::super::barrier::sync_compute;
use super::super::block::{Block, QUAD, TURN};
use super::super::digest::Digest;
use super::super::header::header;
use super::super::inputs::put_parts;
use super::super::record::record;
use super::super::stamped::{self, Looks, Words};
use super::super::{sreg, step};
use super::weights::Weights;
use super::{Lane, Next, Shape, Sums};

/// Loads of a lane for a piece.
const PIECE_QUADS: usize = (PIECE_VALUES / TURN) as usize;
const _: () =
    assert!(PIECE_VALUES == 2 * BLOCKS_TOGETHER_MAX * BLOCK_COLUMNS, "pieces are powers of two");
const _: () = assert!(PIECE_VALUES.is_multiple_of(PART_ROWS_MAX * TURN) && PART_ROWS_MAX == 2);

/// Input rows that come in pieces, as a lane reads them.
struct Pieces {
    /// Rows.
    count: u32,
    /// Columns of each.
    in_dim: u32,
    /// Columns of a piece, but for the last.
    columns: u32,
    /// The lane's first column.
    lane_column: u32,
    /// Address of the lane's first word of each row; of one row, twice.
    rows: [u64; PART_ROWS_MAX as usize],
    /// Stamp of the words.
    stamp: u32,
}

impl Pieces {
    /// Those of the task in the block's slot.
    #[inline(always)]
    fn new(block: &Block) -> Pieces {
        let slot = sreg::fresh(block.slot.get());
        let args = LinearArgs::unpack(&record(slot));
        let count = args.token_rows.count(step::counts(sreg::fresh(block.shared)));
        let columns = Digest::read(slot).piece_columns(count);
        let lane_column = sreg::fresh(block.thread_idx) * QUAD;
        let heap = header().heap + args.x;
        let place = |row: u32| {
            let value = row * args.x_stride + lane_column;
            stamped::place(&header(), heap + u64::from(value) * 4)
        };
        let rows = [place(0), place(count - 1)];
        let stamp = stamped::input_stamp(block, 0);
        Pieces { count, in_dim: args.in_dim, columns, lane_column, rows, stamp }
    }

    /// Columns of the piece that begins at `first`.
    #[inline(always)]
    fn len(&self, first: u32) -> u32 {
        self.columns.min(self.in_dim - first)
    }

    /// Which row the lane's load `idx` is of, and from which column of the piece on.
    #[inline(always)]
    fn spot(&self, idx: usize) -> (u32, u32) {
        let (each, idx) = (PIECE_QUADS as u32 / PART_ROWS_MAX, idx as u32);
        let row = if self.count > 1 { idx / each } else { 0 };
        let turn = if self.count > 1 { idx % each } else { idx };
        (row, turn * TURN + self.lane_column)
    }

    /// Asks for the words of the piece that begins at `first`; zeros past its end.
    #[inline(always)]
    fn take(&self, first: u32) -> [Words; PIECE_QUADS] {
        let len = self.len(first);
        let mut words = [stamped::zeros(self.stamp); PIECE_QUADS];
        for (idx, words) in words.iter_mut().enumerate() {
            let (row, column) = self.spot(idx);
            if column < len {
                let row = if row == 0 { self.rows[0] } else { self.rows[1] };
                let turn = first + column - self.lane_column;
                // SAFETY: four values of a row. Whole groups further on, words lie as they do there.
                *words = unsafe { stamped::load_quad(row + u64::from(turn) * 8) };
            }
        }
        words
    }

    /// Leaves a piece near, once all its words are there.
    #[inline(always)]
    fn put(&self, block: &Block, to: u32, first: u32, mut words: [Words; PIECE_QUADS]) {
        let len = self.len(first);
        let differ =
            |words: &[Words; PIECE_QUADS]| stamped::difference(words.as_flattened(), self.stamp);
        if differ(&words) != 0 {
            words = stamped::wait(block, Looks::AtOnce, || {
                let words = self.take(first);
                (words, differ(&words))
            });
        }
        for (idx, words) in words.iter().enumerate() {
            let (row, column) = self.spot(idx);
            if column < len {
                let size = [self.count, part_pitch(self.columns)];
                put_parts(block.shared + to, size, row, column, stamped::values(*words));
            }
        }
    }
}

/// Products of `G` groups of rows with all pieces, of which the first is near; the last group has 8 rows if `HALF`.
#[inline(always)]
pub(super) fn product<W: Weights, const G: usize, const HALF: bool>(
    block: &Block,
    mut lane: Lane,
    mut shape: Shape,
) -> Sums<G, 1> {
    let mut sums = [[[0.0; 4]; 1]; G];
    let mut next = Next::FIRST;
    loop {
        // Worked out anew each time: registers are scarce while a lane multiplies.
        let pieces = Pieces::new(block);
        shape.end = shape.in_dim.min(next.first + pieces.columns);
        let ahead = pieces.take(shape.end);
        W::product::<G, HALF>(&mut sums, &mut next, block, &lane, &shape);
        if shape.end == shape.in_dim {
            return sums;
        }
        let pieces = Pieces::new(block);
        // Two places take turns: no warp multiplies the piece before this one any more, they have met since.
        let bytes = pieces.count * part_bytes(pieces.columns);
        let is_second = shape.end & pieces.columns != 0;
        pieces.put(block, if is_second { bytes } else { 0 }, shape.end, ahead);
        sync_compute();
        let bytes = if is_second { bytes } else { bytes.wrapping_neg() };
        let moved = bytes.wrapping_sub(pieces.columns * 2);
        lane.input = u64::from((lane.input as u32).wrapping_add(moved));
    }
}
