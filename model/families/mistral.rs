//! Mistral: Llama without biases, with an optional sliding window on every layer.

use super::{AttentionBias, Family, LLAMA_NAMES, Window};

pub(super) const FAMILY: Family = Family {
    model_type: "mistral",
    class_name: "MistralForCausalLM",
    attention_bias: AttentionBias::Never,
    may_have_mlp_bias: false,
    has_qk_norm: false,
    window: Window::EveryLayer,
    names: LLAMA_NAMES,
};
