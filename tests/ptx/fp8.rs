//! E4M3 weights on the kernel: the CPU's logits, and one set of bits.

use tilert_mk::driver::Device;
use tilert_mk::driver::cuda::{Kernel, Purpose, kernels};
use tilert_mk::engine::{DeviceKind, Engine, EngineOptions, ModelSource, Weights};

use super::peers::shipped_peers;
use super::ptx_device::PtxOptions;
use super::{Output, PROMPT, answer, golden_folder, run_clean, shipped};

/// Largest difference from the CPU's logits.
const TOLERANCE: f32 = 1e-4;

/// A golden checkpoint, quantised when it is loaded.
fn run([family, folder]: [&str; 2], device: Box<dyn Device>, width: u32) -> Output {
    let options = EngineOptions {
        max_context: Some(64),
        step_tokens: width,
        wait_ns_max: 50_000_000,
        weights: Weights::Fp8,
        ..EngineOptions::default()
    };
    let path = golden_folder(family).join(folder);
    let source = ModelSource::Directory(&path);
    let mut engine = Engine::open(source, device, &options, &mut |_, _| ()).expect("it opens");
    answer(&mut engine, &PROMPT, 3).expect("the request ends")
}

/// The shipped PTX for E4M3 weights, unchanged.
fn shipped_fp8(workers: u32, seed: u64) -> PtxOptions {
    let is_it = |kernel: &Kernel| kernel.purpose == Purpose::Fp8;
    let text = kernels().find(is_it).expect("the kernel is built").text;
    PtxOptions { text: text.to_owned(), ..shipped(90, workers, seed) }
}

/// The largest difference of two outputs' logits.
fn difference(a: &Output, b: &Output) -> f32 {
    let pairs = a.rows.concat().into_iter().zip(b.rows.concat());
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn fp8_weights_give_the_logits_of_the_cpu_and_one_set_of_bits() {
    for golden in [["qwen3", "bf16"], ["llama", "f32"]] {
        let cpu = DeviceKind::Cpu.open(1, Weights::Native, false).expect("the CPU is there");
        let expected = run(golden, cpu, 8);
        let on = |options, width| run_clean("fp8", options, |device| run(golden, device, width));
        let first = on(shipped_fp8(2, 5), 8);
        let worst = difference(&first, &expected);
        println!("{golden:?}: max|dlogit| {worst:.2e}");
        assert!(worst <= TOLERANCE, "{golden:?}: {worst}");
        assert_eq!((first.ids.len(), &first.ids), (3, &expected.ids), "{golden:?}");
        for (options, width) in
            [(shipped_fp8(1, 6), 1), (shipped_fp8(5, 7), 3), (shipped_peers(2, 4, 9), 8)]
        {
            assert!(on(options, width).is_same(&first), "{golden:?}, width {width}");
        }
    }
}
