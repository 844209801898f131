//! Products with bf16 weights on tensor cores, for all widths of a step.
//!
//! Weights come packed as `shared/packed.rs` describes: a warp multiplies its unit of 32 columns of
//! each block with all rows of the task, so inputs are read once for up to four groups of rows, and a
//! fragment is one load without shuffling. Every pair of token and part has a column of accumulators
//! of its own, and a warp's order of additions is that of the columns, so products depend on neither
//! the task's shape nor a token's neighbours. The parts are summed at the end, the smallest first,
//! then the warps in order.
//!
//! Cost: per unit and group of 16 rows two loads of weights and two `mma` for one or two tokens, six
//! for more.

use core::arch::asm;

use tilert_mk_shared::packed::{
    BLOCK_COLUMNS, FRAGMENT_BYTES, GROUP_ROWS, LANE_BYTES, LANE_COLUMNS, Packing, UNIT_COLUMNS,
};
use tilert_mk_shared::task::{LinearArgs, Task};
use tilert_mk_shared::tile::{COMPUTE_WARPS, INPUTS, PARTIALS, WARP_LANES};

use super::block::Block;
use super::inputs::{Layout, PARTS, split_pair, swizzled};
use super::memory::{
    load_global, load_shared, load_shared_pair, load_shared_words, store_shared_f32,
};
use super::warp;
use crate::machine::Rows;

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

/// What one lane multiplies in every block.
struct Lane {
    /// First of the lane's columns in a block.
    column: u32,
    /// First of the warp's columns in a block.
    warp_column: u32,
    /// Offsets of the lane's weights in a block, of fragments of 16 rows and of 8.
    whole: u32,
    half: u32,
    layout: Layout,
    /// Address of the lane's inputs in the first block: shared if near, else global.
    input: u64,
}

/// Leaves the partial products of all rows, one for each warp, in the area of partials.
#[inline(always)]
pub fn multiply(block: &Block, task: &Task, x: Rows, count: u32) {
    let args = LinearArgs::unpack(task);
    let packing = Packing::new(args.row_count(), args.in_dim);
    let (group, t) = (block.warp_lane() / 4, block.warp_lane() % 4);
    let warp_column = block.warp_idx() * UNIT_COLUMNS;
    let column = warp_column + t * LANE_COLUMNS;
    let layout = block.layout.get();
    // Columns of accumulators that belong to nobody repeat another's inputs.
    let token = group.min(count - 1);
    let near = u64::from(block.shared + INPUTS);
    let input = match layout {
        Layout::Parts { rows, pitch } => {
            let (part, token) = ((group / 2).min(PARTS - 1), (group % 2).min(count - 1));
            near + u64::from(((part * rows + token) * pitch + column) * 2)
        }
        Layout::Near => near + u64::from((token * x.stride as u32 + swizzled(column)) * 4),
        Layout::Far => x.values.address() + u64::from(token * x.stride as u32 + column) * 4,
    };
    let whole = block.warp_idx() * packing.unit_bytes() + block.warp_lane() * LANE_BYTES;
    let half = whole - block.warp_lane() * LANE_BYTES / 2;
    let lane = Lane { column, warp_column, whole, half, layout, input };
    let is_narrow = matches!(layout, Layout::Parts { .. });
    let left = [args.row_count(), count];
    match (packing.group_count(), is_narrow) {
        (1, true) => narrow::<1>(block, &lane, &packing, left),
        (2, true) => narrow::<2>(block, &lane, &packing, left),
        (3, true) => narrow::<3>(block, &lane, &packing, left),
        (_, true) => narrow::<4>(block, &lane, &packing, left),
        (1, false) => wide::<1>(block, &lane, &packing, left),
        (2, false) => wide::<2>(block, &lane, &packing, left),
        (3, false) => wide::<3>(block, &lane, &packing, left),
        (_, false) => wide::<4>(block, &lane, &packing, left),
    }
}

/// One or two tokens: a tile's columns are both tokens' parts.
#[inline(always)]
fn narrow<const G: usize>(block: &Block, lane: &Lane, packing: &Packing, rows: [u32; 2]) {
    let sums = product::<G, 1>(block, lane, packing);
    for (idx, [sums]) in (0u32..).zip(&sums) {
        leave_narrow(block, *sums, idx * GROUP_ROWS, rows);
    }
}

/// More tokens: a tile for each part.
#[inline(always)]
fn wide<const G: usize>(block: &Block, lane: &Lane, packing: &Packing, rows: [u32; 2]) {
    let sums = product::<G, 3>(block, lane, packing);
    for (idx, [large, middle, small]) in (0u32..).zip(&sums) {
        let sum = |idx: usize| small[idx] + middle[idx] + large[idx];
        leave(block, [sum(0), sum(1), sum(2), sum(3)], idx * GROUP_ROWS, rows);
    }
}

