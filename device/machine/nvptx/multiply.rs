//! Products of staged weights: the hot path.
//!
//! Each warp takes four rows of a page and the columns of its 32 lanes; a lane multiplies one
//! 16-byte vector of each row with inputs that it keeps in registers for a whole chunk. Lanes are
//! summed by exchange, the chunks of a row by the lane that holds the sum, and the warps that share
//! a row at the end, in order. A product's additions therefore depend on `in_dim` and the weights'
//! format alone.
//!
//! Cost: about 140 instructions per page and warp for one token; eight warps take the 16 KiB of a
//! page.

use tilert_mk_shared::task::{LinearArgs, Task, WeightFormat};
use tilert_mk_shared::tile::{
    CHUNK_COLUMNS, COMPUTE_LANES, INPUT_VALUES, INPUTS, PARTIALS, ROWS_PER_WARP, WARP_LANES,
    column_warps, page_rows, vector_values,
};

use super::barrier::sync_compute;
use super::block::{Block, near, swizzled, widen_words};
use super::memory::{
    load_global, load_shared, load_shared_f32, load_shared_words, store_shared_f32,
};
use super::{fma, warp};
use crate::machine::memory::Span;
use crate::machine::{Machine, Rows};

const ROWS: usize = ROWS_PER_WARP as usize;
const F32: u16 = WeightFormat::F32 as u16;
const F16: u16 = WeightFormat::F16 as u16;
const BF16: u16 = WeightFormat::Bf16 as u16;

