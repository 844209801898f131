//! The ops as functions of their own.
//!
//! Those for weights in E4M3 are in PTX of its own (`--cfg tilert_fp8`), or in that for several
//! devices; those for integers are in another (`--cfg tilert_integers`), without any for other
//! weights. More code makes the others slower, also where it is not run.
//!
//! Were they part of the loop, the compiler would keep what is the same in every turn of every op in
//! registers, which are not enough, and local memory, which every acquire makes cold. A function gets
//! a task's slot and finds the rest in special registers and shared memory.

use core::mem::offset_of;

use tilert_mk_shared::kv::attention_split_count;
use tilert_mk_shared::task::{LinearArgs, Opcode, Task, WeightFormat};
use tilert_mk_shared::tile::{NOTICE_WORD, OP_WORDS};

use super::attention::{Heads, Long, Middle, Pairs, Short};
#[cfg(tilert_sm90)]
use super::barrier;
use super::compute::{Kept, Next};
use super::digest::Digest;
use super::header::{self, reference};
#[cfg(tilert_integers)]
use super::kind::Format;
#[cfg(tilert_sm90)]
use super::kind::Pieces;
use super::kind::{Admit, Embed, Empty, Kind, Linear, Sample};
use super::memory::{generic, load_shared_word, shared_base, store_shared_word};
#[cfg(not(tilert_integers))]
use super::multiply::{PlainF16, PlainF32};
use super::op_block::OpBlock;
use super::record::record;
#[cfg(not(tilert_integers))]
use super::tensor::Bf16;
#[cfg(tilert_fp8)]
use super::tensor::Fp8;
#[cfg(tilert_integers)]
use super::tensor::{Q4, Q8};
use super::{compute, peer, sreg, stamped, step};
use crate::worker::{Claim, Progress, Stopped, Worker};

/// Calls an op on a slot.
///
/// On sm_90 the warp meets before, by an instruction whose text names the op. While one lane waits
/// for the task's input, the assembler takes the warp's lanes for parted, until an `aligned`
/// barrier, and spends two more instructions on each access of global memory. Were the barrier's
/// text the same for all ops, the compiler would move it to before the choice of the op, where it
/// says nothing about what follows.
macro_rules! call {
    ($op:ident, $slot:ident) => {{
        // Assemblers for older chips find too few registers with it.
        #[cfg(tilert_sm90)]
        barrier::sync_own_warp!(stringify!($op));
        $op($slot)
    }};
}

/// Runs the op of the task in the block's slot.
#[inline(always)]
pub fn run<K: Kind>(worker: &Worker<OpBlock<K>>, opcode: Opcode) -> Result<(), Stopped> {
    let slot = worker.machine.slot.get();
    match opcode {
        Opcode::Empty => call!(empty, slot),
        Opcode::Admit => call!(admit, slot),
        Opcode::Embed => call!(embed, slot),
        Opcode::Linear => run_linear(&LinearArgs::unpack(&record(slot)), slot),
        Opcode::Attention => match (Heads::of(&worker.header().dims), has_many_splits(worker)) {
            (Heads::Short, false) => call!(attention_short, slot),
            (Heads::Pairs, false) => call!(attention_pairs, slot),
            (Heads::Middle, false) => call!(attention, slot),
            (Heads::Long, false) => call!(attention_long, slot),
            (Heads::Short, true) => call!(attention_short_joining, slot),
            (Heads::Pairs, true) => call!(attention_pairs_joining, slot),
            (Heads::Middle, true) => call!(attention_joining, slot),
            (Heads::Long, true) => call!(attention_long_joining, slot),
        },
        Opcode::Sample => call!(sample, slot),
    }
    if compute::has_stopped() { Err(Stopped) } else { Ok(()) }
}

/// Runs the op of a linear task.
#[cfg(not(tilert_integers))]
#[inline(always)]
fn run_linear(args: &LinearArgs, slot: u32) {
    match args.format {
        WeightFormat::F32 => call!(linear_f32, slot),
        WeightFormat::F16 => call!(linear_f16, slot),
        WeightFormat::Bf16 if !has_few_rows(args, slot) => call!(linear_bf16_wide, slot),
        WeightFormat::Bf16 if args.leaves_best() => call!(head_bf16, slot),
        WeightFormat::Bf16 => call!(linear_bf16, slot),
        #[cfg(tilert_fp8)]
        WeightFormat::Fp8 if !has_few_rows(args, slot) => call!(linear_fp8_wide, slot),
        #[cfg(tilert_fp8)]
        WeightFormat::Fp8 if args.leaves_best() => call!(head_fp8, slot),
        #[cfg(tilert_fp8)]
        WeightFormat::Fp8 => call!(linear_fp8, slot),
        // The host does not make such programs for this PTX.
        _ => sreg::trap(),
    }
}

