//! The computing warps' loop: runs what the loading warp has staged.
//!
//! Ops are calls, over which a warp may keep few registers; the rest would go to local memory, which
//! every acquire makes cold. So what a worker knows from one task to the next lives in shared memory,
//! a copy for each warp, and is read again in every turn.

use tilert_mk_shared::event::EventId;
use tilert_mk_shared::fault::FaultCode;
use tilert_mk_shared::task::{LinearArgs, Opcode, Task};
use tilert_mk_shared::tile::{
    LOOP_WORDS, NOTICE_WORD, PROGRESS, PROGRESS_BYTES, STOP_WORD, TASK_EMPTY_BARRIERS,
    TASK_SLOT_BYTES, TASK_SLOTS, TASK_WORD, WARP_LANES,
};

use super::block::Block;
use super::digest::Digest;
use super::feed::NO_TASK;
use super::header::reference_over_calls;
use super::kind::Loop;
use super::loader::RECORD_BYTES;
use super::memory::{
    generic, load_shared_pair, load_shared_word, load_shared_words, shared_base, store_shared,
    store_shared_pair, store_shared_word,
};
use super::op_block::OpBlock;
use super::ring::RingCursor;
use super::{barrier, peer, sreg, step};
use crate::worker::{Claim, Progress, Worker};

/// Runs tasks until the block stops.
#[inline(always)]
pub fn run() {
    let shared = shared_base();
    let block = loop_block(shared, sreg::thread_idx());
    let worker = loop_worker(shared, &block, Progress::NONE);
    if worker.begin().is_ok() {
        Kept::of_warp().save_prologue(&block, 0);
        save(&worker, &RingCursor::tasks(shared), 0);
        while turn() {}
    }
    if sreg::thread_idx() == 0 {
        // SAFETY: a word of the block's memory.
        unsafe { store_shared_word(shared_base() + STOP_WORD, 1) };
    }
}

/// The block as the loop around ops sees it.
#[inline(always)]
fn loop_block(shared: u32, thread_idx: u32) -> OpBlock<Loop> {
    OpBlock::new(thread_idx, shared, reference_over_calls(shared), LOOP_WORDS)
}

/// Its worker.
#[inline(always)]
fn loop_worker(
    shared: u32,
    block: &OpBlock<Loop>,
    progress: Progress,
) -> Worker<'_, OpBlock<Loop>> {
    // SAFETY: by the contract of the kernel; blocks have different indices.
    unsafe { Worker::new(reference_over_calls(shared), peer::worker_idx(), block, progress) }
}

/// Runs the next task, and those that follow and are like it; false if the block stops.
#[inline(always)]
fn turn() -> bool {
    let (shared, thread_idx) = (shared_base(), sreg::thread_idx());
    barrier::sync_warp();
    let (position, progress) = saved(place(shared, thread_idx));
    let block = loop_block(shared, thread_idx);
    block.lead_word.set(position >> 16);
    let tasks = next_task(shared, position);
    let worker = loop_worker(shared, &block, progress);

    tasks.wait_full();
    let slot = slot_of(shared, &tasks);
    let (task_idx, epoch) = task_in(slot);
    if task_idx == NO_TASK {
        return false;
    }
    // SAFETY: the record in the slot, likewise; slots are aligned to 128 bytes and more.
    let task = unsafe { &*(generic(slot) as *const Task) };
    block.slot.set(slot);
    let now_ns = worker.trace_ns();
    let claim = Claim::new(task, task_idx, epoch);
    if worker.wait(&claim, || false).is_err() {
        return false;
    }
    begin(&worker, &claim, now_ns, &tasks, slot);
    if worker.run_op(&claim).is_err() {
        return false;
    }
    finish_last();
    true
}

/// Ends the task in `slot`, whose op has run in this step, and begins the next one, if that is ready to run
/// and `is_alike` says so of it; its slot, or none if the task is yet to be ended or the device stops.
///
/// What it reads it asks for at once: between two stages every read that waits for another counts.
#[inline(always)]
pub fn follow(slot: u32, is_alike: impl FnOnce(&Next) -> bool) -> Option<u32> {
    let (shared, thread_idx) = (shared_base(), sreg::thread_idx());
    let (position, progress) = saved(place(shared, thread_idx));
    if has_stopped() {
        return None;
    }
    let tasks = next_task(shared, position);
    // The loading warp does not wait for the end of a task before it fills the next slot.
    tasks.wait_full();
    let next = Next::read(shared, slot_of(shared, &tasks));
    let is_ready = next.epoch == progress.kept_epoch && next.task_idx != NO_TASK;
    if !is_ready || !is_alike(&next) {
        return None;
    }
    let block = loop_block(shared, thread_idx);
    block.lead_word.set(position >> 16);
    let worker = loop_worker(shared, &block, progress);
    finish(&worker, slot);
    let now_ns = worker.trace_ns();
    // SAFETY: the record in the slot, as in `turn`.
    let task = unsafe { &*(generic(next.slot) as *const Task) };
    begin(&worker, &Claim::new(task, next.task_idx, next.epoch), now_ns, &tasks, next.slot);
    Some(next.slot)
}

