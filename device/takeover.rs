//! Taking over: linear tasks that a worker has claimed but does not finish.
//!
//! A worker can lose its core in the middle of a task, for milliseconds. What it has not claimed the
//! others steal; what it has, one that waits computes once more. Products go to a worker's own scratch,
//! and only who commits the task stores them and signals: the others discard theirs. Who that is makes
//! no difference, since the bits of a task do not depend on who computes them.
//!
//! A worker that is too late may read inputs while later tasks replace them. Its products are then
//! meaningless, but it only writes them to its scratch: whoever has replaced an input has waited for
//! the task's event, hence the task is committed, and the late worker cannot commit it again.
//!
//! Order: a commit hands over nothing but the right to store, so relaxed order is enough; what is
//! stored is published by the signal that follows, as for every task.

use tilert_mk_shared::queue::Cursor;
use tilert_mk_shared::task::Opcode;

use crate::machine::memory::check;
use crate::machine::{CursorCounter, Machine};
use crate::queue;
use crate::worker::{Claim, Stopped, Worker};

/// How long a worker waits before it takes over, for each token of the step: a few times as long as a
/// task takes, and far less than a time slice of the system.
const PATIENCE_NS: u64 = 50_000;
/// Claims of a queue that are looked at, from the latest back.
const LOOKBACK: u32 = 4;

/// Whether the task is committed in step `epoch`, or was in a later one.
#[inline(always)]
pub fn is_committed(counter: &CursorCounter, epoch: u32) -> bool {
    is_at(counter.load_relaxed(), epoch)
}

/// Commits the task in step `epoch`, unless somebody else has.
#[inline(always)]
pub fn commit(counter: &CursorCounter, epoch: u32) -> bool {
    let seen = counter.load_relaxed();
    !is_at(seen, epoch) && counter.replace_relaxed(seen, u64::from(epoch))
}

/// Steps are counted modulo 2^32; the word is 0 before the first, which is step 1.
#[inline(always)]
fn is_at(word: u64, epoch: u32) -> bool {
    (word as u32).wrapping_sub(epoch) as i32 >= 0
}

impl<M: Machine> Worker<'_, M> {
    #[inline(always)]
    fn commit_counter(&self, task_idx: u32) -> &CursorCounter {
        check!(task_idx < self.header().task_count);
        let offset = self.header().plan.commits + u64::from(task_idx) * 8;
        // SAFETY: one of the header's tasks; the region holds nothing but counters.
        unsafe { CursorCounter::at(self.header().heap + offset) }
    }

    /// Whether another worker has finished the claimed task. For linear tasks.
    #[inline(always)]
    pub fn is_too_late(&self, claim: &Claim) -> bool {
        M::IS_STEALABLE && {
            let is_late = is_committed(self.commit_counter(claim.task_idx), claim.epoch);
            self.has_lost.set(is_late);
            is_late
        }
    }

    /// Whether this worker is the one to store the claimed task's results. For linear tasks, once.
    #[inline(always)]
    pub fn commit(&self, claim: &Claim) -> bool {
        !M::IS_STEALABLE || {
            let is_mine = commit(self.commit_counter(claim.task_idx), claim.epoch);
            self.has_lost.set(!is_mine);
            is_mine
        }
    }

    /// Runs a task that another worker has claimed and could have finished, if this one has waited
    /// since `since_ns`, 0 for not yet, for long enough.
    pub(crate) fn take_over(&self, since_ns: &mut u64) -> Result<bool, Stopped> {
        let now_ns = self.machine.now_ns();
        if *since_ns == 0 {
            *since_ns = now_ns;
        }
        let tokens = crate::ops::step(self).get(0).token_count.max(1);
        if now_ns - *since_ns < PATIENCE_NS * u64::from(tokens) {
            return Ok(false);
        }
        for queue_idx in 0..=self.header().worker_count {
            if let Some(late) = self.late_claim(queue_idx) {
                let now_ns = self.trace_ns();
                self.execute(&late, now_ns, now_ns)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// A linear task among the queue's latest claims that is ready and not committed.
    fn late_claim(&self, queue_idx: u32) -> Option<Claim<'_>> {
        let span = self.span(queue_idx);
        if span.count == 0 {
            return None;
        }
        let next = queue::peek(self.cursor(queue_idx));
        (1..=LOOKBACK.min(span.count)).find_map(|back| {
            let Cursor { epoch, position } = next.before(back, span.count)?;
            let task_idx = self.entry(span, position);
            let task = self.task(task_idx);
            let is_late = task.opcode == Opcode::Linear as u16
                && self.is_ready(task, epoch)
                && !is_committed(self.commit_counter(task_idx), epoch);
            is_late.then(|| Claim::new(task, task_idx, epoch).stolen())
        })
    }
}
