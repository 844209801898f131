//! Weights in E4M3 and in integers on the kernel: the CPU's logits, and one set of bits.

use std::path::Path;

use tilert_mk::driver::Device;
use tilert_mk::driver::cuda::{Kernel, Purpose, kernels};
use tilert_mk::engine::{DeviceKind, Engine, EngineOptions, ModelSource, Weights};
use tilert_mk_model::weights::Dtype;

use super::fp8_files::Files;
use super::peers::shipped_peers;
use super::ptx_device::PtxOptions;
use super::{Output, PROMPT, answer, golden_folder, run_clean, shipped};

/// Largest difference from the CPU's logits.
const TOLERANCE: f32 = 1e-4;

/// An answer of a checkpoint.
fn run(path: &Path, weights: Weights, device: Box<dyn Device>, width: u32) -> Output {
    let options = EngineOptions {
        max_context: Some(64),
        step_tokens: width,
        wait_ns_max: 50_000_000,
        weights,
        ..EngineOptions::default()
    };
    let source = ModelSource::Directory(path);
    let mut engine = Engine::open(source, device, &options, &mut |_, _| ()).expect("it opens");
    answer(&mut engine, &PROMPT, 3).expect("the request ends")
}

/// The shipped PTX for a purpose, unchanged.
pub(crate) fn shipped_for(purpose: Purpose, workers: u32, seed: u64) -> PtxOptions {
    let is_it = |kernel: &Kernel| kernel.purpose == purpose;
    let text = kernels().find(is_it).expect("the kernel is built").text;
    PtxOptions { text: text.to_owned(), ..shipped(90, workers, seed) }
}

/// The largest difference of two outputs' logits.
fn difference(a: &Output, b: &Output) -> f32 {
    let pairs = a.rows.concat().into_iter().zip(b.rows.concat());
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Compares a checkpoint on the kernel with the CPU, and with itself on other workers, widths and GPUs.
fn check(name: &str, path: &Path, weights: Weights) {
    let is_integer = matches!(weights, Weights::Q8 | Weights::Q4);
    let purpose = if is_integer { Purpose::Integers } else { Purpose::Fp8 };
    let shipped = |workers, seed| shipped_for(purpose, workers, seed);
    let cpu = DeviceKind::Cpu.open(1, false).expect("the CPU is there");
    let expected = run(path, weights, cpu, 8);
    let on = |options, width| {
        run_clean("quantised", options, |device| run(path, weights, device, width))
    };
    let first = on(shipped(2, 5), 8);
    let worst = difference(&first, &expected);
    println!("{name} {weights:?}: max|dlogit| {worst:.2e}");
    assert!(worst <= TOLERANCE, "{name}: {worst}");
    assert_eq!((first.ids.len(), &first.ids), (3, &expected.ids), "{name}");
    let mut others = vec![(shipped(1, 6), 1), (shipped(5, 7), 3)];
    if !is_integer {
        others.push((shipped_peers(2, 4, 9), 8));
    }
    for (options, width) in others {
        assert!(on(options, width).is_same(&first), "{name}, width {width}");
    }
}

/// The same for golden checkpoints, quantised when they are loaded.
fn check_golden(names: [&str; 2], weights: Weights) {
    for name in names {
        check(name, &golden_folder(name), weights);
    }
}

#[test]
fn fp8_weights_give_the_logits_of_the_cpu_and_one_set_of_bits() {
    check_golden(["qwen3/bf16", "llama/f32"], Weights::Fp8);
}

#[test]
fn so_do_integers_of_8_bits() {
    check_golden(["qwen3/bf16", "llama/f32"], Weights::Q8);
}

#[test]
fn so_do_integers_of_4_bits() {
    check_golden(["qwen3/bf16", "smollm2/f32"], Weights::Q4);
}

#[test]
fn so_do_checkpoints_in_fp8_with_other_matrices_beside() {
    // Also the head, which is the embedding, stays as it is.
    let plain = ["layers.1.self_attn", "layers.0.mlp.down"];
    for (golden, scales) in [("qwen3/bf16", Dtype::F32), ("smollm2/bf16", Dtype::Bf16)] {
        let folder = Files::golden(golden).in_fp8(scales, &plain).write();
        check(golden, folder.path(), Weights::Native);
    }
}
