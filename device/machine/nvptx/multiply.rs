//! Products of staged weights: the hot path.
//!
//! Each warp takes four rows of a page and the columns of its 32 lanes; a lane multiplies one
//! 16-byte vector of each row. Lanes are summed by exchange, the chunks of a row by the lane that
//! holds the sum, and the warps that share a row at the end, in order. A product's additions
//! therefore depend on `in_dim` and the weights' format alone.
//!
//! Cost: per page and warp four loads of weights, two of inputs and 32 multiply-adds for each token,
//! 16 KiB of weights for the block.

use tilert_mk_shared::limits::SEGMENT_COUNT_MAX;
use tilert_mk_shared::task::{LinearArgs, Segment, Task, WeightFormat};
use tilert_mk_shared::tile::{
    CHUNK_COLUMNS, COMPUTE_LANES, INPUT_VALUES, INPUTS, PARTIALS, ROWS_PER_WARP, WARP_LANES,
    column_warps, page_rows, vector_values,
};

use super::barrier::sync_compute;
use super::block::{Block, near, swizzled, widen_words};
use super::memory::{load_global, load_shared, load_shared_words, store_shared_f32};
use super::{fma, warp};
use crate::machine::memory::Span;
use crate::machine::{Machine, Rows};

const ROWS: usize = ROWS_PER_WARP as usize;

/// One page as one lane sees it.
struct Page {
    /// Shared address of this lane's vector in its warp's first row; none if past the chunk's end.
    vector: Option<u32>,
    /// Bytes from one row to the next.
    pitch: u32,
    /// Rows of this warp.
    row_count: u32,
    /// The first of them in the tile.
    tile_row: u32,
    /// Shared address of this lane's inputs of the first token.
    input: u32,
    /// Bytes from one token's inputs to the next's.
    input_pitch: u32,
    /// Whether earlier chunks have left sums.
    adds: bool,
}

/// See `Machine::multiply`.
#[inline(always)]
pub fn multiply(block: &Block, task: &Task, x: Rows, count: usize, out: Rows) {
    let args = LinearArgs::unpack(task);
    match args.format {
        WeightFormat::F32 => run::<4>(block, task, x, count),
        WeightFormat::F16 => run::<8>(block, task, x, count),
        WeightFormat::Bf16 => run::<8>(block, task, x, count),
    }
    sync_compute();
    let warps = column_warps(args.format);
    block.for_each(count, args.row_count() as usize, |token, row| {
        let first = (row * count + token) as u32 * warps;
        let mut sum = 0.0;
        for column_warp in 0..warps {
            sum += near(block.shared + PARTIALS, first + column_warp);
        }
        out.values.write(token * out.stride + row, sum);
    });
    sync_compute();
}

/// See `Machine::discard`.
#[inline(always)]
pub fn discard(block: &Block, task: &Task) {
    let args = LinearArgs::unpack(task);
    for _ in 0..args.in_dim.div_ceil(CHUNK_COLUMNS) {
        for idx in 0..SEGMENT_COUNT_MAX {
            for _ in 0..task.segment(idx).row_count.div_ceil(page_rows(args.format)) {
                block.pages.wait_full();
                block.pages.release(block.warp_lane());
            }
        }
    }
}

/// Copies columns `first..first + len` of a row into near memory, swizzled. All lanes call it.
#[inline(always)]
pub fn copy_window(block: &Block, from: Span<f32>, first: usize, len: usize, to: Span<f32>) {
    const AHEAD: usize = 4;
    let step = 4 * COMPUTE_LANES as usize;
    let mut base = block.thread_idx as usize * 4;
    while base < len {
        let mut quads = [[0.0; 4]; AHEAD];
        for (turn, quad) in quads.iter_mut().enumerate() {
            let column = base + turn * step;
            if column < len {
                // SAFETY: rows are multiples of four values, aligned to 16 bytes, and the column is
                // in the row.
                *quad = unsafe { load_global(from.address() + (first + column) as u64 * 4) };
            }
        }
        for (turn, quad) in quads.iter().enumerate() {
            let column = base + turn * step;
            if column < len {
                // SAFETY: four adjacent values of the target row, this lane's own.
                unsafe { ((to.address() + swizzled(column) as u64 * 4) as *mut [f32; 4]).write(*quad) };
            }
        }
        base += AHEAD * step;
    }
}

/// Multiplies all pages of a task; `V` is the number of values in a vector.
#[inline(always)]
fn run<const V: usize>(block: &Block, task: &Task, x: Rows, count: usize) {
    let args = LinearArgs::unpack(task);
    let warps = column_warps(args.format);
    let (column_warp, row_warp) = (block.warp_idx() % warps, block.warp_idx() / warps);
    let column = (column_warp * WARP_LANES + block.warp_lane()) * V as u32;
    let value_bytes = args.format.value_bytes() as u32;
    let is_near = block.is_near(&x);
    let window = INPUT_VALUES / (CHUNK_COLUMNS * count as u32);
    let stride = if is_near { x.stride as u32 } else { window * CHUNK_COLUMNS };
    for chunk in 0..args.in_dim.div_ceil(CHUNK_COLUMNS) {
        let first = chunk * CHUNK_COLUMNS;
        let columns = CHUNK_COLUMNS.min(args.in_dim - first);
        let mut input_first = first;
        if !is_near {
            if chunk % window == 0 {
                let len = (window * CHUNK_COLUMNS).min(args.in_dim - first) as usize;
                take_window(block, x, count, first as usize, len, stride as usize);
            }
            input_first = chunk % window * CHUNK_COLUMNS;
        }
        let input = swizzled((input_first + column) as usize) as u32;
        let mut tile_row = 0;
        for idx in 0..SEGMENT_COUNT_MAX {
            let segment = task.segment(idx);
            let mut row = 0;
            while row < segment.row_count {
                let page = Page {
                    vector: (column < columns).then(|| {
                        let row = row_warp * ROWS_PER_WARP;
                        block.pages.address() + (row * columns + column) * value_bytes
                    }),
                    pitch: columns * value_bytes,
                    row_count: rows_of_warp(&segment, row, row_warp),
                    tile_row: tile_row + row + row_warp * ROWS_PER_WARP,
                    input: block.shared + INPUTS + input * 4,
                    input_pitch: stride * 4,
                    adds: chunk > 0,
                };
                multiply_page::<V>(block, args.format, &page, count, column_warp);
                row += page_rows(args.format);
            }
            tile_row += segment.row_count;
        }
    }
}

