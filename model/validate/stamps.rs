//! Stamped values: every read expects the stamp that the last writer has left, and whoever an
//! announced task hints to looks at stamps.

use tilert_mk_shared::task::{Epilogue, LinearArgs, Opcode, RESIDUAL_AGE_MAX};

use super::access::Region;
use super::error::ValidateError;
use super::name;
use super::order::{Order, Stage};
use crate::lower::Program;

/// Checks what announced tasks are waited for by, and how old residuals are said to be.
pub(super) fn check(program: &Program, order: &Order) -> Result<(), ValidateError> {
    let mut is_announced = vec![false; program.event_arrivals.len()];
    for task in program.tasks.iter().filter(|task| task.is_announced()) {
        if task.signal_event.is_some() {
            is_announced[task.signal_event.0 as usize] = true;
        }
    }
    for (task_idx, task) in (0u32..).zip(&program.tasks) {
        let waits_for_hint = task.wait_event.is_some() && is_announced[task.wait_event.0 as usize];
        if waits_for_hint && !task.waits_itself() {
            let (task, event) = (name(program, task_idx), task.wait_event.0);
            return Err(ValidateError::Announced { task, event });
        }
        if task.opcode == Opcode::Linear as u16 {
            let age = LinearArgs::unpack(task).residual_age;
            let stage = &order.stages[order.stage_of[task_idx as usize] as usize];
            let known = LinearArgs::unpack(&program.tasks[stage.task_idx as usize]);
            let adds = LinearArgs::unpack(task).epilogue == Epilogue::AddResidual;
            let is_right = match adds {
                true => (1..=RESIDUAL_AGE_MAX).contains(&age) && age == known.residual_age,
                false => age == 0,
            };
            if !is_right {
                return Err(ValidateError::ResidualAge { task: name(program, task_idx), age });
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
