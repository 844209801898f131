//! Random damage: whatever is changed in a valid program, the validator sees it.

use std::collections::HashMap;

use proptest::prelude::*;
use tilert_mk_shared::event::EventId;
use tilert_mk_shared::task::{LinearArgs, Opcode, Prologue, Task};

use super::tests::{SHAPES, program, recount};
use super::validate;
use crate::lower::{Program, TENSOR_SHIFT};

/// One kind of damage; the numbers are reduced to what the program has.
#[derive(Clone, Copy, Debug)]
enum Damage {
    /// Flips one of the 1024 bits of a task's record.
    FlipBit(usize, usize),
    /// Flips a bit of a task's number of a queue.
    FlipEntry(usize, u32),
    /// Gives a task the arguments of another.
    CopyArguments(usize, usize),
    /// Exchanges two references of two tasks.
    SwapReferences(usize, usize, usize),
    /// Exchanges two entries of the queues.
    SwapEntries(usize, usize),
    /// Exchanges two tasks in the list.
    SwapTasks(usize, usize),
    /// Lets a task wait for nothing, and corrects all counts.
    DropWait(usize),
    /// Lets a task signal nothing, and corrects all counts.
    DropSignal(usize),
    /// Lets a task wait for another event, and corrects all counts.
    MoveWait(usize, usize),
    /// Lets a task signal another event, and corrects all counts.
    MoveSignal(usize, usize),
    /// Takes a task out, but leaves its place in the order.
    Empty(usize),
}

fn damage() -> impl Strategy<Value = Damage> {
    let (a, b) = (any::<usize>(), any::<usize>());
    prop_oneof![
        4 => (a, 0..1024usize).prop_map(|(a, bit)| Damage::FlipBit(a, bit)),
        1 => (a, 0..32u32).prop_map(|(a, bit)| Damage::FlipEntry(a, bit)),
        1 => (a, b).prop_map(|(a, b)| Damage::CopyArguments(a, b)),
        1 => (a, b, 0..9usize).prop_map(|(a, b, c)| Damage::SwapReferences(a, b, c)),
        1 => (a, b).prop_map(|(a, b)| Damage::SwapEntries(a, b)),
        1 => (a, b).prop_map(|(a, b)| Damage::SwapTasks(a, b)),
        1 => a.prop_map(Damage::DropWait),
        1 => a.prop_map(Damage::DropSignal),
        2 => (a, b).prop_map(|(a, b)| Damage::MoveWait(a, b)),
        2 => (a, b).prop_map(|(a, b)| Damage::MoveSignal(a, b)),
        1 => a.prop_map(Damage::Empty),
    ]
}

/// Flips bit `bit` of the record, in the order of its fields.
fn flip(task: &mut Task, bit: usize) {
    match bit {
        0..16 => task.opcode ^= 1 << bit,
        16..32 => task.flags ^= 1 << (bit - 16),
        32..64 => task.wait_event.0 ^= 1 << (bit - 32),
        64..96 => task.wait_count ^= 1 << (bit - 64),
        96..128 => task.signal_event.0 ^= 1 << (bit - 96),
        128..448 => task.words[(bit - 128) / 32] ^= 1 << (bit % 32),
        _ => task.refs[(bit - 448) / 64] ^= 1 << (bit % 64),
    }
}

fn copy_arguments(to: &mut Task, from: &Task) {
    (to.opcode, to.flags, to.words, to.refs) = (from.opcode, from.flags, from.words, from.refs);
}

impl Damage {
    fn apply(self, p: &mut Program) {
        let (task_count, entry_count) = (p.tasks.len(), p.queue_entries.len());
        let event = |b: usize| EventId((b % p.event_arrivals.len()) as u32);
        match self {
            Damage::FlipBit(a, bit) => flip(&mut p.tasks[a % task_count], bit % 1024),
            Damage::FlipEntry(a, bit) => p.queue_entries[a % entry_count] ^= 1 << bit,
            Damage::CopyArguments(a, b) => {
                let from = p.tasks[b % task_count];
                copy_arguments(&mut p.tasks[a % task_count], &from);
            }
            Damage::SwapReferences(a, b, c) => {
                let (a, b) = (a % task_count, b % task_count);
                let kept = p.tasks[a].refs[c];
                p.tasks[a].refs[c] = p.tasks[b].refs[c];
                p.tasks[b].refs[c] = kept;
            }
            Damage::SwapEntries(a, b) => p.queue_entries.swap(a % entry_count, b % entry_count),
            Damage::SwapTasks(a, b) => p.tasks.swap(a % task_count, b % task_count),
            Damage::DropWait(a) => p.tasks[a % task_count].wait_event = EventId::NONE,
            Damage::DropSignal(a) => p.tasks[a % task_count].signal_event = EventId::NONE,
            Damage::MoveWait(a, b) => p.tasks[a % task_count].wait_event = event(b),
            Damage::MoveSignal(a, b) => p.tasks[a % task_count].signal_event = event(b),
            Damage::Empty(a) => {
                copy_arguments(&mut p.tasks[a % task_count], &Task::new(Opcode::Empty))
            }
        }
        let keeps_counts = matches!(
            self,
            Damage::DropWait(_)
                | Damage::DropSignal(_)
                | Damage::MoveWait(..)
                | Damage::MoveSignal(..)
        );
        if keeps_counts {
            recount(p);
        }
    }
}

