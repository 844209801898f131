//! The PTX that ships, executed: the same answers as the CPU machine, no race, no hang.

#[path = "common/ptx_device.rs"]
mod ptx_device;

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

/// What one run produces.
#[derive(PartialEq)]
struct Output {
    ids: Vec<u32>,
    rows: Vec<Vec<f32>>,
}

/// A run on `device` of a prompt in steps of `width` tokens.
fn run(family: &str, folder: &str, device: Box<dyn Device>, width: u32) -> Result<Output, Error> {
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
        prompt: &[74, 179, 209, 167, 92, 25, 102, 252, 72],
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

fn run_cpu(family: &str, folder: &str) -> Output {
    run(family, folder, Box::new(CpuDevice::new()), 8).expect("the CPU machine works")
}

/// The PTX for `capability`, and the shared memory of a block of such chips.
fn kernel(capability: u32) -> (&'static str, u32) {
    let (_, text) = kernels().find(|(kind, _)| *kind == capability).expect("the kernel is built");
    let bytes = SHARED_BYTES.iter().find(|(kind, _)| *kind == capability);
    (text, bytes.map_or(0, |(_, bytes)| *bytes))
}

/// A run of the PTX for `capability`, which must be free of findings.
fn run_ptx(
    [family, folder]: [&str; 2],
    capability: u32,
    workers: u32,
    width: u32,
    seed: u64,
) -> Output {
    let (text, shared_bytes) = kernel(capability);
    let options = PtxOptions { text: text.to_owned(), workers, shared_bytes, seed };
    let (device, report) = PtxDevice::new(options);
    let output = run(family, folder, Box::new(device), width);
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
            let expected = run_cpu(family, folder);
            for (capability, workers) in [(90, [1, 2, 5][idx % 3]), (80, 2)] {
                let found = run_ptx([family, folder], capability, workers, 8, 11);
                assert_close(&found, &expected);
            }
        }
    }
}

#[test]
fn widths_workers_and_schedules_leave_the_bits_alone() {
    let expected = run_ptx(["qwen3", "bf16"], 90, 2, 8, 0);
    for (seed, (width, workers)) in (1..).zip([(1, 1), (2, 3), (3, 2), (5, 5), (8, 1), (8, 2)]) {
        let found = run_ptx(["qwen3", "bf16"], 90, workers, width, seed);
        assert!(found == expected, "{workers} workers, width {width} differ");
    }
}

/// A mistake planted in the PTX: what it is, the text to find, what replaces it there.
struct Planted {
    what: &'static str,
    capability: u32,
    find: &'static str,
    replace: &'static str,
}

const PLANTED: [Planted; 12] = [
    planted("a dropped acquire fence", 90, "fence.acq_rel.gpu;", ""),
    planted("a relaxed signal", 90, "red.release.gpu", "red.relaxed.gpu"),
    planted(
        "a poll of too narrow a scope",
        90,
        "ld.relaxed.gpu.global.u32",
        "ld.relaxed.cta.global.u32",
    ),
    planted("a signal of too narrow a scope", 90, "red.release.gpu", "red.release.cta"),
    planted("a dropped barrier", 90, "barrier.cta.sync 1, 256;", ""),
    planted(
        "pages that nobody waits for",
        90,
        "mbarrier.try_wait.parity.shared::cta.b64 p, [",
        "setp.eq.u32 p, 1, 1; //",
    ),
    planted("pages that are released before they are read", 90, "bar.warp.sync 0xffffffff;", ""),
    planted("a copy that is not made", 90, "cp.async.bulk.shared", "// cp.async.bulk.shared"),
    planted(
        "bytes that no barrier expects",
        90,
        "mbarrier.arrive.expect_tx.shared::cta.b64 state, [",
        "mbarrier.arrive.shared.b64 state, [",
    ),
    planted("input rows that are not stored", 90, "st.shared.v2.u32", "// st.shared.v2.u32"),
    planted(
        "a copy that no barrier learns of",
        80,
        "cp.async.mbarrier.arrive.noinc.shared.b64",
        "mbarrier.arrive.shared.b64 _,",
    ),
    planted("an older chip's dropped fence", 80, "fence.acq_rel.gpu;", ""),
];

const fn planted(
    what: &'static str,
    capability: u32,
    find: &'static str,
    replace: &'static str,
) -> Planted {
    Planted { what, capability, find, replace }
}

#[test]
fn planted_mistakes_are_found() {
    for Planted { what, capability, find, replace } in &PLANTED {
        let (text, shared_bytes) = kernel(*capability);
        assert!(text.contains(find), "{what}: nothing to replace");
        let options =
            PtxOptions { text: text.replace(find, replace), workers: 2, shared_bytes, seed: 5 };
        let (device, report) = PtxDevice::new(options);
        let output = run("qwen3", "bf16", Box::new(device), 8);
        let mut lines = report.lock().expect("the device has not panicked").findings.clone();
        lines.extend(output.err().map(|error| error.to_string()));
        assert!(!lines.is_empty(), "{what} is not found");
        println!("{what}: {}", lines[0]);
        assert!(lines.iter().any(|line| line.contains("task")), "{what}: {lines:?}");
    }
}

#[test]
fn a_stalled_worker_is_named_with_what_it_waits_for() {
    // Block 1 never computes: its warps sleep for ever after the block's first barrier.
    let (text, shared_bytes) = kernel(90);
    let begin = text.find("tilert_mk(").expect("the kernel's entry");
    let barrier = "barrier.cta.sync 0;";
    let place = begin + text[begin..].find(barrier).expect("the block's first barrier");
    let stall = "{ .reg .pred stalls; .reg .b32 block; mov.u32 block, %ctaid.x;\n\
                 setp.ne.u32 stalls, block, 0;\n\
                 STALL: @stalls nanosleep.u32 1000;\n@stalls bra STALL; }";
    let text = format!("{}{barrier}\n{stall}{}", &text[..place], &text[place + barrier.len()..]);
    let options = PtxOptions { text, workers: 2, shared_bytes, seed: 3 };
    let (device, _) = PtxDevice::new(options);
    let error = run("qwen3", "bf16", Box::new(device), 8).err().expect("the run cannot end");
    let message = error.to_string();
    println!("{message}");
    assert!(message.contains("worker 0 waited too long before `layer 0"), "{message}");
}