/// Rows of the page from `row` on that fall to the warps of `row_warp`.
#[inline(always)]
fn rows_of_warp(segment: &Segment, row: u32, row_warp: u32) -> u32 {
    segment.row_count.saturating_sub(row + row_warp * ROWS_PER_WARP).min(ROWS_PER_WARP)
}

/// Brings a window of columns of all input rows near.
#[inline(always)]
fn take_window(block: &Block, x: Rows, count: usize, first: usize, len: usize, stride: usize) {
    sync_compute();
    let inputs = super::memory::generic(block.shared + INPUTS);
    for token in 0..count {
        // SAFETY: a row of the window in the input area, which only this block's lanes use.
        let to = unsafe { Span::new(inputs + (token * stride) as u64 * 4, stride) };
        copy_window(block, x.values.sub(token * x.stride, first + len), first, len, to);
    }
    sync_compute();
}

#[inline(always)]
fn multiply_page<const V: usize>(
    block: &Block,
    format: WeightFormat,
    page: &Page,
    count: usize,
    column_warp: u32,
) {
    block.pages.wait_full();
    let mut weights = [[0.0f32; V]; ROWS];
    if let Some(vector) = page.vector {
        for row in 0..ROWS {
            if (row as u32) < page.row_count {
                load_vector::<V>(format, vector + row as u32 * page.pitch, &mut weights[row]);
            }
        }
    }
    // The weights are in registers: the page may be filled again.
    block.pages.release(block.warp_lane());
    if page.row_count == 0 {
        return;
    }
    let mut token = 0;
    while count - token >= 8 {
        tokens::<V, 8, 32>(block, page, &weights, token, count, column_warp);
        token += 8;
    }
    if count - token >= 4 {
        tokens::<V, 4, 16>(block, page, &weights, token, count, column_warp);
        token += 4;
    }
    if count - token >= 2 {
        tokens::<V, 2, 8>(block, page, &weights, token, count, column_warp);
        token += 2;
    }
    if count > token {
        tokens::<V, 1, 4>(block, page, &weights, token, count, column_warp);
    }
}

#[inline(always)]
fn load_vector<const V: usize>(format: WeightFormat, address: u32, out: &mut [f32; V]) {
    if V == 4 {
        // SAFETY: a vector of a full page, by the caller.
        let values = unsafe { load_shared(address) };
        out.copy_from_slice(&values);
    } else {
        // SAFETY: as above.
        let (low, high) = widen_words(format, unsafe { load_shared_words(address) });
        for idx in 0..4 {
            out[idx] = low[idx];
            out[idx + 4] = high[idx];
        }
    }
}

/// Products of the warp's rows with `T` tokens; `N` is four times `T`.
#[inline(always)]
fn tokens<const V: usize, const T: usize, const N: usize>(
    block: &Block,
    page: &Page,
    weights: &[[f32; V]; ROWS],
    token: usize,
    count: usize,
    column_warp: u32,
) {
    let mut sums = [0.0f32; N];
    for t in 0..T {
        let mut inputs = [0.0f32; V];
        if page.vector.is_some() {
            let address = page.input + (token + t) as u32 * page.input_pitch;
            for half in 0..V / 4 {
                // SAFETY: this lane's columns of an input row; halves of a group are 128 values
                // apart.
                let quad = unsafe { load_shared(address + half as u32 * 512) };
                inputs[half * 4..half * 4 + 4].copy_from_slice(&quad);
            }
        }
        for row in 0..ROWS {
            let mut sum = 0.0;
            for idx in 0..V {
                sum = fma(weights[row][idx], inputs[idx], sum);
            }
            sums[row * T + t] = sum;
        }
    }
    let lane = block.warp_lane();
    let sum = warp::sum_scattered::<N>(sums, lane);
    let lanes_each = WARP_LANES / N as u32;
    let (row, t) = (lane / lanes_each / T as u32, lane / lanes_each % T as u32);
    if lane % lanes_each == 0 && row < page.row_count {
        let index = (page.tile_row + row) * count as u32 + token as u32 + t;
        let warps = if V == 4 { 8 } else { 4 };
        let place = block.shared + PARTIALS + (index * warps + column_warp) * 4;
        let old = if page.adds { near(place, 0) } else { 0.0 };
        // SAFETY: this lane's own partial sum, in the area of partials.
        unsafe { store_shared_f32(place, if page.adds { old + sum } else { sum }) };
    }
}

const _: () = assert!(vector_values(WeightFormat::Bf16) == 8 && vector_values(WeightFormat::F32) == 4);
const _: () = assert!(column_warps(WeightFormat::Bf16) == 4 && column_warps(WeightFormat::F32) == 8);
