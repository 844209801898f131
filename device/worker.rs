//! The worker loop: claim, stage, wait, run, signal.
//!
//! Tasks are listed in an order in which each depends only on earlier ones. A worker claims in that
//! order and finishes what it claimed before it claims again, so the oldest unfinished task can
//! always run. While its own task waits, a worker runs tasks of other queues that are ready: they
//! finish without waiting, so the argument holds.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

use tilert_mk_shared::event::{EVENT_STRIDE_BYTES, EventId, target};
use tilert_mk_shared::fault::{FaultCode, FaultRecord};
use tilert_mk_shared::mailbox::{Mailbox, StopWord};
use tilert_mk_shared::program::ProgramHeader;
use tilert_mk_shared::queue::{CURSOR_STRIDE_BYTES, QueueSpan, comes_before};
use tilert_mk_shared::task::{Opcode, Task};
use tilert_mk_shared::trace::{TRACE_STOLEN, TraceRecord};

use crate::machine::cpu::Isa;
use crate::machine::memory::{Span, counter_u32, counter_u64};
use crate::{event, ops, queue};

/// Polls between two looks at other queues, the stop word and the clock.
const POLLS_PER_LOOK: u32 = 256;
/// Idle looks after which an idle worker sleeps between looks.
const IDLE_LOOKS_MAX: u32 = 200;
/// How long it sleeps.
const IDLE_SLEEP: std::time::Duration = std::time::Duration::from_micros(50);
/// Bytes of a task's weights that are requested before its input is ready.
const STAGE_BYTES: u64 = 4096;

/// The device stops: the worker leaves its loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped;

/// A task that this worker owns.
#[derive(Clone, Copy, Debug)]
pub struct Claim {
    /// Its record.
    pub task: Task,
    /// Its index in the program.
    pub task_idx: u32,
    /// Its step.
    pub epoch: u32,
    is_stolen: bool,
}

/// One worker: what it shares with the others, and what is its own.
pub struct Worker {
    /// The program.
    pub header: ProgramHeader,
    /// Which worker this is.
    pub worker_idx: u32,
    /// Instruction set of the primitives.
    pub isa: Isa,
    /// Zero of the device's clock.
    pub clock: Instant,
    /// Prologue result in this worker's scratch: step and key.
    pub prologue: Option<(u32, u32)>,
    tasks: Span<Task>,
    spans: Span<QueueSpan>,
    entries: Span<u32>,
    begun_epoch: u32,
    trace_count: u64,
}

impl Worker {
    /// A worker of the program in `header`.
    ///
    /// # Safety
    /// Every address in the header and in its tasks is valid for what it names until `run` returns,
    /// no two workers have the same index, and the events of the program order all conflicting
    /// accesses of its tasks.
    pub unsafe fn new(header: &ProgramHeader, worker_idx: u32, isa: Isa, clock: Instant) -> Worker {
        let span_count = header.worker_count as usize + 1;
        // SAFETY: by this function's contract.
        let tasks = unsafe { Span::new(header.tasks, header.task_count as usize) };
        // SAFETY: by this function's contract.
        let spans: Span<QueueSpan> = unsafe { Span::new(header.queue_spans, span_count) };
        let entry_count = spans.as_slice().iter().map(|span| span.count as usize).sum();
        // SAFETY: by this function's contract; the spans cover the list of entries exactly.
        let entries = unsafe { Span::new(header.queue_entries, entry_count) };
        Worker {
            header: *header,
            worker_idx,
            isa,
            clock,
            prologue: None,
            tasks,
            spans,
            entries,
            begun_epoch: 0,
            trace_count: 0,
        }
    }

    /// Runs tasks until the device stops.
    pub fn run(&mut self) {
        while let Some(claim) = self.claim_next() {
            let claimed_ns = self.trace_ns();
            self.stage(&claim.task);
            let staged_ns = self.trace_ns();
            if self.wait(&claim).is_err() {
                return;
            }
            if self.execute(&claim, claimed_ns, staged_ns).is_err() {
                return;
            }
        }
    }

    /// Nanoseconds on the device's clock.
    pub fn now_ns(&self) -> u64 {
        self.clock.elapsed().as_nanos() as u64
    }

    /// A typed view of `len` values at a heap offset.
    pub fn heap<T: Copy>(&self, offset: u64, len: u64) -> Span<T> {
        assert!(offset + len * size_of::<T>() as u64 <= self.header.plan.total_bytes);
        // SAFETY: within the heap by the assertion; regions are aligned to cache lines and valid by
        // the contract of `Worker::new`.
        unsafe { Span::new(self.header.heap + offset, len as usize) }
    }

