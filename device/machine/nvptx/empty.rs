//! What an empty task does: the least that a stage costs whose values are stamped.

use tilert_mk_shared::tile::COMPUTE_LANES;

use super::barrier::sync_compute;
use super::block::Block;
use super::header::header;
use super::stamped::{self, Looks};
use crate::machine::memory::Span;

/// See `Machine::pass_on`.
#[inline(always)]
pub fn pass_on(block: &Block, from: Span<f32>, to: Span<f32>) {
    let (stamp, count) = (stamped::input_stamp(block, 0), from.len() as u32);
    let mut index = block.thread_idx;
    while index < count {
        let place = stamped::place(&header(), from.address() + u64::from(index) * 4);
        stamped::wait(block, Looks::AtOnce, || {
            // SAFETY: a word of the heap.
            let word = unsafe { stamped::load_word(place) };
            ((), stamped::difference(&[word], stamp))
        });
        index += COMPUTE_LANES;
    }
    // Whoever has learned that the device stops tells the others, too.
    sync_compute();
    if block.thread_idx == 0 {
        stamped::store(to.address(), 0.0, stamped::output_stamp(block));
    }
}
