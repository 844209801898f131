//! Families that have no golden files, and refusals.

use super::*;
use crate::weights::{Dtype, TensorView};
use std::collections::BTreeMap;

/// Tensors of f32 elements in memory.
#[derive(Default)]
struct Memory(BTreeMap<String, (Vec<u64>, Vec<u8>)>);

impl Memory {
    fn set(&mut self, name: &str, shape: &[u64], value: impl Fn(u64) -> f32) {
        let count: u64 = shape.iter().product();
        let data = (0..count).flat_map(|i| value(i).to_le_bytes()).collect();
        self.0.insert(name.to_owned(), (shape.to_vec(), data));
    }
}

impl WeightSource for Memory {
    fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let (shape, data) = self.0.get(name)?;
        Some(TensorView { dtype: Dtype::F32, shape, data })
    }
}

/// One layer, hidden 8, two heads of 4 on one key/value head, MLP 8, vocabulary 16.
fn config(extra: &str) -> ModelConfig {
    let json = format!(
        r#"{{"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16,
        "max_position_embeddings": 64, {extra}}}"#
    );
    ModelConfig::parse(&json).unwrap()
}

/// All tensors that any family with these dimensions reads.
fn memory() -> Memory {
    let mut memory = Memory::default();
    let wave = |scale: f32, offset: u64| {
        move |i: u64| scale * ((i * 37 + offset * 11) % 17) as f32 - 8.0 * scale
    };
    memory.set("model.embed_tokens.weight", &[16, 8], wave(0.1, 1));
    memory.set("lm_head.weight", &[16, 8], wave(0.1, 2));
    memory.set("model.norm.weight", &[8], |_| 1.0);
    for norm in ["input_layernorm", "post_attention_layernorm"] {
        memory.set(&format!("model.layers.0.{norm}.weight"), &[8], |_| 1.0);
    }
    for (offset, (part, rows)) in (3..).zip([
        ("self_attn.q_proj", 8),
        ("self_attn.k_proj", 4),
        ("self_attn.v_proj", 4),
        ("self_attn.o_proj", 8),
        ("mlp.gate_proj", 8),
        ("mlp.up_proj", 8),
        ("mlp.down_proj", 8),
    ]) {
        let name = format!("model.layers.0.{part}");
        memory.set(&format!("{name}.weight"), &[rows, 8], wave(0.05, offset));
        memory.set(&format!("{name}.bias"), &[rows], wave(0.02, offset + 20));
    }
    memory
}

fn logits(extra: &str, memory: &Memory) -> Vec<Vec<f32>> {
    Reference::new(&config(extra), memory).unwrap().forward(&[1, 2, 3, 4])
}

#[test]
fn each_bias_flag_changes_the_result() {
    let memory = memory();
    let plain = logits(r#""model_type": "llama""#, &memory);
    let qkv = logits(r#""model_type": "qwen2""#, &memory);
    let qkvo = logits(r#""model_type": "llama", "attention_bias": true"#, &memory);
    let mlp = logits(r#""model_type": "llama", "mlp_bias": true"#, &memory);
    let tied = logits(r#""model_type": "llama", "tie_word_embeddings": true"#, &memory);
    let all = [plain, qkv, qkvo, mlp, tied];
    for (i, left) in all.iter().enumerate() {
        assert!(all[..i].iter().all(|right| left != right), "variant {i} equals an earlier one");
    }
}

#[test]
fn a_bias_of_zero_is_no_bias() {
    let mut memory = memory();
    for (part, rows) in [("q", 8), ("k", 4), ("v", 4), ("o", 8)] {
        memory.set(&format!("model.layers.0.self_attn.{part}_proj.bias"), &[rows], |_| 0.0);
    }
    let plain = logits(r#""model_type": "llama""#, &memory);
    assert_eq!(logits(r#""model_type": "qwen2""#, &memory), plain);
    assert_eq!(logits(r#""model_type": "llama", "attention_bias": true"#, &memory), plain);
}

#[test]
fn the_window_hides_old_keys_only() {
    let memory = memory();
    let plain = logits(r#""model_type": "mistral""#, &memory);
    let wide = logits(r#""model_type": "mistral", "sliding_window": 4"#, &memory);
    let narrow = logits(r#""model_type": "mistral", "sliding_window": 2"#, &memory);
    assert_eq!(plain, wide);
    assert_eq!(plain[..2], narrow[..2]);
    assert_ne!(plain[2], narrow[2]);
}

#[test]
fn reset_and_continuation() {
    let memory = memory();
    let config = config(r#""model_type": "llama""#);
    let mut reference = Reference::new(&config, &memory).unwrap();
    let whole = reference.forward(&[1, 2, 3]);
    reference.reset();
    let mut parts = reference.forward(&[1]);
    parts.extend(reference.forward(&[2, 3]));
    assert_eq!(whole, parts);
}

#[test]
fn missing_and_wrong_tensors_are_named() {
    let error = |memory: &Memory| {
        let config = config(r#""model_type": "llama""#);
        Reference::new(&config, memory).err().unwrap().to_string()
    };
    let mut broken = memory();
    broken.0.remove("model.layers.0.mlp.up_proj.weight");
    assert!(error(&broken).contains("no tensor `model.layers.0.mlp.up_proj.weight`"));
    broken.set("model.layers.0.mlp.up_proj.weight", &[4, 16], |_| 0.0);
    assert!(error(&broken).contains("has shape [4, 16], the configuration needs [8, 8]"));
    let mut short = memory();
    short.0.get_mut("model.norm.weight").unwrap().1.pop();
    assert!(error(&short).contains("`model.norm.weight` has 31 bytes"));
}
