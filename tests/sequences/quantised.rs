//! Quantised weights: logits are those of the slow reference on what the weights then mean.

use std::collections::BTreeMap;

use tilert_mk::engine::Weights;
use tilert_mk::load::Checkpoint;
use tilert_mk_model::config::ModelConfig;
use tilert_mk_model::quantise::dequantised;
use tilert_mk_model::reference::Reference;
use tilert_mk_model::weights::{Dtype, TensorView, WeightSource};
use tilert_mk_shared::task::WeightFormat;

use crate::play::{Answer, Plan, checkpoint, open_with, play};

/// Both sides sum in different orders, as for the golden checkpoints.
const TOLERANCE: f32 = 1e-4;
const TABLE: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// A tensor in f32.
struct Tensor {
    shape: Vec<u64>,
    data: Vec<u8>,
}

/// A checkpoint in f32, whose matrices have been quantised and widened again.
pub(crate) struct Widened(BTreeMap<String, Tensor>);

impl Widened {
    /// Tensors of name, shape and values.
    pub(crate) fn of(tensors: impl Iterator<Item = (String, Vec<u64>, Vec<f32>)>) -> Widened {
        let tensor = |(name, shape, values): (String, _, Vec<f32>)| {
            let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            (name, Tensor { shape, data })
        };
        Widened(tensors.map(tensor).collect())
    }

    /// All but the embedding, which is looked up as it is stored; a tied head is its own tensor.
    fn new(stored: &Checkpoint, format: WeightFormat) -> Widened {
        let mut tensors = BTreeMap::new();
        for name in stored.names() {
            let view = stored.tensor(name).expect("a supported type");
            let values = view.to_f32();
            let widen = |values: &[f32]| Tensor {
                shape: view.shape.to_vec(),
                data: values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            };
            let [.., columns] = *view.shape else { panic!("{name} is a scalar") };
            let quantised = || widen(&dequantised(format, &values, columns as usize));
            if name == TABLE {
                tensors.entry(HEAD.to_owned()).or_insert_with(quantised);
                tensors.insert(name.to_owned(), widen(&values));
            } else if view.shape.len() == 2 {
                tensors.insert(name.to_owned(), quantised());
            } else {
                tensors.insert(name.to_owned(), widen(&values));
            }
        }
        Widened(tensors)
    }
}

impl WeightSource for Widened {
    fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let Tensor { shape, data } = self.0.get(name)?;
        Some(TensorView { dtype: Dtype::F32, shape, data })
    }
}

/// The rows of logits of a prompt and some tokens after it, by the reference.
pub(crate) fn expected(
    config: &ModelConfig,
    weights: &dyn WeightSource,
    plan: &Plan,
) -> (Vec<u32>, Vec<Vec<f32>>) {
    let mut reference = Reference::new(config, weights).expect("all tensors");
    let mut rows = reference.forward(&plan.prompt);
    let mut ids = Vec::new();
    while ids.len() < plan.max_tokens as usize {
        let last = rows.last().expect("a row for each token");
        let id = tilert_mk_model::reference::argmax(last);
        ids.push(id);
        if ids.len() < plan.max_tokens as usize {
            rows.extend(reference.forward(&[id]));
        }
    }
    (ids, rows)
}

/// Compares an answer with what is expected of it.
#[track_caller]
pub(crate) fn check(answer: &Answer, ids: &[u32], rows: &[Vec<f32>], what: &str) {
    assert_eq!(answer.ids, ids, "{what}");
    assert_eq!(answer.rows.len(), rows.len(), "{what}");
    for (found, expected) in answer.rows.iter().flatten().zip(rows.iter().flatten()) {
        let difference = (f32::from_bits(*found) - expected).abs();
        assert!(difference <= TOLERANCE, "{what}: off by {difference}");
    }
}

#[test]
fn logits_are_those_of_the_widened_weights() {
    let plan = Plan::new(1, 13, 6);
    let formats = [
        (Weights::Q8, WeightFormat::Q8),
        (Weights::Q4, WeightFormat::Q4),
        (Weights::Fp8, WeightFormat::Fp8),
    ];
    for name in ["llama/f32", "smollm2/bf16", "qwen3/bf16", "qwen3_yarn/bf16"] {
        let path = checkpoint(name);
        for (weights, format) in formats {
            let stored = Checkpoint::open(&path).expect("a golden checkpoint");
            let mut config = ModelConfig::parse(stored.config_text()).expect("a valid config.json");
            config.tied_head = false;
            let (ids, rows) = expected(&config, &Widened::new(&stored, format), &plan);
            let mut bits = None;
            for (workers, step_tokens) in [(1, 64), (2, 1), (3, 5)] {
                let mut engine = open_with(&path, workers, 1, step_tokens, weights);
                let answer = play(&mut engine, 1, std::slice::from_ref(&plan)).remove(0);
                check(&answer, &ids, &rows, &format!("{name} {format:?}"));
                let known = bits.get_or_insert_with(|| answer.rows.clone());
                assert!(*known == answer.rows, "{name} {format:?}, {workers} workers: other bits");
            }
        }
    }
}
