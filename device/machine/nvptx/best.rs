//! The choice of the best value.

use tilert_mk_shared::tile::{COMPUTE_WARPS, REDUCTION};

use super::barrier::sync_compute;
use super::block::{Block, QUAD, TURN, near};
use super::memory::{Quad, load_shared_word, store_shared_f32, store_shared_word};
use super::warp;

/// The largest value of some, the first of equal ones.
pub struct Best {
    /// Its index.
    pub index: u32,
    /// The value.
    pub value: f32,
    /// Whether one of the values is not a number.
    pub is_nan: bool,
}

impl Best {
    /// Of no values.
    pub const NONE: Best = Best { index: u32::MAX, value: f32::NEG_INFINITY, is_nan: false };

    /// Looks at one more value, whose index is larger.
    #[inline(always)]
    pub fn look(&mut self, value: f32, index: u32) {
        self.is_nan |= value.is_nan();
        if value > self.value {
            (self.index, self.value) = (index, value);
        }
    }

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
}

/// The index of the block's largest value from each lane's; none if a lane saw no number.
#[inline(always)]
pub fn best_of_block(block: &Block, lane: Best) -> Option<u32> {
    let (mut best, mut largest, mut nan) = (lane.index, lane.value, u32::from(lane.is_nan));
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
