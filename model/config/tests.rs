//! Tests of the parser: published files in both spellings, and every refusal.

use super::*;
use serde_json::{Value, json};

/// A small valid configuration with some keys replaced; a null removes the key's effect.
pub(super) fn with(changes: Value) -> String {
    let mut root = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
        "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256,
        "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "bos_token_id": 0, "eos_token_id": 1
    });
    if let (Some(root), Value::Object(changes)) = (root.as_object_mut(), changes) {
        root.extend(changes);
    }
    root.to_string()
}

fn parse(changes: Value) -> ModelConfig {
    ModelConfig::parse(&with(changes)).unwrap()
}

fn error(changes: Value) -> String {
    ModelConfig::parse(&with(changes)).unwrap_err().to_string()
}

#[test]
fn smollm2_hub_file() {
    let json = r#"{"architectures": ["LlamaForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu",
        "hidden_size": 576, "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
        "is_llama_config": true, "max_position_embeddings": 8192, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30,
        "num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "use_cache": true,
        "vocab_size": 49152}"#;
    let expected = ModelConfig {
        architecture: Architecture::Llama,
        hidden_dim: 576,
        intermediate_dim: 1536,
        layer_count: 30,
        head_count: 9,
        kv_head_count: 3,
        head_dim: 64,
        vocab_size: 49152,
        position_max: 8192,
        rms_norm_eps: 1e-5,
        rope: Rope { theta: 1e5, scaling: RopeScaling::Default },
        tied_head: true,
        qkv_bias: false,
        output_bias: false,
        mlp_bias: false,
        qk_norm: false,
        sliding_window: None,
        fp8: None,
        eos_ids: vec![0],
        bos_id: Some(0),
    };
    assert_eq!(ModelConfig::parse(json).unwrap(), expected);
}