    /// The counter at an offset of the mailbox.
    pub fn mailbox_word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset < size_of::<Mailbox>());
        // SAFETY: the mailbox is valid by the contract of `Worker::new`; its words are only counters.
        unsafe { counter_u32(self.header.mailbox + offset as u64) }
    }

    fn event(&self, id: EventId) -> &AtomicU32 {
        assert!(id.0 < self.header.event_count);
        let offset = self.header.plan.events + u64::from(id.0) * EVENT_STRIDE_BYTES;
        // SAFETY: one of the header's events; the region holds nothing but counters.
        unsafe { counter_u32(self.header.heap + offset) }
    }

    fn cursor(&self, queue_idx: u32) -> &AtomicU64 {
        assert!(queue_idx <= self.header.worker_count);
        let offset = self.header.plan.cursors + u64::from(queue_idx) * CURSOR_STRIDE_BYTES;
        // SAFETY: one of the header's cursors; the region holds nothing but counters.
        unsafe { counter_u64(self.header.heap + offset) }
    }

    /// Whether the host has asked for the end, or a worker has faulted.
    pub fn has_stopped(&self) -> bool {
        let word = self.mailbox_word(std::mem::offset_of!(Mailbox, stop));
        word.load(Ordering::Acquire) != StopWord::Run as u32
    }

    /// The task at a queue's cursor, not claimed; its program order is `(epoch, task_idx)`.
    fn head(&self, queue_idx: u32) -> Option<(tilert_mk_shared::queue::Cursor, u32)> {
        let span = self.spans.read(queue_idx as usize);
        if span.count == 0 {
            return None;
        }
        let cursor = queue::peek(self.cursor(queue_idx));
        Some((cursor, self.entries.read((span.first + cursor.position) as usize)))
    }

    /// Claims the earlier of the own queue's next task and the shared queue's.
    fn claim_next(&self) -> Option<Claim> {
        let shared = self.header.worker_count;
        loop {
            let own_head = self.head(self.worker_idx);
            let shared_head = self.head(shared);
            let queue_idx = match (own_head, shared_head) {
                (None, None) => return None,
                (Some(_), None) => self.worker_idx,
                (None, Some(_)) => shared,
                (Some((own, own_task)), Some((other, other_task))) => {
                    if comes_before(own.epoch, own_task, other.epoch, other_task) {
                        self.worker_idx
                    } else {
                        shared
                    }
                }
            };
            if let Some(claim) = self.claim_from(queue_idx, false) {
                return Some(claim);
            }
        }
    }

    fn claim_from(&self, queue_idx: u32, is_stolen: bool) -> Option<Claim> {
        let (cursor, task_idx) = self.head(queue_idx)?;
        let task = self.tasks.read(task_idx as usize);
        if is_stolen && !self.is_ready(&task, cursor.epoch) {
            return None;
        }
        let count = self.spans.read(queue_idx as usize).count;
        let is_mine = queue::claim(self.cursor(queue_idx), cursor, count);
        is_mine.then_some(Claim { task, task_idx, epoch: cursor.epoch, is_stolen })
    }

    /// Whether the task may run at once. `Admit` may wait for the host, so it is never "ready".
    fn is_ready(&self, task: &Task, epoch: u32) -> bool {
        task.opcode != Opcode::Admit as u16
            && task.wait_event.is_some()
            && event::poll(self.event(task.wait_event), target(task.wait_count, epoch))
    }

    /// Requests the first bytes of a task's weights.
    fn stage(&self, task: &Task) {
        if task.opcode == Opcode::Linear as u16 {
            crate::machine::cpu::prefetch(task.refs[3], STAGE_BYTES);
        }
    }

    /// Waits for a task's input event; runs ready tasks of other queues meanwhile.
    fn wait(&mut self, claim: &Claim) -> Result<(), Stopped> {
        if !claim.task.wait_event.is_some() {
            return Ok(());
        }
        // `Admit` waits for the previous step's end.
        let is_admit = claim.task.opcode == Opcode::Admit as u16;
        let epoch = if is_admit { claim.epoch.wrapping_sub(1) } else { claim.epoch };
        let goal = target(claim.task.wait_count, epoch);
        let (mut idle_looks, mut deadline_ns) = (0u32, None);
        loop {
            for _ in 0..POLLS_PER_LOOK {
                if event::poll(self.event(claim.task.wait_event), goal) {
                    self.begun_epoch = claim.epoch;
                    return Ok(());
                }
                std::hint::spin_loop();
            }
            if self.has_stopped() {
                return Err(Stopped);
            }
            if self.steal()? {
                (idle_looks, deadline_ns) = (0, None);
                continue;
            }
            if !is_admit && self.has_begun(claim.epoch) {
                self.check_deadline(claim, goal, &mut deadline_ns)?;
                std::thread::yield_now();
            } else {
                idle_looks += 1;
                self.idle(idle_looks);
            }
        }
    }

    /// Gives the core away while there is nothing to do.
    pub fn idle(&self, looks: u32) {
        if looks > IDLE_LOOKS_MAX {
            std::thread::sleep(IDLE_SLEEP);
        } else {
            std::thread::yield_now();
        }
    }

    fn has_begun(&mut self, epoch: u32) -> bool {
        if self.begun_epoch != epoch {
            let begin = self.event(EventId(self.header.begin_event));
            if event::poll(begin, target(1, epoch)) {
                self.begun_epoch = epoch;
            }
        }
        self.begun_epoch == epoch
    }

    fn steal(&mut self) -> Result<bool, Stopped> {
        for step in 1..self.header.worker_count {
            let victim = (self.worker_idx + step) % self.header.worker_count;
            if let Some(claim) = self.claim_from(victim, true) {
                let now_ns = self.trace_ns();
                self.execute(&claim, now_ns, now_ns)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn check_deadline(
        &self,
        claim: &Claim,
        goal: u32,
        deadline_ns: &mut Option<u64>,
    ) -> Result<(), Stopped> {
        let now_ns = self.now_ns();
        let deadline = *deadline_ns.get_or_insert(now_ns + self.header.wait_ns_max);
        if now_ns < deadline {
            return Ok(());
        }
        let observed = self.event(claim.task.wait_event).load(Ordering::Relaxed);
        self.fault(FaultCode::WaitTimeout, claim, goal, observed);
        Err(Stopped)
    }

    /// Leaves a fault record, unless another worker has, and stops the device.
    fn fault(&self, code: FaultCode, claim: &Claim, expected: u32, observed: u32) {
        // SAFETY: the record is valid by the contract of `Worker::new`; `claimed` is only a counter.
        let claimed = unsafe { counter_u32(self.header.fault) };
        if claimed.swap(1, Ordering::Relaxed) != 0 {
            return;
        }
        let record = FaultRecord {
            claimed: 1,
            code: code as u32,
            worker_idx: self.worker_idx,
            task_idx: claim.task_idx,
            epoch: claim.epoch,
            event: claim.task.wait_event.0,
            expected,
            observed,
            time_ns: self.now_ns(),
        };
        // SAFETY: this worker alone has claimed the record; the host reads it after `stop` below.
        let slot: Span<FaultRecord> = unsafe { Span::new(self.header.fault, 1) };
        slot.write(0, record);
        let word = self.mailbox_word(std::mem::offset_of!(Mailbox, stop));
        word.store(StopWord::Fault as u32, Ordering::Release);
    }

    fn execute(&mut self, claim: &Claim, claimed_ns: u64, staged_ns: u64) -> Result<(), Stopped> {
        let started_ns = self.trace_ns();
        match Opcode::from_raw(claim.task.opcode) {
            Some(opcode) => ops::run(opcode, self, claim)?,
            None => {
                self.fault(FaultCode::BadTask, claim, 0, u32::from(claim.task.opcode));
                return Err(Stopped);
            }
        }
        self.record(claim, [claimed_ns, staged_ns, started_ns]);
        if claim.task.signal_event.is_some() {
            event::signal(self.event(claim.task.signal_event));
        }
        Ok(())
    }

    fn trace_ns(&self) -> u64 {
        if self.header.trace_capacity == 0 { 0 } else { self.now_ns() }
    }

    fn record(&mut self, claim: &Claim, times_ns: [u64; 3]) {
        let capacity = u64::from(self.header.trace_capacity);
        if capacity == 0 {
            return;
        }
        let first = u64::from(self.worker_idx) * capacity + self.trace_count % capacity;
        let address = self.header.trace + first * size_of::<TraceRecord>() as u64;
        // SAFETY: this worker's own ring, valid by the contract of `Worker::new`.
        let slot: Span<TraceRecord> = unsafe { Span::new(address, 1) };
        let [claimed_ns, staged_ns, started_ns] = times_ns;
        slot.write(
            0,
            TraceRecord {
                task_idx: claim.task_idx,
                epoch: claim.epoch,
                claimed_ns,
                staged_ns,
                started_ns,
                finished_ns: self.now_ns(),
                flags: if claim.is_stolen { TRACE_STOLEN } else { 0 },
            },
        );
        self.trace_count += 1;
    }
}