/// What a task does, without what has no meaning of its own: a row distance that the prologue
/// ignores, and the name of a prologue.
fn meaning(task: &Task) -> Task {
    let mut task = *task;
    if task.opcode == Opcode::Linear as u16 {
        task.words[3] = 0;
        if LinearArgs::unpack(&task).prologue == Prologue::MergeSplits {
            task.words[1] = 0;
        }
    }
    task
}

/// Whether two tasks share the name of a prologue but wait for different events.
fn confuses_prologues(p: &Program) -> bool {
    let mut waits = HashMap::new();
    p.tasks.iter().filter(|task| task.opcode == Opcode::Linear as u16).any(|task| {
        let args = LinearArgs::unpack(task);
        let is_shared = args.prologue != Prologue::None;
        is_shared && *waits.entry(args.prologue_key).or_insert(task.wait_event) != task.wait_event
    })
}

/// The damaged program with its tensors named as in the original, if all that use a tensor there
/// use one tensor here, and the other way round, or if a whole bias has gone to another operator:
/// those are sound programs for other networks.
fn rename_back(damaged: &Program, original: &Program) -> Program {
    let (mut there, mut back) = (HashMap::new(), HashMap::new());
    let mut renamed = damaged.clone();
    let references = |p: &Program| {
        let mut all: Vec<u64> = p.tasks.iter().flat_map(|task| task.refs).collect();
        all.sort_unstable();
        all
    };
    let is_permuted = references(damaged) == references(original);
    for (task, before) in renamed.tasks.iter_mut().zip(&original.tasks) {
        for (reference, before) in task.refs.iter_mut().zip(before.refs) {
            let [index, index_before] = [*reference, before].map(|name| name >> TENSOR_SHIFT);
            let has_moved = is_permuted && *reference != before && (*reference == 0 || before == 0);
            let is_same = has_moved
                || (*reference ^ before) & ((1 << TENSOR_SHIFT) - 1) == 0
                    && *there.entry(index_before).or_insert(index) == index
                    && *back.entry(index).or_insert(index_before) == index_before;
            if !is_same {
                return damaged.clone();
            }
            *reference = before;
        }
    }
    renamed
}

/// Whether the damaged program does the same in the same order as the original.
fn is_harmless(damaged: &Program, original: &Program) -> bool {
    let events = |p: &Program| -> Vec<_> {
        p.tasks.iter().map(|task| (task.wait_event, task.signal_event)).collect()
    };
    // Tasks between the same events may be listed in any order.
    let sorted = |p: &Program| {
        let mut meanings: Vec<Task> = p.tasks.iter().map(meaning).collect();
        meanings.sort_by_key(|t| (t.wait_event.0, t.signal_event.0, t.words, t.refs));
        meanings
    };
    // A task may be in any queue, as long as it is in one and in its place.
    let mut entries = damaged.queue_entries.clone();
    entries.sort_unstable();
    let is_ordered = damaged.queue_spans.iter().all(|span| {
        let queue = &damaged.queue_entries[span.first as usize..][..span.count as usize];
        queue.is_sorted()
    });
    is_ordered
        && entries.into_iter().eq(0..damaged.tasks.len() as u32)
        && events(damaged) == events(original)
        && [damaged, &rename_back(damaged, original)].map(sorted).contains(&sorted(original))
        && !confuses_prologues(damaged)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 4000,
        max_global_rejects: 1 << 20,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_damage_is_seen(
        shape_idx in 0..SHAPES.len(),
        worker_count in 1u32..5,
        tile_shift in 8u32..18,
        damage in damage(),
    ) {
        let original = program(&SHAPES[shape_idx], worker_count, 1 << tile_shift);
        let mut damaged = original.clone();
        damage.apply(&mut damaged);
        prop_assume!(!is_harmless(&damaged, &original));
        prop_assert!(validate(&damaged).is_err(), "{damage:?} was not seen");
    }

    #[test]
    fn nonsense_is_refused_without_a_panic(
        words in proptest::collection::vec(any::<u32>(), 1..60),
        worker_count in 1u32..4,
    ) {
        let mut program = program(&SHAPES[0], worker_count, 1 << 11);
        let task_count = program.tasks.len();
        for triple in words.chunks_exact(3) {
            let task = &mut program.tasks[triple[0] as usize % task_count];
            task.words[triple[1] as usize % 10] = triple[2];
            task.refs[triple[1] as usize % 9] = u64::from(triple[2]) << (triple[0] % 33);
        }
        // Any verdict is right, as long as there is one.
        let _ = validate(&program);
    }
}
