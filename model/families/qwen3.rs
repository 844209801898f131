//! Qwen3 dense: an RMSNorm on every query and key head before RoPE.

use super::{AttentionBias, Family, LLAMA_NAMES, Window};

pub(super) const FAMILY: Family = Family {
    model_type: "qwen3",
    class_name: "Qwen3ForCausalLM",
    attention_bias: AttentionBias::ByKey,
    may_have_mlp_bias: false,
    has_qk_norm: true,
    window: Window::BySwitch,
    names: LLAMA_NAMES,
};
