//! Attention of a token over a task's splits.
//!
//! Blocks of a split's positions are dealt to all warps, by the position alone, and a warp multiplies
//! its keys with up to `ATTENTION_QUERIES` queries. Each keeps a running maximum for each query; the
//! warps' sums are merged in the order of the warps, which is the one time the block meets. What
//! is not of this step is asked for before the step's queries are awaited, then all that is: a short
//! sequence takes one round of loads. Each warp rotates the queries for itself, and the warp that has
//! the token's own position appends its key and value and keeps them near.
//!
//! Eight lanes share a key: each has four columns of every 32 of a head's lower half, and those that
//! rotation pairs them with in the upper half.

mod join;
mod lane;
mod scan;

use tilert_mk_shared::kv::attention_split_count;
use tilert_mk_shared::limits::{ATTENTION_BLOCK, HEAD_DIM_MAX, SPLIT_ROWS};
use tilert_mk_shared::program::Dims;
use tilert_mk_shared::tile::{
    ATTENTION_QUERIES, ATTENTION_SCORES, ATTENTION_SUMS, ATTENTION_VALUES, COMPUTE_WARPS,
    WARP_LANES,
};

pub use self::join::join;
use self::lane::{KEY_STEP, KEYS, Lane, Numbers, Places};
use self::scan::{KEYS_AHEAD, VALUES_AHEAD, leave, leave_scores, scan};
use super::barrier::{sync_compute, sync_warp};
use super::block::Block;
use super::kind;
use super::memory::{Quad, load_shared_f32, load_shared_pair};
use super::{divide, exp, fma, rsqrt, sreg, stamped, warp};
use crate::machine::Attention;

const _: () = assert!(HEAD_DIM_MAX <= 2 * 4 * KEY_STEP);
const _: () = assert!(ATTENTION_QUERIES == 4 && 4 * 2 * 2 * KEY_STEP <= ATTENTION_VALUES);
const _: () = assert!(2 * HEAD_DIM_MAX <= ATTENTION_VALUES);

/// Attention of heads of up to 64 values.
pub type Short<const JOINS: bool> = kind::Attention<2, 2, 4, JOINS>;
/// Of up to 128 values, one or two queries for each key.
pub type Pairs<const JOINS: bool> = kind::Attention<4, 2, 2, JOINS>;
/// Of up to 128 values.
pub type Middle<const JOINS: bool> = kind::Attention<4, 1, 4, JOINS>;
/// Of longer heads.
pub type Long<const JOINS: bool> = kind::Attention<8, 1, 2, JOINS>;

/// What is known of a model's heads when the op is compiled: it bounds the values that a lane keeps in
/// registers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Heads {
    /// See the type of this name, likewise the others.
    Short,
    /// See `Short`.
    Pairs,
    /// See `Short`.
    Middle,
    /// See `Short`.
    Long,
}

impl Heads {
    /// Those of a model.
    #[inline(always)]
    pub fn of(dims: &Dims) -> Heads {
        match (dims.kv.head_dim, dims.head_count) {
            (0..=64, _) => Heads::Short,
            (0..=128, heads) if heads <= 2 * dims.kv.kv_head_count => Heads::Pairs,
            (0..=128, _) => Heads::Middle,
            _ => Heads::Long,
        }
    }
}

