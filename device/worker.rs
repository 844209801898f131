//! The worker loop: stage, wait, claim, run, signal.
//!
//! Tasks are listed in an order in which each depends only on earlier ones. A worker claims in that
//! order and finishes what it claimed in the order of its claims, so the oldest unfinished task can
//! always run. While its next task waits, a worker of a machine that allows it runs tasks of other
//! queues that are ready: they finish without waiting, so the argument holds.

use core::cell::Cell;
use core::mem::offset_of;
use core::ops::Deref;

use tilert_mk_shared::ABI_VERSION;
use tilert_mk_shared::event::{EVENT_STRIDE_BYTES, EventId, target};
use tilert_mk_shared::fault::{FaultCode, FaultRecord};
use tilert_mk_shared::mailbox::{Mailbox, StopWord};
use tilert_mk_shared::program::ProgramHeader;
use tilert_mk_shared::queue::{CURSOR_STRIDE_BYTES, Cursor, QueueSpan, comes_before};
use tilert_mk_shared::task::{Opcode, Task};
use tilert_mk_shared::trace::{TRACE_STOLEN, TraceRecord};

use crate::machine::memory::{Span, check};
use crate::machine::{CursorCounter, EventCounter, HostCounter, Machine};
use crate::{event, queue};

/// How long who ends the kernel waits for a fault record that another writes.
const RECORD_NS_MAX: u64 = 1_000_000_000;

/// The device stops: the worker leaves its loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped;

/// A task that this worker owns.
#[derive(Clone, Copy, Debug)]
pub struct Claim<'a> {
    /// Its record.
    pub task: &'a Task,
    /// Its index in the program.
    pub task_idx: u32,
    /// Its step.
    pub epoch: u32,
    is_stolen: bool,
}

impl<'a> Claim<'a> {
    /// A task of the worker's own or the shared queue.
    #[inline(always)]
    pub fn new(task: &'a Task, task_idx: u32, epoch: u32) -> Claim<'a> {
        Claim { task, task_idx, epoch, is_stolen: false }
    }

    /// The same, of another worker.
    #[inline(always)]
    pub(crate) fn stolen(self) -> Claim<'a> {
        Claim { is_stolen: true, ..self }
    }
}

/// A task that a worker may claim: a queue, and the cursor at which it was seen.
#[derive(Clone, Copy, Debug)]
pub struct Offer {
    queue_idx: u32,
    cursor: Cursor,
}

/// What a worker knows from one task to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Step and key of the prologue whose result the worker's input rows hold, as
    /// `epoch << 32 | key`; 0 if they hold none: epochs count from 1.
    pub prologue: u64,
    /// The latest step that is known to have begun; its description is near.
    pub kept_epoch: u32,
    /// An event that is complete in that step.
    pub complete: EventId,
    /// Tasks that the leading lane has begun.
    pub trace_count: u32,
}

impl Progress {
    /// That of a worker which begins.
    pub const NONE: Progress =
        Progress { prologue: 0, kept_epoch: 0, complete: EventId::NONE, trace_count: 0 };
}

/// One worker: what it shares with the others, and what is its own.
pub struct Worker<'a, M: Machine> {
    bound: &'a ProgramHeader,
    /// Which worker this is.
    pub worker_idx: u32,
    /// What it runs on.
    pub machine: &'a M,
    /// See `Progress`.
    pub prologue: Cell<u64>,
    pub(crate) kept_epoch: Cell<u32>,
    pub(crate) complete: Cell<EventId>,
    trace_count: Cell<u32>,
    /// Another worker has committed the task that this one has run.
    pub(crate) has_lost: Cell<bool>,
}

