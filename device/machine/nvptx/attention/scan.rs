//! A warp's part of a pass: its positions' scores, and the weighted sums of their values.

use tilert_mk_shared::limits::{ATTENTION_BLOCK, ATTENTION_SPLIT_MAX};
use tilert_mk_shared::tile::{ATTENTION_SCORES, COMPUTE_WARPS};

use super::Pass;
use super::lane::{KEY_LANES, KEY_STEP, KEYS, Lane, Places, Taken};
use crate::machine::Attention;
use crate::machine::nvptx::barrier::sync_warp;
use crate::machine::nvptx::memory::{Quad, load_shared, store_shared, store_shared_pair};
use crate::machine::nvptx::{exp, fma, sreg, warp};

/// From one block of a split's positions to the next.
const SPLIT_STEP: u32 = ATTENTION_BLOCK * ATTENTION_SPLIT_MAX;

/// Loads of a lane for each key up to which it has registers for keys, or for values too, while it
/// works on something else.
pub(super) const KEYS_AHEAD: usize = 4;
/// See `KEYS_AHEAD`.
pub(super) const VALUES_AHEAD: usize = 2;

/// What one lane knows of the queries after its warp's positions: sums of its columns of every fourth
/// position for all queries; of one query, which `Scored` tells, the largest score of all of the warp's
/// positions, and the weights of those that the lane has scored.
pub(super) struct State<const D: usize, const Q: usize> {
    largest: f32,
    total: f32,
    sums: [[Quad; D]; Q],
}

/// Which of the `Q` times `B` scores of a key's lanes belongs to a lane once they are summed.
struct Scored<const B: usize, const Q: usize>;

impl<const B: usize, const Q: usize> Scored<B, Q> {
    /// Lanes that have the same score.
    const LANES: u32 = KEY_LANES / (B * Q) as u32;

    /// The first lane, of those that share a key with `lane`, which has query `q`'s score of key `b`.
    #[inline(always)]
    fn lane(lane: &Lane, q: usize, b: usize) -> u32 {
        lane.key() * KEY_LANES + (q * B + b) as u32 * Self::LANES
    }

    /// Which of the lane's `B` keys its score is of.
    #[inline(always)]
    fn key(lane: &Lane) -> u32 {
        lane.lane() % KEY_LANES / Self::LANES % B as u32
    }

    /// Joins values of all lanes that have scores of the same query.
    #[inline(always)]
    fn join(value: f32, join: impl Fn(f32, f32) -> f32) -> f32 {
        let mut value = value;
        if B == 2 {
            value = join(value, warp::exchange(value, Self::LANES));
        }
        for mask in [8, 16] {
            value = join(value, warp::exchange(value, mask));
        }
        value
    }

    /// Sums the lanes' scores; each lane gets its own.
    #[inline(always)]
    fn sum(lane: &Lane, scores: [[f32; B]; Q]) -> f32 {
        const { assert!(B * Q <= 8 && B <= 2) };
        let mut values = [0.0; 8];
        for (q, scores) in scores.iter().enumerate() {
            for (b, score) in scores.iter().enumerate() {
                values[q * B + b] = *score;
            }
        }
        // Constant halves: the compiler must see every index to keep the values in registers.
        macro_rules! halve {
            ($($half:literal),*) => {$(
                if $half < B * Q {
                    let mask = Self::LANES * $half;
                    let is_upper = lane.lane() & mask != 0;
                    for idx in 0..$half {
                        let (low, high) = (values[idx], values[idx + $half]);
                        let (kept, sent) = if is_upper { (high, low) } else { (low, high) };
                        values[idx] = kept + warp::exchange(sent, mask);
                    }
                }
            )*};
        }
        halve!(4, 2, 1);
        let (mut value, mut mask) = (values[0], Self::LANES / 2);
        while mask > 0 {
            value += warp::exchange(value, mask);
            mask /= 2;
        }
        value
    }
}

