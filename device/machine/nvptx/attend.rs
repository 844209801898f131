//! Attention of one split, the rotation of heads, and the choice of the best value.
//!
//! The warps of a block deal the positions of a split among them in groups; each keeps a running
//! maximum, and the results are merged in the order of the warps. Who gets which position depends on
//! the position alone, so a split's result does not depend on what else the step contains.

use tilert_mk_shared::program::Dims;
use tilert_mk_shared::tile::{
    ATTENTION_PARTIAL_VALUES, ATTENTION_VALUES, COMPUTE_WARPS, PARTIALS, REDUCTION, WARP_LANES,
};

use super::barrier::sync_compute;
use super::block::{Block, near, sqrt};
use super::memory::{load_global_f32, load_shared_word, store_shared_f32, store_shared_word};
use super::{fma, warp};
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
            if let Some(weight) = item.norm {
                weights[p] = [weight.read(idx), weight.read(idx + half)];
            }
            if let Some([cos, sin]) = item.turn {
                turns[p] = [cos.read(idx), sin.read(idx)];
            }
        }
    }
    if item.norm.is_some() {
        let mut sum = 0.0;
        for p in 0..P {
            sum = fma(pairs[p][0], pairs[p][0], sum);
            sum = fma(pairs[p][1], pairs[p][1], sum);
        }
        let mean = warp::sum(sum) / dims.kv.head_dim as f32;
        let scale = 1.0 / sqrt(mean + dims.rms_norm_eps);
        for p in 0..P {
            pairs[p] = [pairs[p][0] * scale * weights[p][0], pairs[p][1] * scale * weights[p][1]];
        }
    }
    for p in 0..P {
        let idx = lane + p * WARP_LANES as usize;
        if idx < half {
            let ([a, b], [cos, sin]) = (pairs[p], turns[p]);
            item.out.write(idx, if item.turn.is_some() { a * cos - b * sin } else { a });
            item.out.write(idx + half, if item.turn.is_some() { b * cos + a * sin } else { b });
        }
    }
}

/// See `Machine::attend`. The match bounds the values that a lane keeps in registers.
#[inline(always)]
pub fn attend(block: &Block, split: Split) {
    match split.head_dim.div_ceil(WARP_LANES as usize) {
        1 | 2 => attend_groups::<2, 4, 4, 16>(block, split),
        3 | 4 => attend_groups::<4, 2, 4, 8>(block, split),
        5..=8 => attend_groups::<8, 2, 2, 4>(block, split),
        _ => attend_groups::<16, 1, 1, 1>(block, split),
    }
}

/// `D` values of a head to a lane, `G` queries and `B` positions at once; `N` is `G` times `B`.
#[inline(always)]
fn attend_groups<const D: usize, const G: usize, const B: usize, const N: usize>(
    block: &Block,
    split: Split,
) {
    const { assert!(G * D * 32 <= ATTENTION_VALUES as usize && G * B == N) };
    let mut first = 0;
    while first < split.query_count {
        let count = G.min(split.query_count - first);
        let state = scan::<D, G, B, N>(block, &split, first, count);
        leave(block, &split, &state);
        sync_compute();
        combine(block, &split, first, count);
        sync_compute();
        first += G;
    }
}

/// What one warp knows of `G` queries after its positions.
struct State<const D: usize, const G: usize> {
    largest: [f32; G],
    total: [f32; G],
    sums: [[f32; D]; G],
}

#[inline(always)]
fn scan<const D: usize, const G: usize, const B: usize, const N: usize>(
    block: &Block,
    split: &Split,
    first: usize,
    count: usize,
) -> State<D, G> {
    let (lane, dim) = (block.warp_lane() as usize, split.head_dim);
    let position_count = split.keys.len() / dim;
    let mut queries = [[0.0f32; D]; G];
    for (g, query) in queries.iter_mut().enumerate() {
        for (d, value) in query.iter_mut().enumerate() {
            let column = lane + d * WARP_LANES as usize;
            if g < count && column < dim {
                *value = split.queries.values.read((first + g) * split.queries.stride + column);
            }
        }
    }
    let mut state = State { largest: [f32::NEG_INFINITY; G], total: [0.0; G], sums: [[0.0; D]; G] };
    let mut position = block.warp_idx() as usize * B;
    while position < position_count {
        let mut keys = [[0.0f32; D]; B];
        let mut values = [[0.0f32; D]; B];
        for b in 0..B {
            for d in 0..D {
                let column = lane + d * WARP_LANES as usize;
                if position + b < position_count && column < dim {
                    let offset = ((position + b) * dim + column) as u64 * 4;
                    // SAFETY: both spans have `position_count` rows of `dim` values.
                    keys[b][d] = unsafe { load_global_f32(split.keys.address() + offset) };
                    // SAFETY: as above.
                    values[b][d] = unsafe { load_global_f32(split.values.address() + offset) };
                }
            }
        }
        let scores = scores::<D, G, B, N>(&queries, &keys, lane as u32, split.scale);
        let valid = position_count - position;
        for g in 0..G {
            update::<D, G, B>(block, &mut state, g, &scores[g], &values, valid);
        }
        position += COMPUTE_WARPS as usize * B;
    }
    state
}

