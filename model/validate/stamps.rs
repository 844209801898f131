//! Stamped values: every read expects the stamp that the last writer has left, whoever an announced
//! task hints to looks at stamps, and tasks that wait for each other run at the same time.

use std::collections::HashMap;

use tilert_mk_shared::task::{
    AttentionArgs, Epilogue, LinearArgs, Opcode, RESIDUAL_AGE_MAX, SampleArgs, Task, TokenRows,
};

use super::access::Region;
use super::error::ValidateError;
use super::name;
use super::order::{Order, Stage};
use crate::lower::Program;

/// Checks that tasks are announced where all that wait for them look at stamps and nowhere else, and
/// how old residuals are said to be.
pub(super) fn check(program: &Program, order: &Order) -> Result<(), ValidateError> {
    // Whether something waits for an event, and all that does looks at stamps.
    let mut is_hint = vec![None; program.event_arrivals.len()];
    for task in program.tasks.iter().filter(|task| task.wait_event.is_some()) {
        let looks = &mut is_hint[task.wait_event.0 as usize];
        *looks = Some(looks.unwrap_or(true) && task.waits_itself());
    }
    // Without rows a task looks at nothing, and so learns nothing of the stage before: what waits for
    // it waits for that stage too.
    for (task_idx, task) in (0u32..).zip(&program.tasks) {
        let is_linear = task.opcode == Opcode::Linear as u16;
        if is_linear && LinearArgs::unpack(task).token_rows == TokenRows::Logits {
            is_hint[task.wait_event.0 as usize] = Some(false);
            let goal = (task.wait_event, task.wait_count);
            let waits = |other: &&Task| other.wait_event == task.signal_event;
            let is_seen = program.tasks.iter().filter(waits).all(|other| {
                let SampleArgs { also_event, also_count } = SampleArgs::unpack(other);
                other.opcode == Opcode::Sample as u16 && (also_event, also_count) == goal
            });
            if !is_seen {
                let (task, event) = (name(program, task_idx), task.wait_event.0);
                return Err(ValidateError::Unseen { task, event });
            }
        }
    }
    let stores = [Opcode::Linear, Opcode::Attention].map(|opcode| opcode as u16);
    for (task_idx, task) in (0u32..).zip(&program.tasks) {
        let event = task.signal_event;
        let wanted = event.is_some()
            && stores.contains(&task.opcode)
            && is_hint[event.0 as usize] == Some(true);
        if task.is_announced() != wanted {
            let (task, event) = (name(program, task_idx), event.0);
            return Err(ValidateError::Announced { task, event });
        }
        if task.opcode == Opcode::Linear as u16 {
            let LinearArgs { residual_age: age, epilogue, .. } = LinearArgs::unpack(task);
            let stage = &order.stages[order.stage_of[task_idx as usize] as usize];
            let known = LinearArgs::unpack(&program.tasks[stage.task_idx as usize]);
            let is_right = match epilogue {
                Epilogue::AddResidual => {
                    (1..=RESIDUAL_AGE_MAX).contains(&age) && age == known.residual_age
                }
                _ => age == 0,
            };
            if !is_right {
                return Err(ValidateError::ResidualAge { task: name(program, task_idx), age });
            }
        }
    }
    if program.dims.is_stamped != 0 { check_exchange(program, order) } else { Ok(()) }
}

/// The parts of a KV head merge its splits together: each waits for all others of its stage. That ends
/// if no worker has two of a stage, since whatever a worker has before them is of earlier stages; and a
/// split is not overwritten before its readers have read it, since whoever does needs what all of them
/// have merged.
fn check_exchange(program: &Program, order: &Order) -> Result<(), ValidateError> {
    let mut stage_of_head = HashMap::new();
    for span in &program.queue_spans {
        let (first, end) = (span.first as usize, (span.first + span.count) as usize);
        let mut own = HashMap::new();
        for &task_idx in &program.queue_entries[first..end] {
            let task = &program.tasks[task_idx as usize];
            let args = AttentionArgs::unpack(task);
            if task.opcode != Opcode::Attention as u16 || args.part_count == 1 {
                continue;
            }
            let stage = order.stage_of[task_idx as usize];
            let refuse = |other: u32, why| {
                let (task, other) = (name(program, task_idx), name(program, other));
                Err(ValidateError::Exchange { task, other, why })
            };
            if let Some(other) = own.insert(stage, task_idx) {
                return refuse(other, "are one worker's");
            }
            let head = (args.layer_idx, args.kv_head_idx);
            let (known, other) = *stage_of_head.entry(head).or_insert((stage, task_idx));
            if known != stage {
                return refuse(other, "are of different stages");
            }
        }
    }
    Ok(())
}

/// The event whose stage a stage's tasks expect to have stored what they read of a region; none if
/// they do not look at stamps there.
pub(super) fn expected(program: &Program, stage: &Stage, region: Region) -> Option<u32> {
    let task = &program.tasks[stage.task_idx as usize];
    let is_stamped =
        matches!(region, Region::Hidden | Region::Qkv | Region::Splits | Region::Intermediate);
    let wait = stage.wait.filter(|_| is_stamped)?;
    match Opcode::from_raw(task.opcode) {
        Some(Opcode::Attention) => Some(wait),
        Some(Opcode::Linear) => {
            // Tasks that add read nothing of the stream but what they add to.
            let is_residual = region == Region::Hidden;
            let age = LinearArgs::unpack(task).residual_age;
            Some(if is_residual { wait.wrapping_sub(age) } else { wait })
        }
        _ => None,
    }
}
