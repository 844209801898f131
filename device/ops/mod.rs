//! The ops: what each opcode does.

mod admit;
mod attention;
mod embed;
mod linear;
mod sample;

use crate::machine::memory::Span;
use crate::worker::{Claim, Stopped, Worker};
use tilert_mk_shared::sequence::{SequenceState, StepState};
use tilert_mk_shared::task::Opcode;

/// Runs a claimed task whose input is ready.
pub fn run(opcode: Opcode, worker: &mut Worker, claim: &Claim) -> Result<(), Stopped> {
    match opcode {
        Opcode::Empty => {}
        Opcode::Admit => admit::run(worker)?,
        Opcode::Embed => embed::run(worker, claim),
        Opcode::Linear => linear::run(worker, claim),
        Opcode::Attention => attention::run(worker, claim),
        Opcode::Sample => sample::run(worker),
    }
    Ok(())
}

/// The step's description.
fn step(worker: &Worker) -> Span<StepState> {
    worker.heap(worker.header.plan.step, 1)
}

/// The slots' states.
fn sequences(worker: &Worker) -> Span<SequenceState> {
    worker.heap(worker.header.plan.sequences, worker.header.dims.kv.slot_count.into())
}

/// The tokens of one slot's sequence.
fn tokens(worker: &Worker, slot: u32) -> Span<u32> {
    let context = u64::from(worker.header.dims.kv.context_max);
    let offset = worker.header.plan.tokens + u64::from(slot) * context * 4;
    worker.heap(offset, context)
}

/// The vocabulary marks of one slot.
fn marks(worker: &Worker, slot: u32) -> Span<u32> {
    let vocab = u64::from(worker.header.dims.vocab_size);
    let offset = worker.header.plan.token_marks + u64::from(slot) * vocab * 4;
    worker.heap(offset, vocab)
}

/// This worker's scratch for input rows.
fn scratch_input(worker: &Worker) -> Span<f32> {
    let dims = &worker.header.dims;
    let offset = worker.header.plan.scratch + u64::from(worker.worker_idx) * dims.scratch_bytes();
    worker.heap(offset, dims.scratch_input_values())
}

/// This worker's scratch for products.
fn scratch_output(worker: &Worker) -> Span<f32> {
    let dims = &worker.header.dims;
    let offset = worker.header.plan.scratch
        + u64::from(worker.worker_idx) * dims.scratch_bytes()
        + dims.scratch_input_values() * 4;
    worker.heap(offset, dims.scratch_output_values())
}