/// Products of `G` groups of rows over all blocks, with `TILES` tiles of accumulators each.
#[inline(always)]
fn product<const G: usize, const TILES: usize>(
    block: &Block,
    lane: &Lane,
    packing: &Packing,
) -> [[[f32; 4]; TILES]; G] {
    let mut sums = [[[0.0f32; 4]; TILES]; G];
    let (block_bytes, page_blocks) = (packing.unit_bytes() * COMPUTE_WARPS, packing.page_blocks());
    let (mut first, mut address, mut blocks_left) = (0, 0, 0);
    while first < packing.in_dim {
        if blocks_left == 0 {
            block.pages.wait_full();
            (address, blocks_left) = (block.pages.address(), page_blocks);
        }
        if first + lane.warp_column < packing.in_dim {
            let is_inside = first + lane.column < packing.in_dim;
            let inputs =
                if is_inside { take_inputs::<TILES>(lane, first) } else { [[0; 4]; TILES] };
            for (idx, sums) in (0u32..).zip(&mut sums) {
                let is_half = idx as usize + 1 == G && packing.ends_in_half();
                let [even, odd] = take_weights(lane, address + idx * 2 * FRAGMENT_BYTES, is_half);
                for (sums, b) in sums.iter_mut().zip(&inputs) {
                    mma(sums, even, [b[0], b[1]]);
                    mma(sums, odd, [b[2], b[3]]);
                }
            }
        }
        first += BLOCK_COLUMNS;
        address += block_bytes;
        blocks_left -= 1;
        if blocks_left == 0 || first >= packing.in_dim {
            block.pages.release(block.warp_lane());
        }
    }
    sums
}

/// The lane's part of a group's two fragments, in a unit of the block that begins at `address` less
/// the groups before.
#[inline(always)]
fn take_weights(lane: &Lane, address: u32, is_half: bool) -> [[u32; 4]; 2] {
    if is_half {
        let address = address + lane.half;
        // SAFETY: this lane's values in a full page.
        let pairs =
            unsafe { [load_shared_pair(address), load_shared_pair(address + FRAGMENT_BYTES / 2)] };
        return pairs.map(|[a, b]| [a, 0, b, 0]);
    }
    let address = address + lane.whole;
    // SAFETY: this lane's values in a full page.
    unsafe { [load_shared_words(address), load_shared_words(address + FRAGMENT_BYTES)] }
}

/// The lane's 8 inputs in the block whose columns begin at `first`, as bf16 for each tile.
#[inline(always)]
fn take_inputs<const TILES: usize>(lane: &Lane, first: u32) -> [[u32; 4]; TILES] {
    if TILES == 1 {
        // SAFETY: this lane's columns of a part's row.
        return [unsafe { load_shared_words(lane.input as u32 + first * 2) }; TILES];
    }
    let (low, high) = if lane.layout == Layout::Near {
        let place = lane.input as u32 + first * 4;
        // SAFETY: this lane's columns of an input row; halves of a group are 128 values apart.
        unsafe { (load_shared(place), load_shared(place + 512)) }
    } else {
        let place = lane.input + u64::from(first) * 4;
        // SAFETY: this lane's columns of an input row.
        unsafe { (load_global(place), load_global(place + 16)) }
    };
    let pairs = [
        split_pair(low[0], low[1]),
        split_pair(low[2], low[3]),
        split_pair(high[0], high[1]),
        split_pair(high[2], high[3]),
    ];
    core::array::from_fn(|tile| core::array::from_fn(|idx| pairs[idx][tile]))
}

/// Sums the parts, which are in lanes 1 and 2 after their group's first, and leaves the products.
#[inline(always)]
fn leave_narrow(block: &Block, sums: [f32; 4], first: u32, rows: [u32; 2]) {
    let first_lane = block.warp_lane() & !3;
    let sum = |idx: usize| {
        let (middle, small) =
            (warp::take(sums[idx], first_lane + 1), warp::take(sums[idx], first_lane + 2));
        small + middle + sums[idx]
    };
    let totals = [sum(0), sum(1), sum(2), sum(3)];
    if block.warp_lane() % 4 == 0 {
        leave(block, totals, first, rows);
    }
}

/// Leaves a lane's products: two tokens of two rows, 8 apart, of the group that begins at `first`.
#[inline(always)]
fn leave(block: &Block, sums: [f32; 4], first: u32, [row_count, count]: [u32; 2]) {
    let (group, t) = (block.warp_lane() / 4, block.warp_lane() % 4);
    for idx in 0..4 {
        let sum = sums[idx as usize];
        let (row, token) = (first + group + idx / 2 * 8, t * 2 + idx % 2);
        if row < row_count && token < count {
            let place = (row * count + token) * COMPUTE_WARPS + block.warp_idx();
            // SAFETY: this lane's own partial sum, in the area of partials.
            unsafe { store_shared_f32(block.shared + PARTIALS + place * 4, sum) };
        }
    }
}

const _: () = assert!(WARP_LANES == 32 && COMPUTE_WARPS * UNIT_COLUMNS == BLOCK_COLUMNS);