/// What a block knows of the next task before it begins it.
pub struct Next {
    /// Its slot.
    pub slot: u32,
    /// Its index, and its step.
    pub task_idx: u32,
    /// See `task_idx`.
    pub epoch: u32,
    /// The first word of its record.
    pub head: u32,
    /// Input rows that it keeps as parts at most, if its weights are packed.
    pub narrow_rows_max: u32,
    /// Its input rows in the step that the block knows, if it is linear.
    pub rows: u32,
}

impl Next {
    /// That of the task in a full slot; of one that does not exist, an index that says so.
    #[inline(always)]
    fn read(shared: u32, slot: u32) -> Next {
        let (task_idx, epoch) = task_in(slot);
        // SAFETY: a word of the slot, which is full.
        let head = unsafe { load_shared_word(slot) };
        let args = LinearArgs::unpack(&task_with(head));
        let rows = args.token_rows.count(step::counts(shared));
        let narrow_rows_max = Digest::read(slot).narrow_rows_max;
        Next { slot, task_idx, epoch, head, narrow_rows_max, rows }
    }

    /// A task with the opcode and the flags of this one.
    #[inline(always)]
    pub fn head_of(&self) -> Task {
        task_with(self.head)
    }
}

/// A task with the opcode and the flags that a record's first word has.
#[inline(always)]
fn task_with(head: u32) -> Task {
    Task { opcode: head as u16, flags: (head >> 16) as u16, ..Task::new(Opcode::Empty) }
}

/// The ring of tasks at the task that `position` names.
#[inline(always)]
fn next_task(shared: u32, position: u32) -> RingCursor {
    let tasks = RingCursor::tasks(shared);
    tasks.go_to(position & 0xff, position >> 8 & 1);
    tasks
}

/// The slot at a position of the ring of tasks.
#[inline(always)]
fn slot_of(shared: u32, tasks: &RingCursor) -> u32 {
    shared + TASK_SLOTS + tasks.index() * TASK_SLOT_BYTES
}

/// Index and step of the task in a full slot.
#[inline(always)]
pub fn task_in(slot: u32) -> (u32, u32) {
    // SAFETY: words of the slot, which is full: the loading warp does not touch it.
    let [task_idx, epoch] = unsafe { load_shared_pair(slot + RECORD_BYTES) };
    (task_idx, epoch)
}

/// Notes that a task's op begins, and what the turn's end and the next turn need.
#[inline(always)]
fn begin(
    worker: &Worker<OpBlock<Loop>>,
    claim: &Claim,
    now_ns: u64,
    tasks: &RingCursor,
    slot: u32,
) {
    if worker.machine.thread_idx == 0 {
        let shared = worker.machine.shared;
        // For whoever looks at a block that has stopped.
        // SAFETY: words of the block's memory.
        unsafe {
            store_shared_word(shared + TASK_WORD, claim.task_idx);
            store_shared_word(place(shared, 0) + EPOCH, claim.epoch);
        }
    }
    worker.start(claim, now_ns, now_ns);
    tasks.advance();
    save(worker, tasks, slot);
}

/// The position in the ring of tasks, and progress, as `save` has left them.
#[inline(always)]
fn saved(place: u32) -> (u32, Progress) {
    // SAFETY: this warp's words, which its first lane has left before a barrier of the warp.
    let [position, kept_epoch, complete, trace_count] = unsafe { load_shared_words(place) };
    let complete = EventId(complete);
    (position, Progress { kept_epoch, complete, trace_count, ..Progress::NONE })
}

/// Ends the latest task that has begun, with nothing but what shared memory has kept.
#[inline(always)]
fn finish_last() {
    let (shared, thread_idx) = (shared_base(), sreg::thread_idx());
    let place = place(shared, thread_idx);
    // SAFETY: words of this warp, which `save` has left.
    let (trace_count, slot) =
        unsafe { (load_shared_word(place + TRACE_COUNT), load_shared_word(place + SLOT)) };
    let progress = Progress { trace_count, ..Progress::NONE };
    let block = loop_block(shared, thread_idx);
    finish(&loop_worker(shared, &block, progress), slot);
}

