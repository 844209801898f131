//! Programs of empty tasks, as `bench runtime` times them, on the shipped kernel.

use std::ops::ControlFlow;

use tilert_mk::driver::Device;
use tilert_mk::engine::{DeviceKind, Engine, EngineOptions, Request};
use tilert_mk_model::lower::EmptyShape;

use crate::{run_clean, shipped};

/// The tokens of steps without arithmetic.
fn tokens(device: Box<dyn Device>, shape: EmptyShape) -> Vec<u32> {
    let options = EngineOptions {
        workers: Some(2),
        max_context: Some(16),
        step_tokens: 1,
        wait_ns_max: 50_000_000,
        ..EngineOptions::default()
    };
    let mut engine = Engine::open_empty(device, &options, &shape, 96).expect("it can be opened");
    let mut ids = Vec::new();
    for _ in 0..2 {
        let request = Request::greedy(&[0], 3);
        let answer = engine.generate(&request, &mut |_| ControlFlow::Continue(()));
        ids.extend(answer.expect("the request ends").ids);
    }
    ids
}

#[test]
fn empty_stages_end_and_sample_as_on_the_cpu() {
    // More than the lanes look at together, too.
    for [stage_count, stage_tasks] in [[0, 0], [3, 1], [3, 2], [3, 3], [3, 260]] {
        let shape = EmptyShape::new(stage_count, stage_tasks);
        let expected = tokens(DeviceKind::Cpu.open(1, false).expect("the CPU is there"), shape);
        for capability in [80, 90] {
            let what = format!("{shape:?}, sm_{capability}");
            let found = run_clean(&what, shipped(capability, 2, 7), |device| tokens(device, shape));
            assert_eq!(found, expected, "{what}");
        }
    }
}