/// The warp's part of a pass. It has the first `keys`, up to `KEYS_AHEAD`, and `values`, up to
/// `VALUES_AHEAD`, but for the token's own; the next ones are asked for as soon as there are registers
/// for them.
#[inline(always)]
pub(super) fn scan<const D: usize, const B: usize, const Q: usize>(
    lane: &Lane,
    attention: &Attention,
    pass: &Pass,
    mut keys: Taken<D, B>,
    mut values: Taken<D, B>,
) -> State<D, Q> {
    let mut first = pass.split * ATTENTION_BLOCK;
    let mut state = State { largest: f32::NEG_INFINITY, total: 0.0, sums: [[[0.0; 4]; D]; Q] };
    let none = [[[0.0; 4]; D]; B];
    // Whether values are asked for before scores: older chips' assemblers find no registers for it.
    let values_first = D <= KEYS_AHEAD && cfg!(tilert_sm90);
    let mut is_begun = false;
    while first + lane.again().first::<B>() <= attention.position {
        // What the loops around this one could keep is more than there are registers for.
        let (lane, now) = (&lane.again(), sreg::fresh(first));
        let has_own = lane.has_own::<B>(attention, pass);
        let next = next_positions::<B>(now);
        let goes_on = next + lane.first::<B>() <= attention.position;
        if D > KEYS_AHEAD {
            keys = lane.take(attention, attention.keys, now);
        }
        if D > VALUES_AHEAD && values_first {
            values = lane.take(attention, attention.values, now);
        }
        if has_own {
            lane.take_own(attention, now, 0, &mut keys);
        }
        let sums = scores::<D, B, Q>(lane, &keys);
        if D > VALUES_AHEAD && !values_first {
            values = lane.take(attention, attention.values, now);
        }
        if D <= KEYS_AHEAD {
            keys = if goes_on { lane.take(attention, attention.keys, next) } else { none };
        }
        let mut score = Scored::<B, Q>::sum(lane, sums) * Places::numbers(lane).scale;
        if lane.position::<B>(now, Scored::<B, Q>::key(lane)) > attention.position {
            score = f32::NEG_INFINITY;
        }
        if has_own {
            lane.take_own(attention, now, 1, &mut values);
        }
        update(lane, &mut state, score, &values, is_begun);
        if D <= VALUES_AHEAD {
            values = if goes_on { lane.take(attention, attention.values, next) } else { none };
        }
        (first, is_begun) = (next, true);
    }
    state
}

/// What the block takes after its positions from `first` on.
#[inline(always)]
fn next_positions<const B: usize>(first: u32) -> u32 {
    let next = first + COMPUTE_WARPS * KEYS * B as u32;
    let is_end = next % ATTENTION_BLOCK == 0;
    if is_end { next + SPLIT_STEP - ATTENTION_BLOCK } else { next }
}

/// Scores of the lane's keys with all queries: its columns' part of them.
#[inline(always)]
fn scores<const D: usize, const B: usize, const Q: usize>(
    lane: &Lane,
    keys: &Taken<D, B>,
) -> [[f32; B]; Q] {
    let lane = &lane.again();
    let mut scores = [[0.0; B]; Q];
    for d in 0..D {
        if lane.is_inside::<D>(d) {
            let mut address = lane.sums() + lane.column::<D>(d) * 4;
            for scores in &mut scores {
                // SAFETY: the query, which this warp has left.
                let query = unsafe { load_shared(address) };
                for (score, key) in scores.iter_mut().zip(keys) {
                    for idx in 0..4 {
                        *score = fma(query[idx], key[d][idx], *score);
                    }
                }
                address += 2 * lane.half * 4;
            }
        }
    }
    scores
}

