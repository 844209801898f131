//! Sampling: chooses next tokens from logits, moves sequences on, and publishes outputs.
//!
//! Probabilities are integers: `exp(logit - max)` times 2^40, rounded down. Their sums do not depend
//! on an order, so a token is chosen the same way however the work is divided.

use std::mem::offset_of;
use std::sync::atomic::Ordering;

use tilert_mk_shared::limits::OUTPUT_COUNT_MAX;
use tilert_mk_shared::mailbox::{Mailbox, Output, OutputKind};
use tilert_mk_shared::sample::{SamplingParams, random_bits};
use tilert_mk_shared::sequence::{NO_LOGITS, SequenceState, StepToken, WANT_LOGITS};

use crate::machine::cpu::exp;
use crate::machine::memory::Span;
use crate::worker::Worker;

/// Mark of a token that the prompt contains; the bits below count it in the answer.
pub(super) const IN_PROMPT: u32 = 1 << 31;
/// One, as an integer probability.
const ONE: f32 = (1u64 << 40) as f32;

pub(super) fn run(worker: &Worker) {
    let step_view = super::step(worker);
    let step = &step_view.as_slice()[0];
    let states = super::sequences(worker);
    for token in &step.tokens[..step.token_count as usize] {
        let state = &mut states.as_mut_slice()[token.slot as usize];
        state.position = token.position + 1;
        if token.logit_row == NO_LOGITS {
            continue;
        }
        if state.params.flags & WANT_LOGITS != 0 {
            publish(worker, OutputKind::Logits, token.slot, token.position, token.logit_row);
        }
        if state.position == state.token_count {
            advance(worker, token, state);
        }
    }
}

fn advance(worker: &Worker, token: &StepToken, state: &mut SequenceState) {
    let report = |kind, value| publish(worker, kind, token.slot, token.position, value);
    let Some(next) = choose(worker, token, state) else {
        state.is_active = 0;
        return report(OutputKind::EndNotANumber, 0);
    };
    if state.params.sampling.has_penalty() {
        let marks = super::marks(worker, token.slot);
        marks.write(next as usize, marks.read(next as usize) + 1);
    }
    state.generated_count += 1;
    report(OutputKind::Token, next);
    let stop_ids = &state.params.stop_ids[..state.params.stop_id_count as usize];
    if stop_ids.contains(&next) {
        state.is_active = 0;
        report(OutputKind::EndStop, 0);
    } else if state.generated_count == state.params.generate_max {
        state.is_active = 0;
        report(OutputKind::EndLength, 0);
    } else {
        super::tokens(worker, token.slot).write(state.token_count as usize, next);
        state.token_count += 1;
    }
}

/// The next token, or none if a logit is not a number.
fn choose(worker: &Worker, token: &StepToken, state: &SequenceState) -> Option<u32> {
    let vocab = u64::from(worker.header.dims.vocab_size);
    let offset = worker.header.plan.logits + u64::from(token.logit_row) * vocab * 4;
    let logits = worker.heap::<f32>(offset, vocab);
    let params = &state.params.sampling;
    let work = if params.has_penalty() {
        let work = worker.heap::<f32>(worker.header.plan.sample, vocab);
        penalise(params, logits, super::marks(worker, token.slot), work);
        work
    } else {
        logits
    };
    let best = argmax(work.as_slice())?;
    if params.temperature == 0.0 {
        return Some(best);
    }
    Some(draw(worker, params, work.as_slice(), best, state.generated_count))
}

fn argmax(logits: &[f32]) -> Option<u32> {
    let (mut best, mut largest) = (0, f32::NEG_INFINITY);
    for (index, value) in logits.iter().enumerate() {
        if value.is_nan() {
            return None;
        }
        if *value > largest {
            (best, largest) = (index, *value);
        }
    }
    largest.is_finite().then_some(best as u32)
}

fn penalise(params: &SamplingParams, logits: Span<f32>, marks: Span<u32>, out: Span<f32>) {
    let sources = logits.as_slice().iter().zip(marks.as_slice());
    for (out, (logit, mark)) in out.as_mut_slice().iter_mut().zip(sources) {
        let mut value = *logit;
        if *mark != 0 {
            let repetition = params.repetition_penalty;
            value = if value > 0.0 { value / repetition } else { value * repetition };
        }
        let count = mark & !IN_PROMPT;
        if count > 0 {
            value -= params.frequency_penalty * count as f32 + params.presence_penalty;
        }
        *out = value;
    }
}

/// Draws from the filtered distribution. Equal logits stand in the order of their indices.
fn draw(worker: &Worker, p: &SamplingParams, logits: &[f32], best: u32, counter: u32) -> u32 {
    let largest = logits[best as usize];
    let weigh = |logit: f32| (exp(worker.isa, (logit - largest) / p.temperature) * ONE) as u64;
    let mut ordered: Vec<(u64, u32)> =
        logits.iter().enumerate().map(|(index, logit)| (weigh(*logit), index as u32)).collect();
    ordered.retain(|(weight, _)| *weight > 0);
    if p.top_k > 0 || p.top_p < 1.0 {
        ordered.sort_unstable_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
        if p.top_k > 0 {
            ordered.truncate(p.top_k as usize);
        }
        keep_nucleus(&mut ordered, p.top_p);
    }
    let floor = (p.min_p * ONE) as u64;
    ordered.retain(|(weight, _)| *weight >= floor);
    let total: u64 = ordered.iter().map(|(weight, _)| weight).sum();
    let random = random_bits(p.seed, u64::from(counter));
    let mut left = ((u128::from(random) * u128::from(total)) >> 64) as u64;
    for (weight, index) in ordered {
        if left < weight {
            return index;
        }
        left -= weight;
    }
    best
}

fn keep_nucleus(ordered: &mut Vec<(u64, u32)>, top_p: f32) {
    if top_p >= 1.0 {
        return;
    }
    let total: u64 = ordered.iter().map(|(weight, _)| weight).sum();
    let wanted = (total as f64 * f64::from(top_p)) as u64;
    let mut sum = 0;
    let count = ordered.iter().take_while(|(weight, _)| {
        let is_kept = sum < wanted.max(1);
        sum += weight;
        is_kept
    });
    let count = count.count();
    ordered.truncate(count);
}

/// Publishes a record about a slot.
///
/// Order: the record is stored before the release store of `output_tail`. `Admit` has made sure of
/// the room.
pub(super) fn publish(worker: &Worker, kind: OutputKind, slot: u32, position: u32, value: u32) {
    let output = Output { kind: kind as u32, slot, position, value, time_ns: worker.now_ns() };
    let ring = worker.header.mailbox + offset_of!(Mailbox, outputs) as u64;
    // SAFETY: the ring is part of the mailbox; the host does not read records past `output_tail`.
    let outputs: Span<Output> = unsafe { Span::new(ring, OUTPUT_COUNT_MAX as usize) };
    let tail_word = worker.mailbox_word(offset_of!(Mailbox, output_tail));
    let tail = tail_word.load(Ordering::Relaxed);
    outputs.write((tail % OUTPUT_COUNT_MAX) as usize, output);
    tail_word.store(tail.wrapping_add(1), Ordering::Release);
}
