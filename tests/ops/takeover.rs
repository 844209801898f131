//! Two workers of one program, driven by turns: one claims a task and loses its core.

use tilert_mk_device::machine::cpu::Isa;
use tilert_mk_device::worker::Worker;
use tilert_mk_shared::event::EventId;
use tilert_mk_shared::queue::QueueSpan;
use tilert_mk_shared::sequence::StepToken;
use tilert_mk_shared::task::{
    Epilogue, LinearArgs, Opcode, Precision, Prologue, Segment, Task, TokenRows, WeightFormat,
};

use crate::rig::{Memory, Rig, dims};

const DIM: usize = 64;
const READY: EventId = EventId(0);
const DONE: EventId = EventId(1);

/// Adds `[1, 2, 3, 4]` to the logits: its rows are ones, twos and so on, its input the first unit
/// vector.
fn linear(rig: &Rig, weights: &Memory) -> Task {
    let plan = rig.header.plan;
    let segment = Segment { weights: weights.address(), row_count: 4, ..Segment::default() };
    let args = LinearArgs {
        prologue: Prologue::None,
        epilogue: Epilogue::AddResidual,
        token_rows: TokenRows::All,
        format: WeightFormat::F32,
        precision: Precision::Exact,
        residual_age: 0,
        is_announced: false,
        best_idx: 0,
        in_dim: DIM as u32,
        x_stride: DIM as u32,
        y_stride: 40,
        prologue_key: 1,
        x: plan.hidden,
        y: plan.logits,
        norm_weight: 0,
        segments: [segment, Segment::default(), Segment::default()],
    };
    Task { wait_event: READY, wait_count: 1, signal_event: DONE, ..args.pack() }
}

#[test]
fn a_claimed_task_is_taken_over_and_its_late_worker_changes_nothing() {
    let weights: Vec<f32> = (0..4 * DIM).map(|idx| (idx / DIM + 1) as f32).collect();
    let weights = Memory::of(&weights);
    let mut rig = Rig::new(&dims(DIM as u32, [2, 1, 8], 64), Isa::Portable);
    let after = Task { wait_event: DONE, wait_count: 1, ..Task::new(Opcode::Empty) };
    let tasks = Memory::of(&[linear(&rig, &weights), after]);
    // The second worker's queue has the linear task, the first one's what comes after it.
    let [first, second, shared] = [(1, 1), (0, 1), (0, 0)];
    let spans = [first, second, shared].map(|(first, count)| QueueSpan { first, count });
    let (spans, entries) = (Memory::of(&spans), Memory::of(&[0u32, 1]));
    rig.run_for_two(tasks.address(), spans.address(), entries.address());
    rig.set_step(&[StepToken::default()]);
    let plan = rig.header.plan;
    let x = rig.heap::<f32>(plan.hidden, DIM as u64);
    x.write(0, 1.0);
    rig.signal(READY);

    let [waiting, late] = [0, 1].map(|idx| rig.worker(idx));
    let (offer, lost) = late.next().expect("its queue has a task");
    assert!(late.take(&offer));
    let (_, after) = waiting.next().expect("so has this one's");
    waiting.wait(&after, || false).expect("it does itself what it waits for");
    let results = || rig.heap::<f32>(plan.logits, 4).as_slice().to_vec();
    assert_eq!(results(), [1.0, 2.0, 3.0, 4.0]);
    waiting.execute(&after, 0, 0).expect("nobody stops it");

    // What the late worker has read meanwhile may be anything.
    x.write(0, 7.0);
    let run = |worker: &Worker<_>| worker.execute(&lost, 0, 0).expect("nobody stops it");
    run(&late);
    assert_eq!(results(), [1.0, 2.0, 3.0, 4.0]);
    assert_eq!(rig.arrivals(DONE), 1, "the task is signalled once");
}
