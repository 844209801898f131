//! Arguments of tasks, and what tasks do to each other's rows.

use tilert_mk_shared::task::{Epilogue, SampleArgs};

use super::*;

#[test]
fn tiles_of_a_stage_are_disjoint_and_complete() {
    let (qkv, down) = ("layer 1 qkv tile 1", "layer 1 down tile 0");
    let shifted = linear_verdict(qkv, |args| args.segments[0].out_first -= 1);
    refused!(shifted, E::Task { defect: Defect::Disagrees { .. }, .. });
    let overlap = verdict(|p| {
        // The second tile takes the columns and the weights of the first.
        let (first, second) = (find(p, "layer 1 down tile 0"), find(p, "layer 1 down tile 1"));
        let (words, refs) = (p.tasks[first].words, p.tasks[first].refs);
        (p.tasks[second].words, p.tasks[second].refs) = (words, refs);
    });
    refused!(overlap, E::TensorRow { .. } | E::Race { region: Region::Hidden, .. });
    let gap = linear_verdict(down, |args| args.segments[0].row_count -= 1);
    refused!(gap, E::TensorRow { count: 0, .. });
    refused!(linear_verdict(down, |args| args.segments[0].row_count += 1), E::TensorRow { .. });
    let past = linear_verdict(down, |args| args.segments[0].weights += 64 * 320);
    refused!(past, E::Task { defect: Defect::Rows { .. }, .. });
    let between = linear_verdict(down, |args| args.segments[0].weights += 2);
    refused!(between, E::Task { defect: Defect::Rows { .. }, .. });
    let column = linear_verdict(down, |args| args.segments[0].out_first = 64);
    refused!(column, E::Task { defect: Defect::Columns { .. }, .. });
}

#[test]
fn a_missing_tile_is_noticed_where_it_is_read() {
    // Without its weights the tensor rule is silent only if the model is smaller; so the tile
    // becomes empty and its tensor is cut to what is left.
    let missing = |name: &str, layer: &str| {
        verdict(|p| {
            let at = find(p, name);
            let args = LinearArgs::unpack(&p.tasks[at]);
            for segment in &args.segments {
                let named = (segment.weights >> crate::lower::TENSOR_SHIFT) as usize;
                let first = u64::from(segment.row_count);
                if named > 0 {
                    p.tensors[named - 1].shape[0] -= first;
                }
            }
            assert!(p.names[at].contains(layer));
            let events = (p.tasks[at].wait_event, p.tasks[at].signal_event, p.tasks[at].wait_count);
            p.tasks[at] = Task::new(Opcode::Empty);
            let task = &mut p.tasks[at];
            (task.wait_event, task.signal_event, task.wait_count) = events;
        })
    };
    let tile_count =
        |stage: &str| victim().names.iter().filter(|name| name.starts_with(stage)).count();
    let last = |stage: &str| format!("{stage} tile {}", tile_count(stage) - 1);
    refused!(
        missing(&last("layer 0 gate-up"), "layer 0"),
        E::Unwritten { region: Region::Intermediate, .. }
    );
    refused!(
        missing(&last("layer 1 gate-up"), "layer 1"),
        E::Stale { region: Region::Intermediate, .. }
    );
    refused!(missing(&last("layer 1 output"), "layer 1"), E::Stale { region: Region::Hidden, .. });
    refused!(missing(&last("head"), "head"), E::Unwritten { region: Region::Logits, .. });
}

