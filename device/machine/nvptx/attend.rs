//! Attention of one split, the rotation of heads, and the choice of the best value.
//!
//! Each query has a group of warps, which deal the positions of a split among them; each warp keeps a
//! running maximum, and the results are merged in the order of the warps. Who gets which position
//! depends on the position alone, so a split's result does not depend on what else the step contains.

use tilert_mk_shared::limits::{ATTENTION_BLOCK, ATTENTION_SPLIT_MAX, HEAD_DIM_MAX};
use tilert_mk_shared::program::Dims;
use tilert_mk_shared::tile::{
    ATTENTION_PARTIAL_VALUES, ATTENTION_VALUES, COMPUTE_WARPS, PARTIALS, REDUCTION, WARP_LANES,
};

use super::barrier::sync_compute;
use super::block::{Block, QUAD, near};
use super::memory::{
    Quad, load_global, load_shared_word, store_shared, store_shared_f32, store_shared_word,
};
use super::{divide, fma, rsqrt, sreg, warp};
use crate::machine::memory::Span;
use crate::machine::{Machine, Rotation, Split};

/// See `Machine::rotate`: one vector, by one warp. `P` pairs to a lane.
#[inline(always)]
pub fn rotate<const P: usize>(item: Rotation, dims: &Dims, lane: usize) {
    let half = dims.kv.head_dim as usize / 2;
    let mut pairs = [[0.0f32; 2]; P];
    let mut weights = [[1.0f32; 2]; P];
    let mut turns = [[1.0f32, 0.0]; P];
    // Everything is requested before the first value is needed.
    for p in 0..P {
        let idx = lane + p * WARP_LANES as usize;
        if idx < half {
            pairs[p] = [item.from.read(idx), item.from.read(idx + half)];
            if !item.norm.is_empty() {
                weights[p] = [item.norm.read(idx), item.norm.read(idx + half)];
            }
            if !item.cos.is_empty() {
                turns[p] = [item.cos.read(idx), item.sin.read(idx)];
            }
        }
    }
    if !item.norm.is_empty() {
        let mut sum = 0.0;
        for p in 0..P {
            sum = fma(pairs[p][0], pairs[p][0], sum);
            sum = fma(pairs[p][1], pairs[p][1], sum);
        }
        let mean = divide(warp::sum(sum), dims.kv.head_dim as f32);
        let scale = rsqrt(mean + dims.rms_norm_eps);
        for p in 0..P {
            pairs[p] = [pairs[p][0] * scale * weights[p][0], pairs[p][1] * scale * weights[p][1]];
        }
    }
    for p in 0..P {
        let idx = lane + p * WARP_LANES as usize;
        if idx < half {
            let ([a, b], [cos, sin]) = (pairs[p], turns[p]);
            let is_turned = !item.cos.is_empty();
            item.out.write(idx, if is_turned { a * cos - b * sin } else { a });
            item.out.write(idx + half, if is_turned { b * cos + a * sin } else { b });
        }
    }
}

const _: () = assert!(HEAD_DIM_MAX <= 8 * KEY_STEP);
const _: () = assert!(HEAD_DIM_MAX <= ATTENTION_VALUES);

/// Lanes that share a key or value.
const KEY_LANES: u32 = 8;
/// Keys that one load of a warp takes from.
const KEYS: u32 = WARP_LANES / KEY_LANES;
/// Values of a key that one load of its lanes takes.
const KEY_STEP: u32 = KEY_LANES * QUAD;

/// See `Machine::attend`. The match bounds the values that a lane keeps in registers: `D` loads of a
/// lane for each key, `B` loads of keys at once.
#[inline(always)]
pub fn attend(block: &Block, split: Split) {
    match (split.head_dim as u32).div_ceil(KEY_STEP) {
        1 | 2 => attend_queries::<2, 4>(block, &split),
        3 | 4 => attend_queries::<4, 2>(block, &split),
        _ => attend_queries::<8, 1>(block, &split),
    }
}

/// Up to `COMPUTE_WARPS` queries at a time. Each has a group of warps, which deal the keys of the
/// split among them.
#[inline(always)]
fn attend_queries<const D: usize, const B: usize>(block: &Block, split: &Split) {
    let mut first = 0;
    while first < split.query_count as u32 {
        let count = COMPUTE_WARPS.min(split.query_count as u32 - first);
        let shift = match count {
            1 => 3,
            2 => 2,
            3 | 4 => 1,
            _ => 0,
        };
        let group = 1 << shift;
        let (query, member) = (block.warp_idx() >> shift, block.warp_idx() & (group - 1));
        if query < count {
            let state = scan::<D, B>(block, split, first + query, member, group);
            leave(block, split, &state);
        }
        sync_compute();
        combine(block, split, first, count, group);
        sync_compute();
        first += count;
    }
}

