//! Sampling: chooses next tokens from logits, moves sequences on, and publishes outputs.
//!
//! Probabilities are integers: `exp(logit - max)` times 2^40, rounded down. Their sums do not depend
//! on an order, so a token is chosen the same way however the work is divided. Filters keep the
//! largest weights, those of equal tokens in the order of their indices; what they keep is found by
//! histograms of the weights' digits, without sorting.

use core::mem::offset_of;

use tilert_mk_shared::limits::OUTPUT_COUNT_MAX;
use tilert_mk_shared::mailbox::{Mailbox, MailboxView, Output, OutputKind};
use tilert_mk_shared::program::SAMPLE_BIN_COUNT;
use tilert_mk_shared::sample::{SamplingParams, random_bits};
use tilert_mk_shared::sequence::{NO_LOGITS, SequenceState, StepToken, WANT_LOGITS};
use tilert_mk_shared::tile::WARP_LANES;

use super::admit::{look_at_head, look_at_tail};
use crate::machine::Machine;
use crate::machine::memory::Span;
use crate::worker::Worker;

/// Mark of a token that the prompt contains; the bits below count it in the answer.
pub(super) const IN_PROMPT: u32 = 1 << 31;
/// One, as an integer probability.
const ONE: f32 = (1u64 << 40) as f32;
/// Digits of a weight, of 8 bits: the largest is 2^40.
const DIGIT_COUNT: u32 = 6;
/// No end: no `OutputKind`.
const GOES_ON: u32 = 0;
/// No token: there is no next one, or a logit is not a number.
const NO_TOKEN: u32 = u32::MAX;

/// Jobs of a worker's lanes that may go on at the same time: each is a read or a write of the host's
/// memory, or several of the device's, one after the other.
#[derive(Clone, Copy)]
enum Job {
    /// Moves the sequence on.
    Advance,
    /// Publishes what has become of it.
    Publish,
    /// Looks for commands.
    LookForCommands,
    /// Looks for room for outputs.
    LookForRoom,
}

impl Job {
    /// Whether it is this lane's; on a GPU lanes of different warps wait for themselves.
    #[inline(always)]
    fn is_mine<M: Machine>(self, machine: &M) -> bool {
        machine.lane_idx() == (self as usize * WARP_LANES as usize).min(machine.lane_count() - 1)
    }
}

#[inline(always)]
pub(crate) fn run<M: Machine>(worker: &Worker<M>) {
    let machine = worker.machine;
    let step_view = super::step(worker);
    let step = step_view.get(0);
    let states = super::sequences(worker);
    for token_idx in 0..step.token_count as usize {
        let token = &step.tokens[token_idx];
        let state = states.get(token.slot as usize);
        let is_next = token.logit_row != NO_LOGITS && token.position + 1 == state.token_count;
        // No `Option`s: a GPU would keep what is undefined in them.
        let next = if is_next { choose(worker, token, state) } else { NO_TOKEN };
        let end = if is_next { end_after(state, next) } else { GOES_ON };
        let wants_logits = token.logit_row != NO_LOGITS && state.params.flags & WANT_LOGITS != 0;
        // Nobody needs the state as it was.
        machine.sync();
        if Job::Advance.is_mine(machine) {
            advance(worker, token, states.get_mut(token.slot as usize), next, end != GOES_ON);
        }
        if Job::Publish.is_mine(machine) {
            let report = |kind, value| publish(worker, kind, token.slot, token.position, value);
            if wants_logits {
                report(OutputKind::Logits as u32, token.logit_row);
            }
            if next != NO_TOKEN {
                report(OutputKind::Token as u32, next);
            }
            if end != GOES_ON {
                report(end, 0);
            }
        }
        // For the next `Admit`.
        if token_idx == 0 && Job::LookForCommands.is_mine(machine) {
            look_at_tail(worker);
        }
        if token_idx == 0 && Job::LookForRoom.is_mine(machine) {
            look_at_head(worker);
        }
        machine.sync();
    }
}

/// How an answer ends with the token `next`: an `OutputKind`, or `GOES_ON`.
#[inline(always)]
fn end_after(state: &SequenceState, next: u32) -> u32 {
    if next == NO_TOKEN {
        return OutputKind::EndNotANumber as u32;
    }
    let mut end = GOES_ON;
    if state.generated_count + 1 == state.params.generate_max {
        end = OutputKind::EndLength as u32;
    }
    for idx in 0..state.params.stop_id_count as usize {
        if state.params.stop_ids[idx] == next {
            end = OutputKind::EndStop as u32;
        }
    }
    end
}

