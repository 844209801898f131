//! Admission: reads the host's commands and decides which tokens the next step processes.
//!
//! Order: commands are read after an acquire load of `command_tail`, by this task or by the `Sample`
//! before it; the step is published to the other workers by the task's own signal.

use core::mem::offset_of;

use tilert_mk_shared::limits::{
    COMMAND_COUNT_MAX, DECODE_TOKENS_MAX, OUTPUT_COUNT_MAX, STEP_TOKENS_MAX,
};
use tilert_mk_shared::mailbox::{Command, CommandKind, Mailbox, MailboxView, OutputKind};
use tilert_mk_shared::sequence::{NO_LOGITS, SequenceState, StepState, StepToken, WANT_LOGITS};

use crate::machine::Machine;
use crate::machine::memory::Span;
use crate::worker::{Stopped, Worker};

/// What a look at the mailbox found.
const NOTHING: u32 = 0;
const COMMAND: u32 = 1;
const STEP: u32 = 2;
const STOP: u32 = 3;

#[inline(always)]
pub(crate) fn run<M: Machine>(worker: &Worker<M>) -> Result<(), Stopped> {
    // `Sample` has just looked at the mailbox.
    let mut looks = 0;
    loop {
        match worker.machine.lead(|| look(worker, looks > 0)) {
            COMMAND => read_command(worker),
            STEP => {
                worker.machine.put_step(worker.heap(worker.header().plan.step, 1));
                return Ok(());
            }
            STOP => return Err(Stopped),
            _ => {
                looks += 1;
                worker.machine.idle(looks);
            }
        }
    }
}

/// For the leader.
#[inline(always)]
fn look<M: Machine>(worker: &Worker<M>, is_again: bool) -> u32 {
    if is_again {
        look_at_tail(worker);
        look_at_head(worker);
    }
    let word = |offset| super::view_word(worker, offset).read(0);
    if word(offset_of!(MailboxView, command_head)) != word(offset_of!(MailboxView, command_tail)) {
        return COMMAND;
    }
    if has_room(worker) && compose(worker) {
        return STEP;
    }
    if worker.has_stopped() { STOP } else { NOTHING }
}

/// Notes how many commands the host has written. For one lane.
#[inline(always)]
pub(super) fn look_at_tail<M: Machine>(worker: &Worker<M>) {
    let tail = worker.mailbox_word(offset_of!(Mailbox, command_tail)).load_acquire();
    super::view_word(worker, offset_of!(MailboxView, command_tail)).write(0, tail);
}

/// Notes how many outputs the host has read. For one lane.
#[inline(always)]
pub(super) fn look_at_head<M: Machine>(worker: &Worker<M>) {
    let head = worker.mailbox_word(offset_of!(Mailbox, output_head)).load_acquire();
    super::view_word(worker, offset_of!(MailboxView, output_head)).write(0, head);
}

/// Whether the outputs of one more step fit, and all rows of logits have been taken. For the
/// leader.
///
/// A sequence that has ended may have rows that the host has yet to take, so its flag counts until
/// the ring has been empty once.
#[inline(always)]
fn has_room<M: Machine>(worker: &Worker<M>) -> bool {
    let word = |offset| super::view_word(worker, offset).read(0);
    let tail = word(offset_of!(MailboxView, output_tail));
    let pending = tail.wrapping_sub(word(offset_of!(MailboxView, output_head)));
    let mut wants_logits = false;
    let states = super::sequences(worker);
    for slot in 0..states.len() {
        let state = states.get_mut(slot);
        if state.is_active == 0 && pending == 0 {
            state.params.flags &= !WANT_LOGITS;
        }
        wants_logits |= state.params.flags & WANT_LOGITS != 0;
    }
    if wants_logits { pending == 0 } else { pending + 3 * STEP_TOKENS_MAX < OUTPUT_COUNT_MAX }
}