/// The same of a program whose matrices are all integers.
#[cfg(tilert_integers)]
#[inline(always)]
fn run_linear(args: &LinearArgs, slot: u32) {
    match args.format {
        WeightFormat::Q8 if !has_few_rows(args, slot) => call!(linear_q8_wide, slot),
        WeightFormat::Q8 => call!(linear_q8, slot),
        WeightFormat::Q4 if !has_few_rows(args, slot) => call!(linear_q4_wide, slot),
        WeightFormat::Q4 => call!(linear_q4, slot),
        _ => sreg::trap(),
    }
}

/// Whether attention merges splits of any token of the step. That is in functions of its own: code
/// that is passed by costs a short sequence what it costs to fetch instructions further on.
#[inline(always)]
fn has_many_splits<K: Kind>(worker: &Worker<OpBlock<K>>) -> bool {
    let (shared, dims) = (shared_base(), &worker.header().dims);
    let [token_count, _] = step::counts(shared);
    (0..token_count)
        .any(|idx| dims.joins_splits(attention_split_count(step::token(shared, idx).position)))
}

/// Whether the input rows of the linear task in `slot` are kept as parts.
#[inline(always)]
fn has_few_rows(args: &LinearArgs, slot: u32) -> bool {
    args.token_rows.count(step::counts(shared_base())) <= Digest::read(slot).narrow_rows_max
}

/// Whether a task is a linear one of kind `K`, which is of packed weights and few rows.
#[inline(always)]
fn is_alike<K: Kind>(next: &Next) -> bool {
    let task = next.head_of();
    let args = LinearArgs::unpack(&task);
    // All of it, without a branch for each part.
    (task.opcode == Opcode::Linear as u16)
        & (args.format == K::FORMAT)
        & (args.leaves_best() == K::LEAVES_BEST)
        & (next.rows <= next.narrow_rows_max)
}

/// The same of an op that takes tasks whether they leave the best of their results or not.
#[cfg(tilert_integers)]
#[inline(always)]
fn is_integer_alike<F: Format>(next: &Next) -> bool {
    is_alike::<Linear<F, true, false>>(next) | is_alike::<Linear<F, true, true>>(next)
}

/// Whether a task is an empty one that waits for values.
#[inline(always)]
fn is_passing_on(next: &Next) -> bool {
    // SAFETY: a word of the slot, which is full.
    let count = unsafe { load_shared_word(next.slot + offset_of!(Task, words) as u32) };
    (next.head_of().opcode == Opcode::Empty as u16) & (count != 0)
}

/// Runs an op on a worker made from the slot. What it leaves behind goes to shared memory: results
/// of functions would go to local memory.
#[inline(always)]
fn with_worker<K: Kind>(slot: u32) {
    let shared = shared_base();
    let header = reference(shared);
    let block = OpBlock::<K>::new(sreg::thread_idx(), shared, &header::header(), OP_WORDS);
    block.pages.go_to(slot);
    block.slot.set(slot);
    if block.warp_lane() == 0 {
        stamped::forget(block.warp_idx());
    }
    let (task_idx, epoch) = compute::task_in(slot);
    // SAFETY: the record in the slot, which is full while the op runs.
    let task = unsafe { &*(generic(slot) as *const Task) };
    // SAFETY: the header is that of the kernel, by the contract of its entry.
    let worker = unsafe {
        let kept = Kept::of_warp();
        let trace_count = kept.progress().trace_count;
        let progress = Progress { prologue: kept.prologue(), trace_count, ..Progress::NONE };
        Worker::new(header, peer::worker_idx(), &block, progress)
    };
    if K::run(&worker, &Claim::new(task, task_idx, epoch)).is_err() {
        // SAFETY: a word of the block's memory.
        unsafe { store_shared_word(shared_base() + NOTICE_WORD, 1) };
    }
}

