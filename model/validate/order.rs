//! Events: what is ordered before what, in a step and from one step to the next.
//!
//! Tasks that wait for the same event and signal the same event are one *stage*: an edge of the
//! graph of events. A task comes before another if and only if the event it signals is, or leads
//! to, the event that the other waits for. `Admit` waits for the step before, so within a step it
//! waits for nothing.

use std::collections::HashMap;

use tilert_mk_shared::event::EventId;
use tilert_mk_shared::task::{Opcode, Task};

use super::error::ValidateError;
use crate::lower::Program;

/// The tasks between two events.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stage {
    /// Event waited for within the step.
    pub(super) wait: Option<u32>,
    /// Event signalled.
    pub(super) signal: Option<u32>,
    /// First task of the stage in the list.
    pub(super) task_idx: u32,
    /// Whether every task of the step before comes before it, if those end with their step.
    pub(super) is_after_begin: bool,
    /// Whether it comes before every task of the next step that begins with its step.
    pub(super) is_before_end: bool,
}

/// The order of a program's tasks.
pub(super) struct Order {
    /// Stage of each task.
    pub(super) stage_of: Vec<u32>,
    /// All stages.
    pub(super) stages: Vec<Stage>,
    /// Stages such that each comes after those it depends on.
    pub(super) sequence: Vec<u32>,
    /// `[events, words]`: bit `v` of row `u` is set if event `u` is or leads to `v`.
    reach: Vec<u64>,
    /// Words in a row of `reach`.
    word_count: usize,
}

impl Order {
    /// Orders the tasks of a program whose sizes have been checked.
    ///
    /// Errors:  whatever makes a task wait for ever, or not wait for what it names.
    /// Cost:    events squared in bits.
    pub(super) fn new(program: &Program) -> Result<Order, ValidateError> {
        let admit_idx = find_admit(program)?;
        check_events(program, admit_idx)?;
        let (mut stages, stage_of) = stages(program, admit_idx);
        let event_order = sort_events(program, &stages)?;
        check_list(program, admit_idx)?;
        let (reach, word_count) = reachability(&stages, &event_order);
        let mut position = vec![0u32; event_order.len()];
        for (place, event) in (1u32..).zip(&event_order) {
            position[*event as usize] = place;
        }
        let mut sequence: Vec<u32> = (0..stages.len() as u32).collect();
        let place = |stage: u32| stages[stage as usize].wait.map_or(0, |e| position[e as usize]);
        sequence.sort_by_key(|stage| place(*stage));
        let end = program.tasks[admit_idx as usize].wait_event.0;
        let leads = |u: u32, v: u32| bit(&reach, word_count, u, v);
        for stage in &mut stages {
            stage.is_after_begin = stage.task_idx == admit_idx
                || stage.wait.is_some_and(|wait| leads(program.begin_event.0, wait));
            stage.is_before_end = stage.signal.is_some_and(|signal| leads(signal, end));
        }
        check_closed(program, &stages)?;
        Ok(Order { stage_of, stages, sequence, reach, word_count })
    }

    /// Whether all tasks of stage `a` come before all of stage `b` in the same step.
    pub(super) fn is_before(&self, a: u32, b: u32) -> bool {
        match (self.stages[a as usize].signal, self.stages[b as usize].wait) {
            (Some(signal), Some(wait)) => bit(&self.reach, self.word_count, signal, wait),
            _ => false,
        }
    }
}

fn bit(reach: &[u64], word_count: usize, u: u32, v: u32) -> bool {
    reach[u as usize * word_count + v as usize / 64] >> (v % 64) & 1 == 1
}

/// The one task that admits.
fn find_admit(program: &Program) -> Result<u32, ValidateError> {
    let of = |opcode: Opcode| {
        let same = move |task: &&Task| task.opcode == opcode as u16;
        program.tasks.iter().filter(same).count() as u64
    };
    for (what, found) in [("admit tasks", of(Opcode::Admit)), ("sample tasks", of(Opcode::Sample))]
    {
        if found != 1 {
            return Err(ValidateError::Count { what, found, expected: 1 });
        }
    }
    let position = program.tasks.iter().position(|task| task.opcode == Opcode::Admit as u16);
    Ok(position.unwrap_or(0) as u32)
}

/// Ids in range, and thresholds equal to arrivals.
fn check_events(program: &Program, admit_idx: u32) -> Result<(), ValidateError> {
    let event_count = program.event_arrivals.len() as u32;
    let mut signals = vec![0u32; event_count as usize];
    let tasks = || (0u32..).zip(&program.tasks);
    for (task_idx, task) in tasks() {
        for event in [task.wait_event, task.signal_event] {
            if event.is_some() && event.0 >= event_count {
                let task = super::name(program, task_idx);
                return Err(ValidateError::EventRange { task, event: event.0, event_count });
            }
        }
        if task.signal_event.is_some() {
            signals[task.signal_event.0 as usize] += 1;
        }
    }
    let admit = &program.tasks[admit_idx as usize];
    if !admit.wait_event.is_some() {
        return Err(ValidateError::AdmitUnordered { task: super::name(program, admit_idx) });
    }
    for (event, (&declared, &signals)) in (0u32..).zip(program.event_arrivals.iter().zip(&signals))
    {
        if declared != signals {
            return Err(ValidateError::Arrivals { event, declared, signals });
        }
    }
    let begin = program.begin_event;
    if begin != admit.signal_event || signals.get(begin.0 as usize) != Some(&1) {
        let task = super::name(program, admit_idx);
        return Err(ValidateError::BeginEvent { event: begin.0, task });
    }
    for (task_idx, task) in tasks() {
        let (event, wait_count) = (task.wait_event.0, task.wait_count);
        let arrivals = if task.wait_event.is_some() { signals[event as usize] } else { 0 };
        // An event without arrivals would let a task run that names it, or hold it for ever.
        if wait_count != arrivals || (task.wait_event.is_some() && arrivals == 0) {
            let task = super::name(program, task_idx);
            return Err(ValidateError::WaitCount { task, event, wait_count, arrivals });
        }
    }
    Ok(())
}