#[test]
fn attention_heads_are_appended_once() {
    let edit = |name: &str, edit: &dyn Fn(&mut AttentionArgs)| {
        verdict(|p| {
            let at = find(p, name);
            let mut args = AttentionArgs::unpack(&p.tasks[at]);
            edit(&mut args);
            (p.tasks[at].words, p.tasks[at].refs) = (args.pack().words, args.pack().refs);
        })
    };
    let name = "layer 1 attention head 1";
    let twice = verdict(|p| {
        let [first, second] = ["layer 1 attention head 0", name].map(|name| find(p, name));
        (p.tasks[second].words, p.tasks[second].refs) = (p.tasks[first].words, p.tasks[first].refs);
    });
    refused!(twice, E::Race { region: Region::Splits, .. });
    refused!(edit(name, &|a| a.kv_head_idx = 0), E::Task { defect: Defect::Offset { .. }, .. });
    refused!(edit(name, &|a| a.kv_head_idx = 2), E::Task { defect: Defect::Bound { .. }, .. });
    refused!(edit(name, &|a| a.layer_idx = 3), E::Task { defect: Defect::Bound { .. }, .. });
    refused!(
        edit(name, &|a| a.layer_idx = 2),
        E::KvHead { layer_idx: 1, kv_head_idx: 1, split_idx: 0, count: 0 }
    );
    refused!(edit(name, &|a| a.part_count = 17), E::Task { defect: Defect::Bound { .. }, .. });
    refused!(edit(name, &|a| a.part_idx = 1), E::Task { defect: Defect::Bound { .. }, .. });
    // Half of the splits, and nobody has the others.
    refused!(
        edit(name, &|a| (a.part_count, a.columns[1]) = (2, a.columns[1] / 2)),
        E::KvHead { layer_idx: 1, kv_head_idx: 1, split_idx: 1, count: 0 }
    );
    refused!(edit(name, &|a| a.qkv += 4), E::Task { defect: Defect::Offset { .. }, .. });
    refused!(edit(name, &|a| a.splits = a.qkv), E::Task { defect: Defect::Offset { .. }, .. });
    refused!(edit(name, &|a| a.key_norm = 1 << 40), E::Task { defect: Defect::Shape { .. }, .. });
}

#[test]
fn buffers_are_not_confused_or_reused_early() {
    let plan = victim().plan;
    let down = "layer 1 down tile 0";
    let stride = linear_verdict("layer 0 qkv tile 0", |args| args.y = plan.intermediate);
    refused!(stride, E::Task { defect: Defect::Stride { .. }, .. });
    refused!(
        linear_verdict(down, |args| args.y = plan.logits),
        E::Task { defect: Defect::Role { .. }, .. }
    );
    refused!(
        linear_verdict(down, |args| args.x = plan.kv),
        E::Task { defect: Defect::Offset { .. }, .. }
    );
    refused!(
        linear_verdict(down, |args| args.x += 4),
        E::Task { defect: Defect::Columns { .. }, .. }
    );
    refused!(
        linear_verdict(down, |args| args.x += 2),
        E::Task { defect: Defect::Offset { .. }, .. }
    );
    refused!(
        linear_verdict(down, |args| args.y_stride += 8),
        E::Task { defect: Defect::Stride { .. }, .. }
    );
    refused!(
        linear_verdict(down, |args| args.x_stride -= 8),
        E::Task { defect: Defect::Stride { .. }, .. }
    );
    refused!(
        linear_verdict(down, |args| args.in_dim -= 8),
        E::Task { defect: Defect::Shape { .. }, .. }
    );
    // With equal widths only roles and the order of the accesses tell that a buffer is wrong.
    let shape = ("llama", [64, 64, 2, 4, 2, 8, 50], true);
    let swapped = |stage: &str, edit: &dyn Fn(&mut LinearArgs)| {
        let mut p = program(&shape, 2, 1 << 11);
        for at in 0..p.tasks.len() {
            if p.names[at].starts_with(stage) {
                edit_linear(&mut p.tasks[at], edit);
            }
        }
        validate(&p).unwrap_err()
    };
    let plan = program(&shape, 2, 1 << 11).plan;
    refused!(
        swapped("layer 1 gate-up", &|a| a.y = plan.hidden),
        E::Task { defect: Defect::Role { .. }, .. }
    );
    refused!(
        swapped("layer 1 down", &|a| a.y = plan.qkv),
        E::Task { defect: Defect::Role { .. }, .. }
    );
    refused!(
        swapped("layer 1 down", &|a| a.x = plan.hidden),
        E::Task { defect: Defect::Role { .. }, .. }
    );
    refused!(
        swapped("layer 1 gate-up", &|a| a.y = plan.qkv),
        E::Unread { region: Region::Qkv, .. }
    );
    refused!(swapped("layer 0 down", &|a| a.x = plan.qkv), E::Stamp { region: Region::Qkv, .. });
    // Queries that go where the down projection still reads.
    let early = {
        let mut p = program(&shape, 2, 1 << 11);
        let (mixed, gated) = (find(&p, "layer 1 gate-up tile 0"), find(&p, "layer 1 down tile 0"));
        let (first, then) = (p.tasks[mixed].wait_event, p.tasks[gated].signal_event);
        for task in &mut p.tasks {
            if task.wait_event == then {
                task.wait_event = first;
            }
        }
        recount(&mut p);
        validate(&p).unwrap_err()
    };
    refused!(early, E::Race { region: Region::Hidden, .. } | E::OutsideStep { .. });
}