/// Carries out the oldest command. Collective.
#[inline(always)]
fn read_command<M: Machine>(worker: &Worker<M>) {
    let head_word = super::view_word(worker, offset_of!(MailboxView, command_head));
    let head = worker.machine.lead(|| head_word.read(0));
    let ring = worker.header().mailbox + offset_of!(Mailbox, commands) as u64;
    // SAFETY: the ring is part of the mailbox; the host filled the record before `command_tail`.
    let commands: Span<Command> = unsafe { Span::new(ring, COMMAND_COUNT_MAX as usize) };
    let command = commands.get((head % COMMAND_COUNT_MAX) as usize);
    if command.kind == CommandKind::Start as u32 {
        start(worker, command);
    } else if worker.machine.lane_idx() == 0 {
        let states = super::sequences(worker);
        let state = states.get_mut(command.slot as usize);
        if state.is_active != 0 {
            let kind = OutputKind::EndCancelled as u32;
            super::sample::publish(worker, kind, command.slot, state.position, 0);
            state.is_active = 0;
        }
    }
    worker.machine.sync();
    if worker.machine.lane_idx() == 0 {
        let head = head.wrapping_add(1);
        head_word.write(0, head);
        worker.mailbox_word(offset_of!(Mailbox, command_head)).store_release(head);
    }
}

#[inline(always)]
fn start<M: Machine>(worker: &Worker<M>, command: &Command) {
    let (slot, count) = (command.slot, command.params.prompt_count as usize);
    let context = worker.header().dims.kv.context_max as usize;
    let address = worker.header().prompts + u64::from(slot) * context as u64 * 4;
    // SAFETY: the slot's row of the prompts, which the host filled before `command_tail`.
    let prompt: Span<u32> = unsafe { Span::new(address, context) };
    let tokens = super::tokens(worker, slot);
    worker.machine.for_each(1, count, |_, position| {
        tokens.write(position, prompt.read(position));
    });
    let has_penalty = command.params.sampling.has_penalty();
    let marks = super::marks(worker, slot);
    if has_penalty {
        worker.machine.for_each(1, marks.len(), |_, token| marks.write(token, 0));
    }
    worker.machine.sync();
    if worker.machine.lane_idx() != 0 {
        return;
    }
    if has_penalty {
        for position in 0..count {
            marks.write(tokens.read(position) as usize, super::sample::IN_PROMPT);
        }
    }
    let states = super::sequences(worker);
    let state = states.get_mut(slot as usize);
    state.params = command.params;
    state.position = 0;
    state.token_count = count as u32;
    state.generated_count = 0;
    state.is_active = 1;
}

/// Composes a step of all active sequences; false if there are none. For the leader.
#[inline(always)]
fn compose<M: Machine>(worker: &Worker<M>) -> bool {
    // Not what this worker has near, which is the step before.
    let step_view = worker.heap::<StepState>(worker.header().plan.step, 1);
    let step = step_view.get_mut(0);
    let states = super::sequences(worker);
    let limit = worker.header().dims.step_tokens_max;
    step.token_count = 0;
    step.logit_count = 0;
    // One token of each decoding sequence first, then as much of the prompts as fits.
    for is_prefill in [false, true] {
        for slot in 0..states.len() {
            let state = states.get(slot);
            let pending = state.token_count - state.position.min(state.token_count);
            if state.is_active != 0 && (pending > 1) == is_prefill {
                let count = pending.min(limit - step.token_count);
                append(worker, step, slot as u32, state, count);
            }
        }
    }
    // A machine that keeps the step near copies the entries of the widest step.
    for idx in step.token_count..DECODE_TOKENS_MAX {
        step.tokens[idx as usize] = StepToken::default();
    }
    for idx in step.logit_count..DECODE_TOKENS_MAX {
        step.logit_tokens[idx as usize] = 0;
    }
    step.token_count > 0
}

#[inline(always)]
fn append<M: Machine>(
    worker: &Worker<M>,
    step: &mut StepState,
    slot: u32,
    state: &SequenceState,
    count: u32,
) {
    let tokens = super::tokens(worker, slot);
    for position in state.position..state.position + count {
        let is_last = position + 1 == state.token_count;
        let has_logits = is_last || state.params.flags & WANT_LOGITS != 0;
        let logit_row = if has_logits { step.logit_count } else { NO_LOGITS };
        if has_logits {
            step.logit_tokens[step.logit_count as usize] = step.token_count;
            step.logit_count += 1;
        }
        let token = tokens.read(position as usize);
        step.tokens[step.token_count as usize] = StepToken { token, slot, position, logit_row };
        step.token_count += 1;
    }
}
