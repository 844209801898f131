//! Queues: every task once, each queue in the order of the program, spans without gaps.

use super::error::ValidateError;
use crate::lower::Program;

/// Checks the spans and the entries of all queues.
pub(super) fn check(program: &Program) -> Result<(), ValidateError> {
    let task_count = program.tasks.len();
    let mut uses = vec![0u32; task_count];
    let mut next = 0u64;
    for (queue_idx, span) in (0u32..).zip(&program.queue_spans) {
        let (first, end) = (u64::from(span.first), u64::from(span.first) + u64::from(span.count));
        if first != next || end > program.queue_entries.len() as u64 {
            return Err(ValidateError::QueueSpan { queue_idx, first, end });
        }
        next = end;
        let mut previous = None;
        for &task_idx in &program.queue_entries[first as usize..end as usize] {
            let Some(count) = uses.get_mut(task_idx as usize) else {
                return Err(ValidateError::QueueEntry { queue_idx, task_idx });
            };
            *count += 1;
            if let Some(previous) = previous
                && previous > task_idx
            {
                return Err(ValidateError::QueueOrder {
                    queue_idx,
                    task: super::name(program, task_idx),
                    previous: super::name(program, previous),
                });
            }
            previous = Some(task_idx);
        }
    }
    let found = program.queue_entries.len() as u64;
    if next != found {
        return Err(ValidateError::Count { what: "queue entries", found, expected: next });
    }
    match (0u32..).zip(&uses).find(|(_, count)| **count != 1) {
        Some((task_idx, &count)) => {
            Err(ValidateError::QueueCount { task: super::name(program, task_idx), count })
        }
        None => Ok(()),
    }
}
