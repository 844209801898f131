//! The proof that a program may run: nothing waits forever, and nothing reads too early.
//!
//! What is proved, for any number of steps and any timing, stealing of tasks included:
//! - every task's arguments are inside the model, the heap, the tensors and `shared/limits.rs`;
//! - every task is in one queue, and queues follow the order of the list of tasks;
//! - events get exactly the arrivals that are waited for, there is no cycle, and a task is listed
//!   after all it waits for: the oldest unfinished task can always run;
//! - two tasks that touch the same bytes, one of them writing, are ordered by events, also when one
//!   belongs to the next step; what a task reads was all written by the stage before it, and what
//!   it writes is read; each row of each matrix is multiplied once in a step, in the matrix's format.
//!
//! Order comes from events alone. Queues give none, since idle workers take tasks of others. Where values
//! are stamped none does, and attention tasks of a stage wait for each other: they are different workers'.
//! Whether the program computes the right network is not proved here; the golden tests see to that.

mod access;
mod error;
mod memory;
#[cfg(test)]
mod mutations;
mod order;
mod queues;
mod scales;
mod stamps;
mod tasks;
#[cfg(test)]
mod tests;

use tilert_mk_shared::limits::{
    ATTENTION_SPLIT_MAX, HEAD_DIM_MAX, HEADS_PER_KV_MAX, SLOT_COUNT_MAX, STEP_TOKENS_MAX,
    VOCAB_MAX, WORKER_COUNT_MAX,
};
use tilert_mk_shared::program::{Dims, HeapPlan};

use crate::config::{
    HIDDEN_DIM_MAX, INTERMEDIATE_DIM_MAX, LAYER_COUNT_MAX, POSITION_COUNT_MAX, QUERY_DIM_MAX,
};
use crate::lower::{Program, TENSOR_SHIFT};

pub use access::Region;
pub use error::{TaskDefect, ValidateError};

/// What a machine can stage of one task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Staging {
    /// Bytes of one row of weights at most: a row never spans pages.
    pub row_bytes_max: u64,
    /// Bytes of all weights of a task at most, where a task must be staged as a whole.
    pub task_bytes_max: u64,
}

impl Staging {
    /// A machine that streams weights of any size.
    pub const UNBOUNDED: Staging = Staging { row_bytes_max: u64::MAX, task_bytes_max: u64::MAX };
}

/// Proves that a program may run on a machine that stages weights of any size.
///
/// Errors:  the first rule that the program breaks, with the names of the tasks.
/// Cost:    proportional to tasks, plus the square of stages; 50 000 tasks take some milliseconds.
pub fn validate(program: &Program) -> Result<(), ValidateError> {
    validate_for(program, &Staging::UNBOUNDED)
}

/// Proves that a program may run on a machine with bounded staging memory.
///
/// Errors:  as `validate`, and tasks whose weights the machine cannot stage.
pub fn validate_for(program: &Program, staging: &Staging) -> Result<(), ValidateError> {
    check_sizes(program)?;
    queues::check(program)?;
    let order = order::Order::new(program)?;
    let mut memory = memory::Memory::new(program, &order);
    tasks::check(program, staging, &mut memory)?;
    memory.check()?;
    stamps::check(program, &order)
}

/// Proves that a program of empty tasks ends: it touches no memory of which to prove anything.
///
/// Errors:  as `validate`, without what concerns tasks' arguments and memory.
pub(crate) fn validate_order(program: &Program) -> Result<(), ValidateError> {
    check_sizes(program)?;
    queues::check(program)?;
    order::Order::new(program).map(|_| ())
}

/// Name of a task, or its index if the program does not name it.
fn name(program: &Program, task_idx: u32) -> String {
    let name = program.names.get(task_idx as usize);
    name.cloned().unwrap_or_else(|| format!("task {task_idx}"))
}

/// The sizes that everything else is checked against.
fn check_sizes(program: &Program) -> Result<(), ValidateError> {
    let dims = &program.dims;
    let worker_count = (program.queue_spans.len() as u64).saturating_sub(1);
    check_dims(dims, worker_count)?;
    let any = u64::from(u32::MAX);
    bound("the number of tasks", program.tasks.len() as u64, any)?;
    bound("the number of events", program.event_arrivals.len() as u64, any - 1)?;
    if program.names.len() != program.tasks.len() {
        let (found, expected) = (program.names.len() as u64, program.tasks.len() as u64);
        return Err(ValidateError::Count { what: "names of tasks", found, expected });
    }
    let event_count = program.event_arrivals.len() as u32;
    let task_count = program.tasks.len() as u32;
    if program.plan != HeapPlan::new(dims, worker_count as u32, event_count, task_count) {
        return Err(ValidateError::Plan);
    }
    // Heap offsets and names of weights share the references of a task.
    bound("the heap in bytes", program.plan.total_bytes, (1 << TENSOR_SHIFT) - 1)
}

/// The sizes of a model and of an engine, before there is a program.
pub(crate) fn check_dims(dims: &Dims, worker_count: u64) -> Result<(), ValidateError> {
    let kv = &dims.kv;
    bound("the number of workers", worker_count, WORKER_COUNT_MAX.into())?;
    bound("step_tokens_max", dims.step_tokens_max.into(), STEP_TOKENS_MAX.into())?;
    bound("slot_count", kv.slot_count.into(), SLOT_COUNT_MAX.into())?;
    bound("context_max", kv.context_max.into(), POSITION_COUNT_MAX.into())?;
    bound("layer_count", kv.layer_count.into(), LAYER_COUNT_MAX.into())?;
    bound("head_dim", kv.head_dim.into(), HEAD_DIM_MAX.into())?;
    bound("head_count", dims.head_count.into(), QUERY_DIM_MAX.into())?;
    bound("kv_head_count", kv.kv_head_count.into(), dims.head_count.into())?;
    bound("hidden_dim", dims.hidden_dim.into(), HIDDEN_DIM_MAX.into())?;
    bound("intermediate_dim", dims.intermediate_dim.into(), INTERMEDIATE_DIM_MAX.into())?;
    bound("vocab_size", dims.vocab_size.into(), VOCAB_MAX.into())?;
    bound("late_splits_max", dims.late_splits_max.into(), ATTENTION_SPLIT_MAX.into())?;
    if dims.is_stamped == 0 && dims.late_splits_max != ATTENTION_SPLIT_MAX {
        let (found, expected) = (dims.late_splits_max.into(), ATTENTION_SPLIT_MAX.into());
        return Err(ValidateError::Count { what: "splits merged by projections", found, expected });
    }
    let group = dims.head_count.div_ceil(kv.kv_head_count);
    bound("head_count / kv_head_count", group.into(), HEADS_PER_KV_MAX.into())?;
    if dims.head_count.is_multiple_of(kv.kv_head_count) {
        return Ok(());
    }
    let (found, expected) = (dims.head_count, group * kv.kv_head_count);
    let (found, expected) = (found.into(), expected.into());
    Err(ValidateError::Count { what: "query heads", found, expected })
}

fn bound(what: &'static str, value: u64, limit: u64) -> Result<(), ValidateError> {
    let is_inside = (1..=limit).contains(&value);
    if is_inside { Ok(()) } else { Err(ValidateError::Limit { what, value, limit }) }
}
