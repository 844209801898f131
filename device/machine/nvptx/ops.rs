//! The ops as functions of their own.
//!
//! Were they part of the loop, the compiler would keep what is the same in every turn of every op in
//! registers, which are not enough, and local memory, which every acquire makes cold. A function gets
//! a task's slot and finds the rest in special registers and shared memory.

use core::cell::Cell;

use tilert_mk_shared::task::{LinearArgs, Opcode, Task, WeightFormat};
use tilert_mk_shared::tile::OP_WORDS;

use super::block::Block;
use super::loader::{RECORD_BYTES, header};
use super::memory::{generic, load_shared_word, shared_base};
use super::sreg;
use crate::worker::{Claim, Stopped, Worker};

/// Runs the op of the task in the block's slot.
#[inline(always)]
pub fn run(worker: &Worker<Block>, opcode: Opcode, claim: &Claim) -> Result<(), Stopped> {
    let slot = worker.machine.slot.get();
    let kept = worker.prologue.get();
    let kept = match opcode {
        Opcode::Empty => kept,
        Opcode::Admit if admit(slot) => kept,
        Opcode::Admit => return Err(Stopped),
        Opcode::Embed => embed(slot, kept),
        Opcode::Linear => match LinearArgs::unpack(claim.task).format {
            WeightFormat::F32 => linear_f32(slot, kept),
            WeightFormat::F16 => linear_f16(slot, kept),
            WeightFormat::Bf16 => linear_bf16(slot, kept),
        },
        Opcode::Attention => attention(slot, kept),
        Opcode::Sample => sample(slot, kept),
    };
    worker.prologue.set(kept);
    Ok(())
}

/// Runs an op on a worker made from the slot; what the input rows hold goes in and comes out.
#[inline(always)]
fn with_worker(slot: u32, kept: u64, opcode: Opcode, format: WeightFormat) -> (bool, u64) {
    let shared = shared_base();
    let header = header(shared);
    let block = Block::new(sreg::thread_idx(), shared, header, format, OP_WORDS);
    block.pages.go_to(slot);
    // SAFETY: words of the slot, which is full while the op runs.
    let (task_idx, epoch) = unsafe {
        (load_shared_word(slot + RECORD_BYTES), load_shared_word(slot + RECORD_BYTES + 4))
    };
    // SAFETY: the record in the slot, likewise.
    let task = unsafe { &*(generic(slot) as *const Task) };
    // SAFETY: the header is that of the kernel, by the contract of its entry.
    let mut worker = unsafe { Worker::new(header, sreg::block_idx(), &block) };
    worker.prologue = Cell::new(kept);
    let result = crate::ops::run(opcode, &worker, &Claim::new(task, task_idx, epoch));
    (result.is_ok(), worker.prologue.get())
}

#[inline(never)]
fn admit(slot: u32) -> bool {
    with_worker(slot, 0, Opcode::Admit, WeightFormat::F32).0
}

macro_rules! op {
    ($name:ident, $opcode:ident, $format:ident) => {
        #[inline(never)]
        fn $name(slot: u32, kept: u64) -> u64 {
            with_worker(slot, kept, Opcode::$opcode, WeightFormat::$format).1
        }
    };
}

op!(embed, Embed, F32);
op!(linear_f32, Linear, F32);
op!(linear_f16, Linear, F16);
op!(linear_bf16, Linear, Bf16);
op!(attention, Attention, F32);
op!(sample, Sample, F32);
