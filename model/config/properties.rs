//! Random input to the parser: never a panic, and never a value outside the bounds.

use super::tests::with;
use super::*;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

/// Any JSON value of limited depth, biased to numbers near the bounds.
fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0u64..70).prop_map(|power| Value::from(1u64.checked_shl(power as u32).unwrap_or(0))),
        any::<f64>().prop_map(Value::from),
        "[a-z0-9]{0,8}".prop_map(Value::from),
        prop_oneof![Just("yarn"), Just("linear"), Just("llama3")].prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 12, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(scaling_key(), inner, 0..4)
                .prop_map(|map| Value::from(map.into_iter().collect::<Map<_, _>>())),
        ]
    })
}

/// One of some words.
fn key(words: &'static str) -> impl Strategy<Value = String> {
    prop::sample::select(words.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
}

fn scaling_key() -> impl Strategy<Value = String> {
    key("rope_type type factor rope_theta beta_fast low_freq_factor high_freq_factor
        original_max_position_embeddings")
}

fn config_key() -> impl Strategy<Value = String> {
    key("model_type architectures hidden_size intermediate_size num_hidden_layers
        num_attention_heads num_key_value_heads head_dim vocab_size max_position_embeddings
        rms_norm_eps rope_theta rope_scaling rope_parameters sliding_window eos_token_id
        bos_token_id mlp_bias")
}

/// Asserts what the type promises.
fn within_bounds(config: &ModelConfig) {
    assert!(config.hidden_dim <= HIDDEN_DIM_MAX && config.hidden_dim.is_multiple_of(8));
    assert!(config.intermediate_dim <= INTERMEDIATE_DIM_MAX);
    assert!((1..=LAYER_COUNT_MAX).contains(&config.layer_count));
    assert!(config.query_dim() <= QUERY_DIM_MAX && config.query_dim().is_multiple_of(8));
    assert!(config.head_count.is_multiple_of(config.kv_head_count));
    assert!(config.head_dim.is_multiple_of(2) && config.head_dim <= HEAD_DIM_MAX);
    assert!((1..=VOCAB_SIZE_MAX).contains(&config.vocab_size));
    assert!(config.rms_norm_eps > 0.0 && config.rms_norm_eps.is_finite());
    assert!(config.eos_ids.iter().all(|id| *id < config.vocab_size));
    let inv_freq = crate::rope::inv_freq(config);
    assert!(inv_freq.iter().all(|frequency| frequency.is_finite()), "{config:?}");
    assert!(crate::rope::attention_factor(config).is_finite(), "{config:?}");
}

proptest! {
    #[test]
    fn any_text_gives_a_value_or_an_error(text in ".{0,200}") {
        let _ = ModelConfig::parse(&text);
    }

    #[test]
    fn any_values_under_known_keys_stay_within_bounds(
        changes in prop::collection::btree_map(config_key(), any_value(), 0..4)
    ) {
        let changes = Value::from(changes.into_iter().collect::<Map<_, _>>());
        if let Ok(config) = ModelConfig::parse(&with(changes)) {
            within_bounds(&config);
        }
    }

    #[test]
    fn any_scaling_stays_finite(
        theta in 0.0f64..1e13, factor in 0.0f64..1e7, original in 0u32..1 << 25,
        first in 0.0f64..100.0, second in 0.0f64..100.0, kind in 0usize..3, truncate: bool,
    ) {
        let kind = ["linear", "llama3", "yarn"][kind];
        let scaling = json!({"type": kind, "factor": factor, "low_freq_factor": first,
            "high_freq_factor": second, "beta_slow": first, "beta_fast": second,
            "original_max_position_embeddings": original, "truncate": truncate});
        let changes = json!({"rope_theta": theta, "rope_scaling": scaling});
        if let Ok(config) = ModelConfig::parse(&with(changes)) {
            within_bounds(&config);
        }
    }

    #[test]
    fn mutated_files_never_panic(position in 0usize..400, byte: u8) {
        let mut bytes = with(json!({"rope_scaling": {"type": "yarn", "factor": 4}})).into_bytes();
        if let Some(target) = bytes.get_mut(position) {
            *target = byte;
        }
        if let Ok(text) = String::from_utf8(bytes)
            && let Ok(config) = ModelConfig::parse(&text)
        {
            within_bounds(&config);
        }
    }
}
