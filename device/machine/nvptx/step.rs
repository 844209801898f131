//! The step's description, of which each block has a copy near.

use core::mem::offset_of;

use tilert_mk_shared::limits::DECODE_TOKENS_MAX;
use tilert_mk_shared::sequence::{StepState, StepToken};
use tilert_mk_shared::tile::{COMPUTE_LANES, GPU_STEP_TOKENS_MAX, STEP, STEP_WORD};

use super::block::Block;
use super::memory::{
    generic, load_global_pair, load_shared_pair, store_shared_pair, store_shared_word,
};
use super::peer;
use crate::machine::memory::Span;

/// Offset of this lane's pair of words: of the counts, and of both lists what a step on a GPU has.
#[inline(always)]
fn pair_offset(block: &Block) -> Option<u32> {
    const LOGIT_TOKENS: u32 = offset_of!(StepState, logit_tokens) as u32;
    const TOKENS: u32 = offset_of!(StepState, tokens) as u32;
    const LOGIT_PAIRS: u32 = GPU_STEP_TOKENS_MAX / 2;
    const TOKEN_PAIRS: u32 = GPU_STEP_TOKENS_MAX * size_of::<StepToken>() as u32 / 8;
    const { assert!(LOGIT_TOKENS == 8 && TOKENS.is_multiple_of(8)) };
    const { assert!(GPU_STEP_TOKENS_MAX <= DECODE_TOKENS_MAX) };
    const { assert!(1 + LOGIT_PAIRS + TOKEN_PAIRS <= COMPUTE_LANES) };
    let pair = block.thread_idx;
    if pair > LOGIT_PAIRS + TOKEN_PAIRS {
        return None;
    }
    Some(match pair {
        0..=LOGIT_PAIRS => pair * 8,
        _ => TOKENS + (pair - LOGIT_PAIRS - 1) * 8,
    })
}

/// See `Machine::put_step`.
#[inline(always)]
pub fn put(block: &Block, step: Span<StepState>) {
    if !peer::HAS_PEERS {
        return;
    }
    if let Some(offset) = pair_offset(block) {
        let address = step.address() + u64::from(offset);
        // SAFETY: words of the step, which this block has composed.
        let pair = unsafe { load_global_pair(address) };
        peer::for_each_heap(|distance| {
            let place = address.wrapping_add(distance) as *mut [f32; 2];
            // SAFETY: the same words of each PE's heap, which nobody reads before the task's signal. To
            // its own heap this writes what is there.
            unsafe { place.write(pair) };
        });
    }
}

/// Copies it, and tells the loading warp, before the block meets; see `Machine::keep_step`.
#[inline(always)]
pub fn keep(block: &Block, step: Span<StepState>, epoch: u32) {
    if let Some(offset) = pair_offset(block) {
        // SAFETY: words of the step, which is ready, and of this block's copy of it, which no
        // lane reads: every task of the step before has ended with a barrier.
        unsafe {
            let pair = load_global_pair(step.address() + u64::from(offset));
            store_shared_pair(block.shared + STEP + offset, pair.map(f32::to_bits));
            if block.thread_idx == 0 {
                let has_logits = pair[1].to_bits() != 0;
                store_shared_word(block.shared + STEP_WORD, word(epoch, has_logits));
            }
        }
    }
}

/// The word that says whether a step has logits.
#[inline(always)]
pub fn word(epoch: u32, has_logits: bool) -> u32 {
    epoch << 1 | u32::from(has_logits)
}

/// See `Machine::step_counts`, of the copy in the block's memory: loads that say that it is there are
/// shorter than through a reference.
#[inline(always)]
pub fn counts(shared: u32) -> [u32; 2] {
    const { assert!(offset_of!(StepState, token_count) == 0 && offset_of!(StepState, logit_count) == 4) };
    // SAFETY: words of the copy.
    unsafe { load_shared_pair(shared + STEP) }
}

/// See `Machine::step_token`, likewise.
#[inline(always)]
pub fn token(shared: u32, idx: u32) -> StepToken {
    const { assert!(size_of::<StepToken>() == 16) };
    let place = shared + STEP + offset_of!(StepState, tokens) as u32 + idx * 16;
    // SAFETY: words of the copy.
    let ([token, slot], [position, logit_row]) =
        unsafe { (load_shared_pair(place), load_shared_pair(place + 8)) };
    StepToken { token, slot, position, logit_row }
}

/// The copy of the step that `keep` has made in the block's memory.
#[inline(always)]
pub fn near(shared: u32) -> Span<StepState> {
    // SAFETY: the area of the copy, which every task but `Admit` has before it.
    unsafe { Span::new(generic(shared + STEP), 1) }
}