/// Scaled products of all queries and keys, on every lane.
#[inline(always)]
fn scores<const D: usize, const G: usize, const B: usize, const N: usize>(
    queries: &[[f32; D]; G],
    keys: &[[f32; D]; B],
    lane: u32,
    scale: f32,
) -> [[f32; B]; G] {
    let mut products = [0.0f32; N];
    for g in 0..G {
        for b in 0..B {
            let mut sum = 0.0;
            for d in 0..D {
                sum = fma(queries[g][d], keys[b][d], sum);
            }
            products[g * B + b] = sum;
        }
    }
    let sum = warp::sum_scattered::<N>(products, lane);
    let mut scores = [[0.0f32; B]; G];
    for g in 0..G {
        for b in 0..B {
            let source = (g * B + b) as u32 * (WARP_LANES / N as u32);
            scores[g][b] = warp::take(sum, source) * scale;
        }
    }
    scores
}

/// Adds `B` positions, of which `valid` exist, to query `g`.
#[inline(always)]
fn update<const D: usize, const G: usize, const B: usize>(
    block: &Block,
    state: &mut State<D, G>,
    g: usize,
    scores: &[f32; B],
    values: &[[f32; D]; B],
    valid: usize,
) {
    let mut largest = state.largest[g];
    for b in 0..B {
        if b < valid {
            largest = largest.max(scores[b]);
        }
    }
    let keep = block.exp(state.largest[g] - largest);
    state.largest[g] = largest;
    state.total[g] *= keep;
    for d in 0..D {
        state.sums[g][d] *= keep;
    }
    for b in 0..B {
        let weight = if b < valid { block.exp(scores[b] - largest) } else { 0.0 };
        state.total[g] += weight;
        for d in 0..D {
            state.sums[g][d] = fma(values[b][d], weight, state.sums[g][d]);
        }
    }
}

/// Leaves a warp's state in the area of partials.
#[inline(always)]
fn leave<const D: usize, const G: usize>(block: &Block, split: &Split, state: &State<D, G>) {
    let (lane, dim) = (block.warp_lane() as usize, split.head_dim);
    let area = block.shared + PARTIALS + block.warp_idx() * ATTENTION_PARTIAL_VALUES * 4;
    for g in 0..G {
        for d in 0..D {
            let column = lane + d * WARP_LANES as usize;
            if column < dim {
                // SAFETY: this warp's part of the area; the group's heads fit it by the assertion
                // in `attend_groups`.
                unsafe { store_shared_f32(area + (g * dim + column) as u32 * 4, state.sums[g][d]) };
            }
        }
        if lane == 0 {
            let place = area + (ATTENTION_VALUES + 2 * g as u32) * 4;
            // SAFETY: as above.
            unsafe {
                store_shared_f32(place, state.largest[g]);
                store_shared_f32(place + 4, state.total[g]);
            }
        }
    }
}

/// Merges the warps' states of `count` queries, in the order of the warps.
#[inline(always)]
fn combine(block: &Block, split: &Split, first: usize, count: usize) {
    let dim = split.head_dim;
    let part = |warp: u32, index: u32| {
        near(block.shared + PARTIALS, warp * ATTENTION_PARTIAL_VALUES + index)
    };
    block.for_each(count, dim, |g, column| {
        let score = ATTENTION_VALUES + 2 * g as u32;
        let mut largest = f32::NEG_INFINITY;
        for warp in 0..COMPUTE_WARPS {
            largest = largest.max(part(warp, score));
        }
        let (mut sum, mut total) = (0.0, 0.0);
        for warp in 0..COMPUTE_WARPS {
            let weight = block.exp(part(warp, score) - largest);
            total = fma(part(warp, score + 1), weight, total);
            sum = fma(part(warp, (g * dim + column) as u32), weight, sum);
        }
        let row = (first + g) * split.out.stride;
        split.out.values.write(row + column, sum);
        if column == 0 {
            split.out.values.write(row + dim, largest);
            split.out.values.write(row + dim + 1, total);
        }
    });
}

/// The index of the block's largest value from each lane's; none if a lane saw no number.
#[inline(always)]
pub fn best_of_block(block: &Block, mut best: u32, mut largest: f32, is_nan: bool) -> Option<u32> {
    let mut nan = u32::from(is_nan);
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