/// Moves a sequence past a token, and takes `next` as its next one, if it is one.
#[inline(always)]
fn advance<M: Machine>(
    worker: &Worker<M>,
    token: &StepToken,
    state: &mut SequenceState,
    next: u32,
    has_ended: bool,
) {
    state.position = token.position + 1;
    if has_ended {
        state.is_active = 0;
    }
    if next == NO_TOKEN {
        return;
    }
    if state.params.sampling.has_penalty() {
        let marks = super::marks(worker, token.slot);
        marks.write(next as usize, marks.read(next as usize) + 1);
    }
    state.generated_count += 1;
    if !has_ended {
        super::tokens(worker, token.slot).write(state.token_count as usize, next);
        state.token_count += 1;
    }
}

/// The next token, or `NO_TOKEN` if a logit is not a number. Collective.
#[inline(always)]
fn choose<M: Machine>(worker: &Worker<M>, token: &StepToken, state: &SequenceState) -> u32 {
    let vocab = u64::from(worker.header().dims.vocab_size);
    let offset = worker.header().plan.logits + u64::from(token.logit_row) * vocab * 4;
    let mut logits = worker.heap::<f32>(offset, vocab);
    let params = &state.params.sampling;
    if params.has_penalty() {
        let out = worker.heap::<f32>(worker.header().plan.sample, vocab);
        let marks = super::marks(worker, token.slot);
        worker.machine.for_each(1, vocab as usize, |_, index| {
            out.write(index, penalised(params, logits.read(index), marks.read(index)));
        });
        worker.machine.sync();
        logits = out;
    }
    let best_count = u64::from(worker.header().dims.head_task_count);
    let best = if params.has_penalty() || best_count == 0 {
        worker.machine.argmax(logits)
    } else {
        let first = u64::from(token.logit_row) * best_count;
        worker.machine.best_of(worker.heap(worker.header().plan.bests + first * 8, best_count))
    };
    match best {
        None => NO_TOKEN,
        Some(best) if params.temperature == 0.0 => best,
        Some(best) => draw(worker, params, logits, best, state.generated_count),
    }
}

#[inline(always)]
fn penalised(params: &SamplingParams, logit: f32, mark: u32) -> f32 {
    let mut value = logit;
    if mark != 0 {
        let repetition = params.repetition_penalty;
        value = if value > 0.0 { value / repetition } else { value * repetition };
    }
    let count = mark & !IN_PROMPT;
    if count > 0 {
        value -= params.frequency_penalty * count as f32 + params.presence_penalty;
    }
    value
}

/// The weights of all tokens, and what the filters have kept of them so far: weights above
/// `threshold`, and those equal to it up to the index `tie_last`.
#[derive(Clone, Copy)]
struct Kept {
    weights: Span<u64>,
    bins: Span<u64>,
    threshold: u64,
    tie_last: usize,
}

impl Kept {
    #[inline(always)]
    fn weight(&self, index: usize) -> u64 {
        let weight = self.weights.read(index);
        let is_kept =
            weight > self.threshold || (weight == self.threshold && index <= self.tie_last);
        if is_kept { weight } else { 0 }
    }

    /// Keeps the largest weights until their amounts, `amount(weight)`, exceed `left`. Collective.
    #[inline(always)]
    fn keep<M: Machine>(&mut self, machine: &M, mut left: u64, amount: impl Fn(u64) -> u64) {
        let len = self.weights.len();
        let old = *self;
        let mut prefix = 0;
        for digit in (0..DIGIT_COUNT).rev() {
            let shift = digit * 8;
            machine.histogram(len, self.bins, |index| {
                let weight = old.weight(index);
                let is_inside = weight > 0 && weight >> (shift + 8) == prefix >> 8 >> shift;
                is_inside.then(|| ((weight >> shift) as usize & 255, amount(weight)))
            });
            let (bin, rest) = walk(self.bins, true, left);
            prefix |= (bin as u64) << shift;
            left = rest;
            machine.sync();
        }
        // `left` is now what the tokens of the weight `prefix` must cover, in the order of indices.
        let ties = left / amount(prefix).max(1);
        self.tie_last =
            machine.find(len, self.bins, ties, |index| u64::from(old.weight(index) == prefix));
        self.threshold = prefix;
    }
}

