//! Waiting for a task's input, with a bound on every wait inside a step.

use tilert_mk_shared::event::{EventId, target};
use tilert_mk_shared::fault::FaultCode;
use tilert_mk_shared::task::{Opcode, SampleArgs, Task};

use crate::event;
use crate::machine::Machine;
use crate::worker::{Claim, Stopped, Worker};

/// What the leader waits for.
struct Goal {
    event: EventId,
    count: u32,
    epoch: u32,
}

impl<M: Machine> Worker<'_, M> {
    /// Waits for a task's input event, or until `is_moot`; runs ready tasks of other queues meanwhile.
    /// If the op waits for its input itself, only for its step to begin. Collective.
    #[inline(always)]
    pub fn wait(&self, claim: &Claim, is_moot: impl Fn() -> bool) -> Result<(), Stopped> {
        let (task, epoch) = (self.machine.record(claim.task), claim.epoch);
        let is_admit = task.opcode == Opcode::Admit as u16;
        let is_known = self.kept_epoch.get() == epoch;
        let (event, count) = if M::HAS_STAMPS && task.waits_itself() {
            (EventId(self.header().begin_event), 1)
        } else {
            (task.wait_event, task.wait_count)
        };
        let has_begun = is_known && event.0 == self.header().begin_event;
        if event.is_some() && !has_begun && !(is_known && self.complete.get() == event) {
            // `Admit` waits for the previous step's end.
            let epoch = if is_admit { epoch.wrapping_sub(1) } else { epoch };
            let goal = Goal { event, count, epoch };
            let wait = || {
                let mut goals = [self.also(&task, epoch), Some(goal)].into_iter().flatten();
                u32::from(goals.any(|goal| self.wait_leading(claim, &goal, &is_moot).is_err()))
            };
            if self.machine.lead(wait) != 0 {
                return Err(Stopped);
            }
            if is_moot() {
                return Ok(());
            }
            self.complete.set(event);
        }
        // `Admit` makes the step; every other task comes after it. One that signals nothing looks at nothing
        // of it: no signal would order that before the next step.
        if self.kept_epoch.get() != epoch && !is_admit && task.signal_event.is_some() {
            self.kept_epoch.set(epoch);
            self.machine.keep_step(self.heap(self.header().plan.step, 1), epoch);
        }
        Ok(())
    }

    /// What a task waits for beside its event, see `SampleArgs::also_event`.
    #[inline(always)]
    fn also(&self, task: &Task, epoch: u32) -> Option<Goal> {
        if !M::HAS_STAMPS || task.opcode != Opcode::Sample as u16 {
            return None;
        }
        let SampleArgs { also_event: event, also_count: count } = SampleArgs::unpack(task);
        event.is_some().then_some(Goal { event, count, epoch })
    }

    #[inline(always)]
    fn wait_leading(
        &self,
        claim: &Claim,
        goal: &Goal,
        is_moot: impl Fn() -> bool,
    ) -> Result<(), Stopped> {
        let is_admit = claim.task.opcode == Opcode::Admit as u16;
        let target = target(goal.count, goal.epoch);
        let counter = self.event(goal.event);
        // No deadline yet: zero. An `Option` would be two words, one of them undefined at times.
        let (mut idle_looks, mut deadline_ns, mut since_ns) = (0u32, 0u64, 0u64);
        loop {
            for _ in 0..self.header().polls_per_look {
                if event::poll(counter, target) {
                    return Ok(());
                }
                self.machine.relax();
            }
            if self.has_stopped() {
                return Err(Stopped);
            }
            if is_moot() {
                return Ok(());
            }
            if M::IS_STEALABLE && (self.steal()? || self.take_over(&mut since_ns)?) {
                (idle_looks, deadline_ns, since_ns) = (0, 0, 0);
                continue;
            }
            if !is_admit && self.has_begun(claim.epoch) {
                self.check_deadline(claim, goal, target, &mut deadline_ns)?;
                self.machine.idle(0);
            } else {
                idle_looks += 1;
                self.machine.idle(idle_looks);
            }
        }
    }

    #[inline(always)]
    fn has_begun(&self, epoch: u32) -> bool {
        let begin = self.event(EventId(self.header().begin_event));
        self.kept_epoch.get() == epoch || event::poll(begin, target(1, epoch))
    }

    #[inline(always)]
    fn check_deadline(
        &self,
        claim: &Claim,
        goal: &Goal,
        target: u32,
        deadline_ns: &mut u64,
    ) -> Result<(), Stopped> {
        let now_ns = self.machine.now_ns();
        if *deadline_ns == 0 {
            *deadline_ns = now_ns + self.header().wait_ns_max;
        }
        if now_ns < *deadline_ns {
            return Ok(());
        }
        let observed = self.event(goal.event).load_relaxed();
        self.fault(FaultCode::WaitTimeout, Some(claim), target, observed);
        Err(Stopped)
    }
}