/// What one lane knows of a query after its warp's positions: the sums are of the lane's columns and
/// of every fourth position, the rest is of all of the warp's.
struct State<const D: usize> {
    largest: f32,
    total: f32,
    sums: [Quad; D],
}

/// Scores of a warp's keys with its query: each lane's columns of `B` loads.
#[inline(always)]
fn scan<const D: usize, const B: usize>(
    block: &Block,
    split: &Split,
    query: u32,
    member: u32,
    group: u32,
) -> State<D> {
    const STEP: u32 = ATTENTION_BLOCK * ATTENTION_SPLIT_MAX;
    let (lane, dim) = (block.warp_lane(), split.head_dim as u32);
    let (key, column) = (lane / KEY_LANES, lane % KEY_LANES * QUAD);
    // What differs between a lane's columns is a constant here, which no register holds.
    let at = |first: u64, row: u32, d: usize| {
        first + u64::from(row * dim + column) * 4 + d as u64 * u64::from(KEY_STEP * 4)
    };
    let columns = dim.saturating_sub(column);
    let is_inside = |d: usize| d as u32 * KEY_STEP < columns;
    let query_row = split.queries.values.address();
    let query_row = query_row + u64::from(query * split.queries.stride as u32) * 4;
    let mut state = State { largest: f32::NEG_INFINITY, total: 0.0, sums: [[0.0; 4]; D] };
    let mut block_first = split.split * ATTENTION_BLOCK;
    while block_first <= split.position {
        let end = (split.position + 1).min(block_first + ATTENTION_BLOCK);
        let mut first = block_first + member * KEYS * B as u32;
        while first < end {
            let take = |plane: Span<f32>| {
                let (first, end) = (sreg::fresh(first), sreg::fresh(end));
                let mut quads = [[[0.0; 4]; D]; B];
                for (b, quads) in (0u32..).zip(&mut quads) {
                    let row = first + b * KEYS + key;
                    for (d, quad) in quads.iter_mut().enumerate() {
                        if row < end && is_inside(d) {
                            // SAFETY: both planes have rows of `dim` values for all positions.
                            *quad = unsafe { load_global(at(plane.address(), row, d)) };
                        }
                    }
                }
                quads
            };
            let (keys, values) = (take(split.keys), take(split.values));
            let mut scores = [0.0; B];
            for d in 0..D {
                if is_inside(d) {
                    let address = at(query_row, 0, d) as *const Quad;
                    // SAFETY: the query's row; near or in this worker's share of the heap.
                    let query = unsafe { address.read() };
                    for b in 0..B {
                        for idx in 0..4 {
                            scores[b] = fma(query[idx], keys[b][d][idx], scores[b]);
                        }
                    }
                }
            }
            for (b, score) in scores.iter_mut().enumerate() {
                *score = sum_of_key(*score) * split.scale;
                if first + b as u32 * KEYS + key >= end {
                    *score = f32::NEG_INFINITY;
                }
            }
            update(block, &mut state, &scores, &values);
            first += group * KEYS * B as u32;
        }
        block_first += STEP;
    }
    for sums in &mut state.sums {
        *sums = sums.map(sum_of_keys);
    }
    state.total = sum_of_keys(state.total);
    state
}

/// The sum over the lanes that share a key, on each of them.
#[inline(always)]
fn sum_of_key(mut value: f32) -> f32 {
    for mask in [4, 2, 1] {
        value += warp::exchange(value, mask);
    }
    value
}

/// The sum over the lanes that have the same columns of different keys, on each of them.
#[inline(always)]
fn sum_of_keys(mut value: f32) -> f32 {
    for mask in [16, 8] {
        value += warp::exchange(value, mask);
    }
    value
}

/// Adds keys, of which at least one has a score; of a key that does not exist it is minus infinity.
#[inline(always)]
fn update<const D: usize, const B: usize>(
    block: &Block,
    state: &mut State<D>,
    scores: &[f32; B],
    values: &[[Quad; D]; B],
) {
    let mut largest = scores.iter().fold(state.largest, |largest, score| largest.max(*score));
    for mask in [16, 8] {
        largest = largest.max(warp::exchange(largest, mask));
    }
    let keep = block.exp(state.largest - largest);
    state.largest = largest;
    state.total *= keep;
    for sums in &mut state.sums {
        *sums = sums.map(|sum| sum * keep);
    }
    for (score, values) in scores.iter().zip(values) {
        let weight = block.exp(score - largest);
        state.total += weight;
        for (sums, values) in state.sums.iter_mut().zip(values) {
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum = fma(*value, weight, *sum);
            }
        }
    }
}