/// Whether the input rows of the task in a slot, which has few, come in pieces.
#[cfg(tilert_sm90)]
#[inline(always)]
fn is_in_pieces(slot: u32) -> bool {
    let [count, _] = step::counts(shared_base());
    Digest::read(slot).piece_columns(count) > 0
}

macro_rules! op {
    ($name:ident, $kind:ty) => {
        #[inline(never)]
        fn $name(slot: u32) {
            with_worker::<$kind>(slot);
        }
    };
}

/// The same for short tasks: goes on with those that follow and are alike, since a turn of the loop
/// takes as long as a short task's product.
///
/// Of linear tasks those whose rows come in pieces have an op of their own.
macro_rules! ops {
    ($name:ident $(/ $in_pieces:ident $in_pieces_kind:ty)?, $kind:ty, $is_alike:expr) => {
        $(
            #[cfg(tilert_sm90)]
            op!($in_pieces, $in_pieces_kind);
        )?
        #[inline(never)]
        fn $name(slot: u32) {
            let mut slot = slot;
            loop {
                ops!(@run $kind, slot $(, $in_pieces)?);
                // Assemblers for older chips find too few registers for it, in other ops.
                if !cfg!(tilert_sm90) {
                    return;
                }
                match compute::follow(slot, $is_alike) {
                    Some(next) => slot = sreg::fresh(next),
                    None => return,
                }
            }
        }
    };
    (@run $kind:ty, $slot:ident) => { with_worker::<$kind>($slot) };
    (@run $kind:ty, $slot:ident, $in_pieces:ident) => {
        #[cfg(tilert_sm90)]
        if is_in_pieces($slot) {
            call!($in_pieces, $slot);
        } else {
            with_worker::<$kind>($slot);
        }
        #[cfg(not(tilert_sm90))]
        with_worker::<$kind>($slot);
    };
}

ops!(empty, Empty, is_passing_on);
op!(admit, Admit);
op!(embed, Embed);
#[cfg(not(tilert_integers))]
op!(linear_f32, Linear<PlainF32, false, true>);
#[cfg(not(tilert_integers))]
op!(linear_f16, Linear<PlainF16, false, true>);
#[cfg(not(tilert_integers))]
ops!(
    linear_bf16 / linear_bf16_in_pieces Pieces<Bf16>,
    Linear<Bf16, true, false>,
    is_alike::<Linear<Bf16, true, false>>
);
#[cfg(not(tilert_integers))]
ops!(head_bf16, Linear<Bf16, true, true>, is_alike::<Linear<Bf16, true, true>>);
#[cfg(not(tilert_integers))]
op!(linear_bf16_wide, Linear<Bf16, false, true>);
#[cfg(tilert_fp8)]
ops!(
    linear_fp8 / linear_fp8_in_pieces Pieces<Fp8>,
    Linear<Fp8, true, false>,
    is_alike::<Linear<Fp8, true, false>>
);
#[cfg(tilert_fp8)]
ops!(head_fp8, Linear<Fp8, true, true>, is_alike::<Linear<Fp8, true, true>>);
#[cfg(tilert_fp8)]
op!(linear_fp8_wide, Linear<Fp8, false, true>);
// Head tasks and others share an op: two would be more code.
#[cfg(tilert_integers)]
ops!(
    linear_q8 / linear_q8_in_pieces Pieces<Q8>,
    Linear<Q8, true, true>,
    is_integer_alike::<Q8>
);
#[cfg(tilert_integers)]
op!(linear_q8_wide, Linear<Q8, false, true>);
#[cfg(tilert_integers)]
ops!(
    linear_q4 / linear_q4_in_pieces Pieces<Q4>,
    Linear<Q4, true, true>,
    is_integer_alike::<Q4>
);
#[cfg(tilert_integers)]
op!(linear_q4_wide, Linear<Q4, false, true>);
op!(attention_short, Short<false>);
op!(attention_pairs, Pairs<false>);
op!(attention, Middle<false>);
op!(attention_long, Long<false>);
op!(attention_short_joining, Short<true>);
op!(attention_pairs_joining, Pairs<true>);
op!(attention_joining, Middle<true>);
op!(attention_long_joining, Long<true>);
op!(sample, Sample);
