//! Programs of empty tasks: what the runtime itself costs, without any arithmetic.

use tilert_mk_shared::event::EventId;
use tilert_mk_shared::program::{Dims, HeapPlan};
use tilert_mk_shared::stamp::STAMPED_GROUP;
use tilert_mk_shared::task::{EmptyArgs, Opcode, SampleArgs, Task};

use super::{BEGIN, CONTROL_HOME, END, LowerError, LowerOptions, Program, lower};
use crate::config::ModelConfig;
use crate::schedule::queues;
use crate::validate::{ValidateError, check_dims, validate_order};

/// The empty tasks of a step, between admission and sampling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EmptyShape {
    /// Stages; each waits for all tasks of the one before it.
    pub stage_count: u32,
    /// Tasks of a stage. They go to the workers in turns, and each stage begins with another worker.
    pub stage_tasks: u32,
    /// Values that a task leaves, where it leaves any.
    pub task_values: u32,
    /// Whether tasks exchange values in pairs: each looks only at what the one has left that is half a stage
    /// further, on several devices one of another. There is then a task of each worker, always the same.
    pub is_paired: bool,
}

impl EmptyShape {
    /// Stages of tasks that leave a value each and look at those of all.
    pub fn new(stage_count: u32, stage_tasks: u32) -> EmptyShape {
        EmptyShape { stage_count, stage_tasks, task_values: 1, is_paired: false }
    }

    /// Values of a stage's tasks, and what is left free after them.
    fn value_count(&self) -> u64 {
        let values = u64::from(self.stage_tasks) * u64::from(self.task_values);
        values.next_multiple_of(STAMPED_GROUP.into())
    }

    /// What a task of a stage looks at and leaves, from heap offset `first` on. Values of stages lie in two
    /// places in turns: a stage's are read before those of the stage after the next are stored.
    fn args(&self, first: u64, stage: u32, task: u32) -> EmptyArgs {
        let values = |stage: u32, task: u32| {
            let value = u64::from(stage % 2) * self.value_count()
                + u64::from(task) * u64::from(self.task_values);
            first + value * 4
        };
        let other =
            if self.is_paired { (task + self.stage_tasks / 2) % self.stage_tasks } else { 0 };
        let seen = if self.is_paired { 1 } else { self.stage_tasks };
        EmptyArgs {
            count: if stage == 0 { 0 } else { seen * self.task_values },
            from: values(stage + 1, other),
            len: self.task_values,
            to: values(stage, task),
            // Sampling does not look at values.
            is_announced: stage + 1 < self.stage_count,
        }
    }
}