/// See `Machine::multiply`.
#[inline(always)]
pub fn multiply(block: &Block, task: &Task, x: Rows, count: usize, out: Rows) {
    let format = LinearArgs::unpack(task).format;
    let count = count as u32;
    match format {
        WeightFormat::F32 if count == 1 => run::<F32, 4, 1, 4>(block, task, x, count),
        WeightFormat::F32 => run::<F32, 4, 4, 16>(block, task, x, count),
        WeightFormat::F16 if count == 1 => run::<F16, 8, 1, 4>(block, task, x, count),
        WeightFormat::F16 => run::<F16, 8, 4, 16>(block, task, x, count),
        WeightFormat::Bf16 if count == 1 => run::<BF16, 8, 1, 4>(block, task, x, count),
        WeightFormat::Bf16 => run::<BF16, 8, 4, 16>(block, task, x, count),
    }
    sync_compute();
    let (warps, partials) = (column_warps(format), block.shared + PARTIALS);
    let row_count = LinearArgs::unpack(task).row_count() as usize;
    block.for_each(count as usize, row_count, |token, row| {
        let first = (row as u32 * count + token as u32) * warps;
        let mut sum = 0.0;
        for column_warp in 0..warps {
            sum += near(partials, first + column_warp);
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
        for idx in 0..task.segment_count() {
            for _ in 0..task.segment(idx).row_count.div_ceil(page_rows(args.format)) {
                block.pages.wait_full();
                block.pages.release(block.warp_lane());
            }
        }
    }
}

/// Copies columns `first..first + len` of a row into near memory, swizzled. All lanes call it.
#[inline(always)]
pub fn copy_window(block: &Block, from: Span<f32>, first: u32, len: u32, to: u64) {
    const AHEAD: u32 = 4;
    let step = 4 * COMPUTE_LANES;
    let mut base = block.thread_idx * 4;
    // Blocks of 256 columns stay where they are, and `step` is a multiple of them.
    let mut place = to + u64::from(swizzled(base)) * 4;
    let mut source = from.address() + u64::from(first + base) * 4;
    while base < len {
        let mut quads = [[0.0; 4]; AHEAD as usize];
        for (turn, quad) in (0..AHEAD).zip(&mut quads) {
            if base + turn * step < len {
                // SAFETY: rows are multiples of four values, aligned to 16 bytes, and the column is
                // in the row.
                *quad = unsafe { load_global(source + u64::from(turn * step) * 4) };
            }
        }
        for (turn, quad) in (0..AHEAD).zip(&quads) {
            if base + turn * step < len {
                // SAFETY: four adjacent values of the target row, this lane's own.
                unsafe { ((place + u64::from(turn * step) * 4) as *mut [f32; 4]).write(*quad) };
            }
        }
        (base, place) = (base + AHEAD * step, place + u64::from(AHEAD * step) * 4);
        source += u64::from(AHEAD * step) * 4;
    }
}

/// What one lane multiplies in every page of a chunk.
struct Lane {
    /// Bytes from a page's start to this lane's vector in its warp's first row.
    vector: u32,
    /// Bytes from one row to the next.
    pitch: u32,
    /// Whether the chunk has this lane's columns.
    is_inside: bool,
    /// First of the warp's rows in a page.
    row: u32,
    /// Shared address of the lane's inputs of the first token, and bytes to the next token's.
    input: u32,
    input_pitch: u32,
    /// Tokens.
    count: u32,
    /// Row and token whose sum this lane holds after the exchange, if any.
    sum_row: u32,
    sum_token: u32,
    /// Whether earlier chunks have left sums.
    adds: bool,
}

/// Multiplies all pages of a task: `V` values in a vector, `T` tokens at once, `N` is four times `T`.
#[inline(always)]
fn run<const F: u16, const V: usize, const T: usize, const N: usize>(
    block: &Block,
    task: &Task,
    x: Rows,
    count: u32,
) {
    let args = LinearArgs::unpack(task);
    let (warps, value_bytes) = (CHUNK_COLUMNS / (WARP_LANES * V as u32), 16 / V as u32);
    let (column_warp, row_warp) = (block.warp_idx() % warps, block.warp_idx() / warps);
    let column = (column_warp * WARP_LANES + block.warp_lane()) * V as u32;
    let rows = 8 / warps * ROWS_PER_WARP;
    let is_near = block.is_near(&x);
    let window = INPUT_VALUES / (CHUNK_COLUMNS * count);
    let stride = if is_near { x.stride as u32 } else { window * CHUNK_COLUMNS };
    let lanes_each = WARP_LANES / N as u32;
    let holder = block.warp_lane() / lanes_each;
    let is_holder = block.warp_lane() % lanes_each == 0;
    let mut lane = Lane {
        vector: 0,
        pitch: 0,
        is_inside: true,
        row: row_warp * ROWS_PER_WARP,
        input: 0,
        input_pitch: stride * 4,
        count,
        // A lane that holds no sum holds that of a row that does not exist.
        sum_row: if is_holder { holder / T as u32 } else { ROWS_PER_WARP },
        sum_token: holder % T as u32,
        adds: false,
    };
    let place = ((lane.row + lane.sum_row) * count + lane.sum_token) * warps + column_warp;
    let place = block.shared + PARTIALS + place * 4;
    let mut first = 0;
    while first < args.in_dim {
        let columns = CHUNK_COLUMNS.min(args.in_dim - first);
        let mut input_first = first;
        if !is_near {
            input_first = first % (window * CHUNK_COLUMNS);
            if input_first == 0 {
                let len = (window * CHUNK_COLUMNS).min(args.in_dim - first);
                take_window(block, x, count, first, len, stride);
            }
        }
        lane.pitch = columns * value_bytes;
        lane.vector = lane.row * lane.pitch + column * value_bytes;
        lane.is_inside = column < columns;
        lane.input = block.shared + INPUTS + swizzled(input_first + column) * 4;
        lane.adds = first > 0;
        let mut inputs = [[0.0; V]; T];
        take_inputs(&lane, 0, &mut inputs);
        let mut place = place;
        for idx in 0..task.segment_count() {
            let row_count = task.segment(idx).row_count;
            let mut row = 0;
            let mut place_of_page = place;
            while row < row_count {
                page::<F, V, T, N>(block, &lane, &mut inputs, row_count - row, place_of_page);
                place_of_page += rows * count * warps * 4;
                row += rows;
            }
            place += row_count * count * warps * 4;
        }
        first += CHUNK_COLUMNS;
    }
}

/// Brings a window of columns of all input rows near.
#[inline(always)]
fn take_window(block: &Block, x: Rows, count: u32, first: u32, len: u32, stride: u32) {
    sync_compute();
    let inputs = super::memory::generic(block.shared + INPUTS);
    for token in 0..count {
        let from = x.values.sub(token as usize * x.stride, (first + len) as usize);
        copy_window(block, from, first, len, inputs + u64::from(token * stride) * 4);
    }
    sync_compute();
}

/// The lane's inputs of tokens `token..`, zeros for those that do not exist.
#[inline(always)]
fn take_inputs<const V: usize, const T: usize>(lane: &Lane, token: u32, out: &mut [[f32; V]; T]) {
    for (t, out) in (token..).zip(out) {
        *out = [0.0; V];
        if lane.is_inside && t < lane.count {
            for half in 0..V / 4 {
                // SAFETY: this lane's columns of an input row; the halves of a group are 128 values
                // apart.
                let quad = unsafe {
                    load_shared(lane.input + t * lane.input_pitch + half as u32 * 512)
                };
                for idx in 0..4 {
                    out[half * 4 + idx] = quad[idx];
                }
            }
        }
    }
}

/// Multiplies one page, of which `rows_left` rows remain in the segment.
#[inline(always)]
fn page<const F: u16, const V: usize, const T: usize, const N: usize>(
    block: &Block,
    lane: &Lane,
    inputs: &mut [[f32; V]; T],
    rows_left: u32,
    mut place: u32,
) {
    block.pages.wait_full();
    let address = block.pages.address() + lane.vector;
    let mut words = [[0u32; 4]; ROWS];
    for (row, words) in (0u32..).zip(&mut words) {
        if lane.is_inside && lane.row + row < rows_left {
            // SAFETY: a vector of a full page.
            *words = unsafe { load_shared_words(address + row * lane.pitch) };
        }
    }
    // The weights are in registers: the page may be filled again.
    block.pages.release(block.warp_lane());
    if lane.row >= rows_left {
        return;
    }
    let is_mine = lane.row + lane.sum_row < rows_left && lane.sum_row < ROWS_PER_WARP;
    let mut token = 0;
    loop {
        let sum = products::<F, V, T, N>(block, &words, inputs);
        if is_mine && token + lane.sum_token < lane.count {
            // SAFETY: this lane's own partial sum, in the area of partials.
            unsafe {
                let old = if lane.adds { load_shared_f32(place) } else { 0.0 };
                store_shared_f32(place, if lane.adds { old + sum } else { sum });
            }
        }
        token += T as u32;
        if T == 1 || token >= lane.count {
            break;
        }
        take_inputs(lane, token, inputs);
        place += T as u32 * (CHUNK_COLUMNS / (WARP_LANES * V as u32)) * 4;
    }
    if T > 1 && token > T as u32 {
        take_inputs(lane, 0, inputs);
    }
}

/// Sums of the warp's four rows times `T` tokens, scattered over the lanes.
#[inline(always)]
fn products<const F: u16, const V: usize, const T: usize, const N: usize>(
    block: &Block,
    words: &[[u32; 4]; ROWS],
    inputs: &[[f32; V]; T],
) -> f32 {
    let mut sums = [0.0f32; N];
    for row in 0..ROWS {
        let (low, high) = match F {
            F32 => (words[row].map(f32::from_bits), [0.0; 4]),
            F16 => widen_words(WeightFormat::F16, words[row]),
            _ => widen_words(WeightFormat::Bf16, words[row]),
        };
        for t in 0..T {
            let mut sum = 0.0;
            for idx in 0..4 {
                sum = fma(low[idx], inputs[t][idx], sum);
            }
            if V == 8 {
                for idx in 0..4 {
                    sum = fma(high[idx], inputs[t][(idx + 4) % V], sum);
                }
            }
            sums[row * T + t] = sum;
        }
    }
    warp::sum_scattered::<N>(sums, block.warp_lane())
}

const _: () = assert!(vector_values(WeightFormat::Bf16) == 8);
const _: () = assert!(vector_values(WeightFormat::F32) == 4);
