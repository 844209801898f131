//! Sequences and steps: what the device's own token loop keeps in the heap.

use crate::limits::{STEP_TOKENS_MAX, STOP_ID_COUNT_MAX};
use crate::sample::SamplingParams;

/// What the host asks for, once per request.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct SequenceParams {
    /// Tokens of the prompt, already in the slot's row of the token region.
    pub prompt_count: u32,
    /// Tokens to generate at most.
    pub generate_max: u32,
    /// Bit 0: compute and hand over the logits of every position (`WANT_LOGITS`).
    pub flags: u32,
    /// Valid entries of `stop_ids`.
    pub stop_id_count: u32,
    /// Tokens that end the answer; they are part of it.
    pub stop_ids: [u32; STOP_ID_COUNT_MAX],
    /// How tokens are chosen.
    pub sampling: SamplingParams,
}

/// Flag of a sequence whose logits of every position go to the host.
pub const WANT_LOGITS: u32 = 1;

/// State of one slot. Written by the `Admit` and `Sample` tasks alone.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct SequenceState {
    /// The request.
    pub params: SequenceParams,
    /// Whether the slot takes part in steps.
    pub is_active: u32,
    /// Positions whose keys and values are in the cache.
    pub position: u32,
    /// Tokens known so far: the prompt and what was generated.
    pub token_count: u32,
    /// Tokens generated so far.
    pub generated_count: u32,
}

/// No logits are computed for a token.
pub const NO_LOGITS: u32 = u32::MAX;

/// One token of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct StepToken {
    /// Token id.
    pub token: u32,
    /// Slot of its sequence.
    pub slot: u32,
    /// Its position in the sequence.
    pub position: u32,
    /// Row of the logits region that it fills, or `NO_LOGITS`.
    pub logit_row: u32,
}

/// What one step processes. Written by `Admit`, read by every task of the step.
///
/// Tokens of one sequence are adjacent and in the order of their positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct StepState {
    /// Tokens in this step.
    pub token_count: u32,
    /// Rows of logits in this step.
    pub logit_count: u32,
    /// For each row of logits, the index of its token in `tokens`.
    pub logit_tokens: [u32; STEP_TOKENS_MAX as usize],
    /// The tokens.
    pub tokens: [StepToken; STEP_TOKENS_MAX as usize],
}

const _: () = assert!(size_of::<SequenceParams>() == 88);
const _: () = assert!(size_of::<SequenceState>() == 104);
const _: () = assert!(size_of::<StepState>() == 8 + 20 * STEP_TOKENS_MAX as usize);