/// See `Machine::attend`: splits one after the other, and of each `Q` queries at a time, with `D` loads of a
/// lane for each key and `B` keys at once.
#[inline(always)]
pub fn attend<const D: usize, const B: usize, const Q: usize>(
    block: &Block,
    attention: &Attention,
) {
    let lane = Lane::new(block, attention);
    Places::keep(&lane, attention);
    let (mut split, mut is_begun) = (attention.part_idx, false);
    while split < attention_split_count(attention.position) {
        let mut query = 0;
        while query < Places::numbers(&lane.again()).query_count {
            if is_begun {
                // The memory of sums is free, and what has been appended is there.
                sync_compute();
            }
            is_begun = true;
            let pass = Pass { split: sreg::fresh(split), query: sreg::fresh(query) };
            let lane = lane.again();
            let first = split * ATTENTION_BLOCK;
            let (mut keys, mut values) = ([[[0.0; 4]; D]; B], [[[0.0; 4]; D]; B]);
            if D <= KEYS_AHEAD {
                keys = lane.take(attention, attention.keys, first);
            }
            if D <= VALUES_AHEAD {
                values = lane.take(attention, attention.values, first);
            }
            if first + lane.first::<B>() <= attention.position {
                rotate::<D, B, Q>(block, &lane, attention, &pass);
                let state = scan::<D, B, Q>(&lane, attention, &pass, keys, values);
                leave::<D, B, Q>(&lane, state);
            } else {
                leave_scores::<B, Q>(&lane, f32::NEG_INFINITY, 0.0);
            }
            sync_compute();
            combine::<B, Q>(block, &lane, attention, &pass);
            query += Q as u32;
        }
        split += Places::numbers(&lane.again()).part_count;
    }
}

/// What is done at once: `Q` queries from `query` on, and a split.
struct Pass {
    split: u32,
    query: u32,
}

/// Leaves the pass's queries where the warp reads them, each rotated by the lanes of a key, and
/// appends the token's key and value if the warp has its position. All is requested before the first
/// value is needed, if there are registers for it.
#[inline(always)]
fn rotate<const D: usize, const B: usize, const Q: usize>(
    block: &Block,
    lane: &Lane,
    attention: &Attention,
    pass: &Pass,
) {
    let lane = &lane.again();
    let (dim, key) = (2 * lane.half, lane.key());
    let query = key * Q as u32 / KEYS;
    let head = (pass.query + query).min(Places::numbers(lane).query_count - 1) * dim;
    let appends = pass.query == 0 && lane.has_own::<B>(attention, pass);
    let [queries, query_norm] = Places::Queries.get(lane);
    let turns = lane.turns::<D>();
    let ([own_key, own_value], [key_norm, _]) =
        (Places::Own.get(lane), Places::KeyNormAndOut.get(lane));
    let row = queries + u64::from(head) * 4;
    let stamp = stamped::input_stamp(block, 0);
    if Q == 2 {
        // With two queries, two keys' lanes would do the same: the second ones take the token's own.
        let is_own = appends && key % 2 != 0;
        let own = if key == 1 { own_key } else { own_value };
        let (row, norm) = if is_own { (own, key_norm) } else { (row, query_norm) };
        let mut weights = [[0.0; 4]; D];
        if D <= KEYS_AHEAD {
            weights = lane.norm_weights(norm);
        }
        let [mut quads] = lane.stamped_rows(block, [row], stamp);
        if appends {
            lane.append(attention, attention.values, 1, 3, &quads);
        }
        if D > KEYS_AHEAD {
            weights = lane.norm_weights(norm);
        }
        turn(lane, attention, norm != 0, &weights, &turns, &mut quads);
        if key % 2 == 0 {
            lane.keep(lane.sums() + query * dim * 4, &quads);
        }
        if appends {
            lane.append(attention, attention.keys, 0, 1, &quads);
        }
    } else {
        // Older chips' assemblers find no registers for them meanwhile.
        let mut weights = [[0.0; 4]; D];
        if cfg!(tilert_sm90) {
            weights = lane.norm_weights(query_norm);
        }
        // Lanes of even keys take the token's own key, the others its value.
        let own_row = if key % 2 == 0 { own_key } else { own_value };
        let (mut quads, mut own);
        if appends {
            [quads, own] = lane.stamped_rows(block, [row, own_row], stamp);
        } else {
            [quads] = lane.stamped_rows(block, [row], stamp);
            own = [[0.0; 4]; D];
        }
        if !cfg!(tilert_sm90) {
            weights = lane.norm_weights(query_norm);
        }
        turn(lane, attention, query_norm != 0, &weights, &turns, &mut quads);
        lane.keep(lane.sums() + query * dim * 4, &quads);
        if appends {
            lane.append(attention, attention.values, 1, 1, &own);
            let weights = lane.norm_weights::<D>(key_norm);
            turn(lane, attention, key_norm != 0, &weights, &turns, &mut own);
            lane.append(attention, attention.keys, 0, 0, &own);
        }
    }
    sync_warp();
}

