//! Merging the splits of a KV head where they are many: each of the tasks that have its parts takes some
//! columns.
//!
//! They wait for each other by stamps, so no stage of its own is needed, and whoever multiplies next
//! reads each value once instead of all splits. 16 lanes have a split each of four columns; they sum
//! by exchange, in an order that depends on nothing. The code is short, since it runs once in a layer and
//! instructions come from as far as values.

use tilert_mk_shared::limits::{ATTENTION_SPLIT_MAX, SPLIT_ROWS};
use tilert_mk_shared::tile::{COMPUTE_LANES, WARP_LANES};

use crate::machine::Join;
use crate::machine::nvptx::barrier::sync_compute;
use crate::machine::nvptx::block::{Block, QUAD};
use crate::machine::nvptx::header::header;
use crate::machine::nvptx::merge::NOTHING;
use crate::machine::nvptx::stamped::{self, Looks};
use crate::machine::nvptx::{divide, exp, warp};

/// Fours of columns that a block merges at once.
const GROUPS: u32 = COMPUTE_LANES / ATTENTION_SPLIT_MAX;
/// Those of a warp.
const WARP_GROUPS: u32 = WARP_LANES / ATTENTION_SPLIT_MAX;

/// See `Machine::join`.
#[inline(always)]
pub fn join(block: &Block, join: &Join<impl Fn(usize) -> u32>) {
    let [first, end] = join.columns;
    let fours = (end - first) / QUAD;
    let (group, split) =
        (block.thread_idx / ATTENTION_SPLIT_MAX, block.thread_idx % ATTENTION_SPLIT_MAX);
    // Parts of a stage have its stamp, of which this task is one.
    let stamp = stamped::output_stamp(block);
    // All lanes of a warp turn as often, since they exchange; warps that have nothing to do are out of the
    // others' way.
    let (mut first_group, count) = (block.warp_idx() * WARP_GROUPS, fours * join.count as u32);
    let (mut token, mut four) = (0, group);
    while first_group < count {
        while four >= fours {
            (token, four) = (token + 1, four - fours);
        }
        let split_count =
            if token < join.count as u32 { (join.split_count)(token as usize) } else { 0 };
        merge(block, join, token, first + four * QUAD, split, split_count, stamp);
        four += GROUPS;
        first_group += GROUPS;
    }
    // Whoever has learned that the device stops tells the others.
    sync_compute();
}

/// Merges four columns, from `column` on among those of all queries, of a token; nothing if it has no
/// splits to merge. Called by the lanes of all its splits.
#[inline(always)]
fn merge<F>(
    block: &Block,
    join: &Join<F>,
    token: u32,
    mut column: u32,
    split: u32,
    split_count: u32,
    stamp: u32,
) {
    let mut first_row = 0;
    while column >= join.head_dim {
        (column, first_row) = (column - join.head_dim, first_row + SPLIT_ROWS);
    }
    let at = |split: u32, value: u32| {
        let row = (first_row + split) * join.split_values;
        join.splits + u64::from(token * join.pitch + (row + value) * 4)
    };
    let place = |value: u32| stamped::place(&header(), at(split, value));
    let (columns, scores) = (place(column), place(join.head_dim));
    let [a, b, c, d, score, total] = stamped::wait(block, Looks::AtOnce, || {
        let [zero] = stamped::zeros(stamp);
        let mut words = [zero, zero, zero, zero, zero | NOTHING, zero];
        if split < split_count {
            // SAFETY: places of a split's values; heads are multiples of four values.
            let ([a, b, c, d], [score, total]) =
                unsafe { (stamped::load_quad(columns), stamped::load_pair(scores)) };
            words = [a, b, c, d, score, total];
        }
        (stamped::values(words), stamped::difference(&words, stamp))
    });
    let largest = among_splits(score, f32::max);
    let weight = exp(score - largest);
    let sum = |value: f32| among_splits(value * weight, |a, b| a + b);
    let scale = divide(1.0, sum(total));
    let quad = [a, b, c, d].map(|value| sum(value) * scale);
    // The first split has positions if any has.
    if split == 0 && split_count > 0 {
        stamped::store_quad(at(ATTENTION_SPLIT_MAX, column), quad, stamp);
        if column == 0 {
            stamped::store(at(ATTENTION_SPLIT_MAX, join.head_dim), 0.0, stamp);
            stamped::store(at(ATTENTION_SPLIT_MAX, join.head_dim + 1), 1.0, stamp);
        }
    }
}

/// Joins the values of the lanes that have the splits of the same columns; each gets the result.
#[inline(always)]
fn among_splits(value: f32, join: impl Fn(f32, f32) -> f32) -> f32 {
    let (mut value, mut mask) = (value, ATTENTION_SPLIT_MAX / 2);
    while mask > 0 {
        value = join(value, warp::exchange(value, mask));
        mask /= 2;
    }
    value
}

const _: () = assert!(ATTENTION_SPLIT_MAX == 16);
