//! What an empty task does: the least that a stage costs whose values are stamped.

use tilert_mk_shared::tile::COMPUTE_LANES;

use super::barrier::sync_compute;
use super::block::Block;
use super::header::header;
use super::stamped::{self, Looks};
use crate::machine::memory::Span;

/// Words that a lane looks at together, where there are more than lanes.
const WORDS: usize = 8;

/// See `Machine::pass_on`.
#[inline(always)]
pub fn pass_on(block: &Block, from: Span<f32>, to: Span<f32>) {
    let count = from.len() as u32;
    if count <= COMPUTE_LANES {
        look::<1>(block, from.address(), count);
    } else {
        look::<WORDS>(block, from.address(), count);
    }
    // Whoever has learned that the device stops tells the others, too.
    sync_compute();
    let (stamp, mut index) = (stamped::output_stamp(block), block.thread_idx);
    while index < to.len() as u32 {
        stamped::store(to.address() + u64::from(index) * 4, 0.0, stamp);
        index += COMPUTE_LANES;
    }
}

/// Waits for the stamps of `count` values, of which a lane looks at `N` at a time.
#[inline(always)]
fn look<const N: usize>(block: &Block, first: u64, count: u32) {
    let (stamp, mut base) = (stamped::input_stamp(block, 0), block.thread_idx);
    while base < count {
        // All loads are in flight together.
        stamped::wait(block, Looks::AtOnce, || {
            let mut words = stamped::zeros::<N>(stamp);
            for (step, word) in (0u32..).zip(&mut words) {
                let index = base + step * COMPUTE_LANES;
                if index < count {
                    let address = first + u64::from(index) * 4;
                    // SAFETY: a word of the heap.
                    *word = unsafe { stamped::load_word(stamped::place(&header(), address)) };
                }
            }
            ((), stamped::difference(&words, stamp))
        });
        base += N as u32 * COMPUTE_LANES;
    }
}
