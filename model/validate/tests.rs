//! Lowered programs pass; each way to break one is refused with its own error.

use tilert_mk_shared::event::EventId;
use tilert_mk_shared::limits::SEGMENT_ROWS_MAX;
use tilert_mk_shared::program::HeapPlan;
use tilert_mk_shared::queue::QueueSpan;
use tilert_mk_shared::task::{AttentionArgs, LinearArgs, Opcode, Precision, Task, WeightFormat};

use super::{Region, Staging, TaskDefect as Defect, ValidateError as E, validate, validate_for};
use crate::config::ModelConfig;
use crate::lower::{LowerOptions, Program, lower};

/// A config.json: family, hidden, inner, layers, heads, kv heads, head size, vocabulary, tied.
type Shape = (&'static str, [u32; 7], bool);

/// Small models of every family, with odd sizes.
pub(super) const SHAPES: [Shape; 5] = [
    ("llama", [64, 160, 3, 8, 2, 8, 97], false),
    ("qwen3", [64, 64, 2, 4, 4, 16, 512], true),
    ("qwen2", [72, 200, 2, 9, 3, 8, 100], true),
    ("mistral", [128, 128, 1, 4, 1, 32, 33], false),
    ("llama", [72, 96, 4, 3, 3, 24, 257], true),
];

/// Lowers a shape for a number of workers.
pub(super) fn program(shape: &Shape, worker_count: u32, tile_bytes: u64) -> Program {
    lowered(shape, worker_count, tile_bytes, false)
}

/// The same, for a device that stamps values or not.
fn lowered(shape: &Shape, worker_count: u32, tile_bytes: u64, is_stamped: bool) -> Program {
    lowered_with(shape, "", worker_count, tile_bytes, is_stamped)
}

/// The same, with matrices in FP8 but for layer 1's.
fn fp8_program(shape: &Shape, worker_count: u32, tile_bytes: u64) -> Program {
    let keys = r#", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["model.layers.1"]}"#;
    lowered_with(shape, keys, worker_count, tile_bytes, false)
}

/// Lowers a shape; `keys` are more of its config.json.
fn lowered_with(
    shape: &Shape,
    keys: &str,
    worker_count: u32,
    tile_bytes: u64,
    is_stamped: bool,
) -> Program {
    let (family, [hidden, inner, layers, heads, kv_heads, head_dim, vocab], tied) = shape;
    let json = format!(
        r#"{{"model_type": "{family}", "hidden_size": {hidden}, "intermediate_size": {inner},
        "num_hidden_layers": {layers}, "num_attention_heads": {heads},
        "num_key_value_heads": {kv_heads}, "head_dim": {head_dim}, "vocab_size": {vocab},
        "max_position_embeddings": 4096, "tie_word_embeddings": {tied} {keys}}}"#
    );
    let options = LowerOptions {
        worker_count,
        slot_count: 2,
        context_max: 256,
        step_tokens_max: 8,
        stored_format: WeightFormat::Bf16,
        format: WeightFormat::Bf16,
        precision: Precision::Exact,
        tile_bytes,
        tile_rows_max: SEGMENT_ROWS_MAX,
        is_stamped,
        packed_rows: 8,
    };
    lower(&ModelConfig::parse(&json).unwrap(), &options).unwrap()
}

/// Index of a task by its name.
fn find(program: &Program, name: &str) -> usize {
    program.names.iter().position(|known| known == name).unwrap()
}

/// Makes all counts fit the events that tasks name, as a wrong but consistent lowering would.
pub(super) fn recount(program: &mut Program) {
    program.event_arrivals.fill(0);
    for task in program.tasks.iter().filter(|task| task.signal_event.is_some()) {
        program.event_arrivals[task.signal_event.0 as usize] += 1;
    }
    for task in &mut program.tasks {
        let event = task.wait_event;
        let arrivals = if event.is_some() { program.event_arrivals[event.0 as usize] } else { 0 };
        task.wait_count = arrivals;
    }
}

/// Rewrites the arguments of a linear task and keeps its events.
pub(super) fn edit_linear(task: &mut Task, edit: impl Fn(&mut LinearArgs)) {
    let mut args = LinearArgs::unpack(task);
    edit(&mut args);
    let packed = args.pack();
    (task.flags, task.words, task.refs) = (packed.flags, packed.words, packed.refs);
}

