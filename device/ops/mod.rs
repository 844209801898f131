//! The ops: what each opcode does, in code that all lanes of a worker run together.

pub(crate) mod admit;
pub(crate) mod attention;
pub(crate) mod embed;
pub(crate) mod empty;
pub(crate) mod linear;
pub(crate) mod sample;

use crate::machine::Machine;
use crate::machine::memory::Span;
use crate::worker::{Claim, Stopped, Worker};
use tilert_mk_shared::mailbox::MailboxView;
use tilert_mk_shared::sequence::{SequenceState, StepState};
use tilert_mk_shared::task::Opcode;

/// Runs a claimed task whose input is ready. Collective.
#[inline(always)]
pub fn run<M: Machine>(opcode: Opcode, worker: &Worker<M>, claim: &Claim) -> Result<(), Stopped> {
    match opcode {
        Opcode::Empty => empty::run(worker, claim),
        Opcode::Admit => admit::run(worker)?,
        Opcode::Embed => embed::run(worker, claim),
        Opcode::Linear => linear::run(worker, claim),
        Opcode::Attention => attention::run(worker, claim),
        Opcode::Sample => sample::run(worker),
    }
    Ok(())
}

/// The step's description.
#[inline(always)]
pub(crate) fn step<M: Machine>(worker: &Worker<M>) -> Span<StepState> {
    worker.machine.step(worker.heap(worker.header().plan.step, 1))
}

/// The slots' states.
#[inline(always)]
fn sequences<M: Machine>(worker: &Worker<M>) -> Span<SequenceState> {
    worker.heap(worker.header().plan.sequences, worker.header().dims.kv.slot_count.into())
}

/// A word of what this device knows of the mailbox, at an offset of `MailboxView`.
#[inline(always)]
fn view_word<M: Machine>(worker: &Worker<M>, offset: usize) -> Span<u32> {
    let words = worker.heap(worker.header().plan.mailbox_view, size_of::<MailboxView>() as u64 / 4);
    words.sub(offset / 4, 1)
}

/// The tokens of one slot's sequence.
#[inline(always)]
fn tokens<M: Machine>(worker: &Worker<M>, slot: u32) -> Span<u32> {
    let context = u64::from(worker.header().dims.kv.context_max);
    let offset = worker.header().plan.tokens + u64::from(slot) * context * 4;
    worker.heap(offset, context)
}

/// The vocabulary marks of one slot.
#[inline(always)]
fn marks<M: Machine>(worker: &Worker<M>, slot: u32) -> Span<u32> {
    let vocab = u64::from(worker.header().dims.vocab_size);
    let offset = worker.header().plan.token_marks + u64::from(slot) * vocab * 4;
    worker.heap(offset, vocab)
}

/// This worker's share of the heap for input rows.
#[inline(always)]
fn scratch_input<M: Machine>(worker: &Worker<M>) -> Span<f32> {
    let header = worker.header();
    let dims = &header.dims;
    let offset = worker.header().plan.scratch + u64::from(worker.worker_idx) * dims.scratch_bytes();
    worker.heap(offset, dims.scratch_input_values())
}

/// This worker's share of the heap for products.
#[inline(always)]
fn scratch_output<M: Machine>(worker: &Worker<M>) -> Span<f32> {
    let header = worker.header();
    let dims = &header.dims;
    let offset = worker.header().plan.scratch
        + u64::from(worker.worker_idx) * dims.scratch_bytes()
        + dims.scratch_input_values() * 4;
    worker.heap(offset, dims.scratch_output_values())
}
