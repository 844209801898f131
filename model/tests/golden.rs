//! The reference against logits and greedy tokens that `transformers` computed in f32.
//!
//! Files in `tests/golden/<family>/`: `golden.json` (prompt, greedy ids), `golden.safetensors`
//! (logits), and the checkpoint in f32 and in bf16.

use safetensors::SafeTensors;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tilert_mk_model::config::ModelConfig;
use tilert_mk_model::reference::{Reference, argmax};
use tilert_mk_model::weights::{Dtype, TensorView, WeightSource};

/// Both sides sum in different orders; 1e-4 is 4e-5 of the logits' standard deviation of 2.7.
const TOLERANCE: f32 = 1e-4;

struct Tensors(BTreeMap<String, (Dtype, Vec<u64>, Vec<u8>)>);

impl Tensors {
    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let entry = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
            let dtype = match view.dtype() {
                safetensors::Dtype::F32 => Dtype::F32,
                safetensors::Dtype::BF16 => Dtype::Bf16,
                other => panic!("{name} has type {other:?}"),
            };
            let shape = view.shape().iter().map(|axis| *axis as u64).collect();
            (name, (dtype, shape, view.data().to_vec()))
        };
        Self(file.tensors().into_iter().map(entry).collect())
    }

    /// The rows of a matrix.
    fn rows(&self, name: &str) -> Vec<Vec<f32>> {
        let view = self.tensor(name).unwrap();
        view.to_f32().chunks(view.shape[1] as usize).map(<[f32]>::to_vec).collect()
    }
}

impl WeightSource for Tensors {
    fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let (dtype, shape, data) = self.0.get(name)?;
        Some(TensorView { dtype: *dtype, shape, data })
    }
}

fn read_json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// Largest difference; panics with the first bad coordinate above the tolerance.
fn compare(what: &str, found: &[Vec<f32>], expected: &[Vec<f32>]) -> f32 {
    assert_eq!(found.len(), expected.len(), "{what}: rows");
    let mut worst = 0f32;
    for (row, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.len(), expected.len(), "{what}: columns of row {row}");
        for (column, (found, expected)) in found.iter().zip(expected).enumerate() {
            let difference = (found - expected).abs();
            assert!(difference <= TOLERANCE, "{what}[{row}, {column}]: {found} not {expected}");
            worst = worst.max(difference);
        }
    }
    worst
}

/// Runs prompt and greedy decoding of both variants of one family.
fn check(family: &str) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(family);
    let golden = read_json(&folder.join("golden.json"));
    let tensors = Tensors::read(&folder.join("golden.safetensors"));
    for variant in golden["variants"].as_array().unwrap() {
        let name = variant["name"].as_str().unwrap();
        let checkpoint = folder.join(variant["dir"].as_str().unwrap());
        let text = std::fs::read_to_string(checkpoint.join("config.json")).unwrap();
        let config = ModelConfig::parse(&text).unwrap();
        let weights = Tensors::read(&checkpoint.join("model.safetensors"));
        let mut reference = Reference::new(&config, &weights).unwrap();

        let prompt = reference.forward(&ids(&golden["prompt"]));
        let worst_prompt = compare("logits", &prompt, &tensors.rows(&format!("{name}.logits")));
        let mut row = prompt.last().unwrap().clone();
        let (mut greedy, mut rows) = (Vec::new(), Vec::new());
        for _ in 0..golden["new_tokens"].as_u64().unwrap() {
            let token = argmax(&row);
            greedy.push(token);
            rows.push(std::mem::replace(&mut row, reference.forward(&[token]).remove(0)));
        }
        assert_eq!(greedy, ids(&variant["greedy"]), "{family} {name}: greedy tokens");
        let expected = tensors.rows(&format!("{name}.gen_logits"));
        let worst_decode = compare("gen_logits", &rows, &expected);
        println!("{family} {name}: prompt {worst_prompt:e}, decode {worst_decode:e}");
    }
}

/// The file that transformers 5 wrote gives the same configuration as the hub's spelling.
fn check_new_spelling(family: &str) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(family);
    let parse = |name: &str| {
        ModelConfig::parse(&std::fs::read_to_string(folder.join(name)).unwrap()).unwrap()
    };
    assert_eq!(parse("f32/config.json"), parse("config_v5.json"));
}

#[test]
fn llama() {
    check("llama");
    check_new_spelling("llama");
}

#[test]
fn smollm2() {
    check("smollm2");
    check_new_spelling("smollm2");
}

#[test]
fn qwen3() {
    check("qwen3");
    check_new_spelling("qwen3");
}

#[test]
fn qwen3_yarn() {
    check("qwen3_yarn");
    check_new_spelling("qwen3_yarn");
}