/// The usual victim: every stage has several tiles.
fn victim() -> Program {
    program(&SHAPES[0], 2, 1 << 11)
}

/// Breaks the usual victim and gives the verdict.
fn verdict(edit: impl Fn(&mut Program)) -> E {
    let mut program = victim();
    edit(&mut program);
    validate(&program).unwrap_err()
}

/// Breaks one task of the usual victim.
fn task_verdict(name: &str, edit: impl Fn(&mut Task)) -> E {
    verdict(|p| {
        let at = find(p, name);
        edit(&mut p.tasks[at]);
    })
}

/// Breaks one linear task of the usual victim.
fn linear_verdict(name: &str, edit: impl Fn(&mut LinearArgs)) -> E {
    task_verdict(name, |task| edit_linear(task, &edit))
}

/// Asserts that a verdict has a certain form.
macro_rules! refused {
    ($verdict:expr, $($pattern:tt)+) => {{
        let verdict = $verdict;
        assert!(matches!(&verdict, $($pattern)+), "{verdict:?}");
    }};
}

mod arguments;

#[test]
fn lowered_programs_pass() {
    for shape in &SHAPES {
        for worker_count in [1, 2, 3, 7, 16, 132] {
            for tile_bytes in [1, 1 << 11, 1 << 17] {
                for is_stamped in [false, true] {
                    validate(&lowered(shape, worker_count, tile_bytes, is_stamped))
                        .unwrap_or_else(|error| panic!("{shape:?} {worker_count}: {error}"));
                }
            }
        }
    }
}

#[test]
fn fp8_programs_pass() {
    for shape in &SHAPES {
        for worker_count in [1, 3, 16] {
            for tile_bytes in [1, 1 << 11, 1 << 17] {
                let program = fp8_program(shape, worker_count, tile_bytes);
                for (task, name) in program.tasks.iter().zip(&program.names) {
                    if task.opcode != Opcode::Linear as u16 {
                        continue;
                    }
                    let is_plain = name.starts_with("layer 1 ") || name.starts_with("head");
                    let expected = if is_plain { WeightFormat::Bf16 } else { WeightFormat::Fp8 };
                    assert_eq!(LinearArgs::unpack(task).format, expected, "{name}");
                }
            }
        }
    }
}

#[test]
fn formats_and_scales_belong_to_matrices() {
    let refuse = |edit: &dyn Fn(&mut Program)| {
        let mut program = fp8_program(&SHAPES[0], 2, 1 << 11);
        edit(&mut program);
        validate(&program).unwrap_err()
    };
    for (name, format) in [
        ("layer 0 down tile 1", WeightFormat::Bf16),
        ("layer 1 down tile 1", WeightFormat::Fp8),
        ("layer 2 qkv tile 0", WeightFormat::Q8),
    ] {
        let verdict = refuse(&|p| {
            let at = find(p, name);
            edit_linear(&mut p.tasks[at], |args| args.format = format);
        });
        refused!(verdict, E::Task { defect: Defect::Format(_), .. });
    }
    let matrix = |p: &Program, nth: usize| {
        let matrices = p.tensors.iter().enumerate().filter(|(_, tensor)| tensor.scales.is_some());
        matrices.map(|(idx, _)| idx).nth(nth).unwrap()
    };
    let scales_idx = |p: &Program, nth| p.tensors[matrix(p, nth)].scales.unwrap().0 as usize;
    // Down has two scales of a row, the others have two of a column or one.
    refused!(
        refuse(&|p| {
            let idx = scales_idx(p, 6);
            p.tensors[idx].shape.reverse();
        }),
        E::Scales { .. }
    );
    refused!(
        refuse(&|p| {
            let (first, second) = (matrix(p, 0), matrix(p, 1));
            p.tensors[second].scales = p.tensors[first].scales;
        }),
        E::Scales { .. }
    );
    refused!(
        refuse(&|p| {
            let first = matrix(p, 0);
            p.tensors[first].scales = Some(crate::graph::TensorIdx(u32::MAX));
        }),
        E::Scales { .. }
    );
    // Scales that no matrix has are a tensor that no task uses, and the matrix is another's.
    refused!(
        refuse(&|p| {
            let first = matrix(p, 0);
            p.tensors[first].scales = None;
        }),
        E::Task { defect: Defect::Format(_), .. }
    );
    // The table is looked up as it is stored.
    refused!(
        refuse(&|p| {
            let first = matrix(p, 0);
            p.tensors[0].scales = p.tensors[first].scales.take();
        }),
        E::Scales { .. } | E::Task { defect: Defect::Shape { .. }, .. }
    );
}

