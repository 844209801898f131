//! Products of staged weights; of f32 and f16 weights here, of bf16 weights on tensor cores.
//!
//! Each warp takes eight rows of a page and the columns of its 32 lanes; a lane multiplies one
//! 16-byte vector of each row and keeps its sums through all chunks of the rows. Then lanes are
//! summed by exchange, and the warps that share a row at the end, in order. A product's additions
//! therefore depend on `in_dim` and the weights' format alone.

use tilert_mk_shared::limits::SEGMENT_COUNT_MAX;
use tilert_mk_shared::task::{LinearArgs, Task, WeightFormat};
use tilert_mk_shared::tile::{
    CHUNK_COLUMNS, COMPUTE_WARPS, PARTIALS, ROWS_PER_WARP, WARP_LANES, WIDE_INPUTS, column_warps,
    vector_values,
};

use super::block::{Block, widen_words};
use super::inputs::{Layout, swizzled};
use super::kind::{Format, Kind};
use super::memory::{load_global, load_shared, load_shared_words, store_shared_f32};
use super::op_block::OpBlock;
use super::{fma, sreg, warp};
use crate::machine::Rows;

const ROWS: usize = ROWS_PER_WARP as usize;
const F32: u16 = WeightFormat::F32 as u16;
const F16: u16 = WeightFormat::F16 as u16;

/// F32 weights.
pub struct PlainF32;

impl Format for PlainF32 {
    const FORMAT: WeightFormat = WeightFormat::F32;

    #[inline(always)]
    fn multiply<const NARROW: bool, const IN_PIECES: bool>(
        block: &Block,
        task: &Task,
        x: Rows,
        count: u32,
    ) {
        by_count::<F32, 4>(block, task, x, count);
    }
}

/// F16 weights.
pub struct PlainF16;

impl Format for PlainF16 {
    const FORMAT: WeightFormat = WeightFormat::F16;

    #[inline(always)]
    fn multiply<const NARROW: bool, const IN_PIECES: bool>(
        block: &Block,
        task: &Task,
        x: Rows,
        count: u32,
    ) {
        by_count::<F16, 8>(block, task, x, count);
    }
}

/// Warps that share a product.
#[inline(always)]
const fn sharers(format: WeightFormat) -> u32 {
    if format as u16 == F16 { 4 } else { COMPUTE_WARPS }
}

/// Where the partial sums of the product at `index` of `[rows, tokens]` begin.
#[inline(always)]
pub fn place<K: Kind>(block: &OpBlock<K>, index: u32) -> u32 {
    block.shared + PARTIALS + index * sharers(K::FORMAT) * 4
}

/// The product at `index` of `[rows, tokens]`: the warps' partial sums, in their order.
#[inline(always)]
pub fn product<K: Kind>(block: &OpBlock<K>, index: u32) -> f32 {
    let first = place(block, index);
    // SAFETY: partial sums that the warps have left before the last barrier.
    let [a, b, c, d] = unsafe { load_shared(first) };
    let sum = a + b + c + d;
    if sharers(K::FORMAT) == 4 {
        return sum;
    }
    // SAFETY: as above.
    let [a, b, c, d] = unsafe { load_shared(first + 16) };
    sum + a + b + c + d
}

/// What one lane multiplies in every page.
struct Lane {
    /// The lane's first column in a chunk.
    column: u32,
    /// First of the warp's rows in a page.
    row: u32,
    /// Where the input rows are: whether near, their address, bytes from one to the next.
    is_near: bool,
    input: u64,
    input_near: u32,
    input_pitch: u32,
    /// Values in an input row, and rows.
    in_dim: u32,
    count: u32,
}

/// Chooses the code for the number of tokens; `V` is the number of values in a vector.
#[inline(always)]
fn by_count<const F: u16, const V: usize>(block: &Block, task: &Task, x: Rows, count: u32) {
    match count {
        1 => run::<F, V, 1, 8, 1>(block, task, x, count),
        2..=4 => run::<F, V, 4, 32, 1>(block, task, x, count),
        _ => run::<F, V, 4, 32, 2>(block, task, x, count),
    }
}

/// Multiplies all pages of a task with up to `B` times `T` tokens; `N` is `ROWS` times `T`.
#[inline(always)]
fn run<const F: u16, const V: usize, const T: usize, const N: usize, const B: usize>(
    block: &Block,
    task: &Task,
    x: Rows,
    count: u32,
) {
    let warps = CHUNK_COLUMNS / (WARP_LANES * V as u32);
    let (column_warp, row_warp) = (block.warp_idx() % warps, block.warp_idx() / warps);
    let column = (column_warp * WARP_LANES + block.warp_lane()) * V as u32;
    let rows = COMPUTE_WARPS / warps * ROWS_PER_WARP;
    let is_near = block.layout.get() == Layout::Near;
    let lane = Lane {
        column,
        row: row_warp * ROWS_PER_WARP,
        is_near,
        input: x.values.address() + u64::from(column) * 4,
        input_near: block.shared + WIDE_INPUTS + swizzled(column) * 4,
        input_pitch: x.stride as u32 * 4,
        in_dim: LinearArgs::unpack(task).in_dim,
        count,
    };
    let mut first = 0;
    loop {
        let rows_left = rows_left(task, first);
        if rows_left == 0 {
            break;
        }
        let sums = group::<F, V, T, N, B>(block, &lane, rows_left);
        if lane.row < rows_left {
            for b in 0..B {
                let token = (b * T) as u32;
                leave::<T, N>(block, &lane, sums[b], first, rows_left, token, warps);
            }
        }
        first += rows.min(rows_left);
    }
}

