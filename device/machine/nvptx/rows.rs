//! Bringing input rows near.

use tilert_mk_shared::tile::{COMPUTE_WARPS, REDUCTION};

use super::block::{QUAD, TURN, read_quads};
use super::header::header;
use super::inputs::put;
use super::kind::Kind;
use super::memory::{Quad, load_shared, store_shared_f32};
use super::op_block::OpBlock;
use super::stamped::{self, Looks};
use super::{fma, warp};
use crate::machine::Rows;
use crate::machine::memory::Span;

/// Loads of a lane that are in flight together in a copy.
const COPY_QUADS: usize = 8;
/// Words of all rows of which a copy looks at once.
const FEW_WORDS: u32 = 8192;
/// Loads of a lane that are in flight together in a norm.
const NORM_QUADS: usize = 4;
/// See `Machine::norm_ahead`.
pub type NormAhead = (u64, [Quad; NORM_QUADS]);

impl<K: Kind> OpBlock<K> {
    /// Copies the first `dim` values of rows to where they are kept near.
    #[inline(always)]
    pub fn copy_rows(&self, from: Rows, count: u32, dim: u32, to: Rows) {
        let stamp = stamped::input_stamp(self, 0);
        let is_few = K::IS_NARROW && count * dim <= FEW_WORDS;
        let mut looks = if is_few { Looks::AtOnce } else { Looks::AfterHint };
        for row in 0..count {
            let source = from.values.address() + u64::from(row * from.stride as u32) * 4;
            let mut base = self.thread_idx * QUAD;
            while base < dim {
                let place = stamped::place(&header(), source + u64::from(base) * 4);
                let [quads] =
                    stamped::quads::<1, COPY_QUADS>(self, looks, [place], base, dim, stamp);
                looks = Looks::AtOnce;
                for (step, quad) in (0u32..).zip(&quads) {
                    if base + step * TURN < dim {
                        put(self.shared, self.layout.get(), &to, row, base + step * TURN, *quad);
                    }
                }
                base += COPY_QUADS as u32 * TURN;
            }
        }
    }

    /// The part of `rms_norm` before the block meets; `M` rows at a time.
    #[inline(always)]
    pub fn weigh_rows<const M: usize>(
        &self,
        from: impl Fn(usize) -> Span<f32>,
        count: usize,
        weight: Span<f32>,
        out: Rows,
        (first_place, first_weights): NormAhead,
    ) {
        let (dim, layout, first) = (weight.len() as u32, self.layout.get(), self.thread_idx * QUAD);
        let stamp = stamped::input_stamp(self, 0);
        let place = |row: usize, base: u32| match (row, base == first) {
            (0, true) => first_place,
            _ => stamped::place(&header(), from(row).address() + u64::from(base) * 4),
        };
        let mut row = 0;
        while row < count {
            let (mut sums, mut base) = ([0.0; M], first);
            while base < dim {
                // Past the last row it is looked at again.
                let places = core::array::from_fn(|idx| place((row + idx).min(count - 1), base));
                let rows =
                    stamped::quads::<M, NORM_QUADS>(self, Looks::AtOnce, places, base, dim, stamp);
                let weights = match base == first {
                    true => first_weights,
                    false => read_quads(weight.address(), base, dim, true),
                };
                for (idx, (quads, sum)) in rows.iter().zip(&mut sums).enumerate() {
                    for (step, (quad, weight)) in (0u32..).zip(quads.iter().zip(&weights)) {
                        let (row, column) = ((row + idx) as u32, base + step * TURN);
                        if column < dim && (row as usize) < count {
                            let values = core::array::from_fn(|idx| quad[idx] * weight[idx]);
                            put(self.shared, layout, &out, row, column, values);
                        }
                        for value in quad {
                            *sum = fma(*value, *value, *sum);
                        }
                    }
                }
                base += NORM_QUADS as u32 * TURN;
            }
            for (idx, sum) in sums.into_iter().enumerate() {
                if row + idx < count {
                    self.block_sum(row + idx, sum);
                }
            }
            row += M;
        }
    }

    /// Where the lane's first words of a normed row are, and their weights.
    #[inline(always)]
    pub fn weights_ahead(&self, first_row: Span<f32>, weight: Span<f32>) -> NormAhead {
        let base = self.thread_idx * QUAD;
        let address = first_row.address() + u64::from(base) * 4;
        let weights = read_quads(weight.address(), base, weight.len() as u32, true);
        (stamped::place(&header(), address), weights)
    }

    /// Leaves each warp's sum of `value` for `row`, of at most `GPU_STEP_TOKENS_MAX`; see
    /// `block_total`.
    #[inline(always)]
    fn block_sum(&self, row: usize, value: f32) {
        let sum = warp::sum(value);
        if self.warp_lane() == 0 {
            let index = row as u32 * COMPUTE_WARPS + self.warp_idx();
            // SAFETY: a value of the reduction area that this warp owns.
            unsafe { store_shared_f32(self.shared + REDUCTION + index * 4, sum) };
        }
    }

    /// The sum of what `block_sum` left for `row`, in the order of the warps; after `sync`.
    #[inline(always)]
    pub fn block_total(&self, row: usize) -> f32 {
        let first = self.shared + REDUCTION + row as u32 * COMPUTE_WARPS * 4;
        // SAFETY: eight values of the reduction area; `sync` has ordered their stores.
        let (a, b) = unsafe { (load_shared(first), load_shared(first + 16)) };
        a[0] + a[1] + a[2] + a[3] + b[0] + b[1] + b[2] + b[3]
    }
}
