//! Products with bf16 weights on tensor cores, for all widths of a step.
//!
//! A page holds 16 rows; each warp takes all of them and an eighth of the columns. A lane loads 16
//! bytes of two rows at a time: which columns a step of `mma` calls its k is free as long as weights
//! and inputs agree, and so fragments need no shuffling. Every pair of token and part has a column
//! of accumulators of its own, so a token's products do not depend on its neighbours. The parts are
//! summed at the end, the smallest first, then the warps in order.
//!
//! Cost: per page and warp 8 loads of weights and 8 `mma` for one or two tokens, 24 for more.

use core::arch::asm;

use tilert_mk_shared::task::{LinearArgs, Task, WeightFormat};
use tilert_mk_shared::tile::{
    CHUNK_COLUMNS, COMPUTE_WARPS, INPUTS, PARTIALS, WARP_LANES, page_rows,
};

use super::block::Block;
use super::inputs::{Layout, PARTS, split_pair, swizzled};
use super::memory::{load_global, load_shared, load_shared_words, store_shared_f32};
use super::warp;
use crate::machine::Rows;

/// Columns of a chunk that one warp takes.
const WARP_COLUMNS: u32 = CHUNK_COLUMNS / COMPUTE_WARPS;
/// Columns of one load of a warp: four lanes of 8 values.
const BLOCK_COLUMNS: u32 = 32;
/// Loads of a row in a page.
const BLOCKS: usize = (WARP_COLUMNS / BLOCK_COLUMNS) as usize;

/// `c += a * b` for 16 rows, 8 columns and 16 values of k. PTX: `mma.sync.m16n8k16`.
#[inline(always)]
fn mma(c: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
    // SAFETY: all 32 lanes call this together.
    unsafe {
        asm!("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 \
              {{{c0}, {c1}, {c2}, {c3}}}, {{{a0}, {a1}, {a2}, {a3}}}, {{{b0}, {b1}}}, \
              {{{c0}, {c1}, {c2}, {c3}}};",
             c0 = inout(reg32) c[0], c1 = inout(reg32) c[1], c2 = inout(reg32) c[2],
             c3 = inout(reg32) c[3], a0 = in(reg32) a[0], a1 = in(reg32) a[1],
             a2 = in(reg32) a[2], a3 = in(reg32) a[3], b0 = in(reg32) b[0], b1 = in(reg32) b[1],
             options(nomem, nostack));
    }
}

/// What one lane multiplies in every page.
struct Lane {
    /// Row of weights, column of accumulators.
    group: u32,
    /// First of the lane's columns in a chunk.
    column: u32,
    /// Values in an input row.
    in_dim: u32,
    layout: Layout,
    /// Address of the lane's inputs in the first chunk: shared if near, else global.
    input: u64,
}

/// Leaves the partial products of all rows, one for each warp, in the area of partials.
#[inline(always)]
pub fn multiply(block: &Block, task: &Task, x: Rows, count: u32) {
    let in_dim = LinearArgs::unpack(task).in_dim;
    let (group, t) = (block.warp_lane() / 4, block.warp_lane() % 4);
    let column = block.warp_idx() * WARP_COLUMNS + t * 8;
    let layout = block.layout.get();
    // Columns of accumulators that belong to nobody repeat another's inputs.
    let is_narrow = count <= 2;
    let token = if is_narrow { group % 2 } else { group }.min(count - 1);
    let near = u64::from(block.shared + INPUTS);
    let input = match layout {
        Layout::Parts { rows, pitch } => {
            let part = (group / 2).min(PARTS - 1);
            near + u64::from(((part * rows + token) * pitch + column) * 2)
        }
        Layout::Near => near + u64::from((token * x.stride as u32 + swizzled(column)) * 4),
        Layout::Far => x.values.address() + u64::from(token * x.stride as u32 + column) * 4,
    };
    let lane = Lane { group, column, in_dim, layout, input };
    let mut tile_row = 0;
    for idx in 0..task.segment_count() {
        let row_count = task.segment(idx).row_count;
        let mut row = 0;
        while row < row_count {
            let (left, first) = (row_count - row, tile_row + row);
            if is_narrow {
                let sums = group_of_rows::<1>(block, &lane, left);
                leave_narrow(block, sums[0], [first, left, count]);
            } else {
                let [large, middle, small] = group_of_rows::<3>(block, &lane, left);
                let sum = |idx: usize| small[idx] + middle[idx] + large[idx];
                leave(block, [sum(0), sum(1), sum(2), sum(3)], [first, left, count]);
            }
            row += page_rows(WeightFormat::Bf16);
        }
        tile_row += row_count;
    }
}