/// Leaves a warp's state in the area of partials. Every lane has the sums of its columns.
#[inline(always)]
fn leave<const D: usize>(block: &Block, split: &Split, state: &State<D>) {
    // Read again: the lane's columns would be kept over the keys otherwise.
    let thread_idx = sreg::thread_idx();
    let (lane, dim) = (thread_idx % WARP_LANES, split.head_dim as u32);
    let warp_area = thread_idx / WARP_LANES * ATTENTION_PARTIAL_VALUES * 4;
    let area = block.shared + PARTIALS + warp_area;
    for (d, sums) in (0u32..).zip(&state.sums) {
        let column = lane * QUAD + d * KEY_STEP;
        if lane < KEY_LANES && column < dim {
            // SAFETY: this warp's part of the area, which has room for a head.
            unsafe { store_shared(area + column * 4, *sums) };
        }
    }
    if lane == 0 {
        let place = area + ATTENTION_VALUES * 4;
        // SAFETY: as above.
        unsafe {
            store_shared_f32(place, state.largest);
            store_shared_f32(place + 4, state.total);
        }
    }
}

/// Merges the states of `count` queries from `first` on, each in the order of its `group` of warps.
/// A warp that has had no key has a largest score of minus infinity; the first one has had some.
#[inline(always)]
fn combine(block: &Block, split: &Split, first: u32, count: u32, group: u32) {
    let dim = split.head_dim;
    let part = |warp: u32, index: u32| {
        near(block.shared + PARTIALS, warp * ATTENTION_PARTIAL_VALUES + index)
    };
    block.for_each(count as usize, dim, |query, column| {
        let warps = query as u32 * group..(query as u32 + 1) * group;
        let mut largest = f32::NEG_INFINITY;
        for warp in warps.clone() {
            largest = largest.max(part(warp, ATTENTION_VALUES));
        }
        let (mut sum, mut total) = (0.0, 0.0);
        for warp in warps {
            let weight = block.exp(part(warp, ATTENTION_VALUES) - largest);
            total = fma(part(warp, ATTENTION_VALUES + 1), weight, total);
            sum = fma(part(warp, column as u32), weight, sum);
        }
        let row = (first as usize + query) * split.out.stride;
        split.out.values.write(row + column, sum);
        if column == 0 {
            split.out.values.write(row + dim, largest);
            split.out.values.write(row + dim + 1, total);
        }
    });
}

/// The largest value of some, the first of equal ones.
pub struct Best {
    /// Its index.
    pub index: u32,
    /// The value.
    pub value: f32,
    /// Whether one of the values is not a number.
    pub is_nan: bool,
}

impl Best {
    /// Of no values.
    pub const NONE: Best = Best { index: u32::MAX, value: f32::NEG_INFINITY, is_nan: false };

    /// Looks at one more value, whose index is larger.
    #[inline(always)]
    pub fn look(&mut self, value: f32, index: u32) {
        self.is_nan |= value.is_nan();
        if value > self.value {
            (self.index, self.value) = (index, value);
        }
    }
}

/// The index of the block's largest value from each lane's; none if a lane saw no number.
#[inline(always)]
pub fn best_of_block(block: &Block, lane: Best) -> Option<u32> {
    let (mut best, mut largest, mut nan) = (lane.index, lane.value, u32::from(lane.is_nan));
    let mut mask = 16;
    while mask > 0 {
        let (other, index) = (warp::exchange(largest, mask), warp::exchange_word(best, mask));
        nan |= warp::exchange_word(nan, mask);
        if other > largest || (other == largest && index < best) {
            (largest, best) = (other, index);
        }
        mask /= 2;
    }
    if block.warp_lane() == 0 {
        let place = block.shared + REDUCTION + block.warp_idx() * 16;
        // SAFETY: this warp's part of the reduction area.
        unsafe {
            store_shared_f32(place, largest);
            store_shared_word(place + 4, best);
            store_shared_word(place + 8, nan);
        }
    }
    sync_compute();
    (best, largest, nan) = (u32::MAX, f32::NEG_INFINITY, 0);
    for warp in 0..COMPUTE_WARPS {
        let place = block.shared + REDUCTION + warp * 16;
        let other = near(place, 0);
        // SAFETY: what the warps have stored above.
        let index = unsafe { load_shared_word(place + 4) };
        // SAFETY: as above.
        nan |= unsafe { load_shared_word(place + 8) };
        if other > largest || (other == largest && index < best) {
            (largest, best) = (other, index);
        }
    }
    sync_compute();
    (nan == 0 && largest.is_finite()).then_some(best)
}