fn some(event: EventId) -> Option<u32> {
    event.is_some().then_some(event.0)
}

/// Groups the tasks by the events they lie between.
fn stages(program: &Program, admit_idx: u32) -> (Vec<Stage>, Vec<u32>) {
    let mut stages: Vec<Stage> = Vec::new();
    let mut by_events: HashMap<(Option<u32>, Option<u32>), u32> = HashMap::new();
    let mut stage_of = Vec::with_capacity(program.tasks.len());
    let mut latest = None;
    for (task_idx, task) in (0u32..).zip(&program.tasks) {
        let wait = if task_idx == admit_idx { None } else { some(task.wait_event) };
        let key = (wait, some(task.signal_event));
        let stage_idx = match latest {
            Some((latest_key, stage_idx)) if latest_key == key => stage_idx,
            _ => *by_events.entry(key).or_insert_with(|| {
                let (is_after_begin, is_before_end) = (false, false);
                let (wait, signal) = key;
                stages.push(Stage { wait, signal, task_idx, is_after_begin, is_before_end });
                stages.len() as u32 - 1
            }),
        };
        latest = Some((key, stage_idx));
        stage_of.push(stage_idx);
    }
    (stages, stage_of)
}

/// Events in an order in which each follows those it depends on.
fn sort_events(program: &Program, stages: &[Stage]) -> Result<Vec<u32>, ValidateError> {
    let event_count = program.event_arrivals.len();
    let mut next: Vec<Vec<u32>> = vec![Vec::new(); event_count];
    let mut open = vec![0u32; event_count];
    for stage in stages {
        if let (Some(wait), Some(signal)) = (stage.wait, stage.signal) {
            next[wait as usize].push(signal);
            open[signal as usize] += 1;
        }
    }
    let mut order: Vec<u32> =
        (0..event_count as u32).filter(|event| open[*event as usize] == 0).collect();
    let mut done = 0;
    while let Some(event) = order.get(done).copied() {
        done += 1;
        for signal in &next[event as usize] {
            open[*signal as usize] -= 1;
            if open[*signal as usize] == 0 {
                order.push(*signal);
            }
        }
    }
    if order.len() == event_count {
        return Ok(order);
    }
    Err(cycle(program, stages, &open))
}

/// Names one task of a cycle among the events that could not be sorted.
fn cycle(program: &Program, stages: &[Stage], open: &[u32]) -> ValidateError {
    // Each open event has an open event before it, so walking back must come round.
    let back = |event: u32| {
        let before = |stage: &&Stage| {
            stage.signal == Some(event) && stage.wait.is_some_and(|e| open[e as usize] > 0)
        };
        stages.iter().find(before)
    };
    let mut event = open.iter().position(|count| *count > 0).unwrap_or(0) as u32;
    let mut task_idx = 0;
    for _ in 0..open.len() {
        if let Some(stage) = back(event) {
            task_idx = stage.task_idx;
            event = stage.wait.unwrap_or(event);
        }
    }
    ValidateError::Cycle { task: super::name(program, task_idx), event }
}

/// Every task is listed after all that it waits for.
fn check_list(program: &Program, admit_idx: u32) -> Result<(), ValidateError> {
    let mut last_signaller = vec![0u32; program.event_arrivals.len()];
    for (task_idx, task) in (0u32..).zip(&program.tasks) {
        if let Some(event) = some(task.signal_event) {
            last_signaller[event as usize] = task_idx;
        }
    }
    for (task_idx, task) in (0u32..).zip(&program.tasks) {
        let Some(event) = some(task.wait_event) else { continue };
        let signaller = last_signaller[event as usize];
        if task_idx != admit_idx && signaller >= task_idx {
            return Err(ValidateError::ListOrder {
                task: super::name(program, task_idx),
                signaller: super::name(program, signaller),
                event,
            });
        }
    }
    Ok(())
}

/// Which event leads to which, itself included.
fn reachability(stages: &[Stage], event_order: &[u32]) -> (Vec<u64>, usize) {
    let word_count = event_order.len().div_ceil(64);
    let mut reach = vec![0u64; event_order.len() * word_count];
    let mut next: Vec<Vec<u32>> = vec![Vec::new(); event_order.len()];
    for stage in stages {
        if let (Some(wait), Some(signal)) = (stage.wait, stage.signal) {
            next[wait as usize].push(signal);
        }
    }
    let mut row = vec![0u64; word_count];
    for event in event_order.iter().rev() {
        row.fill(0);
        row[*event as usize / 64] |= 1 << (event % 64);
        for signal in &next[*event as usize] {
            let first = *signal as usize * word_count;
            for (word, more) in row.iter_mut().zip(&reach[first..first + word_count]) {
                *word |= more;
            }
        }
        let first = *event as usize * word_count;
        reach[first..first + word_count].copy_from_slice(&row);
    }
    (reach, word_count)
}

/// Counters are never reset, so a signal must fall between the begin and the end of its own step.
fn check_closed(program: &Program, stages: &[Stage]) -> Result<(), ValidateError> {
    for stage in stages {
        let Some(event) = stage.signal else { continue };
        let between = match (stage.is_after_begin, stage.is_before_end) {
            (true, true) => continue,
            (false, _) => "after the step's begin",
            (true, false) => "before the step's end",
        };
        let task = super::name(program, stage.task_idx);
        return Err(ValidateError::OutsideStep { task, event, between });
    }
    Ok(())
}