/// Products of up to 16 rows, of `rows_left`, over all chunks; `TILES` tiles of accumulators: one
/// for both tokens' parts, or one for each part of all tokens.
#[inline(always)]
fn group_of_rows<const TILES: usize>(
    block: &Block,
    lane: &Lane,
    rows_left: u32,
) -> [[f32; 4]; TILES] {
    // Two chains of sums each: an `mma` takes longer than the next one's operands.
    let mut sums = [[[0.0f32; 4]; 2]; TILES];
    let mut first = 0;
    while first < lane.in_dim {
        let columns = CHUNK_COLUMNS.min(lane.in_dim - first);
        block.pages.wait_full();
        let address = block.pages.address() + (lane.group * columns + lane.column) * 2;
        let mut weights = [[[0u32; 4]; 2]; BLOCKS];
        for (idx, weights) in (0u32..).zip(&mut weights) {
            let is_inside = lane.column + idx * BLOCK_COLUMNS < columns;
            for half in 0..2u32 {
                if is_inside && lane.group + half * 8 < rows_left {
                    let offset = idx * BLOCK_COLUMNS * 2 + half * 8 * columns * 2;
                    // SAFETY: 8 values of a row of a full page.
                    weights[half as usize] = unsafe { load_shared_words(address + offset) };
                }
            }
        }
        // The weights are in registers: the page may be filled again.
        block.pages.release(block.warp_lane());
        for (idx, [low, high]) in (0u32..).zip(&weights) {
            let is_inside = lane.column + idx * BLOCK_COLUMNS < columns;
            let inputs = if is_inside {
                take_inputs::<TILES>(lane, first + idx * BLOCK_COLUMNS)
            } else {
                [[0; 4]; TILES]
            };
            for (sums, b) in sums.iter_mut().zip(&inputs) {
                mma(&mut sums[0], [low[0], high[0], low[1], high[1]], [b[0], b[1]]);
                mma(&mut sums[1], [low[2], high[2], low[3], high[3]], [b[2], b[3]]);
            }
        }
        first += CHUNK_COLUMNS;
    }
    sums.map(|[even, odd]| [even[0] + odd[0], even[1] + odd[1], even[2] + odd[2], even[3] + odd[3]])
}

/// The lane's 8 inputs at `offset` columns from its first, as bf16 for each tile.
#[inline(always)]
fn take_inputs<const TILES: usize>(lane: &Lane, offset: u32) -> [[u32; 4]; TILES] {
    if let Layout::Parts { .. } = lane.layout {
        // SAFETY: this lane's columns of a part's row.
        return [unsafe { load_shared_words(lane.input as u32 + offset * 2) }; TILES];
    }
    let (low, high) = if lane.layout == Layout::Near {
        // Within a block of 256, which a lane's columns of a chunk never leave, swizzled places of
        // columns 8 apart are 4 values apart.
        let place = lane.input as u32 + (offset & !255) * 4 + (offset & 255) / 8 * 16;
        // SAFETY: this lane's columns of an input row; halves of a group are 128 values apart.
        unsafe { (load_shared(place), load_shared(place + 512)) }
    } else {
        let place = lane.input + u64::from(offset) * 4;
        // SAFETY: this lane's columns of an input row.
        unsafe { (load_global(place), load_global(place + 16)) }
    };
    let pairs = [
        split_pair(low[0], low[1]),
        split_pair(low[2], low[3]),
        split_pair(high[0], high[1]),
        split_pair(high[2], high[3]),
    ];
    // One tile: the lane's column says which part; else a tile for each part.
    let part = if TILES == 1 { (lane.group / 2).min(PARTS - 1) as usize } else { 0 };
    core::array::from_fn(|tile| {
        core::array::from_fn(|idx| match part + tile {
            0 => pairs[idx][0],
            1 => pairs[idx][1],
            _ => pairs[idx][2],
        })
    })
}

/// Sums the parts, which are in lanes 1 and 2 after their group's first, and leaves the products.
#[inline(always)]
fn leave_narrow(block: &Block, sums: [f32; 4], place: [u32; 3]) {
    let first_lane = block.warp_lane() & !3;
    let sum = |idx: usize| {
        let (middle, small) =
            (warp::take(sums[idx], first_lane + 1), warp::take(sums[idx], first_lane + 2));
        small + middle + sums[idx]
    };
    let totals = [sum(0), sum(1), sum(2), sum(3)];
    if block.warp_lane() % 4 == 0 {
        leave(block, totals, place);
    }
}

/// Leaves a lane's products: two tokens of two rows, 8 apart.
#[inline(always)]
fn leave(block: &Block, sums: [f32; 4], [first, rows_left, count]: [u32; 3]) {
    let (group, t) = (block.warp_lane() / 4, block.warp_lane() % 4);
    for idx in 0..4 {
        let sum = sums[idx as usize];
        let (row, token) = (group + idx / 2 * 8, t * 2 + idx % 2);
        if row < rows_left && token < count {
            let place = ((first + row) * count + token) * COMPUTE_WARPS + block.warp_idx();
            // SAFETY: this lane's own partial sum, in the area of partials.
            unsafe { store_shared_f32(block.shared + PARTIALS + place * 4, sum) };
        }
    }
}

const _: () = assert!(WARP_COLUMNS == 128 && BLOCKS == 4 && WARP_LANES == 32);
