//! Checkpoints whose matrices are FP8: they are multiplied with their own codes and scales.

mod files;
mod refused;

use std::path::Path;

use tilert_mk::engine::{DeviceKind, Engine, EngineOptions, LoadMode, ModelSource, Weights};
use tilert_mk_model::weights::Dtype;

use crate::play::{Answer, Plan, open_with, play};
use crate::quantised::{check, expected};
use files::Files;

/// What of a model is FP8, and the type of its scales.
const VARIANTS: [(&str, Dtype, &[&str]); 5] = [
    ("qwen3/bf16", Dtype::F32, &[]),
    ("qwen3/bf16", Dtype::Bf16, &["layers.1.self_attn", "layers.0.mlp.down", "layers.2.mlp"]),
    ("smollm2/bf16", Dtype::F32, &["o_proj"]),
    ("llama/f32", Dtype::Bf16, &[]),
    ("qwen3_yarn/bf16", Dtype::F32, &["_proj"]),
];

fn answer(path: &Path, shape: [u32; 2], weights: Weights, plan: &Plan) -> Answer {
    let [workers, step_tokens] = shape;
    let mut engine = open_with(path, workers, 1, step_tokens, weights);
    play(&mut engine, 1, std::slice::from_ref(plan)).remove(0)
}

#[test]
fn logits_are_those_of_codes_times_scales() {
    let plan = Plan::new(1, 13, 6);
    for (name, scales_dtype, plain) in VARIANTS {
        let files = Files::golden(name).in_fp8(scales_dtype, plain);
        let (ids, rows) = expected(&files.config(), &files.widened(), &plan);
        let folder = files.write();
        let mut bits = None;
        for shape in [[1, 64], [2, 1], [3, 5]] {
            let answer = answer(folder.path(), shape, Weights::Native, &plan);
            check(&answer, &ids, &rows, &format!("{name} {plain:?}"));
            let known = bits.get_or_insert_with(|| answer.rows.clone());
            assert!(*known == answer.rows, "{name} {plain:?}, {shape:?}: other bits");
        }
    }
}

#[test]
fn bits_are_those_of_the_same_codes_and_scales_made_at_load() {
    let plan = Plan::new(2, 21, 4);
    for name in ["qwen3/bf16", "smollm2/bf16", "llama/f32"] {
        let files = Files::golden(name).with_selecting_head();
        let quantised = files.write();
        let stored = files.in_fp8(Dtype::F32, &[]).write();
        for shape in [[1, 64], [3, 5]] {
            let made = answer(quantised.path(), shape, Weights::Fp8, &plan);
            let read = answer(stored.path(), shape, Weights::Native, &plan);
            assert!(made == read, "{name}, {shape:?}: other bits");
        }
    }
}

#[test]
fn matrices_that_are_not_fp8_are_multiplied_as_they_are() {
    // Whether a configuration lists all modules or has no quantisation is the same.
    let plan = Plan::new(3, 9, 3);
    let plain = Files::golden("qwen3/bf16");
    let listed = plain.clone().in_fp8(Dtype::F32, &["_proj"]);
    let [plain, listed] = [plain, listed].map(|files| files.write());
    let [plain, listed] =
        [&plain, &listed].map(|folder| answer(folder.path(), [2, 64], Weights::Native, &plan));
    assert!(plain == listed);
}

fn engine(path: &Path, load: LoadMode) -> Engine {
    let options = EngineOptions {
        workers: Some(2),
        max_context: Some(256),
        load,
        ..EngineOptions::default()
    };
    let device = DeviceKind::Cpu.open(1, false).expect("the CPU is there");
    Engine::open(ModelSource::Directory(path), device, &options, &mut |_, _| {}).expect("it opens")
}

#[test]
fn sizes_are_those_of_codes_and_scales() {
    let files = Files::golden("qwen3/bf16").in_fp8(Dtype::F32, &["down_proj"]);
    let folder = files.write();
    let [mut read, mut kept, mut count] = [0u64; 3];
    for (name, tensor) in &files.tensors {
        let bytes = tensor.data.len() as u64;
        if !name.ends_with("_scale_inv") {
            count += tensor.shape.iter().product::<usize>() as u64;
        }
        match tensor.dtype {
            // A byte for each value and four for each row of a block, which has 128 columns.
            Dtype::F8E4m3 => {
                let rows = tensor.shape[0] as u64;
                read += rows * tensor.shape[1].div_ceil(128) as u64 * 132;
            }
            // The embedding serves as the head.
            Dtype::Bf16 if tensor.shape.len() == 2 => read += bytes,
            Dtype::Bf16 => kept += bytes,
            _ => {}
        }
    }
    for load in [LoadMode::Map, LoadMode::Copy, LoadMode::Dummy] {
        let engine = engine(folder.path(), load);
        assert_eq!(engine.parameter_count(), count, "{load:?}");
        assert_eq!(engine.bytes_per_token(), read, "{load:?}");
        assert_eq!(engine.weight_bytes(), read + kept, "{load:?}");
    }
}

#[test]
fn copied_and_made_up_weights_run() {
    let plan = Plan::new(4, 7, 3);
    let folder =
        Files::golden("qwen3/bf16").in_fp8(Dtype::Bf16, &["q_proj", "k_proj", "v_proj"]).write();
    let run =
        |load| play(&mut engine(folder.path(), load), 1, std::slice::from_ref(&plan)).remove(0);
    assert!(run(LoadMode::Map) == run(LoadMode::Copy));
    let config_alone = tempfile::tempdir().expect("a temporary folder");
    Files::golden("qwen3/bf16").in_fp8(Dtype::F32, &[]).write_config(config_alone.path());
    let mut engine = engine(config_alone.path(), LoadMode::Dummy);
    let answer = play(&mut engine, 1, std::slice::from_ref(&plan)).remove(0);
    assert!(answer.rows.iter().flatten().all(|bits| f32::from_bits(*bits).is_finite()));
}