#[test]
fn stamps_are_those_of_the_last_writers() {
    let edited = |stage: &str, edit: &dyn Fn(&mut LinearArgs)| {
        verdict(|p| {
            for at in 0..p.tasks.len() {
                if p.names[at].starts_with(stage) {
                    edit_linear(&mut p.tasks[at], edit);
                }
            }
        })
    };
    refused!(
        edited("layer 1 output", &|args| args.residual_age += 1),
        E::Stamp { region: Region::Hidden, .. }
    );
    refused!(edited("layer 1 down", &|args| args.residual_age = 0), E::Stamp { .. });
    refused!(edited("layer 1 qkv", &|args| args.residual_age = 1), E::Stamp { .. });
    refused!(edited("layer 1 gate-up", &|args| args.residual_age = 2), E::Stamp { .. });
    refused!(
        linear_verdict("layer 1 down tile 1", |args| args.residual_age += 1),
        E::ResidualAge { age: 2, .. }
    );
    // Logits are looked at once all of them are there.
    refused!(edited("head", &|args| args.is_announced = true), E::Announced { .. });
    // Steps without logits have no values to look at.
    let last = format!("layer {} down", victim().dims.kv.layer_count - 1);
    refused!(edited(&last, &|args| args.is_announced = true), E::Announced { .. });
    // Sampling waits for them in the head's place.
    let sampling = |edit: &dyn Fn(&mut SampleArgs)| {
        verdict(|p| {
            let at = find(p, "sample");
            let mut args = SampleArgs::unpack(&p.tasks[at]);
            edit(&mut args);
            p.tasks[at].words = args.pack().words;
        })
    };
    refused!(sampling(&|args| args.also_event = EventId::NONE), E::Unseen { .. });
    refused!(sampling(&|args| args.also_event.0 -= 1), E::Unseen { .. });
    refused!(sampling(&|args| args.also_count -= 1), E::Unseen { .. });
}

#[test]
fn each_of_the_heads_tasks_leaves_its_best() {
    let best = |edit: fn(&mut LinearArgs)| linear_verdict("head tile 0", edit);
    refused!(best(|args| args.best_idx = 1), E::Race { region: Region::Bests, .. });
    refused!(best(|args| args.best_idx = u32::MAX), E::Task { defect: Defect::Bound { .. }, .. });
    refused!(
        best(|args| (args.epilogue, args.best_idx) = (Epilogue::Store, 0)),
        E::Task { defect: Defect::Role { .. }, .. }
    );
    refused!(
        linear_verdict("layer 0 qkv tile 0", |args| args.epilogue = Epilogue::StoreBest),
        E::Task { .. }
    );
    let fewer = verdict(|p| p.dims.head_task_count -= 1);
    refused!(fewer, E::Plan);
}

#[test]
fn prologues_are_shared_only_where_they_are_the_same() {
    let of = |p: &Program, name: &str| LinearArgs::unpack(&p.tasks[find(p, name)]).prologue_key;
    let key = of(&victim(), "layer 0 qkv tile 0");
    let shared = linear_verdict("layer 0 gate-up tile 0", |args| args.prologue_key = key);
    refused!(shared, E::PrologueKey { .. });
    // The same rows and the same norm, but after the residual stream has changed.
    let norm =
        LinearArgs::unpack(&victim().tasks[find(&victim(), "layer 0 qkv tile 0")]).norm_weight;
    let stale = verdict(|p| {
        for at in 0..p.tasks.len() {
            if p.names[at].starts_with("layer 0 gate-up") {
                edit_linear(&mut p.tasks[at], |args| {
                    (args.prologue_key, args.norm_weight) = (key, norm);
                });
            }
        }
    });
    refused!(stale, E::PrologueKey { .. });
}

