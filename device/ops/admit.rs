//! Admission: reads the host's commands and decides which tokens the next step processes.
//!
//! Order: commands are read after an acquire load of `command_tail`; the step is published to the
//! other workers by the task's own signal.

use std::mem::offset_of;
use std::sync::atomic::Ordering;

use tilert_mk_shared::limits::COMMAND_COUNT_MAX;
use tilert_mk_shared::limits::{OUTPUT_COUNT_MAX, STEP_TOKENS_MAX};
use tilert_mk_shared::mailbox::{Command, CommandKind, Mailbox, OutputKind};
use tilert_mk_shared::sequence::{NO_LOGITS, SequenceState, StepState, StepToken, WANT_LOGITS};

use crate::machine::memory::Span;
use crate::worker::{Stopped, Worker};

pub(super) fn run(worker: &Worker) -> Result<(), Stopped> {
    let mut looks = 0;
    loop {
        read_commands(worker);
        if has_room(worker) && compose(worker) {
            return Ok(());
        }
        if worker.has_stopped() {
            return Err(Stopped);
        }
        looks += 1;
        worker.idle(looks);
    }
}

/// Whether the outputs of one more step fit, and all rows of logits have been taken.
fn has_room(worker: &Worker) -> bool {
    let tail = worker.mailbox_word(offset_of!(Mailbox, output_tail)).load(Ordering::Relaxed);
    let head = worker.mailbox_word(offset_of!(Mailbox, output_head)).load(Ordering::Acquire);
    let pending = tail.wrapping_sub(head);
    let wants_logits = super::sequences(worker)
        .as_slice()
        .iter()
        .any(|state| state.is_active != 0 && state.params.flags & WANT_LOGITS != 0);
    if wants_logits { pending == 0 } else { pending + 3 * STEP_TOKENS_MAX < OUTPUT_COUNT_MAX }
}

fn read_commands(worker: &Worker) {
    let tail = worker.mailbox_word(offset_of!(Mailbox, command_tail)).load(Ordering::Acquire);
    let head_word = worker.mailbox_word(offset_of!(Mailbox, command_head));
    let mut head = head_word.load(Ordering::Relaxed);
    while head != tail {
        let ring = worker.header.mailbox + offset_of!(Mailbox, commands) as u64;
        // SAFETY: the ring is part of the mailbox; the host filled the record before `tail`.
        let commands: Span<Command> = unsafe { Span::new(ring, COMMAND_COUNT_MAX as usize) };
        let command = commands.read((head % COMMAND_COUNT_MAX) as usize);
        let states = super::sequences(worker);
        let slot = command.slot as usize;
        if command.kind == CommandKind::Start as u32 {
            start(worker, command);
        } else if states.read(slot).is_active != 0 {
            let state = states.read(slot);
            let kind = OutputKind::EndCancelled;
            super::sample::publish(worker, kind, command.slot, state.position, 0);
            states.as_mut_slice()[slot].is_active = 0;
        }
        head = head.wrapping_add(1);
        head_word.store(head, Ordering::Release);
    }
}

fn start(worker: &Worker, command: Command) {
    let params = command.params;
    let state = SequenceState {
        params,
        is_active: 1,
        position: 0,
        token_count: params.prompt_count,
        generated_count: 0,
    };
    super::sequences(worker).write(command.slot as usize, state);
    if params.sampling.has_penalty() {
        let marks = super::marks(worker, command.slot);
        marks.as_mut_slice().fill(0);
        for token in &super::tokens(worker, command.slot).as_slice()[..params.prompt_count as usize]
        {
            marks.write(*token as usize, super::sample::IN_PROMPT);
        }
    }
}

/// Composes a step of all active sequences; false if there are none.
fn compose(worker: &Worker) -> bool {
    let step_view = super::step(worker);
    let step = &mut step_view.as_mut_slice()[0];
    let states = super::sequences(worker);
    let limit = worker.header.dims.step_tokens_max;
    step.token_count = 0;
    step.logit_count = 0;
    // One token of each decoding sequence first, then as much of the prompts as fits.
    for is_prefill in [false, true] {
        for (slot, state) in states.as_slice().iter().enumerate() {
            let pending = state.token_count - state.position.min(state.token_count);
            if state.is_active != 0 && (pending > 1) == is_prefill {
                let count = pending.min(limit - step.token_count);
                append(worker, step, slot as u32, state, count);
            }
        }
    }
    step.token_count > 0
}

fn append(worker: &Worker, step: &mut StepState, slot: u32, state: &SequenceState, count: u32) {
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