/// Rows from row `first` of the task to the end of its segment; 0 if there are none. From the
/// record each time: a loop over segments would keep three more values while pages are multiplied.
#[inline(always)]
fn rows_left(task: &Task, first: u32) -> u32 {
    let mut end = 0;
    for idx in 0..SEGMENT_COUNT_MAX {
        end += task.segment(idx).row_count;
        if first < end {
            return end - first;
        }
    }
    0
}

/// Leaves the warp's sums of `T` tokens from `token` on, of rows of a page that begins with row
/// `first` of the task and has `rows_left` rows. What lanes have to do is worked out again each
/// time: registers are scarce while pages are multiplied.
#[inline(always)]
fn leave<const T: usize, const N: usize>(
    block: &Block,
    lane: &Lane,
    sums: [f32; N],
    first: u32,
    rows_left: u32,
    token: u32,
    warps: u32,
) {
    let thread_idx = sreg::thread_idx();
    let (warp_idx, warp_lane) = (thread_idx / WARP_LANES, thread_idx % WARP_LANES);
    let sum = warp::sum_scattered::<N>(sums, warp_lane);
    // Row and token whose sum this lane holds after the exchange, if any.
    let holder = warp_lane / (WARP_LANES / N as u32);
    let (row, token) = (lane.row + holder / T as u32, token + holder % T as u32);
    if warp_lane % (WARP_LANES / N as u32) == 0 && row < rows_left && token < lane.count {
        let place = ((first + row) * lane.count + token) * warps + warp_idx % warps;
        // SAFETY: this lane's own partial sum, in the area of partials.
        unsafe { store_shared_f32(block.shared + PARTIALS + place * 4, sum) };
    }
}

/// This lane's sums of the warp's rows, of `rows_left` in the segment, over all chunks.
#[inline(always)]
fn group<const F: u16, const V: usize, const T: usize, const N: usize, const B: usize>(
    block: &Block,
    lane: &Lane,
    rows_left: u32,
) -> [[f32; N]; B] {
    let mut sums = [[0.0f32; N]; B];
    let value_bytes = 16 / V as u32;
    let mut first = 0;
    while first < lane.in_dim {
        let columns = CHUNK_COLUMNS.min(lane.in_dim - first);
        let pitch = columns * value_bytes;
        block.pages.wait_full();
        let address =
            block.pages.address() + sreg::fresh(lane.column) * value_bytes + lane.row * pitch;
        let is_inside = lane.column < columns;
        // Half of the rows at a time if there are many sums: all would not fit the registers.
        let (halves, rows) = (B, ROWS / B);
        for half in 0..halves {
            let first_row = half * rows;
            let mut words = [[0u32; 4]; ROWS];
            for (row, words) in words.iter_mut().enumerate().take(rows) {
                let row = sreg::fresh((first_row + row) as u32);
                if is_inside && lane.row + row < rows_left {
                    // SAFETY: a vector of a full page.
                    *words = unsafe { load_shared_words(address + row * pitch) };
                }
            }
            if half + 1 == halves {
                // The weights are in registers: the page may be filled again.
                block.pages.release(block.warp_lane());
            }
            if lane.row >= rows_left {
                continue;
            }
            for token in 0..B * T {
                // Addresses of all tokens would be kept otherwise.
                let row = sreg::fresh(token as u32);
                let is_there = is_inside && row < lane.count;
                let input = if is_there { take_input::<V>(lane, row, first) } else { [0.0; V] };
                for row in 0..rows {
                    let weights = widened::<F, V>(words[row]);
                    let sum = &mut sums[token / T][(first_row + row) * T + token % T];
                    for idx in 0..V {
                        *sum = fma(weights[idx], input[idx], *sum);
                    }
                }
            }
        }
        first += CHUNK_COLUMNS;
    }
    sums
}

/// The lane's inputs of one token in the chunk that begins at column `first`.
#[inline(always)]
fn take_input<const V: usize>(lane: &Lane, token: u32, first: u32) -> [f32; V] {
    let mut input = [0.0; V];
    for half in 0..V / 4 {
        let offset = token * lane.input_pitch + first * 4;
        // SAFETY: this lane's columns of an input row; near, the halves of a group are 128 values
        // apart.
        let quad = unsafe {
            if lane.is_near {
                load_shared(lane.input_near + offset + half as u32 * 512)
            } else {
                load_global(lane.input + u64::from(offset) + half as u64 * 16)
            }
        };
        for idx in 0..4 {
            input[half * 4 + idx] = quad[idx];
        }
    }
    input
}

#[inline(always)]
fn widened<const F: u16, const V: usize>(words: [u32; 4]) -> [f32; V] {
    let (low, high) = match F {
        F32 => (words.map(f32::from_bits), [0.0; 4]),
        _ => widen_words(WeightFormat::F16, words),
    };
    core::array::from_fn(|idx| if idx < 4 { low[idx % 4] } else { high[idx % 4] })
}

const _: () = assert!(vector_values(WeightFormat::F16) == 8);
const _: () = assert!(vector_values(WeightFormat::F32) == 4);
const _: () = assert!(column_warps(WeightFormat::F16) == 4 && COMPUTE_WARPS == 8);
