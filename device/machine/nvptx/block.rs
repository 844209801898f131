//! A block as one of its threads sees it.

use core::cell::Cell;

use tilert_mk_shared::program::ProgramHeader;
use tilert_mk_shared::task::WeightFormat;
use tilert_mk_shared::tile::{COMPUTE_LANES, OP_WORDS, WARP_LANES};

use super::inputs::Layout;
use super::memory::{Quad, load_constant, load_global, widen_f16};
use super::ring::PageCursor;

/// Values of one load of a lane.
pub const QUAD: u32 = 4;
/// Values of one load of all lanes.
pub const TURN: u32 = QUAD * COMPUTE_LANES;

/// The computing part of a block, as one thread sees it.
pub struct Block {
    /// This thread.
    pub thread_idx: u32,
    /// Shared address of the block's memory.
    pub shared: u32,
    /// What `store` adds this lane's first product to, if it adds: a stamped word.
    pub old: Cell<u64>,
    /// How the input rows of the task are kept.
    pub layout: Cell<Layout>,
    /// The next page to multiply.
    pub pages: PageCursor,
    /// Shared address of the slot of the task that runs.
    pub slot: Cell<u32>,
    /// The leader's next word, from `OP_WORDS`.
    pub lead_word: Cell<u32>,
}

impl Block {
    /// The block whose memory begins at `shared`; `lead_word` is the first of two words for the
    /// leader's results. An op and the loop around it have two each: the op's first result may come
    /// when a lane has not yet read the loop's last one.
    #[inline(always)]
    pub fn new(thread_idx: u32, shared: u32, header: &ProgramHeader, lead_word: u32) -> Block {
        let pages = PageCursor::new(shared, header);
        Block {
            thread_idx,
            shared,
            old: Cell::new(0),
            layout: Cell::new(Layout::Far),
            pages,
            slot: Cell::new(0),
            lead_word: Cell::new(lead_word - OP_WORDS),
        }
    }

    /// Index of this thread's warp.
    #[inline(always)]
    pub fn warp_idx(&self) -> u32 {
        self.thread_idx / WARP_LANES
    }

    /// Index of this thread in its warp.
    #[inline(always)]
    pub fn warp_lane(&self) -> u32 {
        self.thread_idx % WARP_LANES
    }
}

/// `N` quads of a row of `dim` values, from column `base` on, one for each turn of the
/// computing lanes; zeros past the end. All loads are in flight together.
#[inline(always)]
pub fn read_quads<const N: usize>(
    address: u64,
    base: u32,
    dim: u32,
    is_constant: bool,
) -> [Quad; N] {
    let mut quads = [[0.0; QUAD as usize]; N];
    let address = address + u64::from(base) * 4;
    for (step, quad) in (0u32..).zip(&mut quads) {
        if base + step * TURN < dim {
            let from = address + u64::from(step * TURN) * 4;
            // SAFETY: rows are multiples of four values, aligned to 16 bytes, and the column is in
            // the row; what is constant is a bound weight.
            *quad = unsafe { if is_constant { load_constant(from) } else { load_global(from) } };
        }
    }
    quads
}

/// Eight 16-bit values, widened.
#[inline(always)]
pub fn widen_words(format: WeightFormat, words: [u32; 4]) -> (Quad, Quad) {
    let pair = |word: u32| match format {
        WeightFormat::F16 => [widen_f16(word as u16), widen_f16((word >> 16) as u16)],
        _ => [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)],
    };
    let [a, b, c, d] = words.map(pair);
    ([a[0], a[1], b[0], b[1]], [c[0], c[1], d[0], d[1]])
}