/// Walks the bins, up or down, while `left` covers them; the bin that it does not cover, and what is
/// left there.
#[inline(always)]
fn walk(bins: Span<u64>, is_descending: bool, mut left: u64) -> (usize, u64) {
    let last = bins.len() - 1;
    for step in 0..last {
        let bin = if is_descending { last - step } else { step };
        let amount = bins.read(bin);
        if left < amount {
            return (bin, left);
        }
        left -= amount;
    }
    (if is_descending { 0 } else { last }, left)
}

/// The sum of amounts over `0..len`. Collective.
#[inline(always)]
pub(crate) fn sum_in_bins<M: Machine>(
    machine: &M,
    len: usize,
    bins: Span<u64>,
    amount: impl Fn(usize) -> u64,
) -> u64 {
    machine.histogram(len, bins, |index| Some((0, amount(index))));
    let total = bins.read(0);
    machine.sync();
    total
}

/// The first index at which the amounts of `0..=index` exceed `left`. Collective.
#[inline(always)]
pub(crate) fn find_in_bins<M: Machine>(
    machine: &M,
    len: usize,
    bins: Span<u64>,
    mut left: u64,
    amount: impl Fn(usize) -> u64,
) -> usize {
    let (mut first, mut width) = (0, len.next_power_of_two());
    while width > 1 {
        let part = width.div_ceil(SAMPLE_BIN_COUNT as usize);
        machine.histogram(width.min(len - first), bins, |index| {
            Some((index / part, amount(first + index)))
        });
        let (bin, rest) = walk(bins, false, left);
        (first, width, left) = ((first + bin * part).min(len - 1), part, rest);
        machine.sync();
    }
    first
}

/// Draws from the filtered distribution. Collective.
#[inline(always)]
fn draw<M: Machine>(
    worker: &Worker<M>,
    params: &SamplingParams,
    logits: Span<f32>,
    best: u32,
    counter: u32,
) -> u32 {
    let (header, machine) = (worker.header(), worker.machine);
    let dims = &header.dims;
    let vocab = u64::from(dims.vocab_size);
    let region = worker.header().plan.sample;
    let weights = worker.heap::<u64>(region + dims.sample_weights_offset(), vocab);
    let bin_count = u64::from(dims.sample_bin_count);
    let bins = worker.heap::<u64>(region + dims.sample_bins_offset(), bin_count);
    let largest = logits.read(best as usize);
    let floor = ((params.min_p * ONE) as u64).max(1);
    machine.weigh(logits, [largest, params.temperature, ONE], weights);
    let mut kept = Kept { weights, bins, threshold: 0, tie_last: vocab as usize };
    if params.top_k > 0 {
        kept.keep(machine, u64::from(params.top_k) - 1, |_| 1);
    }
    if params.top_p < 1.0 {
        let total = machine.sum(vocab as usize, bins, |index| kept.weight(index));
        let wanted = (total as f64 * f64::from(params.top_p)) as u64;
        kept.keep(machine, wanted.max(1) - 1, |weight| weight);
    }
    let weight = |index: usize| {
        let weight = kept.weight(index);
        if weight >= floor { weight } else { 0 }
    };
    let total = machine.sum(vocab as usize, bins, weight);
    let random = random_bits(params.seed, u64::from(counter));
    let left = ((u128::from(random) * u128::from(total)) >> 64) as u64;
    machine.find(vocab as usize, bins, left, weight) as u32
}

/// Publishes a record about a slot. For one lane.
///
/// Order: the record is stored before the release store of `output_tail`. `Admit` has made sure of
/// the room.
#[inline(always)]
pub(super) fn publish<M: Machine>(
    worker: &Worker<M>,
    kind: u32,
    slot: u32,
    position: u32,
    value: u32,
) {
    let time_ns = worker.machine.now_ns();
    let output = Output { kind, slot, position, value, time_ns };
    let ring = worker.header().mailbox + offset_of!(Mailbox, outputs) as u64;
    // SAFETY: the ring is part of the mailbox; the host does not read records past `output_tail`.
    let outputs: Span<Output> = unsafe { Span::new(ring, OUTPUT_COUNT_MAX as usize) };
    let tail_word = super::view_word(worker, offset_of!(MailboxView, output_tail));
    let tail = tail_word.read(0);
    outputs.write((tail % OUTPUT_COUNT_MAX) as usize, output);
    tail_word.write(0, tail.wrapping_add(1));
    worker.mailbox_word(offset_of!(Mailbox, output_tail)).store_release(tail.wrapping_add(1));
}