/// Ends the task in a slot.
#[inline(always)]
fn finish(worker: &Worker<OpBlock<Loop>>, slot: u32) {
    // SAFETY: the record in the slot, which is full.
    let task = unsafe { &*(generic(slot) as *const Task) };
    worker.machine.slot.set(slot);
    worker.finish(&Claim::new(task, 0, 0));
    // `finish` has had a barrier: no lane looks at the record any more but this one.
    let Block { thread_idx, shared, .. } = **worker.machine;
    if thread_idx == 0 {
        let index = (slot - shared - TASK_SLOTS) / TASK_SLOT_BYTES;
        // SAFETY: an initialised barrier.
        unsafe { barrier::arrive(shared + TASK_EMPTY_BARRIERS + index * 8) };
    }
}

/// Whether the computing warps know that the device stops.
#[inline(always)]
pub fn has_stopped() -> bool {
    // SAFETY: a word of the block's memory.
    unsafe { load_shared_word(shared_base() + NOTICE_WORD) != 0 }
}

/// Leaves a fault record about weights, or a task, that do not arrive, and ends the kernel.
#[cold]
#[inline(never)]
pub fn weights_overdue() -> ! {
    overdue(FaultCode::WeightsTimeout)
}

/// The same about values of the step.
#[cold]
#[inline(never)]
pub fn values_overdue() -> ! {
    overdue(FaultCode::ValuesTimeout)
}

#[inline(always)]
fn overdue(code: FaultCode) -> ! {
    let (shared, thread_idx) = (shared_base(), sreg::thread_idx());
    // SAFETY: words of the block's memory, which `init` and `run` have written.
    let (task_idx, epoch) = unsafe {
        (load_shared_word(shared + TASK_WORD), load_shared_word(place(shared, 0) + EPOCH))
    };
    let block = loop_block(shared, thread_idx);
    let worker = loop_worker(shared, &block, Progress::NONE);
    worker.miss(code, task_idx, epoch);
    sreg::trap()
}

/// Offsets of a warp's words: the position in the ring of tasks with the leader's next word, the
/// step, the complete event, then the number of traced tasks; those of `Kept`; the slot.
const TRACE_COUNT: u32 = 12;
/// See `TRACE_COUNT`.
const KEPT: u32 = 16;
/// See `TRACE_COUNT`.
const SLOT: u32 = 24;
/// Offset of the step of the first warp's task, for whoever looks at a block that has stopped.
const EPOCH: u32 = 28;

/// Where this warp's words are.
#[inline(always)]
fn place(shared: u32, thread_idx: u32) -> u32 {
    shared + PROGRESS + thread_idx / WARP_LANES * PROGRESS_BYTES
}

/// Leaves what the turn's end and the next turn need. Every lane of the warp has read the last
/// turn's.
#[inline(always)]
fn save(worker: &Worker<OpBlock<Loop>>, tasks: &RingCursor, slot: u32) {
    let (block, progress) = (worker.machine, worker.progress());
    barrier::sync_warp();
    if block.warp_lane() == 0 {
        let place = place(block.shared, block.thread_idx);
        let position = tasks.index() | tasks.parity() << 8 | block.lead_word.get() << 16;
        let words = [position, progress.kept_epoch, progress.complete.0, progress.trace_count];
        // SAFETY: this warp's words.
        unsafe {
            store_shared(place, words.map(f32::from_bits));
            store_shared_word(place + SLOT, slot);
        }
    }
    barrier::sync_warp();
}

/// What an op leaves behind for a warp: the prologue whose result the input rows hold.
pub struct Kept {
    place: u32,
}

impl Kept {
    /// Of this warp.
    #[inline(always)]
    pub fn of_warp() -> Kept {
        Kept { place: place(shared_base(), sreg::thread_idx()) + KEPT }
    }

    /// See `Progress::prologue`.
    #[inline(always)]
    pub fn prologue(&self) -> u64 {
        // SAFETY: this warp's words; whichever op wrote them has ended with a barrier since.
        let [low, high] = unsafe { load_shared_pair(self.place) };
        u64::from(high) << 32 | u64::from(low)
    }

    /// What the warp's loop knows, but for the prologue.
    #[inline(always)]
    pub fn progress(&self) -> Progress {
        saved(self.place - KEPT).1
    }

    /// Leaves the prologue. Called by all lanes.
    #[inline(always)]
    pub fn save_prologue(&self, block: &Block, prologue: u64) {
        barrier::sync_warp();
        if block.warp_lane() == 0 {
            // SAFETY: this warp's words, which all its lanes have read.
            unsafe { store_shared_pair(self.place, [prologue as u32, (prologue >> 32) as u32]) };
        }
    }
}

// The warp's deadline is at the end of its words, see `stamped.rs`.
const _: () = assert!(EPOCH + 4 <= PROGRESS_BYTES - 8 && PROGRESS.is_multiple_of(16));
