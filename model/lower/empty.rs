//! Programs of empty tasks: what the runtime itself costs, without any arithmetic.

use tilert_mk_shared::event::EventId;
use tilert_mk_shared::program::{Dims, HeapPlan};
use tilert_mk_shared::task::{Opcode, SampleArgs, Task};

use super::{BEGIN, CONTROL_HOME, END, LowerError, LowerOptions, Program, lower};
use crate::config::ModelConfig;
use crate::schedule::queues;
use crate::validate::validate_order;

/// The empty tasks of a step, between admission and sampling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EmptyShape {
    /// Stages; each waits for all tasks of the one before it.
    pub stage_count: u32,
    /// Tasks of a stage. They go to the workers in turns, and each stage begins with another worker.
    pub stage_tasks: u32,
}

/// A program with the sizes of `config` that admits tokens, runs empty tasks and samples from logits
/// that nothing computes.
///
/// Errors:  as `lower`; a shape that is not proved to end.
pub fn lower_empty(
    config: &ModelConfig,
    options: &LowerOptions,
    shape: &EmptyShape,
) -> Result<Program, LowerError> {
    let workers = options.worker_count;
    let mut steps = Steps { arrivals: vec![1, 1], ..Steps::default() };
    steps.push(Task::new(Opcode::Admit), [END, BEGIN], CONTROL_HOME, "admit".into());
    let mut ready = BEGIN;
    for stage in 0..shape.stage_count {
        let done = EventId(steps.arrivals.len() as u32);
        steps.arrivals.push(shape.stage_tasks);
        for task in 0..shape.stage_tasks {
            let home = (stage + task) % workers;
            steps.push(
                Task::new(Opcode::Empty),
                [ready, done],
                home,
                format!("stage {stage} task {task}"),
            );
        }
        ready = done;
    }
    let sample = SampleArgs { also_event: EventId::NONE, also_count: 0 };
    steps.push(sample.pack(), [ready, END], CONTROL_HOME, "sample".into());
    // A worker without any task would end, which the host takes for a fault.
    for worker in (0..workers).filter(|worker| !steps.homes.contains(worker)).collect::<Vec<_>>() {
        let name = format!("idle worker {worker}");
        steps.push(Task::new(Opcode::Empty), [BEGIN, EventId::NONE], worker, name);
    }
    let (queue_spans, queue_entries) = queues(&steps.homes, workers);
    let sized = lower(config, options)?;
    let dims = Dims { head_task_count: 0, ..sized.dims };
    let program = Program {
        dims,
        plan: HeapPlan::new(&dims, workers, steps.arrivals.len() as u32, steps.tasks.len() as u32),
        tasks: steps.tasks,
        names: steps.names,
        event_arrivals: steps.arrivals,
        tensors: Vec::new(),
        queue_spans,
        queue_entries,
        stage_count: shape.stage_count + 2,
        ..sized
    };
    validate_order(&program)?;
    Ok(program)
}

/// Tasks as they are listed.
#[derive(Default)]
struct Steps {
    tasks: Vec<Task>,
    names: Vec<String>,
    homes: Vec<u32>,
    /// Signals that each event gets in a step.
    arrivals: Vec<u32>,
}

impl Steps {
    fn push(&mut self, task: Task, [wait, signal]: [EventId; 2], home: u32, name: String) {
        self.tasks.push(Task {
            wait_event: wait,
            wait_count: self.arrivals[wait.0 as usize],
            signal_event: signal,
            ..task
        });
        self.homes.push(home);
        self.names.push(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tilert_mk_shared::task::{Precision, WeightFormat};

    fn program(stage_count: u32, stage_tasks: u32, worker_count: u32) -> Program {
        let config = ModelConfig::parse(include_str!("../demo/config.json")).unwrap();
        let options = LowerOptions {
            worker_count,
            slot_count: 1,
            context_max: 64,
            step_tokens_max: 1,
            stored_format: WeightFormat::Bf16,
            format: WeightFormat::Bf16,
            precision: Precision::Exact,
            tile_bytes: 1 << 20,
            tile_rows_max: 512,
            is_stamped: false,
        };
        lower_empty(&config, &options, &EmptyShape { stage_count, stage_tasks }).unwrap()
    }

    #[test]
    fn stages_wait_for_each_other_and_go_round() {
        let program = program(3, 2, 3);
        let tasks: Vec<_> = program.tasks.iter().map(|t| (t.wait_event.0, t.wait_count)).collect();
        // Admission waits for the end, stages for begin, 2 and 3, sampling for 4.
        assert_eq!(tasks, [(0, 1), (1, 1), (1, 1), (2, 2), (2, 2), (3, 2), (3, 2), (4, 2)]);
        let counts: Vec<u32> = program.queue_spans.iter().map(|span| span.count).collect();
        assert_eq!((counts, program.stage_count), (vec![4, 2, 2, 0], 5));
    }

    #[test]
    fn every_worker_has_a_task() {
        let program = program(0, 0, 3);
        let counts: Vec<u32> = program.queue_spans.iter().map(|span| span.count).collect();
        assert_eq!(counts, [2, 1, 1, 0]);
    }
}
