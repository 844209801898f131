//! What becomes of a task's products.

use tilert_mk_shared::tile::{
    COMPUTE_LANES, COMPUTE_WARPS, GPU_STEP_TOKENS_MAX, PART_ROWS_MAX, TILE_ROWS_MAX, WARP_LANES,
};

use super::barrier::sync_compute;
use super::best::best_of_warp;
use super::block::Block;
use super::header::header;
use super::memory::{load_shared_f32, store_shared_f32};
use super::stamped::{self, Target};
use super::{divide, multiply, rsqrt, sreg};
use crate::machine::best::Best;
use crate::machine::memory::Span;
use crate::machine::{Finish, Machine};

/// A product of a lane. Not an `Option`: what is undefined in it would be kept from task to task.
struct Item {
    token: u32,
    column: u32,
    is_there: bool,
}

/// What a product is combined with.
struct More {
    /// See `Block::scale`.
    scale: f32,
    /// What it is added to.
    old: f32,
    /// Its bias, and that of the product it is multiplied by, if there are any.
    biases: [f32; 2],
}

impl More {
    const NOTHING: More = More { scale: 1.0, old: 0.0, biases: [0.0; 2] };

    /// The biases of a product.
    #[inline(always)]
    fn new(finish: &Finish, item: &Item) -> More {
        let bias = |bias: Span<f32>| {
            if bias.is_empty() { 0.0 } else { bias.read(item.column as usize) }
        };
        let up_bias = if finish.is_gated { bias(finish.up_bias) } else { 0.0 };
        More { biases: [bias(finish.bias), up_bias], ..More::NOTHING }
    }
}

impl Block {
    /// With few rows each lane has at most one product: it asks for what that is added to.
    #[inline(always)]
    pub fn expect_residual(&self, finish: &Finish, out: impl Fn(usize) -> Span<f32>) {
        if !self.kind.is_narrow || !finish.adds {
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

    /// Finishes and stores products, once the block has met.
    #[inline(always)]
    pub fn store_finished(&self, finish: &Finish, out: impl Fn(usize) -> Span<f32>) {
        if self.kind.is_narrow {
            self.store_narrow(finish, out);
        } else {
            sync_compute();
            // As in `for_each`, but the lane's index is read again: registers are scarce in
            // `multiply`.
            let (columns, mut index) = (finish.len as u32, sreg::thread_idx());
            while index < finish.count as u32 * columns {
                let (token, column) = (index / columns, index % columns);
                let item = Item { token, column, is_there: true };
                let out = out(token as usize);
                let old = if finish.adds { self.residual(finish, &out, column) } else { 0.0 };
                let more =
                    More { scale: self.scale(finish, token), old, ..More::new(finish, &item) };
                let target = Target::new(self, out.address() + u64::from(column) * 4);
                target.store(self.result(finish, &item, &more));
                index += COMPUTE_LANES;
            }
        }
        if self.leaves_best(finish) {
            self.leave_bests(finish);
        }
    }

    /// The same of at most one product a lane, which has all that it needs when the block meets.
    #[inline(always)]
    fn store_narrow(&self, finish: &Finish, out: impl Fn(usize) -> Span<f32>) {
        let item = self.item(finish);
        let scale = self.scale(finish, item.token);
        // Computed now, not where it is used.
        let scale = f32::from_bits(sreg::fresh(scale.to_bits()));
        let (mut more, mut target) = (More { scale, ..More::NOTHING }, Target::NOTHING);
        if item.is_there {
            let out = out(item.token as usize);
            let old = if finish.adds { self.old(finish, &out, item.column) } else { 0.0 };
            more = More { scale, old, ..More::new(finish, &item) };
            target = Target::new(self, out.address() + u64::from(item.column) * 4);
        }
        sync_compute();
        if item.is_there {
            target.store(self.result(finish, &item, &more));
        }
    }

    /// What products of a token's row are multiplied by.
    #[inline(always)]
    fn scale(&self, finish: &Finish, token: u32) -> f32 {
        if finish.norm_dim == 0 {
            return 1.0;
        }
        let mean = divide(self.block_total(token as usize), finish.norm_dim as f32);
        rsqrt(mean + header().dims.rms_norm_eps)
    }

    #[inline(always)]
    fn leaves_best(&self, finish: &Finish) -> bool {
        self.kind.leaves_best && !finish.bests.is_empty()
    }

    /// Leaves the best of each token's results, which are in the places of their products: a warp for
    /// each token.
    #[inline(always)]
    fn leave_bests(&self, finish: &Finish) {
        const { assert!(GPU_STEP_TOKENS_MAX <= COMPUTE_WARPS) };
        sync_compute();
        let token = self.warp_idx();
        if token >= finish.count as u32 {
            return;
        }
        let (mut best, mut column) = (Best::NONE, self.warp_lane());
        while column < finish.len as u32 {
            let place = multiply::place(self, self.product_idx(finish, token, column));
            // SAFETY: a result that a lane has left before the barrier.
            let value = unsafe { load_shared_f32(place) };
            best = best.max(Best::of(value, finish.best_first + column));
            column += WARP_LANES;
        }
        let best = best_of_warp(best);
        if self.warp_lane() == 0 {
            finish.bests.write(token as usize * finish.best_stride, best.0);
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

    /// What becomes of one product.
    #[inline(always)]
    fn result(&self, finish: &Finish, item: &Item, more: &More) -> f32 {
        let index = self.product_idx(finish, item.token, item.column);
        let product = |index: u32, has_bias: bool, bias: f32| {
            let sum = multiply::product(self, index) * more.scale;
            if has_bias { sum + bias } else { sum }
        };
        let mut value = product(index, !finish.bias.is_empty(), more.biases[0]);
        if finish.is_gated {
            let index = index + (finish.len * finish.count) as u32;
            let up = product(index, !finish.up_bias.is_empty(), more.biases[1]);
            value = divide(value, 1.0 + self.exp(-value)) * up;
        }
        if finish.adds {
            value += more.old;
        }
        if self.leaves_best(finish) {
            // SAFETY: the first of the product's partial sums, which this lane alone reads.
            unsafe { store_shared_f32(multiply::place(self, index), value) };
        }
        value
    }
}
