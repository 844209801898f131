//! Broken checkpoints: one line that names what is wrong.

use std::path::Path;

use serde_json::json;
use tilert_mk::engine::{DeviceKind, Engine, EngineOptions, ModelSource, Weights};
use tilert_mk::error::Error;
use tilert_mk_model::weights::Dtype;

use super::files::{Files, Stored, scales_name};

const UP: &str = "model.layers.1.mlp.up_proj.weight";
const DOWN: &str = "model.layers.1.mlp.down_proj.weight";
const KEY: &str = "model.layers.0.self_attn.k_proj.weight";
const TABLE: &str = "model.embed_tokens.weight";

fn error_of(path: &Path, weights: Weights) -> Error {
    let options = EngineOptions { workers: Some(2), weights, ..EngineOptions::default() };
    let device = DeviceKind::Cpu.open(1, false).expect("the CPU is there");
    let opened = Engine::open(ModelSource::Directory(path), device, &options, &mut |_, _| {});
    opened.err().expect("an error")
}

/// The error of a good checkpoint after an edit; it must have all of `named` and one line.
#[track_caller]
fn refused(named: &[&str], edit: impl Fn(&mut Files)) {
    let mut files = Files::golden("qwen3/bf16").in_fp8(Dtype::F32, &[]);
    edit(&mut files);
    let error = error_of(files.write().path(), Weights::Native);
    let message = error.to_string();
    assert_eq!((message.lines().count(), error.exit_code()), (1, 1), "{message}");
    for part in named {
        assert!(message.contains(part), "{message:?} does not contain {part:?}");
    }
}

fn tensor<'a>(files: &'a mut Files, name: &str) -> &'a mut Stored {
    files.tensors.get_mut(name).expect("a tensor")
}

#[test]
fn tensors_that_are_missing_or_misshapen() {
    let scales = scales_name(UP);
    refused(&[&scales, "has no tensor"], |files| {
        files.tensors.remove(&scales);
    });
    refused(&[&scales, "[1, 1]", "[2, 1]"], |files| {
        let tensor = tensor(files, &scales);
        (tensor.shape, tensor.data) = (vec![1, 1], vec![0; 4]);
    });
    // One scale for the whole matrix has no axes.
    refused(&[&scales, "[]"], |files| {
        let tensor = tensor(files, &scales);
        (tensor.shape, tensor.data) = (vec![], vec![0; 4]);
    });
    refused(&[UP, "[80, 128]", "[160, 64]"], |files| tensor(files, UP).shape = vec![80, 128]);
}

#[test]
fn tensors_of_other_types() {
    refused(&[UP, "is BF16, not F8_E4M3 as config.json says"], |files| {
        let plain = Files::golden("qwen3/bf16").tensors[UP].clone();
        files.tensors.insert(UP.to_owned(), plain);
    });
    refused(&[&scales_name(UP), "is F16, not F32 or BF16 as scales are"], |files| {
        let scales = tensor(files, &scales_name(UP));
        *scales = scales.cast(Dtype::F16);
    });
    refused(&[DOWN, "is F8_E4M3, not BF16 as config.json and the embedding say"], |files| {
        let modules = &mut files.config["quantization_config"]["modules_to_not_convert"];
        *modules = json!([DOWN.trim_end_matches(".weight")]);
    });
    // The table and vectors have no scales.
    for name in [TABLE, "model.norm.weight"] {
        refused(&[name, "is F8_E4M3, not"], |files| {
            let tensor = tensor(files, name);
            *tensor = tensor.cast(Dtype::F8E4m3);
        });
    }
    refused(&["`model.layers.0.self_attn.q_proj.weight` is FP8", KEY, "layer 0 qkv"], |files| {
        files.config["quantization_config"]["ignored_layers"] =
            json!([KEY.trim_end_matches(".weight")]);
    });
}

#[test]
fn codes_and_scales_that_are_no_numbers() {
    for code in [0x7f, 0xff] {
        refused(&[UP, "not finite numbers"], |files| {
            *tensor(files, UP).data.last_mut().expect("codes") = code;
        });
    }
    for scale in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        refused(&[KEY, "not finite numbers"], |files| {
            tensor(files, &scales_name(KEY)).data[..4].copy_from_slice(&scale.to_le_bytes());
        });
    }
}

#[test]
fn files_that_are_cut() {
    let folder = Files::golden("qwen3/bf16").in_fp8(Dtype::F32, &[]).write();
    let path = folder.path().join("model.safetensors");
    let whole = std::fs::read(&path).expect("the file");
    for byte_count in [0, 7, 1000, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..byte_count]).expect("the file can be written");
        let message = error_of(folder.path(), Weights::Native).to_string();
        assert!(message.contains("model.safetensors") && message.lines().count() == 1, "{message}");
    }
}

#[test]
fn formats_that_the_checkpoint_does_not_have() {
    let folder = Files::golden("qwen3/bf16").in_fp8(Dtype::F32, &[]).write();
    for weights in [Weights::Q8, Weights::Q4, Weights::Fp8] {
        let error = error_of(folder.path(), weights);
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("--weights native"), "{error}");
    }
}
