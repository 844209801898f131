//! Qwen2 and Qwen2.5: biases on q, k and v, which no key of config.json mentions.

use super::{AttentionBias, Family, LLAMA_NAMES, Window};

pub(super) const FAMILY: Family = Family {
    model_type: "qwen2",
    class_name: "Qwen2ForCausalLM",
    attention_bias: AttentionBias::QkvAlways,
    may_have_mlp_bias: false,
    has_qk_norm: false,
    window: Window::BySwitch,
    names: LLAMA_NAMES,
};
