//! The PTX that ships, executed: the reference's answers, no race, no hang.

mod edit;
mod empty;
#[path = "../common/fp8_files.rs"]
mod fp8_files;
mod golden;
mod heads;
mod peers;
mod planted;
#[path = "../common/ptx_device.rs"]
mod ptx_device;
mod quantised;
mod seeds;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use ptx_device::{PtxDevice, PtxOptions};
use tilert_mk::driver::Device;
use tilert_mk::driver::cuda::{Kernel, Purpose, kernels};
use tilert_mk::engine::{Engine, EngineOptions, Event, ModelSource, Request};
use tilert_mk::error::Error;

/// Shared memory of one block of the chips that the two kernels are made for.
const SHARED_BYTES: [(u32, u32); 2] = [(90, 227 << 10), (80, 163 << 10)];
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

/// Where a family's checkpoints and reference outputs are.
fn golden_folder(family: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(family)
}

/// `max_tokens` tokens after `prompt`, on `device`, in steps of `width` tokens.
fn run(
    [family, folder]: [&str; 2],
    device: Box<dyn Device>,
    width: u32,
    prompt: &[u32],
    max_tokens: u32,
) -> Result<Output, Error> {
    let path = golden_folder(family).join(folder);
    answer(&mut open(&path, device, width)?, prompt, max_tokens)
}

/// A checkpoint on `device`, in steps of `width` tokens.
fn open(path: &Path, device: Box<dyn Device>, width: u32) -> Result<Engine, Error> {
    let options = EngineOptions {
        max_context: Some(64),
        step_tokens: width,
        wait_ns_max: 50_000_000,
        ..EngineOptions::default()
    };
    Engine::open(ModelSource::Directory(path), device, &options, &mut |_, _| ())
}

/// `max_tokens` tokens after `prompt`, with the logits of all positions.
fn answer(engine: &mut Engine, prompt: &[u32], max_tokens: u32) -> Result<Output, Error> {
    let greedy = Request::greedy(prompt, max_tokens);
    output(engine, &Request { want_logits: true, ..greedy })
}

/// What a request gets.
fn output(engine: &mut Engine, request: &Request) -> Result<Output, Error> {
    let mut rows = Vec::new();
    let completion = engine.generate(request, &mut |event| {
        if let Event::Logits { row, .. } = event {
            rows.push(row.to_vec());
        }
        ControlFlow::Continue(())
    })?;
    Ok(Output { ids: completion.ids, rows })
}

/// The shipped PTX for `capability`, unchanged.
fn shipped(capability: u32, workers: u32, seed: u64) -> PtxOptions {
    let is_it =
        |kernel: &Kernel| kernel.capability == capability && kernel.purpose == Purpose::Single;
    let text = kernels().find(is_it).expect("the kernel is built").text;
    let bytes = SHARED_BYTES.iter().find(|(kind, _)| *kind == capability);
    let shared_bytes = bytes.map_or(0, |(_, bytes)| *bytes);
    PtxOptions {
        text: text.to_owned(),
        devices: 1,
        workers,
        shared_bytes,
        seed,
        edit_tasks: |_| (),
    }
}

/// What `job` makes of a device that runs the PTX, which must be free of findings.
fn run_clean<T>(what: &str, options: PtxOptions, job: impl FnOnce(Box<dyn Device>) -> T) -> T {
    let (device, report) = PtxDevice::new(options);
    let result = job(Box::new(device));
    let report = report.lock().expect("the device has not panicked");
    assert!(report.findings.is_empty(), "{what}: {}", report.findings.join("\n"));
    assert!(report.lane_steps > 0, "{what}");
    result
}

/// A run of the PTX.
fn run_ptx(
    golden: [&str; 2],
    options: PtxOptions,
    width: u32,
    prompt: &[u32],
    max_tokens: u32,
) -> Output {
    run_clean("golden", options, |device| run(golden, device, width, prompt, max_tokens))
        .expect("the request ends")
}

#[test]
fn widths_workers_and_schedules_leave_the_bits_alone() {
    let expected = run_ptx(["qwen3", "bf16"], shipped(90, 2, 0), 8, &PROMPT, 2);
    for (seed, (width, workers)) in (1..).zip([(1, 1), (2, 3), (3, 2), (5, 5), (8, 1), (8, 2)]) {
        let found = run_ptx(["qwen3", "bf16"], shipped(90, workers, seed), width, &PROMPT, 2);
        assert!(found.is_same(&expected), "{workers} workers, width {width} differ");
    }
}

/// Steps of a prompt before its last have no logits: the head's weights are left alone.
#[test]
fn prompts_without_logits_give_the_same_tokens() {
    for (capability, folder) in [(90, "bf16"), (90, "f32"), (80, "bf16")] {
        let expected = run_ptx(["qwen3", folder], shipped(capability, 2, 0), 2, &PROMPT, 3);
        for workers in [1, 3] {
            let path = golden_folder("qwen3").join(folder);
            let found = run_clean(folder, shipped(capability, workers, 11), |device| {
                let mut engine = open(&path, device, 2).expect("it opens");
                output(&mut engine, &Request::greedy(&PROMPT, 3)).expect("it ends")
            });
            assert_eq!((found.ids, found.rows.len()), (expected.ids.clone(), 0));
        }
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
    let output = run(["qwen3", "bf16"], Box::new(device), 8, &PROMPT, 2);
    let error = output.err().expect("the run cannot end");
    let message = error.to_string();
    println!("{message}");
    let waited = "worker 0 waited too long for the input values of `layer 0";
    assert!(message.contains(waited), "{message}");
}

#[test]
fn weights_that_do_not_arrive_are_named() {
    for (capability, plant) in [(90, planted::more_bytes as fn(&str) -> String), (80, no_arrivals)]
    {
        let shipped = shipped(capability, 2, 3);
        let text = plant(&shipped.text);
        let (device, _) = PtxDevice::new(PtxOptions { text, ..shipped });
        let output = run(["qwen3", "bf16"], Box::new(device), 8, &PROMPT, 2);
        let message = output.err().expect("the run cannot end").to_string();
        println!("sm_{capability}: {message}");
        assert!(message.contains("waited too long for the weights of `layer 0"), "{message}");
    }
}

/// Copies by threads that no barrier learns of: their pages never become full.
fn no_arrivals(text: &str) -> String {
    const ARRIVE: &str = "cp.async.mbarrier.arrive.noinc.shared.b64";
    assert!(text.contains(ARRIVE), "the copies of older chips arrive");
    text.replace(ARRIVE, "//")
}
