//! The choice of the best value.

use tilert_mk_shared::tile::{COMPUTE_LANES, COMPUTE_WARPS, REDUCTION};

use super::barrier::sync_compute;
use super::block::{Block, QUAD, TURN};
use super::memory::{Quad, load_shared_pair, store_shared_pair};
use super::warp;
use crate::machine::best::Best;
use crate::machine::memory::Span;

/// Entries of a lane that are in flight together.
const BESTS_AHEAD: usize = 12;

/// The best that a lane has seen of some values.
pub struct Seen {
    best: Best,
    /// Its value.
    value: f32,
}

impl Seen {
    /// Nothing.
    pub const NOTHING: Seen = Seen { best: Best::NONE, value: f32::NEG_INFINITY };

    /// Looks at quads that are `TURN` values apart, from value `first` on, before `end`.
    #[inline(always)]
    pub fn look_at<const N: usize>(&mut self, quads: &[Quad; N], first: u32, end: u32) {
        for (step, quad) in (0u32..).zip(quads) {
            let [a, b, c, d] = *quad;
            // If a value is not a number the sum is none. Both cases are rare.
            let is_odd = ((a + b) + (c + d)).is_nan();
            let is_better = a.max(b).max(c.max(d)) > self.value;
            if (is_odd || is_better) && first + step * TURN < end {
                for (idx, value) in (0..QUAD).zip(quad) {
                    self.look(*value, first + step * TURN + idx);
                }
            }
        }
    }

    /// Looks at one more value.
    #[inline(always)]
    pub fn look(&mut self, value: f32, index: u32) {
        self.best = self.best.max(Best::of(value, index));
        self.value = self.value.max(value);
    }

    /// The best.
    #[inline(always)]
    pub fn best(&self) -> Best {
        self.best
    }
}

/// The best of what an array of packed entries holds. For all lanes of the block.
#[inline(always)]
pub fn best_of(block: &Block, bests: Span<u64>) -> Option<u32> {
    let mut best = Best::NONE;
    let mut index = block.thread_idx as usize;
    while index < bests.len() {
        let words: [u64; BESTS_AHEAD] = core::array::from_fn(|step| {
            let index = index + step * COMPUTE_LANES as usize;
            if index < bests.len() { bests.read(index) } else { Best::NONE.0 }
        });
        for word in words {
            best = best.max(Best(word));
        }
        index += BESTS_AHEAD * COMPUTE_LANES as usize;
    }
    best_of_block(block, best)
}

/// The best of a warp's lanes, on each of them.
#[inline(always)]
pub fn best_of_warp(best: Best) -> Best {
    let (key, rest) = ((best.0 >> 32) as u32, best.0 as u32);
    let largest = warp::largest_word(key);
    let rest = warp::largest_word(if key == largest { rest } else { 0 });
    Best(u64::from(largest) << 32 | u64::from(rest))
}

/// The index of the best of all lanes of the block.
#[inline(always)]
pub fn best_of_block(block: &Block, best: Best) -> Option<u32> {
    let place = |warp: u32| block.shared + REDUCTION + warp * 8;
    let mut best = best_of_warp(best);
    if block.warp_lane() == 0 {
        // SAFETY: this warp's part of the reduction area.
        unsafe {
            store_shared_pair(place(block.warp_idx()), [best.0 as u32, (best.0 >> 32) as u32])
        };
    }
    sync_compute();
    for warp in 0..COMPUTE_WARPS {
        // SAFETY: what the warps have stored above.
        let [low, high] = unsafe { load_shared_pair(place(warp)) };
        best = best.max(Best(u64::from(high) << 32 | u64::from(low)));
    }
    sync_compute();
    best.chosen()
}