#[test]
fn old_and_new_spelling_agree() {
    let scaling = json!({"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32, "rope_type": "llama3"});
    let mut parameters = scaling.clone();
    parameters["rope_theta"] = json!(500000.0);
    let old = parse(json!({"rope_scaling": scaling}));
    let new = parse(json!({"rope_theta": null, "rope_parameters": parameters, "dtype": "float32"}));
    assert_eq!(old, new);
    let expected = RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_positions: 32,
    };
    assert_eq!(old.rope, Rope { theta: 5e5, scaling: expected });
}

#[test]
fn scaling_type_under_either_key() {
    let linear = RopeScaling::Linear { factor: 2.0 };
    for scaling in [
        json!({"type": "linear", "factor": 2}),
        json!({"rope_type": "linear", "factor": 2.0}),
        json!({"type": "yarn", "rope_type": "linear", "factor": 2.0}),
    ] {
        assert_eq!(parse(json!({"rope_scaling": scaling})).rope.scaling, linear);
    }
    let default = parse(json!({"rope_parameters": {"rope_theta": 1000000}})).rope;
    assert_eq!(default, Rope { theta: 1e6, scaling: RopeScaling::Default });
}

#[test]
fn yarn_defaults() {
    let scaling = parse(json!({"rope_scaling": {"type": "yarn", "factor": 4}})).rope.scaling;
    let expected = RopeScaling::Yarn {
        factor: 4.0,
        original_positions: 1024,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate: true,
        attention_factor: None,
        mscale: None,
        mscale_all_dim: None,
    };
    assert_eq!(scaling, expected);
}

#[test]
fn family_flags() {
    let flags = |changes: Value| {
        let config = parse(changes);
        (config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm)
    };
    assert_eq!(flags(json!({})), (false, false, false, false));
    assert_eq!(flags(json!({"attention_bias": true})), (true, true, false, false));
    assert_eq!(flags(json!({"mlp_bias": true})), (false, false, true, false));
    assert_eq!(flags(json!({"model_type": "mistral"})), (false, false, false, false));
    assert_eq!(flags(json!({"model_type": "qwen2"})), (true, false, false, false));
    let explicit = json!({"model_type": "qwen2", "attention_bias": false});
    assert_eq!(flags(explicit), (true, false, false, false));
    assert_eq!(flags(json!({"model_type": "qwen3"})), (false, false, false, true));
    let biased = json!({"model_type": "qwen3", "attention_bias": true});
    assert_eq!(flags(biased), (true, true, false, true));
}

#[test]
fn family_from_the_class_name_where_model_type_is_absent() {
    let config = parse(json!({"model_type": null, "architectures": ["Qwen3ForCausalLM"]}));
    assert_eq!(config.architecture, Architecture::Qwen3);
}

#[test]
fn sliding_window_by_family() {
    let window = |changes: Value| parse(changes).sliding_window;
    assert_eq!(window(json!({"sliding_window": 512})), None);
    assert_eq!(window(json!({"model_type": "mistral", "sliding_window": 512})), Some(512));
    assert_eq!(window(json!({"model_type": "mistral", "sliding_window": null})), None);
    let qwen = |used: bool, first: u32| {
        json!({"model_type": "qwen2", "sliding_window": 512, "use_sliding_window": used,
            "max_window_layers": first})
    };
    assert_eq!(window(qwen(false, 0)), None);
    assert_eq!(window(qwen(true, 0)), Some(512));
    assert_eq!(window(qwen(true, 3)), None);
    assert_eq!(window(qwen(true, 28)), None);
    assert!(error(qwen(true, 2)).contains("`use_sliding_window` is true"));
    let mut listed = qwen(true, 28);
    listed["layer_types"] = json!(["sliding_attention", "sliding_attention", "sliding_attention"]);
    assert_eq!(window(listed), Some(512));
}

#[test]
fn head_dim_absent_or_unequal_to_the_quotient() {
    assert_eq!(parse(json!({"head_dim": null})).head_dim, 16);
    let wide = parse(json!({"head_dim": 32}));
    assert_eq!((wide.head_dim, wide.query_dim(), wide.kv_dim()), (32, 128, 64));
    assert_eq!(parse(json!({"num_key_value_heads": null})).kv_head_count, 4);
}

#[test]
fn end_tokens() {
    assert_eq!(parse(json!({"eos_token_id": [3, 5]})).eos_ids, [3, 5]);
    assert!(parse(json!({"eos_token_id": null})).eos_ids.is_empty());
    let mut config = parse(json!({}));
    config.override_eos(r#"{"eos_token_id": [7, 8]}"#).unwrap();
    assert_eq!(config.eos_ids, [7, 8]);
    config.override_eos(r#"{"temperature": 0.6}"#).unwrap();
    assert_eq!(config.eos_ids, [7, 8]);
    let message = config.override_eos(r#"{"eos_token_id": 256}"#).unwrap_err().to_string();
    assert!(message.contains("generation_config.json: `eos_token_id` is 256"), "{message}");
    assert!(config.override_eos("[]").is_err());
    assert_eq!(config.eos_ids, [7, 8]);
}

/// Each change is refused with a message that contains the text beside it.
fn refused(cases: &[(Value, &str)]) {
    for (changes, expected) in cases {
        let message = error(changes.clone());
        assert!(message.contains(expected), "{message:?} does not contain {expected:?}");
    }
}

#[test]
fn refused_families() {
    refused(&[
        (json!({"model_type": "gpt2"}), "`model_type` is \"gpt2\" (accepted: llama, mistral"),
        (json!({"model_type": null, "architectures": null}), "no key `model_type`"),
        (json!({"architectures": ["LlamaModel"]}), "`architectures` is [\"LlamaModel\"]"),
        (json!({"hidden_act": "gelu"}), "`hidden_act` is \"gelu\" (accepted: silu)"),
        (json!({"model_type": "qwen3", "mlp_bias": true}), "`mlp_bias` is true"),
        (json!({"model_type": "mistral", "attention_bias": true}), "`attention_bias` is true"),
    ]);
}

/// A `quantization_config` with some keys replaced.
fn fp8(changes: Value) -> Value {
    let mut keys = json!({"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [128, 128]});
    if let (Some(keys), Value::Object(changes)) = (keys.as_object_mut(), changes) {
        keys.extend(changes);
    }
    json!({"quantization_config": keys})
}

#[test]
fn fp8_is_all_matrices_but_the_head_and_those_listed() {
    assert_eq!(parse(json!({"quantization_config": null})).fp8, None);
    let contains = |changes: Value, module: &str| parse(fp8(changes)).fp8.unwrap().contains(module);
    let up = "model.layers.1.mlp.up_proj";
    assert!(contains(json!({}), up) && !contains(json!({}), "lm_head"));
    for key in ["modules_to_not_convert", "ignored_layers"] {
        for listed in [up, "up_proj", "mlp.up_proj", "model.layers.1", "model"] {
            assert!(!contains(json!({key: ["other", listed]}), up), "{listed}");
        }
        for listed in ["mlp", "layers.1", "model.layers.1.mlp.up", "proj", "", "1.mlp.up"] {
            assert!(contains(json!({key: [listed]}), up), "{listed}");
        }
        assert!(!contains(json!({key: [up]}), "lm_head"));
    }
}

#[test]
fn refused_quantisations() {
    let of = |method: &str| json!({"quantization_config": {"quant_method": method, "bits": 4}});
    refused(&[
        (of("gptq"), "`quantization_config.quant_method` is \"gptq\" (accepted: fp8"),
        (of("awq"), "is \"awq\""),
        (of("compressed-tensors"), "is \"compressed-tensors\""),
        (json!({"quantization_config": {}}), "no key `quantization_config.quant_method`"),
        (json!({"quantization_config": "fp8"}), "`quantization_config` is \"fp8\""),
        (fp8(json!({"fmt": "e5m2"})), "`quantization_config.fmt` is \"e5m2\" (accepted: e4m3)"),
        (fp8(json!({"activation_scheme": "static"})), "activation_scheme` is \"static\""),
        (fp8(json!({"weight_block_size": [64, 128]})), "is [64,128] (accepted: [128, 128])"),
        (fp8(json!({"weight_block_size": null})), "no key `quantization_config.weight_block_size`"),
        (
            fp8(json!({"ignored_layers": [1]})),
            "ignored_layers` is [1] (accepted: a list of strings",
        ),
    ]);
}

#[test]
fn refused_dimensions() {
    refused(&[
        (json!({"hidden_size": 60}), "`hidden_size` is 60 (accepted: a multiple of 8"),
        (json!({"hidden_size": 4294967296u64}), "`hidden_size` is 4294967296"),
        (json!({"hidden_size": -64}), "`hidden_size` is -64"),
        (json!({"hidden_size": "64"}), "`hidden_size` is \"64\""),
        (json!({"hidden_size": null}), "no key `hidden_size`"),
        (json!({"intermediate_size": 12}), "`intermediate_size` is 12"),
        (json!({"num_hidden_layers": 0}), "`num_hidden_layers` is 0 (accepted: an integer"),
        (json!({"num_hidden_layers": 1025}), "an integer from 1 to 1024"),
        (json!({"vocab_size": 262145}), "`vocab_size` is 262145"),
        (json!({"max_position_embeddings": 0}), "`max_position_embeddings` is 0"),
    ]);
}

#[test]
fn refused_heads() {
    let many = json!({"num_attention_heads": 131072, "head_dim": 256});
    refused(&[
        (json!({"num_attention_heads": 0}), "`num_attention_heads` is 0"),
        (many, "up to 131072; it is 33554432"),
        (json!({"num_attention_heads": 6, "head_dim": null}), "a divisor of hidden_size 64"),
        (json!({"num_key_value_heads": 3}), "`num_key_value_heads` is 3 (accepted: a divisor"),
        (json!({"num_key_value_heads": 0}), "`num_key_value_heads` is 0"),
        (json!({"head_dim": 15}), "an even head size"),
        (json!({"head_dim": 258}), "`head_dim` is 258 (accepted: an integer from 2 to 256)"),
        (json!({"head_dim": 2, "num_attention_heads": 2}), "a multiple of 8"),
    ]);
}

#[test]
fn refused_numbers_and_tokens() {
    refused(&[
        (json!({"rms_norm_eps": 0.0}), "`rms_norm_eps` is 0.0"),
        (json!({"tie_word_embeddings": 1}), "is 1 (accepted: true or false)"),
        (json!({"eos_token_id": -1}), "`eos_token_id` is -1"),
        (json!({"eos_token_id": [1, "2"]}), "`eos_token_id` is [1,\"2\"]"),
        (json!({"bos_token_id": 256}), "`bos_token_id` is 256"),
    ]);
}

#[test]
fn refused_rotations() {
    let factor = |factor: f64| json!({"rope_scaling": {"type": "linear", "factor": factor}});
    refused(&[
        (json!({"rope_theta": 1}), "`rope_theta` is 1 (accepted: a number"),
        (json!({"rope_theta": 1e300}), "`rope_theta` is 1e"),
        (json!({"rope_scaling": []}), "`rope_scaling` is [] (accepted: an object or null)"),
        (json!({"rope_scaling": {"type": "dynamic"}}), "default, linear, llama3, yarn"),
        (json!({"rope_scaling": {"type": "linear"}}), "no key `rope_scaling.factor`"),
        (factor(0.0), "`rope_scaling.factor` is 0"),
        (json!({"rope_parameters": {"full_attention": {}}}), "`rope_parameters.full_attention`"),
        (json!({"partial_rotary_factor": 0.5}), "`partial_rotary_factor` is 0.5"),
        (json!({"rope_interleaved": true}), "`rope_interleaved` is true"),
    ]);
}

#[test]
fn llama3_and_yarn_parameters_are_checked() {
    let llama3 = |low: f64, high: f64| {
        error(json!({"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": low,
            "high_freq_factor": high, "original_max_position_embeddings": 8192}}))
    };
    assert!(llama3(4.0, 4.0).contains("`rope_scaling.high_freq_factor` is 4.0"));
    assert!(llama3(-1.0, 4.0).contains("`rope_scaling.low_freq_factor` is -1.0"));
    let yarn = json!({"rope_scaling": {"type": "yarn", "factor": 8, "beta_slow": 33}});
    assert!(error(yarn).contains("`rope_scaling.beta_slow` is 33"));
}

#[test]
fn long_values_are_shortened() {
    let message = error(json!({"model_type": "é".repeat(10_000)}));
    assert!(message.len() < 400 && message.contains("..."), "{message}");
}

#[test]
fn text_that_is_no_object() {
    let message = |json| ModelConfig::parse(json).unwrap_err().to_string();
    assert!(message("").contains("config.json is not valid JSON"));
    assert!(message("[1]").contains("must hold one JSON object"));
    assert!(message(r#"{"rope_theta": 1e999}"#).contains("not valid JSON"));
    assert!(message(&"[".repeat(100_000)).contains("not valid JSON"));
}