/// Normalises a head, if it has a norm, with its weights, and rotates it; a lane has its columns of it.
#[inline(always)]
fn turn<const D: usize>(
    lane: &Lane,
    attention: &Attention,
    has_norm: bool,
    weights: &[Quad; D],
    turns: &[Quad; D],
    head: &mut [Quad; D],
) {
    if has_norm {
        let mut sum = 0.0;
        for value in head.as_flattened() {
            sum = fma(*value, *value, sum);
        }
        let mean = divide(sum_of_key(sum), 2.0 * lane.half as f32);
        let scale = rsqrt(mean + attention.eps);
        for (value, weight) in head.as_flattened_mut().iter_mut().zip(weights.as_flattened()) {
            *value = *value * scale * weight;
        }
    }
    for d in 0..D / 2 {
        for idx in 0..4 {
            let (a, b) = (head[d][idx], head[d + D / 2][idx]);
            let (cos, sin) = (turns[d][idx], turns[d + D / 2][idx]);
            head[d][idx] = a * cos - b * sin;
            head[d + D / 2][idx] = b * cos + a * sin;
        }
    }
}

/// Merges the warps' sums, in their order, and stores the result of each query of the pass.
#[inline(always)]
fn combine<const B: usize, const Q: usize>(
    block: &Block,
    lane: &Lane,
    attention: &Attention,
    pass: &Pass,
) {
    let lane = &lane.again();
    let (query, part) = (lane.warp() % Q as u32, lane.warp() / Q as u32);
    let Numbers { query_count, split_values, .. } = Places::numbers(lane);
    if pass.query + query >= query_count {
        return;
    }
    // A lane for each warp, and as many again with the same.
    let of_warp = lane.lane() % COMPUTE_WARPS;
    let place = lane.shared + ATTENTION_SCORES + (query * COMPUTE_WARPS + of_warp) * 8;
    // SAFETY: what the warp has left for the query.
    let [score, sum] = unsafe { load_shared_pair(place) }.map(f32::from_bits);
    let over_warps = |mut value: f32, join: fn(f32, f32) -> f32| {
        for mask in [1, 2, 4] {
            value = join(value, warp::exchange(value, mask));
        }
        value
    };
    let largest = over_warps(score, f32::max);
    let weight = exp(score - largest);
    let total = over_warps(sum * weight, |a, b| a + b);
    // The first warps have positions. The others have left no sums, and no weight.
    let count = attention.position - pass.split * ATTENTION_BLOCK;
    let last = count / (KEYS * B as u32);
    let dim = 2 * lane.half;
    let [_, out] = Places::KeyNormAndOut.get(lane);
    let row = (pass.query + query) * SPLIT_ROWS + pass.split;
    let stamp = stamped::output_stamp(block);
    let address = |column: u32| out + u64::from(row * split_values + column) * 4;
    // Lanes exchange weights in each turn.
    let mut first = part * WARP_LANES;
    while first < dim {
        let (column, mut sum) = (first + lane.lane(), 0.0);
        let place = lane.shared + ATTENTION_SUMS + (query * dim + column.min(dim - 1)) * 4;
        for warp in 0..COMPUTE_WARPS {
            let weight = warp::take(weight, warp);
            let from = if warp <= last { warp * ATTENTION_VALUES * 4 } else { 0 };
            // SAFETY: what the warp, or the first one, has left.
            sum = fma(unsafe { load_shared_f32(place + from) }, weight, sum);
        }
        if column < dim {
            stamped::store_stamped(address(column), sum, stamp);
        }
        first += COMPUTE_WARPS / Q as u32 * WARP_LANES;
    }
    if part == 0 && lane.lane() < 2 {
        let value = if lane.lane() == 0 { largest } else { total };
        stamped::store_stamped(address(dim + lane.lane()), value, stamp);
    }
}

/// The sum over the lanes that share a key, on each of them.
#[inline(always)]
fn sum_of_key(mut value: f32) -> f32 {
    for mask in [4, 2, 1] {
        value += warp::exchange(value, mask);
    }
    value
}
