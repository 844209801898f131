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
use super::block::{Block, near};
use super::memory::{Quad, load_shared};
use super::{divide, fma, rsqrt, sreg, stamped, warp};
use crate::machine::{Attention, Machine};

const _: () = assert!(HEAD_DIM_MAX <= 2 * 4 * KEY_STEP);
const _: () = assert!(ATTENTION_QUERIES == 4 && 4 * 2 * 2 * KEY_STEP <= ATTENTION_VALUES);
const _: () = assert!(2 * HEAD_DIM_MAX <= ATTENTION_VALUES);

/// What the compiler knows of a model's heads when it compiles the op: it bounds the values that a
/// lane keeps in registers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Heads {
    /// Up to 64 values.
    Short,
    /// Up to 128 values, one or two queries for each key.
    Pairs,
    /// Up to 128 values.
    Middle,
    /// Longer ones.
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

/// See `Machine::attend`: `D` loads of a lane for each key, `B` keys and `Q` queries at once.
#[inline(always)]
pub fn attend(block: &Block, attention: &Attention) {
    match block.kind.heads {
        Heads::Short => attend_splits::<2, 2, 4>(block, attention),
        Heads::Pairs => attend_splits::<4, 2, 2>(block, attention),
        Heads::Middle => attend_splits::<4, 1, 4>(block, attention),
        Heads::Long => attend_splits::<8, 1, 2>(block, attention),
    }
}

/// Splits one after the other, and of each `Q` queries at a time.
#[inline(always)]
fn attend_splits<const D: usize, const B: usize, const Q: usize>(
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
                let state = scan::<D, B, Q>(block, &lane, attention, &pass, keys, values);
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
/// appends the token's key and value if the warp has its position.
#[inline(always)]
fn rotate<const D: usize, const B: usize, const Q: usize>(
    block: &Block,
    lane: &Lane,
    attention: &Attention,
    pass: &Pass,
) {
    let lane = &lane.again();
    let dim = 2 * lane.half;
    // With two queries, two keys' lanes do the same.
    let query = lane.key() * Q as u32 / KEYS;
    let head = (pass.query + query).min(Places::numbers(lane).query_count - 1) * dim;
    let appends = pass.query == 0 && lane.has_own::<B>(attention, pass);
    // Everything is requested before the first value is needed, if there are registers for it.
    let [queries, query_norm] = Places::Queries.get(lane);
    let turns = lane.turns::<D>();
    let ([own_key, own_value], [key_norm, _]) =
        (Places::Own.get(lane), Places::KeyNormAndOut.get(lane));
    let row = queries + u64::from(head) * 4;
    let stamp = stamped::input_stamp(block, 0);
    // The token's own key and value.
    let (mut quads, mut own);
    if appends && D <= VALUES_AHEAD {
        let [row, key, value] = lane.stamped_rows(block, [row, own_key, own_value], stamp);
        (quads, own) = (row, [key, value]);
    } else {
        [quads] = lane.stamped_rows(block, [row], stamp);
        own = [[[0.0; 4]; D]; 2];
    }
    turn(lane, attention, query_norm, &turns, &mut quads);
    if lane.key() % (KEYS / Q as u32) == 0 {
        lane.keep(lane.sums() + query * dim * 4, &quads);
    }
    if appends {
        // Both together if there are registers for them, which older chips' assemblers find not.
        let takes_both = D <= KEYS_AHEAD && (cfg!(tilert_sm90) || B == 1);
        if D > VALUES_AHEAD && takes_both {
            own = lane.stamped_rows(block, [own_key, own_value], stamp);
        } else if D > VALUES_AHEAD {
            [own[1]] = lane.stamped_rows(block, [own_value], stamp);
        }
        lane.append(attention, attention.values, 1, &own[1]);
        if D > VALUES_AHEAD && !takes_both {
            [own[0]] = lane.stamped_rows(block, [own_key], stamp);
        }
        turn(lane, attention, key_norm, &turns, &mut own[0]);
        lane.append(attention, attention.keys, 0, &own[0]);
    }
    sync_warp();
}

/// Normalises a head, if it has a norm, and rotates it; a lane has its columns of it.
#[inline(always)]
fn turn<const D: usize>(
    lane: &Lane,
    attention: &Attention,
    norm: u64,
    turns: &[Quad; D],
    head: &mut [Quad; D],
) {
    if norm != 0 {
        let weights = lane.row::<D>(norm);
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
    let mut pairs = [[0.0f32; 4]; COMPUTE_WARPS as usize / 2];
    for (idx, pair) in (0u32..).zip(&mut pairs) {
        let place = lane.shared + ATTENTION_SCORES + query * COMPUTE_WARPS * 8 + idx * 16;
        // SAFETY: what two warps have left for the query.
        *pair = unsafe { load_shared(place) };
    }
    let scores = |warp: usize| &pairs[warp / 2][warp % 2 * 2..][..2];
    let mut largest = f32::NEG_INFINITY;
    for warp in 0..COMPUTE_WARPS as usize {
        largest = largest.max(scores(warp)[0]);
    }
    let (mut weights, mut total) = ([0.0; COMPUTE_WARPS as usize], 0.0);
    for (warp, weight) in weights.iter_mut().enumerate() {
        *weight = block.exp(scores(warp)[0] - largest);
        total = fma(scores(warp)[1], *weight, total);
    }
    // The first warps have positions, and the others have left no sums.
    let count = attention.position - pass.split * ATTENTION_BLOCK;
    let last = (count / (KEYS * B as u32)) as usize;
    let dim = 2 * lane.half;
    let [_, out] = Places::KeyNormAndOut.get(lane);
    let row = (pass.query + query) * SPLIT_ROWS + pass.split;
    let stamp = stamped::output_stamp(block);
    let leave = |column: u32, value: f32| {
        let address = out + u64::from(row * split_values + column) * 4;
        stamped::store(address, value, stamp);
    };
    let mut column = part * WARP_LANES + lane.lane();
    while column < dim {
        let mut sum = 0.0;
        for (warp, weight) in weights.iter().enumerate() {
            if warp <= last {
                let value = warp as u32 * ATTENTION_VALUES + query * dim + column;
                sum = fma(near(lane.shared + ATTENTION_SUMS, value), *weight, sum);
            }
        }
        leave(column, sum);
        column += COMPUTE_WARPS / Q as u32 * WARP_LANES;
    }
    if part == 0 && lane.lane() == 0 {
        leave(dim, largest);
        leave(dim + 1, total);
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