/// A program with the sizes of `config` that admits tokens, runs empty tasks and samples from logits
/// that nothing computes. On a device that stamps values, where stages have a task of each worker, each
/// task leaves one and waits for those of the stage before it, as tasks do that compute something.
///
/// Errors: as `lower`; a shape that is not proved to end, or whose values find no room.
pub fn lower_empty(
    config: &ModelConfig,
    options: &LowerOptions,
    shape: &EmptyShape,
) -> Result<Program, LowerError> {
    let workers = options.worker_count;
    let sized = lower(config, options)?;
    // The signal of a worker's task of the last stage orders what it has read of the step before the next.
    let is_stamped = options.is_stamped && shape.stage_tasks >= workers;
    if shape.is_paired && (shape.stage_tasks != workers || !workers.is_multiple_of(2)) {
        let (found, expected) = (shape.stage_tasks.into(), workers.next_multiple_of(2).into());
        return Err(ValidateError::Count { what: "tasks in pairs", found, expected }.into());
    }
    let mut dims = Dims { head_task_count: 0, ..sized.dims };
    if is_stamped {
        // Room for the values of two stages.
        let row = (2 * shape.value_count()).div_ceil(dims.step_tokens_max.into());
        let row = u32::try_from(row).unwrap_or(u32::MAX);
        dims.intermediate_dim = dims.intermediate_dim.max(row);
        check_dims(&dims, workers.into())?;
    }
    let mut steps = Steps { arrivals: vec![1, 1], ..Steps::default() };
    steps.push(Task::new(Opcode::Admit), [END, BEGIN], CONTROL_HOME, "admit".into());
    let mut ready = BEGIN;
    for stage in 0..shape.stage_count {
        let done = EventId(steps.arrivals.len() as u32);
        steps.arrivals.push(shape.stage_tasks);
        for task in 0..shape.stage_tasks {
            let home = (if shape.is_paired { task } else { stage + task }) % workers;
            let args = if is_stamped {
                shape.args(sized.plan.hidden, stage, task)
            } else {
                EmptyArgs::default()
            };
            let name = format!("stage {stage} task {task}");
            steps.push(args.pack(), [ready, done], home, name);
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

    fn options(worker_count: u32, is_stamped: bool) -> LowerOptions {
        LowerOptions {
            worker_count,
            slot_count: 1,
            context_max: 64,
            step_tokens_max: 1,
            stored_format: WeightFormat::Bf16,
            format: WeightFormat::Bf16,
            precision: Precision::Exact,
            tile_bytes: 1 << 20,
            tile_rows_max: 512,
            is_stamped,
            packed_rows: 1,
        }
    }

    fn program(shape: [u32; 2], worker_count: u32, is_stamped: bool) -> Program {
        let [stage_count, stage_tasks] = shape;
        let config = ModelConfig::parse(include_str!("../demo/config.json")).unwrap();
        let options = options(worker_count, is_stamped);
        lower_empty(&config, &options, &EmptyShape::new(stage_count, stage_tasks)).unwrap()
    }

    #[test]
    fn stages_wait_for_each_other_and_go_round() {
        let program = program([3, 2], 3, false);
        let tasks: Vec<_> = program.tasks.iter().map(|t| (t.wait_event.0, t.wait_count)).collect();
        // Admission waits for the end, stages for begin, 2 and 3, sampling for 4.
        assert_eq!(tasks, [(0, 1), (1, 1), (1, 1), (2, 2), (2, 2), (3, 2), (3, 2), (4, 2)]);
        let counts: Vec<u32> = program.queue_spans.iter().map(|span| span.count).collect();
        assert_eq!((counts, program.stage_count), (vec![4, 2, 2, 0], 5));
    }

    #[test]
    fn stages_look_at_the_values_of_the_one_before() {
        let program = program([3, 2], 2, true);
        let args: Vec<_> = program.tasks[1..7].iter().map(EmptyArgs::unpack).collect();
        let hidden = program.plan.hidden;
        let found: Vec<_> =
            args.iter().map(|a| (a.count, a.from - hidden, a.to - hidden)).collect();
        assert_eq!(found[2..], [(2, 0, 512), (2, 0, 516), (2, 512, 0), (2, 512, 4)]);
        assert_eq!([found[0].0, found[1].0], [0, 0]);
        assert_eq!([found[0].2, found[1].2], [0, 4]);
        let is_announced: Vec<_> = args.iter().map(|args| args.is_announced).collect();
        assert_eq!(is_announced, [true, true, true, true, false, false]);
    }

    #[test]
    fn tasks_in_pairs_look_at_the_values_of_the_other_half() {
        let config = ModelConfig::parse(include_str!("../demo/config.json")).unwrap();
        let shape = EmptyShape { task_values: 1024, is_paired: true, ..EmptyShape::new(2, 4) };
        let program = lower_empty(&config, &options(4, true), &shape).unwrap();
        let plan = &program.plan;
        assert!(plan.logits - plan.hidden >= 2 * 4 * 1024 * 4);
        let args: Vec<_> = program.tasks[1..9].iter().map(EmptyArgs::unpack).collect();
        for task in 0..4 {
            let (first, second) = (&args[task], &args[4 + task]);
            assert_eq!((first.count, first.len, second.count, second.len), (0, 1024, 1024, 1024));
            assert_eq!(second.from, args[(task + 2) % 4].to);
        }
        let counts: Vec<u32> = program.queue_spans.iter().map(|span| span.count).collect();
        assert_eq!(counts, [4, 2, 2, 2, 0]);
        let odd = EmptyShape { is_paired: true, ..EmptyShape::new(2, 3) };
        let refused = lower_empty(&config, &options(4, true), &odd);
        assert!(matches!(refused, Err(LowerError::Invalid(ValidateError::Count { .. }))));
    }

    #[test]
    fn too_many_values_are_refused() {
        let config = ModelConfig::parse(include_str!("../demo/config.json")).unwrap();
        let shape = EmptyShape::new(1, 1 << 20);
        let refused = lower_empty(&config, &options(2, true), &shape);
        assert!(matches!(refused, Err(LowerError::Invalid(ValidateError::Limit { .. }))));
    }

    #[test]
    fn every_worker_has_a_task() {
        let program = program([0, 0], 3, false);
        let counts: Vec<u32> = program.queue_spans.iter().map(|span| span.count).collect();
        assert_eq!(counts, [2, 1, 1, 0]);
    }
}