#[test]
fn sizes_and_opcodes_are_bounded() {
    refused!(verdict(|p| p.dims.step_tokens_max = 65), E::Limit { what: "step_tokens_max", .. });
    refused!(verdict(|p| p.dims.kv.slot_count = 0), E::Limit { what: "slot_count", .. });
    refused!(verdict(|p| p.dims.head_count = 9), E::Count { what: "query heads", .. });
    refused!(verdict(|p| p.dims.kv.context_max += 1), E::Plan);
    refused!(verdict(|p| p.plan.qkv += 128), E::Plan);
    refused!(
        verdict(|p| {
            p.names.pop();
        }),
        E::Count { what: "names of tasks", .. }
    );
    refused!(
        verdict(|p| p.queue_spans.truncate(1)),
        E::Limit { what: "the number of workers", .. }
    );
    let at = |p: &Program| find(p, "layer 0 qkv tile 0");
    refused!(
        verdict(|p| {
            let at = at(p);
            p.tasks[at].opcode = 77
        }),
        E::Task { defect: Defect::Opcode(77), .. }
    );
    refused!(
        verdict(|p| {
            let at = at(p);
            p.tasks[at].flags |= 1 << 13
        }),
        E::Task { defect: Defect::Stray(_), .. }
    );
    refused!(
        verdict(|p| p.tasks[1].opcode = Opcode::Sample as u16),
        E::Count { what: "sample tasks", .. }
    );
    refused!(verdict(|p| p.tasks[0].opcode = 0), E::Count { what: "admit tasks", .. });
    let rows = linear_verdict("layer 0 qkv tile 0", |args| args.segments[0].row_count = 5000);
    refused!(rows, E::Task { defect: Defect::Bound { .. }, .. });
    let none = linear_verdict("layer 0 qkv tile 0", |args| args.segments = Default::default());
    refused!(none, E::Task { defect: Defect::Bound { .. }, .. });
    let unnamed = linear_verdict("layer 0 qkv tile 0", |args| args.segments[0].weights = 999 << 40);
    refused!(unnamed, E::Task { defect: Defect::Tensor { .. }, .. });
}

#[test]
fn staging_is_bounded_where_the_machine_is() {
    let program = victim();
    let row_bytes = 160 * 2;
    let rows = Staging { row_bytes_max: row_bytes, task_bytes_max: u64::MAX };
    assert_eq!(validate_for(&program, &rows), Ok(()));
    let rows = Staging { row_bytes_max: row_bytes - 1, ..rows };
    refused!(
        validate_for(&program, &rows).unwrap_err(),
        E::Staging { what: "one row of weights", .. }
    );
    let task = Staging { task_bytes_max: 1 << 10, ..Staging::UNBOUNDED };
    refused!(validate_for(&program, &task).unwrap_err(), E::Staging { what: "weights", .. });
}

#[test]
fn parts_that_exchange_splits_run_at_the_same_time() {
    let victim = || lowered(&SHAPES[0], 6, 1 << 11, true);
    let [first, second] = [0, 1].map(|part| format!("layer 1 attention head 1 part {part}"));
    // Both in one worker's queue, at the place of the second.
    let mut p = victim();
    let tasks = [&first, &second].map(|name| find(&p, name) as u32);
    let at = |p: &Program, task: u32| p.queue_entries.iter().position(|e| *e == task).unwrap();
    let (from, to) = (at(&p, tasks[0]), at(&p, tasks[1]));
    let owner = |p: &Program, entry: usize| {
        let ends = |span: &QueueSpan| (span.first + span.count) as usize <= entry;
        p.queue_spans.iter().take_while(|span| ends(span)).count()
    };
    let (donor, taker) = (owner(&p, from), owner(&p, to));
    assert!(donor < taker, "parts have workers of their own");
    p.queue_entries.remove(from);
    p.queue_entries.insert(to - 1, tasks[0]);
    p.queue_spans[donor].count -= 1;
    p.queue_spans[taker].count += 1;
    p.queue_spans[donor + 1..=taker].iter_mut().for_each(|span| span.first -= 1);
    refused!(validate(&p).unwrap_err(), E::Exchange { why: "are one worker's", .. });
    // One of them a stage of its own, which signals what nobody waits for but sampling.
    let mut p = victim();
    let (at, sample) = (find(&p, &second), find(&p, "sample"));
    p.tasks[at].signal_event = p.tasks[sample].wait_event;
    recount(&mut p);
    refused!(validate(&p).unwrap_err(), E::Exchange { .. } | E::Race { .. });
    // Another part's columns.
    let mut p = victim();
    let at = find(&p, &second);
    let mut args = AttentionArgs::unpack(&p.tasks[at]);
    args.columns = [0, 8];
    p.tasks[at].words = args.pack().words;
    refused!(
        validate(&p).unwrap_err(),
        E::Task { defect: Defect::Dimension { what: "columns", .. }, .. }
    );
    // Nobody merges what projections leave to attention.
    let mut p = program(&SHAPES[0], 2, 1 << 11);
    p.dims.late_splits_max -= 1;
    refused!(validate(&p).unwrap_err(), E::Count { .. });
}
