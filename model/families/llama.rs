//! Llama 2 and 3, and what is published under their class, such as SmolLM2.

use super::{AttentionBias, Family, LLAMA_NAMES, Window};

pub(super) const FAMILY: Family = Family {
    model_type: "llama",
    class_name: "LlamaForCausalLM",
    attention_bias: AttentionBias::ByKey,
    may_have_mlp_bias: true,
    has_qk_norm: false,
    window: Window::Never,
    names: LLAMA_NAMES,
};
