//! Families of networks: what tells them apart, as data.
//!
//! A family is one file with one constant: which keys of its `config.json` count, which tensors it
//! has, and what they are called. To add one, add a file, a variant and a line in `family`. The ops
//! and the lowering do not know that families exist.

mod llama;
mod mistral;
mod qwen2;
mod qwen3;

use std::fmt;

/// A family of networks: which tensors exist and what happens between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 2 and 3, and everything published under the same class, such as SmolLM2.
    Llama,
    /// Mistral: Llama with an optional sliding window on every layer.
    Mistral,
    /// Qwen2 and Qwen2.5: Llama with biases on q, k and v that no config key mentions.
    Qwen2,
    /// Qwen3 dense: Llama with an RMSNorm on every query and key head before RoPE.
    Qwen3,
}

impl Architecture {
    /// All families, in the order in which error messages list them.
    pub const ALL: [Self; 4] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3];

    /// What tells the family apart.
    pub const fn family(self) -> &'static Family {
        match self {
            Self::Llama => &llama::FAMILY,
            Self::Mistral => &mistral::FAMILY,
            Self::Qwen2 => &qwen2::FAMILY,
            Self::Qwen3 => &qwen3::FAMILY,
        }
    }

    /// The `model_type` of the family in `config.json`.
    pub const fn model_type(self) -> &'static str {
        self.family().model_type
    }

    /// The class name in `architectures` of `config.json`.
    pub const fn class_name(self) -> &'static str {
        self.family().class_name
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.model_type())
    }
}

/// One family.
#[derive(Debug)]
pub struct Family {
    /// The `model_type` in `config.json`.
    pub model_type: &'static str,
    /// The class in `architectures` of `config.json`.
    pub class_name: &'static str,
    /// Which projections of attention have biases.
    pub attention_bias: AttentionBias,
    /// Whether the key `mlp_bias` may be true; it gives gate, up and down biases.
    pub may_have_mlp_bias: bool,
    /// Whether query and key heads are normalised before RoPE.
    pub has_qk_norm: bool,
    /// Which keys make a sliding window.
    pub window: Window,
    /// What the tensors are called.
    pub names: TensorNames,
}

/// Biases of the projections of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionBias {
    /// On q, k, v and o if the key `attention_bias` is true.
    ByKey,
    /// On q, k and v always, on o never.
    QkvAlways,
    /// Nowhere.
    Never,
}

/// Where a family's sliding window comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    /// There is none; the key is ignored.
    Never,
    /// The key `sliding_window` holds for every layer.
    EveryLayer,
    /// The same key holds for some layers, if `use_sliding_window` is true.
    BySwitch,
}

/// Names of a checkpoint's tensors, without `.weight` and `.bias`. Those of a layer follow
/// `layer_prefix`, the layer's number and a dot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorNames {
    /// `[vocab_size, hidden_dim]`.
    pub embedding: &'static str,
    /// Before a layer's number.
    pub layer_prefix: &'static str,
    /// `[hidden_dim]`.
    pub input_norm: &'static str,
    /// `[query_dim, hidden_dim]`.
    pub query: &'static str,
    /// `[kv_dim, hidden_dim]`.
    pub key: &'static str,
    /// `[kv_dim, hidden_dim]`.
    pub value: &'static str,
    /// `[head_dim]`.
    pub query_norm: &'static str,
    /// `[head_dim]`.
    pub key_norm: &'static str,
    /// `[hidden_dim, query_dim]`.
    pub output: &'static str,
    /// `[hidden_dim]`.
    pub post_norm: &'static str,
    /// `[intermediate_dim, hidden_dim]`.
    pub gate: &'static str,
    /// `[intermediate_dim, hidden_dim]`.
    pub up: &'static str,
    /// `[hidden_dim, intermediate_dim]`.
    pub down: &'static str,
    /// `[hidden_dim]`.
    pub final_norm: &'static str,
    /// `[vocab_size, hidden_dim]`, unless the embedding serves.
    pub head: &'static str,
}

/// The names that Llama has and most families kept.
pub const LLAMA_NAMES: TensorNames = TensorNames {
    embedding: "model.embed_tokens",
    layer_prefix: "model.layers.",
    input_norm: "input_layernorm",
    query: "self_attn.q_proj",
    key: "self_attn.k_proj",
    value: "self_attn.v_proj",
    query_norm: "self_attn.q_norm",
    key_norm: "self_attn.k_norm",
    output: "self_attn.o_proj",
    post_norm: "post_attention_layernorm",
    gate: "mlp.gate_proj",
    up: "mlp.up_proj",
    down: "mlp.down_proj",
    final_norm: "model.norm",
    head: "lm_head",
};

impl TensorNames {
    /// A layer's tensor.
    pub fn in_layer(&self, layer_idx: u32, part: &str) -> String {
        format!("{}{layer_idx}.{part}", self.layer_prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_told_apart_by_both_names() {
        for (at, family) in Architecture::ALL.into_iter().enumerate() {
            for other in &Architecture::ALL[at + 1..] {
                assert_ne!(family.model_type(), other.model_type());
                assert_ne!(family.class_name(), other.class_name());
            }
            assert!(family.class_name().ends_with("ForCausalLM"));
        }
    }
}