impl<'a, M: Machine> Worker<'a, M> {
    /// A worker of the program in `header` that goes on from `progress`.
    ///
    /// # Safety
    /// Every address in the header and in its tasks is valid for what it names until the worker
    /// ends, no two workers have the same index, and the events of the program order all
    /// conflicting accesses of its tasks.
    #[inline(always)]
    pub unsafe fn new(
        header: &'a ProgramHeader,
        worker_idx: u32,
        machine: &'a M,
        progress: Progress,
    ) -> Self {
        Worker {
            bound: header,
            worker_idx,
            machine,
            prologue: Cell::new(progress.prologue),
            kept_epoch: Cell::new(progress.kept_epoch),
            complete: Cell::new(progress.complete),
            trace_count: Cell::new(progress.trace_count),
            has_lost: Cell::new(false),
        }
    }

    /// The program's header.
    #[inline(always)]
    pub fn header(&self) -> impl Deref<Target = ProgramHeader> + 'a {
        self.machine.header(self.bound)
    }

    /// What the worker knows.
    #[inline(always)]
    pub fn progress(&self) -> Progress {
        Progress {
            prologue: self.prologue.get(),
            kept_epoch: self.kept_epoch.get(),
            complete: self.complete.get(),
            trace_count: self.trace_count.get(),
        }
    }

    /// Notes which prologue's result the input rows hold. Collective.
    #[inline(always)]
    pub fn keep_prologue(&self, prologue: u64) {
        self.prologue.set(prologue);
        self.machine.keep_prologue(prologue);
    }

    /// Stages, claims and computes in turns until the device stops: the loop of a machine whose
    /// workers are one thread each.
    ///
    /// A task is claimed when it can run, so that a worker which loses its core while it waits holds
    /// nothing that others could do.
    pub fn run(&self) {
        if self.begin().is_err() {
            return;
        }
        while let Some((offer, claim)) = self.next() {
            let seen_ns = self.trace_ns();
            // A task's weights are requested while the one before it runs.
            let span = self.span(offer.queue_idx);
            let after = self.entry(span, offer.cursor.next(span.count).position);
            self.machine.stage(self.task(after));
            let staged_ns = self.trace_ns();
            if self.wait(&claim, || !self.is_open(&offer)).is_err() {
                return;
            }
            if self.take(&offer) && self.execute(&claim, seen_ns, staged_ns).is_err() {
                return;
            }
        }
    }

    /// Checks the program's version and tells the host that the device runs. Collective.
    #[inline(always)]
    pub fn begin(&self) -> Result<(), Stopped> {
        let version = self.header().abi_version;
        if self.machine.lane_idx() == 0 {
            if version != ABI_VERSION {
                self.fault(FaultCode::BadHeader, None, ABI_VERSION, version);
            } else if self.worker_idx == 0 {
                let address = self.header().mailbox + offset_of!(Mailbox, clock_ns) as u64;
                // SAFETY: a word of the mailbox that only this lane writes, before `ready`.
                unsafe { Span::<u64>::new(address, 1) }.write(0, self.machine.now_ns());
                self.mailbox_word(offset_of!(Mailbox, ready)).store_release(1);
            }
        }
        if version == ABI_VERSION { Ok(()) } else { Err(Stopped) }
    }

    /// A typed view of `len` values at a heap offset.
    #[inline(always)]
    pub fn heap<T: Copy>(&self, offset: u64, len: u64) -> Span<T> {
        check!(offset + len * size_of::<T>() as u64 <= self.header().plan.total_bytes);
        // SAFETY: within the heap by the assertion; regions are aligned to cache lines and valid by
        // the contract of `Worker::new`.
        unsafe { Span::new(self.header().heap + offset, len as usize) }
    }

    /// The counter at an offset of the mailbox.
    #[inline(always)]
    pub fn mailbox_word(&self, offset: usize) -> &'a HostCounter {
        check!(offset < size_of::<Mailbox>());
        // SAFETY: the mailbox is valid by the contract of `Worker::new`; its words are only counters.
        unsafe { HostCounter::at(self.header().mailbox + offset as u64) }
    }

    /// This PE's counter of an event.
    #[inline(always)]
    pub(crate) fn event(&self, id: EventId) -> &'a EventCounter {
        self.event_at(id, 0)
    }

    /// The counters of an event, of all PEs.
    #[inline(always)]
    fn events(&self, id: EventId) -> impl Iterator<Item = &'a EventCounter> {
        let count = if M::HAS_PEERS { self.header().pe_count } else { 1 };
        (0..count).map(move |pe| self.event_at(id, self.machine.distance(pe)))
    }

    #[inline(always)]
    fn event_at(&self, id: EventId, distance: u64) -> &'a EventCounter {
        check!(id.0 < self.header().event_count);
        let offset = self.header().plan.events + u64::from(id.0) * EVENT_STRIDE_BYTES;
        // SAFETY: one of the header's events, in the heap of some PE; the region holds nothing but
        // counters.
        unsafe { EventCounter::at((self.header().heap + offset).wrapping_add(distance)) }
    }

    #[inline(always)]
    pub(crate) fn cursor(&self, queue_idx: u32) -> &'a CursorCounter {
        check!(queue_idx <= self.header().worker_count);
        let offset = self.header().plan.cursors + u64::from(queue_idx) * CURSOR_STRIDE_BYTES;
        // SAFETY: one of the header's cursors; the region holds nothing but counters.
        unsafe { CursorCounter::at(self.header().heap + offset) }
    }

    /// Whether the host has asked for the end, or a worker has faulted.
    #[inline(always)]
    pub fn has_stopped(&self) -> bool {
        let word = self.mailbox_word(offset_of!(Mailbox, stop));
        word.load_acquire() != StopWord::Run as u32
    }

    /// Where a queue's entries are.
    #[inline(always)]
    pub fn span(&self, queue_idx: u32) -> QueueSpan {
        let count = self.header().worker_count as usize + 1;
        // SAFETY: by the contract of `Worker::new`.
        unsafe { Span::<QueueSpan>::new(self.header().queue_spans, count) }.read(queue_idx as usize)
    }

    /// The task at a position of a queue.
    #[inline(always)]
    pub(crate) fn entry(&self, span: QueueSpan, position: u32) -> u32 {
        let address = self.header().queue_entries + u64::from(span.first) * 4;
        // SAFETY: the spans cover the list of entries, by the contract of `Worker::new`.
        unsafe { Span::<u32>::new(address, span.count as usize) }.read(position as usize)
    }

    #[inline(always)]
    pub(crate) fn task(&self, task_idx: u32) -> &'a Task {
        check!(task_idx < self.header().task_count);
        let address = self.header().tasks + u64::from(task_idx) * size_of::<Task>() as u64;
        // SAFETY: one of the header's tasks, which nobody writes, by the contract of `Worker::new`.
        unsafe { &*(address as *const Task) }
    }

    /// The earlier of the own queue's next task and the shared queue's, not claimed; none if both are
    /// empty for good.
    pub fn next(&self) -> Option<(Offer, Claim<'a>)> {
        let shared = self.header().worker_count;
        let (own, other) = (self.offer(self.worker_idx), self.offer(shared));
        match (own, other) {
            (Some((_, mine)), Some((_, theirs)))
                if comes_before(theirs.epoch, theirs.task_idx, mine.epoch, mine.task_idx) =>
            {
                other
            }
            (None, _) => other,
            _ => own,
        }
    }

    /// The next task of a queue.
    fn offer(&self, queue_idx: u32) -> Option<(Offer, Claim<'a>)> {
        let span = self.span(queue_idx);
        if span.count == 0 {
            return None;
        }
        let cursor = queue::peek(self.cursor(queue_idx));
        let task_idx = self.entry(span, cursor.position);
        let claim = Claim::new(self.task(task_idx), task_idx, cursor.epoch);
        Some((Offer { queue_idx, cursor }, claim))
    }

    /// Whether nobody has claimed it.
    fn is_open(&self, offer: &Offer) -> bool {
        queue::peek(self.cursor(offer.queue_idx)) == offer.cursor
    }

    /// Claims a task, unless somebody else has.
    pub fn take(&self, offer: &Offer) -> bool {
        let span = self.span(offer.queue_idx);
        queue::claim(self.cursor(offer.queue_idx), offer.cursor, span.count)
    }

    /// Whether the task may run at once. `Admit` may wait for the host, so it is never "ready".
    #[inline(always)]
    pub(crate) fn is_ready(&self, task: &Task, epoch: u32) -> bool {
        task.opcode != Opcode::Admit as u16
            && task.wait_event.is_some()
            && event::poll(self.event(task.wait_event), target(task.wait_count, epoch))
    }

    pub(crate) fn steal(&self) -> Result<bool, Stopped> {
        for step in 1..self.header().worker_count {
            let victim = (self.worker_idx + step) % self.header().worker_count;
            let Some((offer, claim)) = self.offer(victim) else { continue };
            if self.is_ready(claim.task, claim.epoch) && self.take(&offer) {
                let claim = claim.stolen();
                let now_ns = self.trace_ns();
                self.execute(&claim, now_ns, now_ns)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Leaves a fault record about a task of which something does not arrive, and waits until the record is
    /// whole: another lane may be writing it, and the caller ends the kernel. For one lane.
    #[inline(always)]
    pub fn miss(&self, code: FaultCode, task_idx: u32, epoch: u32) {
        let claim = Claim::new(self.task(task_idx), task_idx, epoch);
        self.fault(code, Some(&claim), 0, 0);
        let began_ns = self.machine.now_ns();
        while !self.has_stopped() && self.machine.now_ns() - began_ns < RECORD_NS_MAX {}
    }

    /// Leaves a fault record, unless another worker has, and stops the device. For the leader.
    #[inline(always)]
    pub(crate) fn fault(
        &self,
        code: FaultCode,
        claim: Option<&Claim>,
        expected: u32,
        observed: u32,
    ) {
        // SAFETY: the record is valid by the contract of `Worker::new`; `claimed` is only a counter.
        let claimed = unsafe { HostCounter::at(self.header().fault) };
        if claimed.swap_relaxed(1) != 0 {
            return;
        }
        let words = [
            code as u32,
            self.worker_idx,
            claim.map_or(0, |claim| claim.task_idx),
            claim.map_or(0, |claim| claim.epoch),
            claim.map_or(EventId::NONE.0, |claim| claim.task.wait_event.0),
            expected,
            observed,
        ];
        // The words after `claimed`, which others may be swapping.
        let first = self.header().fault + offset_of!(FaultRecord, code) as u64;
        // SAFETY: this worker alone has claimed the record; the host reads it after `stop` below.
        let slot: Span<u32> = unsafe { Span::new(first, words.len()) };
        for (idx, word) in words.into_iter().enumerate() {
            slot.write(idx, word);
        }
        let time = self.header().fault + offset_of!(FaultRecord, time_ns) as u64;
        // SAFETY: as above.
        unsafe { Span::<u64>::new(time, 1) }.write(0, self.machine.now_ns());
        let word = self.mailbox_word(offset_of!(Mailbox, stop));
        word.store_release(StopWord::Fault as u32);
    }

    /// Runs a task whose input is ready, and signals. Collective.
    pub fn execute(&self, claim: &Claim, claimed_ns: u64, staged_ns: u64) -> Result<(), Stopped> {
        self.start(claim, claimed_ns, staged_ns);
        self.run_op(claim)?;
        self.finish(claim);
        Ok(())
    }

    /// Notes that a task's op begins. Collective.
    #[inline(always)]
    pub fn start(&self, claim: &Claim, claimed_ns: u64, staged_ns: u64) {
        if self.machine.lane_idx() == 0 {
            self.record_start(claim, [claimed_ns, staged_ns]);
        }
    }

    /// Runs a task's op. Collective.
    #[inline(always)]
    pub fn run_op(&self, claim: &Claim) -> Result<(), Stopped> {
        if let Some(opcode) = Opcode::from_raw(self.machine.record(claim.task).opcode) {
            return self.machine.run(self, opcode, claim);
        }
        let opcode = u32::from(claim.task.opcode);
        self.machine.lead(|| {
            self.fault(FaultCode::BadTask, Some(claim), 0, opcode);
            0
        });
        Err(Stopped)
    }

    /// Notes that the input of a linear task has come, where ops wait for it. Collective.
    #[inline(always)]
    pub fn note_input(&self, task: &Task) {
        if M::HAS_STAMPS && self.machine.lane_idx() == 0 {
            let slot = self.trace_record();
            if !slot.is_empty() {
                slot.get_mut(0).started_ns = self.machine.now_ns();
            }
        }
        self.machine.note_input(task);
    }

    /// Signals a task that is announced: nothing can keep it from storing its values any more.
    /// For all lanes, at any time after they have left the product or whatever else it waits for.
    #[inline(always)]
    pub fn announce(&self, claim: &Claim) {
        // Not the leader: the first lanes have products to finish.
        let is_last = self.machine.lane_idx() + 1 == self.machine.lane_count();
        if M::HAS_STAMPS && is_last {
            let task = self.machine.record(claim.task);
            if task.is_announced() {
                self.events(task.signal_event).for_each(event::announce);
            }
        }
    }

    /// Signals what a task's op has done, unless it has been announced. Collective.
    #[inline(always)]
    pub fn finish(&self, claim: &Claim) {
        if M::IS_STEALABLE && self.has_lost.replace(false) {
            return self.record_end();
        }
        let task = self.machine.record(claim.task);
        let event = task.signal_event;
        let signals = event.is_some() && !(M::HAS_STAMPS && task.is_announced());
        // After this every lane's stores are ordered before the leader's signal.
        self.machine.sync();
        if self.machine.lane_idx() == 0 {
            self.record_end();
            if signals && M::HAS_PEERS {
                event::signal_all(self.events(event));
            } else if signals {
                event::signal(self.event(event));
            }
        }
    }

    /// The time, if the program is traced.
    #[inline(always)]
    pub fn trace_ns(&self) -> u64 {
        if self.header().trace_capacity == 0 { 0 } else { self.machine.now_ns() }
    }

    /// This worker's latest trace record; empty if the program is not traced.
    #[inline(always)]
    pub(crate) fn trace_record(&self) -> Span<TraceRecord> {
        // A power of two, or none.
        let capacity = self.header().trace_capacity;
        let last = self.trace_count.get().wrapping_sub(1) & capacity.wrapping_sub(1);
        let idx = u64::from(self.worker_idx) * u64::from(capacity) + u64::from(last);
        let address = self.header().trace + idx * size_of::<TraceRecord>() as u64;
        // SAFETY: this worker's own ring, valid by the contract of `Worker::new`.
        unsafe { Span::new(address, usize::from(capacity != 0)) }
    }

    /// Begins the next record. All that is known goes there at once: a GPU has no registers to keep it
    /// in while the op runs.
    #[inline(always)]
    fn record_start(&self, claim: &Claim, [claimed_ns, staged_ns]: [u64; 2]) {
        self.trace_count.set(self.trace_count.get().wrapping_add(1));
        let slot = self.trace_record();
        if slot.is_empty() {
            return;
        }
        let started_ns = self.machine.now_ns();
        slot.write(
            0,
            TraceRecord {
                task_idx: claim.task_idx,
                epoch: claim.epoch,
                claimed_ns,
                staged_ns,
                started_ns,
                finished_ns: started_ns,
                flags: if claim.is_stolen { TRACE_STOLEN } else { 0 },
            },
        );
    }

    #[inline(always)]
    fn record_end(&self) {
        let slot = self.trace_record();
        if !slot.is_empty() {
            slot.get_mut(0).finished_ns = self.machine.now_ns();
        }
    }
}
