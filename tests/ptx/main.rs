//! The PTX that ships, executed: the same answers as the CPU machine, no race, no hang.

mod edit;
mod planted;
#[path = "../common/ptx_device.rs"]
mod ptx_device;
mod seeds;

use std::ops::ControlFlow;
use std::path::PathBuf;

use ptx_device::{PtxDevice, PtxOptions};
use tilert_mk::driver::Device;
use tilert_mk::driver::cpu::CpuDevice;
use tilert_mk::driver::cuda::kernels;
use tilert_mk::engine::{Engine, EngineOptions, Event, ModelSource, Request};
use tilert_mk::error::Error;
use tilert_mk_shared::sample::SamplingParams;

/// Shared memory of one block of the chips that the two kernels are made for.
const SHARED_BYTES: [(u32, u32); 2] = [(90, 227 << 10), (80, 163 << 10)];
/// Largest difference of logits between the machines: both are within 1e-4 of the reference.
const TOLERANCE: f32 = 1e-4;

/// The prompt of most runs.
const PROMPT: [u32; 9] = [74, 179, 209, 167, 92, 25, 102, 252, 72];

/// What one run produces.
struct Output {
    ids: Vec<u32>,
    rows: Vec<Vec<f32>>,
}

impl Output {
    /// Whether the ids and every bit of the logits are the same.
    fn is_same(&self, other: &Output) -> bool {
        let bits = |output: &Output| -> Vec<Vec<u32>> {
            output
                .rows
                .iter()
                .map(|row| row.iter().map(|value| value.to_bits()).collect())
                .collect()
        };
        self.ids == other.ids && bits(self) == bits(other)
    }
}

/// Two tokens after `prompt`, on `device`, in steps of `width` tokens.
fn run(
    [family, folder]: [&str; 2],
    device: Box<dyn Device>,
    width: u32,
    prompt: &[u32],
) -> Result<Output, Error> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(family);
    let path = path.join(folder);
    let options = EngineOptions {
        max_context: Some(32),
        step_tokens: width,
        wait_ns_max: 50_000_000,
        ..EngineOptions::default()
    };
    let source = ModelSource::Directory(&path);
    let mut engine = Engine::open(source, device, &options, &mut |_, _| ())?;
    let request = Request {
        prompt,
        max_tokens: 2,
        stop_ids: &[],
        sampling: SamplingParams::GREEDY,
        want_logits: true,
    };
    let mut rows = Vec::new();
    let completion = engine.generate(&request, &mut |event| {
        if let Event::Logits { row, .. } = event {
            rows.push(row.to_vec());
        }
        ControlFlow::Continue(())
    })?;
    Ok(Output { ids: completion.ids, rows })
}

fn run_cpu(golden: [&str; 2]) -> Output {
    run(golden, Box::new(CpuDevice::new()), 8, &PROMPT).expect("the CPU machine works")
}

/// The shipped PTX for `capability`, unchanged.
fn shipped(capability: u32, workers: u32, seed: u64) -> PtxOptions {
    let (_, text) = kernels().find(|(kind, _)| *kind == capability).expect("the kernel is built");
    let bytes = SHARED_BYTES.iter().find(|(kind, _)| *kind == capability);
    let shared_bytes = bytes.map_or(0, |(_, bytes)| *bytes);
    PtxOptions { text: text.to_owned(), workers, shared_bytes, seed, edit_tasks: |_| () }
}

/// A run of the PTX, which must be free of findings.
fn run_ptx(golden: [&str; 2], options: PtxOptions, width: u32, prompt: &[u32]) -> Output {
    let (device, report) = PtxDevice::new(options);
    let output = run(golden, Box::new(device), width, prompt);
    let report = report.lock().expect("the device has not panicked");
    assert!(report.findings.is_empty(), "{}", report.findings.join("\n"));
    assert!(report.lane_steps > 0);
    output.expect("the request ends")
}

fn assert_close(found: &Output, expected: &Output) {
    assert_eq!(found.ids, expected.ids);
    assert_eq!(found.rows.len(), expected.rows.len());
    for (position, (found, expected)) in found.rows.iter().zip(&expected.rows).enumerate() {
        for (token, (found, expected)) in found.iter().zip(expected).enumerate() {
            let difference = (found - expected).abs();
            assert!(difference <= TOLERANCE, "position {position}, token {token}: {difference}");
        }
    }
}

#[test]
fn every_family_and_format_agrees_with_the_cpu() {
    for (idx, family) in ["llama", "smollm2", "qwen3", "qwen3_yarn"].into_iter().enumerate() {
        for folder in ["f32", "bf16"] {
            let expected = run_cpu([family, folder]);
            for (capability, workers) in [(90, [1, 2, 5][idx % 3]), (80, 2)] {
                let options = shipped(capability, workers, 11);
                let found = run_ptx([family, folder], options, 8, &PROMPT);
                assert_close(&found, &expected);
            }
        }
    }
}

#[test]
fn widths_workers_and_schedules_leave_the_bits_alone() {
    let expected = run_ptx(["qwen3", "bf16"], shipped(90, 2, 0), 8, &PROMPT);
    for (seed, (width, workers)) in (1..).zip([(1, 1), (2, 3), (3, 2), (5, 5), (8, 1), (8, 2)]) {
        let found = run_ptx(["qwen3", "bf16"], shipped(90, workers, seed), width, &PROMPT);
        assert!(found.is_same(&expected), "{workers} workers, width {width} differ");
    }
}

#[test]
fn a_stalled_worker_is_named_with_what_it_waits_for() {
    // Block 1 never computes: its warps sleep for ever after the block's first barrier.
    let PtxOptions { text, .. } = shipped(90, 2, 3);
    let begin = text.find("tilert_mk(").expect("the kernel's entry");
    let barrier = "barrier.cta.sync 0;";
    let place = begin + text[begin..].find(barrier).expect("the block's first barrier");
    let stall = "{ .reg .pred stalls; .reg .b32 block; mov.u32 block, %ctaid.x;\n\
                 setp.ne.u32 stalls, block, 0;\n\
                 STALL: @stalls nanosleep.u32 1000;\n@stalls bra STALL; }";
    let text = format!("{}{barrier}\n{stall}{}", &text[..place], &text[place + barrier.len()..]);
    let options = PtxOptions { text, ..shipped(90, 2, 3) };
    let (device, _) = PtxDevice::new(options);
    let output = run(["qwen3", "bf16"], Box::new(device), 8, &PROMPT);
    let error = output.err().expect("the run cannot end");
    let message = error.to_string();
    println!("{message}");
    assert!(message.contains("worker 0 waited too long before `layer 0"), "{message}");
}
