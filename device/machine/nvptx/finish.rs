//! What becomes of a task's products.

use tilert_mk_shared::tile::{
    COMPUTE_LANES, COMPUTE_WARPS, GPU_STEP_TOKENS_MAX, PART_ROWS_MAX, TILE_ROWS_MAX, WARP_LANES,
};

use super::barrier::sync_compute;
use super::best::best_of_warp;
use super::header::header;
use super::kind::Kind;
use super::memory::{load_shared_f32, store_shared_f32};
use super::op_block::OpBlock;
use super::{divide, exp, multiply, peer, rsqrt, sreg, stamped};
use crate::machine::best::Best;
use crate::machine::memory::Span;
use crate::machine::{BestPlace, Finish};

/// A product of a lane. Not an `Option`: what is undefined in it would be kept from task to task.
struct Item {
    token: u32,
    column: u32,
    is_there: bool,
}

impl<K: Kind> OpBlock<K> {
    /// With few rows each lane has at most one product: it asks for what that is added to.
    #[inline(always)]
    pub fn expect_residual(&self, finish: &Finish, out: impl Fn(usize) -> Span<f32>) {
        if !K::IS_NARROW || !finish.adds {
            return;
        }
        let Item { token, column, is_there } = self.item(finish);
        if is_there {
            let address = out(token as usize).address() + u64::from(column) * 4;
            let place = stamped::place(&header(), address);
            // SAFETY: a word of the output. The statement keeps the load here, well before its value
            // is needed.
            self.old.set(unsafe { stamped::load_word(place) });
        }
    }

    /// Finishes and stores products.
    #[inline(always)]
    pub fn store_finished(&self, finish: &Finish, out: impl Fn(usize) -> Span<f32>) {
        if K::IS_NARROW {
            let Item { token, column, is_there } = self.item(finish);
            if is_there {
                let out = out(token as usize);
                let old = if finish.adds { self.old(finish, &out, column) } else { 0.0 };
                self.finish(finish, token as usize, column as usize, out, old);
            }
        } else {
            // As in `for_each`, but the lane's index is read again: registers are scarce in
            // `multiply`.
            let (columns, mut index) = (finish.len as u32, sreg::thread_idx());
            while index < finish.count as u32 * columns {
                let (token, column) = (index / columns, (index % columns) as usize);
                let out = out(token as usize);
                let old =
                    if finish.adds { self.residual(finish, &out, column as u32) } else { 0.0 };
                self.finish(finish, token as usize, column, out, old);
                index += COMPUTE_LANES;
            }
        }
    }

    /// Whether the best of the products is left.
    #[inline(always)]
    pub fn leaves_best(&self, finish: &Finish) -> bool {
        K::LEAVES_BEST && finish.leaves_best
    }

    /// Leaves the best of each token's results, which are in the places of their products: a warp for
    /// each token.
    #[inline(always)]
    pub fn leave_bests(&self, finish: &Finish, place: impl Fn(usize) -> BestPlace) {
        const { assert!(GPU_STEP_TOKENS_MAX <= COMPUTE_WARPS) };
        sync_compute();
        // Read again: it would be kept through all of the op.
        let (token, lane) = (sreg::thread_idx() / WARP_LANES, sreg::thread_idx() % WARP_LANES);
        if token >= finish.count as u32 {
            return;
        }
        let BestPlace { word, first } = place(token as usize);
        let (mut best, mut column) = (Best::NONE, lane);
        while column < finish.len as u32 {
            let place = multiply::place(self, self.product_idx(finish, token, column));
            // SAFETY: a result that a lane has left before the barrier.
            let value = unsafe { load_shared_f32(place) };
            best = best.max(Best::of(value, first + column));
            column += WARP_LANES;
        }
        let best = best_of_warp(best);
        if lane == 0 {
            // SAFETY: the token's word of this task, in the heap of the PE that samples.
            unsafe { (peer::on_first(word.address()) as *mut u64).write(best.0) };
        }
    }

    /// Index of a product of `finish`, see `multiply::product`.
    #[inline(always)]
    fn product_idx(&self, finish: &Finish, token: u32, column: u32) -> u32 {
        (finish.first as u32 + column) * finish.count as u32 + token
    }

    /// This lane's product, of at most `PART_ROWS_MAX` tokens.
    #[inline(always)]
    fn item(&self, finish: &Finish) -> Item {
        const { assert!(PART_ROWS_MAX == 2 && PART_ROWS_MAX * TILE_ROWS_MAX <= COMPUTE_LANES) };
        let len = finish.len as u32;
        let token = u32::from(self.thread_idx >= len);
        let is_there = self.thread_idx < len * finish.count as u32;
        Item { token, column: self.thread_idx.wrapping_sub(token * len), is_there }
    }

    /// What is added to the product of a column of `out`.
    #[inline(always)]
    fn residual(&self, finish: &Finish, out: &Span<f32>, column: u32) -> f32 {
        let stamp = stamped::input_stamp(self, finish.residual_age);
        stamped::value(self, out.address() + u64::from(column) * 4, stamp)
    }

    /// The same, if `expect` has asked for it.
    #[inline(always)]
    fn old(&self, finish: &Finish, out: &Span<f32>, column: u32) -> f32 {
        let old = self.old.get();
        if stamped::difference(&[old], stamped::input_stamp(self, finish.residual_age)) == 0 {
            return f32::from_bits(old as u32);
        }
        self.residual(finish, out, column)
    }

    /// Finishes one product.
    #[inline(always)]
    fn finish(&self, finish: &Finish, token: usize, column: usize, out: Span<f32>, old: f32) {
        let scale = match finish.norm_dim {
            0 => 1.0,
            dim => {
                let mean = divide(self.block_total(token), dim as f32);
                rsqrt(mean + header().dims.rms_norm_eps)
            }
        };
        let index = self.product_idx(finish, token as u32, column as u32);
        let product = |index: u32, bias: Span<f32>| {
            let sum = multiply::product(self, index) * scale;
            if bias.is_empty() { sum } else { sum + bias.read(column) }
        };
        let mut value = product(index, finish.bias);
        if finish.is_gated {
            let up = product(index + (finish.len * finish.count) as u32, finish.up_bias);
            value = divide(value, 1.0 + exp(-value)) * up;
        }
        let value = if finish.adds { old + value } else { value };
        if self.leaves_best(finish) {
            // SAFETY: the first of the product's partial sums, which this lane alone reads.
            unsafe { store_shared_f32(multiply::place(self, index), value) };
        }
        let address = out.address() + column as u64 * 4;
        stamped::store(address, value, stamped::output_stamp(self));
    }
}
