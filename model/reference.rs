//! The slow, obvious forward pass: what every device op and every program is compared with.
//!
//! Invariant: one plain loop per operator, no tiles, no threads, no SIMD, no cleverness. Weights
//! are widened to f32 exactly; sums are f64 and rounded once, so an error here is far below that of
//! any f32 order of summation. Every operator here has a twin in the device crate.
//! Used by tests; sizes come from a parsed `ModelConfig`, tensors are untrusted.

mod ops;
mod sample;

use crate::config::ModelConfig;
use crate::rope;
use crate::weights::{Dtype, WeightSource};

pub use ops::{
    AttentionShape, add, argmax, attention, dot, embed, matvec, merge, rms_norm, rope, silu_mul,
    softmax,
};
pub use sample::{penalise, sample};

/// Why the reference could not be made from a set of weights.
#[derive(Debug, thiserror::Error)]
pub enum ReferenceError {
    /// The source has no such tensor in a supported element type.
    #[error("the weights have no tensor `{name}` of type F32, F16 or BF16")]
    Missing {
        /// Name of the tensor.
        name: String,
    },
    /// A tensor's shape is not what the configuration says.
    #[error("tensor `{name}` has shape {found:?}, the configuration needs {expected:?}")]
    Shape {
        /// Name of the tensor.
        name: String,
        /// Shape in the source.
        found: Vec<u64>,
        /// Shape by the configuration.
        expected: Vec<u64>,
    },
    /// A tensor's bytes are not what its shape says.
    #[error("tensor `{name}` has {byte_count} bytes, which does not fit its shape")]
    Length {
        /// Name of the tensor.
        name: String,
        /// Bytes in the source.
        byte_count: u64,
    },
}

/// A matrix and, where the family has one, its bias.
struct Linear {
    /// `[out, in]`, row-major.
    weight: Vec<f32>,
    /// `[out]`, or empty.
    bias: Vec<f32>,
}

impl Linear {
    /// `weight * x + bias`.
    fn apply(&self, x: &[f32]) -> Vec<f32> {
        let mut y = matvec(&self.weight, x);
        if !self.bias.is_empty() {
            add(&mut y, &self.bias);
        }
        y
    }
}

/// Weights and cache of one decoder layer.
struct Layer {
    input_norm: Vec<f32>,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    /// `[head_dim]`, or empty.
    query_norm: Vec<f32>,
    /// `[head_dim]`, or empty.
    key_norm: Vec<f32>,
    post_norm: Vec<f32>,
    gate: Linear,
    up: Linear,
    down: Linear,
    /// `[positions, kv_head_count, head_dim]`, rotated.
    key_cache: Vec<f32>,
    /// `[positions, kv_head_count, head_dim]`.
    value_cache: Vec<f32>,
}

/// One network with one sequence.
pub struct Reference {
    config: ModelConfig,
    /// `[vocab_size, hidden_dim]`.
    embedding: Vec<f32>,
    layers: Vec<Layer>,
    final_norm: Vec<f32>,
    /// `[vocab_size, hidden_dim]`, or empty where the embedding serves.
    head: Vec<f32>,
    /// `[head_dim / 2]`.
    inv_freq: Vec<f32>,
    attention_factor: f32,
    /// Tokens already in the caches; the position of the next one.
    position: u32,
}

impl Reference {
    /// Copies all weights out of `source`, widened to f32.
    ///
    /// Errors:  `ReferenceError` for the first tensor that is missing or has another shape.
    /// Cost:    four bytes for every parameter.
    pub fn new(config: &ModelConfig, source: &dyn WeightSource) -> Result<Self, ReferenceError> {
        let loader = Loader { config, source };
        let table = [config.vocab_size, config.hidden_dim];
        let names = &config.architecture.family().names;
        let layers: Result<Vec<_>, _> =
            (0..config.layer_count).map(|layer_idx| loader.layer(layer_idx)).collect();
        Ok(Self {
            embedding: loader.tensor(&weight(names.embedding), &table)?,
            layers: layers?,
            final_norm: loader.tensor(&weight(names.final_norm), &[config.hidden_dim])?,
            head: loader.tensor_if(!config.tied_head, &weight(names.head), &table)?,
            inv_freq: rope::inv_freq(config),
            attention_factor: rope::attention_factor(config),
            position: 0,
            config: config.clone(),
        })
    }

    /// Forgets the sequence.
    pub fn reset(&mut self) {
        self.position = 0;
        for layer in &mut self.layers {
            layer.key_cache.clear();
            layer.value_cache.clear();
        }
    }

    /// Appends `tokens` to the sequence and gives the logits after each of them.
    ///
    /// Shapes:  result `[tokens, vocab_size]`.
    /// Bounds:  the length of the sequence is not checked against `position_max`.
    ///
    /// # Panics
    /// If a token is not below `vocab_size`: the caller checks tokens, as it must for the device.
    pub fn forward(&mut self, tokens: &[u32]) -> Vec<Vec<f32>> {
        tokens.iter().map(|token| self.step(*token)).collect()
    }

