//! Merging the splits of attention into input rows.

use tilert_mk_shared::limits::SPLIT_ROWS;
use tilert_mk_shared::program::Dims;

use super::block::{QUAD, TURN};
use super::header::header;
use super::inputs::put;
use super::kind::Kind;
use super::memory::Quad;
use super::op_block::OpBlock;
use super::stamped::{self, Looks};
use super::{divide, exp, fma};
use crate::machine::Rows;

/// The score of a split without positions.
pub const NOTHING: u64 = f32::NEG_INFINITY.to_bits() as u64;
/// Merges of a lane that are under way together.
const MERGES: usize = 2;
/// Splits of a head whose loads are in flight together.
const SPLITS_AHEAD: usize = 2;

/// Merges the splits of all heads into a row.
#[inline(always)]
pub fn merge_heads<K: Kind>(
    block: &OpBlock<K>,
    dims: &Dims,
    splits: u64,
    count: u32,
    out: &Rows,
    row: u32,
) {
    let dim = dims.kv.head_dim;
    let (pitch, len) = (dims.split_values() * 4, dims.head_count * dim);
    let stamp = stamped::input_stamp(block, 0);
    let start = block.thread_idx * QUAD;
    let mut base = start;
    while base < len {
        let mut merges: [Merge; MERGES] = core::array::from_fn(|step| {
            // Past the end the first head is merged and left alone.
            let column = base + step as u32 * TURN;
            let column = if column < len { column } else { 0 };
            let head = column / dim * SPLIT_ROWS * pitch;
            Merge::new(splits + u64::from(head), column % dim, dim)
        });
        let mut first = 0;
        while first < count {
            let waits = !K::IS_NARROW && row == 0 && first == 0 && base == start;
            let looks = if waits { Looks::AfterHint } else { Looks::AtOnce };
            let requested = stamped::wait(block, looks, || {
                let words = merges.map(|merge| merge.request(first, count, pitch, stamp));
                let difference = stamped::difference(words.as_flattened().as_flattened(), stamp);
                (words.map(|splits| splits.map(stamped::values)), difference)
            });
            for (merge, splits) in merges.iter_mut().zip(&requested) {
                merge.add(splits);
            }
            first += SPLITS_AHEAD as u32;
        }
        for (step, merge) in (0u32..).zip(&merges) {
            let column = base + step * TURN;
            if column < len {
                let scale = divide(1.0, merge.total);
                let quad = merge.merged.map(|sum| sum * scale);
                put(block.shared, block.layout.get(), out, row, column, quad);
            }
        }
        base += MERGES as u32 * TURN;
    }
}

/// Sums of a head's splits so far, of four adjacent columns.
#[derive(Clone, Copy)]
struct Merge {
    /// Address of the columns in the head's first split, and of its score and sum of weights.
    sums: u64,
    scores: u64,
    largest: f32,
    total: f32,
    merged: Quad,
}

impl Merge {
    /// Nothing of the columns from `column` on of a head whose splits begin at `head` and have `dim`
    /// columns.
    #[inline(always)]
    fn new(head: u64, column: u32, dim: u32) -> Merge {
        let at = |value: u32| head + u64::from(value) * 4;
        let (sums, scores) = (at(column), at(dim));
        Merge { sums, scores, largest: f32::NEG_INFINITY, total: 0.0, merged: [0.0; 4] }
    }

    /// Words of the sums, the score and the sum of weights of splits from `first` on, which are
    /// `pitch` bytes apart; nothing past `count`.
    #[inline(always)]
    fn request(&self, first: u32, count: u32, pitch: u32, stamp: u32) -> [[u64; 6]; SPLITS_AHEAD] {
        core::array::from_fn(|idx| {
            let split = first + idx as u32;
            if split >= count {
                let [zero] = stamped::zeros(stamp);
                return [zero, zero, zero, zero, zero | NOTHING, zero];
            }
            let at = |address: u64| stamped::place(&header(), address + u64::from(split * pitch));
            // SAFETY: places of a split's values; heads are multiples of four values.
            let ([a, b, c, d], [score, total]) =
                unsafe { (stamped::load_quad(at(self.sums)), stamped::load_pair(at(self.scores))) };
            [a, b, c, d, score, total]
        })
    }

    /// Adds splits, in their order. The first of all has a score.
    #[inline(always)]
    fn add(&mut self, splits: &[[f32; 6]; SPLITS_AHEAD]) {
        let largest = splits.iter().fold(self.largest, |largest, split| largest.max(split[4]));
        let keep = exp(self.largest - largest);
        (self.largest, self.total) = (largest, self.total * keep);
        self.merged = self.merged.map(|sum| sum * keep);
        for [sums @ .., score, weight_sum] in splits {
            let weight = exp(score - largest);
            self.total = fma(weight, *weight_sum, self.total);
            for (merged, sum) in self.merged.iter_mut().zip(sums) {
                *merged = fma(*sum, weight, *merged);
            }
        }
    }
}