/// Prints what validation costs; run with `--release --nocapture`.
#[test]
fn a_large_program_passes() {
    let llama_8b = ("llama", [4096, 14336, 32, 32, 8, 128, 128_256], false);
    for tile_bytes in [1 << 20, 1 << 18] {
        let program = program(&llama_8b, 132, tile_bytes);
        let begin = std::time::Instant::now();
        validate(&program).unwrap();
        println!("{} tasks: {:?}", program.tasks.len(), begin.elapsed());
    }
}

#[test]
fn thresholds_are_exact() {
    let name = "layer 1 down tile 1";
    refused!(task_verdict(name, |task| task.wait_count -= 1), E::WaitCount { .. });
    refused!(task_verdict(name, |task| task.wait_count += 1), E::WaitCount { .. });
    refused!(task_verdict(name, |task| task.wait_event = EventId::NONE), E::WaitCount { .. });
    refused!(task_verdict(name, |task| task.signal_event = EventId::NONE), E::Arrivals { .. });
    refused!(verdict(|p| p.event_arrivals[4] += 1), E::Arrivals { event: 4, .. });
    refused!(
        task_verdict(name, |task| task.wait_event = EventId(4000)),
        E::EventRange { event: 4000, .. }
    );
    refused!(task_verdict(name, |task| task.signal_event = EventId(4000)), E::EventRange { .. });
    // An event that is never signalled has a threshold of 0, and so no order at all.
    let never = verdict(|p| {
        p.event_arrivals.push(0);
        let event_count = p.event_arrivals.len() as u32;
        let at = find(p, name);
        (p.tasks[at].wait_event, p.tasks[at].wait_count) = (EventId(event_count - 1), 0);
        p.plan = HeapPlan::new(&p.dims, 2, event_count, p.tasks.len() as u32);
    });
    refused!(never, E::WaitCount { arrivals: 0, .. });
}

#[test]
fn a_wait_cannot_be_dropped() {
    let dropped = |name: &str| {
        verdict(|p| {
            let at = find(p, name);
            p.tasks[at].wait_event = EventId::NONE;
            recount(p);
        })
    };
    refused!(
        dropped("layer 1 down tile 1"),
        E::OutsideStep { between: "after the step's begin", .. }
    );
    refused!(dropped("sample"), E::OutsideStep { .. });
    refused!(dropped("admit"), E::AdmitUnordered { .. });
}

#[test]
fn a_wait_cannot_be_earlier() {
    // Waits for what `source` waits for, instead of what it does now.
    let earlier = |name: &str, source: &str| {
        verdict(|p| {
            let event = p.tasks[find(p, source)].wait_event;
            let at = find(p, name);
            p.tasks[at].wait_event = event;
            recount(p);
        })
    };
    let down = "layer 1 down tile 1";
    refused!(
        earlier(down, "layer 1 gate-up tile 0"),
        E::Race { region: Region::Intermediate | Region::Hidden, across_steps: false, .. }
    );
    refused!(earlier("layer 2 qkv tile 0", down), E::Race { .. } | E::PrologueKey { .. });
    refused!(
        earlier("layer 1 attention head 1", "layer 1 qkv tile 0"),
        E::Race { region: Region::Qkv | Region::Splits, .. }
    );
    // The head's signal would then belong to no step.
    refused!(earlier("sample", "head tile 0"), E::OutsideStep { .. });
    refused!(earlier("embed", "layer 0 qkv tile 0"), E::Cycle { .. });
}

#[test]
fn a_signal_cannot_be_dropped() {
    let dropped = |name: &str| {
        verdict(|p| {
            let at = find(p, name);
            p.tasks[at].signal_event = EventId::NONE;
            recount(p);
        })
    };
    refused!(dropped("layer 1 attention head 1"), E::Race { across_steps: true, .. });
    refused!(
        dropped("layer 0 gate-up tile 1"),
        E::Task { defect: Defect::Disagrees { what: "the event signalled", .. }, .. }
    );
    refused!(dropped("sample"), E::WaitCount { .. });
    refused!(dropped("admit"), E::BeginEvent { .. });
}