/// Adds keys, of which each query has at least one with a score; of a key that does not exist it is
/// minus infinity. `is_begun`: there are sums already.
#[inline(always)]
fn update<const D: usize, const B: usize, const Q: usize>(
    lane: &Lane,
    state: &mut State<D, Q>,
    score: f32,
    values: &Taken<D, B>,
    is_begun: bool,
) {
    let lane = &lane.again();
    let largest = Scored::<B, Q>::join(state.largest.max(score), f32::max);
    let weight = exp(score - largest);
    if is_begun {
        let keep = exp(state.largest - largest);
        state.total *= keep;
        for (q, sums) in state.sums.iter_mut().enumerate() {
            let keep = warp::take(keep, Scored::<B, Q>::lane(lane, q, 0));
            for sums in sums {
                *sums = sums.map(|sum| sum * keep);
            }
        }
    }
    state.largest = largest;
    state.total += weight;
    for (b, values) in values.iter().enumerate() {
        for (q, sums) in state.sums.iter_mut().enumerate() {
            let weight = warp::take(weight, Scored::<B, Q>::lane(lane, q, b));
            for (sums, values) in sums.iter_mut().zip(values) {
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum = fma(*value, weight, *sum);
                }
            }
        }
    }
}

/// Leaves the warp's sums over its queries, and what it knows of their scores.
#[inline(always)]
pub(super) fn leave<const D: usize, const B: usize, const Q: usize>(
    lane: &Lane,
    mut state: State<D, Q>,
) {
    let lane = &lane.again();
    let total = Scored::<B, Q>::join(state.total, |a, b| a + b);
    leave_scores::<B, Q>(lane, state.largest, total);
    // The lanes of four keys have sums of the same columns: each gets a quarter of the totals.
    let is_upper = lane.key() & 2 != 0;
    for q in 0..Q / 2 {
        for d in 0..D {
            let (low, high) = (state.sums[q][d], state.sums[q + Q / 2][d]);
            state.sums[q][d] = halved(low, high, is_upper, 16);
        }
    }
    let is_upper = lane.key() & 1 != 0;
    let (query, count) = if Q == 4 { (lane.key(), D) } else { (lane.key() / 2, D / 2) };
    for d in 0..count {
        let high = if Q == 4 { state.sums[1 % Q][d] } else { state.sums[0][d + D / 2] };
        state.sums[0][d] = halved(state.sums[0][d], high, is_upper, 8);
    }
    let mut address = lane.sums() + (query * 2 * lane.half + lane.first_column()) * 4;
    if Q != 4 && is_upper {
        address += lane.half * 4;
    }
    // All lanes have read the queries.
    sync_warp();
    for (d, sums) in state.sums[0].iter().enumerate() {
        if d < count && lane.is_inside::<D>(d) {
            let first = if d < D / 2 { 0 } else { lane.half };
            let column = first + (d % (D / 2)) as u32 * KEY_STEP;
            // SAFETY: four values of this warp's memory.
            unsafe { store_shared(address + column * 4, *sums) };
        }
    }
}

/// The sums of two lanes that differ by `mask`, of `low` or, on the upper one, of `high`.
#[inline(always)]
fn halved(low: Quad, high: Quad, is_upper: bool, mask: u32) -> Quad {
    core::array::from_fn(|idx| {
        let (low, high) = (low[idx], high[idx]);
        let (kept, sent) = if is_upper { (high, low) } else { (low, high) };
        kept + warp::exchange(sent, mask)
    })
}

/// Leaves the largest score of the warp's positions and their sum of weights, for each query.
#[inline(always)]
pub(super) fn leave_scores<const B: usize, const Q: usize>(lane: &Lane, largest: f32, total: f32) {
    let lanes = KEY_LANES / Q as u32;
    if lane.key() == 0 && lane.lane() % lanes == 0 {
        let place = (lane.lane() / lanes * COMPUTE_WARPS + lane.warp()) * 8;
        let pair = [largest.to_bits(), total.to_bits()];
        // SAFETY: this warp's pair for the query.
        unsafe { store_shared_pair(lane.shared + ATTENTION_SCORES + place, pair) };
    }
}
