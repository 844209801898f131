//! What these tests ask of checkpoints besides.

use serde_json::Value;
use tilert_mk_model::config::ModelConfig;
use tilert_mk_model::quantise::e4m3_to_f32;
use tilert_mk_model::weights::{Dtype, WeightSource};

use crate::fp8_files::BLOCK;
pub(crate) use crate::fp8_files::{Files, Stored, scales_name};
use crate::quantised::Widened;

impl Files {
    /// Gives the model a head that shows the hidden state: a logit is 448 times one of its values,
    /// in bf16 as well as with the scale that its blocks have in FP8, which is 1.
    pub(crate) fn with_selecting_head(mut self) -> Files {
        let table = &self.tensors["model.embed_tokens.weight"];
        let (dtype, shape) = (table.dtype, table.shape.clone());
        let mut data = Vec::new();
        for idx in 0..shape[0] * shape[1] {
            let (row, column) = (idx / shape[1], idx % shape[1]);
            dtype.append(if row % shape[1] == column { 448.0 } else { 0.0 }, &mut data);
        }
        self.tensors.insert("lm_head.weight".to_owned(), Stored { dtype, shape, data });
        self.config["tie_word_embeddings"] = Value::Bool(false);
        self
    }

    pub(crate) fn config(&self) -> ModelConfig {
        ModelConfig::parse(&self.config.to_string()).expect("a valid config.json")
    }

    /// What all tensors mean, in f32: codes times scales.
    pub(crate) fn widened(&self) -> impl WeightSource + use<> {
        let widen = |(name, tensor): (&String, &Stored)| {
            let mut values = tensor.values();
            if tensor.dtype == Dtype::F8E4m3 {
                let (scales, columns) =
                    (self.tensors[&scales_name(name)].values(), tensor.shape[1]);
                let per_row = columns.div_ceil(BLOCK);
                for (idx, code) in tensor.data.iter().enumerate() {
                    let (row, column) = (idx / columns, idx % columns);
                    let scale = scales[row / BLOCK * per_row + column / BLOCK];
                    values[idx] = e4m3_to_f32(*code) * scale;
                }
            }
            let shape: Vec<u64> = tensor.shape.iter().map(|axis| *axis as u64).collect();
            (name.clone(), shape, values)
        };
        Widened::of(self.tensors.iter().map(widen))
    }
}