#[test]
fn steps_do_not_overlap() {
    // The next step begins when the logits are there: the sampler may still be reading them.
    let early = verdict(|p| {
        let (sample, admit) = (find(p, "sample"), find(p, "admit"));
        p.tasks[admit].wait_event = p.tasks[sample].wait_event;
        recount(p);
    });
    refused!(early, E::OutsideStep { between: "before the step's end", .. });
    // A sampler without a signal, and an admission that does not wait for it.
    let unsignalled = verdict(|p| {
        let (sample, admit) = (find(p, "sample"), find(p, "admit"));
        p.tasks[admit].wait_event = p.tasks[sample].wait_event;
        p.tasks[sample].signal_event = EventId::NONE;
        recount(p);
    });
    refused!(unsignalled, E::Race { across_steps: true, .. });
    refused!(verdict(|p| p.begin_event = EventId(2)), E::BeginEvent { event: 2, .. });
    let twice = verdict(|p| {
        let (embed, admit) = (find(p, "embed"), find(p, "admit"));
        p.tasks[embed].signal_event = p.tasks[admit].signal_event;
        recount(p);
    });
    refused!(twice, E::BeginEvent { .. });
}

#[test]
fn cycles_and_wrong_lists_are_refused() {
    let cycle = verdict(|p| {
        let (embed, down) = (find(p, "embed"), find(p, "layer 0 down tile 0"));
        p.tasks[embed].wait_event = p.tasks[down].signal_event;
        recount(p);
    });
    refused!(cycle, E::Cycle { .. });
    let itself = verdict(|p| {
        let at = find(p, "layer 0 down tile 0");
        p.tasks[at].wait_event = p.tasks[at].signal_event;
        recount(p);
    });
    refused!(itself, E::Cycle { .. });
    let listed = verdict(|p| {
        let (a, b) = (find(p, "layer 0 down tile 0"), find(p, "layer 1 qkv tile 0"));
        p.tasks.swap(a, b);
        p.names.swap(a, b);
    });
    refused!(listed, E::ListOrder { .. });
}

#[test]
fn queues_hold_every_task_once_in_order() {
    let last = |p: &Program| p.queue_entries.len() - 1;
    refused!(verdict(|p| p.queue_entries[1] = p.queue_entries[2]), E::QueueCount { .. });
    refused!(verdict(|p| p.queue_entries.swap(3, 4)), E::QueueOrder { queue_idx: 0, .. });
    refused!(
        verdict(|p| {
            p.queue_entries.pop();
        }),
        E::QueueSpan { .. }
    );
    refused!(verdict(|p| { p.queue_entries.push(0) }), E::Count { what: "queue entries", .. });
    refused!(
        verdict(|p| {
            let at = last(p);
            p.queue_entries[at] = 1 << 20
        }),
        E::QueueEntry { .. }
    );
    refused!(verdict(|p| p.queue_spans[1].first -= 1), E::QueueSpan { queue_idx: 1, .. });
    refused!(verdict(|p| p.queue_spans[1].count += 1), E::QueueSpan { queue_idx: 1, .. });
    let dropped = verdict(|p| {
        p.queue_entries.pop();
        p.queue_spans[1].count -= 1;
        p.queue_spans[2].first -= 1;
    });
    refused!(dropped, E::QueueCount { count: 0, .. });
    let duplicated = verdict(|p| {
        p.queue_entries.push(0);
        p.queue_spans[2].count += 1;
    });
    refused!(duplicated, E::QueueCount { count: 2, .. });
    refused!(verdict(|p| p.queue_spans.push(QueueSpan::default())), E::Plan | E::QueueSpan { .. });
}

#[test]
fn errors_name_the_tasks() {
    let error = verdict(|p| {
        let at = find(p, "layer 1 down tile 1");
        p.tasks[at].wait_count -= 1;
    });
    let text = error.to_string();
    assert!(text.starts_with("task `layer 1 down tile 1` waits for "), "{text}");
}