    /// Runs one token through the whole network and appends it to the sequence.
    fn step(&mut self, token: u32) -> Vec<f32> {
        assert!(token < self.config.vocab_size, "token {token} is outside the vocabulary");
        let hidden_dim = self.config.hidden_dim as usize;
        let (cos, sin) = rope::row(&self.inv_freq, self.attention_factor, self.position);
        let mut hidden = embed(&self.embedding, hidden_dim, token);
        for layer in &mut self.layers {
            let mixed = layer.attend(&self.config, &hidden, (&cos, &sin));
            add(&mut hidden, &mixed);
            let transformed = layer.transform(&self.config, &hidden);
            add(&mut hidden, &transformed);
        }
        self.position += 1;
        let normed = rms_norm(&hidden, &self.final_norm, self.config.rms_norm_eps);
        let head = if self.config.tied_head { &self.embedding } else { &self.head };
        matvec(head, &normed)
    }
}

impl Layer {
    /// Attention of one token over the cache, to which it is appended: what is added to `hidden`.
    fn attend(
        &mut self,
        config: &ModelConfig,
        hidden: &[f32],
        (cos, sin): (&[f32], &[f32]),
    ) -> Vec<f32> {
        let head_dim = config.head_dim as usize;
        let x = rms_norm(hidden, &self.input_norm, config.rms_norm_eps);
        let (mut query, mut key) = (self.query.apply(&x), self.key.apply(&x));
        for (heads, norm) in [(&mut query, &self.query_norm), (&mut key, &self.key_norm)] {
            for head in heads.chunks_exact_mut(head_dim) {
                if config.qk_norm {
                    head.copy_from_slice(&rms_norm(head, norm, config.rms_norm_eps));
                }
                rope(head, cos, sin);
            }
        }
        self.key_cache.extend(key);
        self.value_cache.extend(self.value.apply(&x));
        let shape = AttentionShape {
            head_count: config.head_count,
            kv_head_count: config.kv_head_count,
            head_dim: config.head_dim,
            sliding_window: config.sliding_window,
        };
        self.output.apply(&attention(&shape, &query, &self.key_cache, &self.value_cache))
    }

    /// The gated MLP of one token: what is added to `hidden`.
    fn transform(&self, config: &ModelConfig, hidden: &[f32]) -> Vec<f32> {
        let x = rms_norm(hidden, &self.post_norm, config.rms_norm_eps);
        self.down.apply(&silu_mul(&self.gate.apply(&x), &self.up.apply(&x)))
    }
}

/// Name of the weight of a matrix or a norm.
fn weight(name: &str) -> String {
    format!("{name}.weight")
}

/// Reads named tensors and checks them against the configuration.
struct Loader<'a> {
    config: &'a ModelConfig,
    source: &'a dyn WeightSource,
}

impl Loader<'_> {
    /// A tensor of exactly this shape.
    fn tensor(&self, name: &str, shape: &[u32]) -> Result<Vec<f32>, ReferenceError> {
        let name = name.to_owned();
        let view = self.source.tensor(&name).filter(|view| view.dtype != Dtype::F8E4m3);
        let Some(view) = view else {
            return Err(ReferenceError::Missing { name });
        };
        let expected: Vec<u64> = shape.iter().map(|axis| u64::from(*axis)).collect();
        if view.shape != expected {
            return Err(ReferenceError::Shape { name, found: view.shape.to_vec(), expected });
        }
        if !view.is_consistent() {
            let byte_count = view.data.len() as u64;
            return Err(ReferenceError::Length { name, byte_count });
        }
        Ok(view.to_f32())
    }

    /// A tensor that only some networks have; empty in the others.
    fn tensor_if(
        &self,
        exists: bool,
        name: &str,
        shape: &[u32],
    ) -> Result<Vec<f32>, ReferenceError> {
        if exists { self.tensor(name, shape) } else { Ok(Vec::new()) }
    }

    /// A matrix `[rows, columns]` with an optional bias `[rows]`.
    fn linear(&self, name: &str, shape: [u32; 2], biased: bool) -> Result<Linear, ReferenceError> {
        let weight = self.tensor(&weight(name), &shape)?;
        let [rows, _] = shape;
        Ok(Linear { weight, bias: self.tensor_if(biased, &format!("{name}.bias"), &[rows])? })
    }

    /// All tensors of one layer, with empty caches.
    fn layer(&self, layer_idx: u32) -> Result<Layer, ReferenceError> {
        let c = self.config;
        let names = &c.architecture.family().names;
        let name = |part: &str| names.in_layer(layer_idx, part);
        let norm = |part: &str| self.tensor(&weight(&name(part)), &[c.hidden_dim]);
        let head_norm = |part: &str| self.tensor_if(c.qk_norm, &weight(&name(part)), &[c.head_dim]);
        let linear =
            |part: &str, rows, columns, biased| self.linear(&name(part), [rows, columns], biased);
        Ok(Layer {
            input_norm: norm(names.input_norm)?,
            query: linear(names.query, c.query_dim(), c.hidden_dim, c.qkv_bias)?,
            key: linear(names.key, c.kv_dim(), c.hidden_dim, c.qkv_bias)?,
            value: linear(names.value, c.kv_dim(), c.hidden_dim, c.qkv_bias)?,
            output: linear(names.output, c.hidden_dim, c.query_dim(), c.output_bias)?,
            query_norm: head_norm(names.query_norm)?,
            key_norm: head_norm(names.key_norm)?,
            post_norm: norm(names.post_norm)?,
            gate: linear(names.gate, c.intermediate_dim, c.hidden_dim, c.mlp_bias)?,
            up: linear(names.up, c.intermediate_dim, c.hidden_dim, c.mlp_bias)?,
            down: linear(names.down, c.hidden_dim, c.intermediate_dim, c.mlp_bias)?,
            key_cache: Vec::new(),
            value_cache: Vec::new(),
        })
    }
}

#[cfg(test)]
mod tests;
