//! What a checkpoint's `config.json` says about the network, checked and bounded.
//!
//! Invariant: a `ModelConfig` made by `parse` can be used for sizes without further checks. Every
//! number is inside the bounds named here, so no product of two or three of them overflows `u64`.
//! Differences of families become plain flags here, by what `families.rs` says of each.
//! Reads hub files and files saved by transformers 5 (`rope_parameters`). Opens no file.
//! Source: `transformers` configuration classes of llama, mistral, qwen2 and qwen3.

mod fields;
mod fp8_keys;
mod rope_keys;

use crate::families::{AttentionBias, Window};
use fields::Fields;

pub use self::fp8_keys::Fp8Modules;
pub use crate::families::Architecture;

/// Most layers accepted.
pub const LAYER_COUNT_MAX: u32 = 1024;
/// Widest hidden state accepted, in elements.
pub const HIDDEN_DIM_MAX: u32 = 1 << 16;
/// Widest MLP accepted, in elements.
pub const INTERMEDIATE_DIM_MAX: u32 = 1 << 18;
/// Widest concatenation of all query heads accepted, in elements.
pub const QUERY_DIM_MAX: u32 = 1 << 17;
/// Widest attention head accepted, in elements.
pub use tilert_mk_shared::limits::HEAD_DIM_MAX;
/// Largest vocabulary accepted, in tokens.
pub const VOCAB_SIZE_MAX: u32 = 1 << 18;
/// Longest context accepted: every position below it is exact as an `f32`, as RoPE needs.
pub const POSITION_COUNT_MAX: u32 = 1 << 24;
/// Most end-of-sequence ids accepted.
pub const EOS_COUNT_MAX: usize = 64;
/// Dimensions that weights are tiled along are multiples of this many elements.
pub const DIM_MULTIPLE: u32 = 8;
/// First windowed layer of Qwen files that do not name it (default of the Python classes).
const WINDOW_FIRST_LAYER: u32 = 28;

/// How positions turn into rotation angles; `model/rope.rs` does the arithmetic.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the geometric series of wavelengths, in (1, 1e12].
    pub theta: f64,
    /// Correction of that series for contexts longer than the trained one.
    pub scaling: RopeScaling,
}

/// The supported values of `rope_type`, each with its own parameters; factors are finite and > 0.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// No correction.
    Default,
    /// Every frequency divided by one factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths divided, short ones kept, a blend between.
    Llama3 {
        /// Divisor of the long wavelengths.
        factor: f64,
        /// Wavelengths above `original_positions / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_positions / high_freq_factor` are kept; > low.
        high_freq_factor: f64,
        /// Trained context in positions.
        original_positions: u32,
    },
    /// YaRN: a linear ramp over the dimensions, and a factor on cos and sin.
    Yarn {
        /// Divisor of the slow dimensions.
        factor: f64,
        /// Trained context in positions.
        original_positions: u32,
        /// Turns over the trained context above which a dimension is kept.
        beta_fast: f64,
        /// Turns over the trained context below which a dimension is divided; <= `beta_fast`.
        beta_slow: f64,
        /// Whether the ramp's ends are rounded outwards to whole dimensions.
        truncate: bool,
        /// Factor on cos and sin, when the file gives it.
        attention_factor: Option<f64>,
        /// Numerator's coefficient in DeepSeek's form of that factor.
        mscale: Option<f64>,
        /// Denominator's coefficient in DeepSeek's form of that factor.
        mscale_all_dim: Option<f64>,
    },
}

/// One decoder-only network: dimensions, flags and special tokens.
///
/// Bounds:  as the constants of this file; see each field.
/// Source:  `config.json` of the checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Family.
    pub architecture: Architecture,
    /// Elements of the residual stream; a multiple of 8 up to `HIDDEN_DIM_MAX`.
    pub hidden_dim: u32,
    /// Elements between gate/up and down; a multiple of 8 up to `INTERMEDIATE_DIM_MAX`.
    pub intermediate_dim: u32,
    /// Decoder layers, 1 to `LAYER_COUNT_MAX`.
    pub layer_count: u32,
    /// Query heads of a layer.
    pub head_count: u32,
    /// Key/value heads of a layer; divides `head_count`.
    pub kv_head_count: u32,
    /// Elements of a head; even, up to `HEAD_DIM_MAX`. Not always hidden_dim / head_count.
    pub head_dim: u32,
    /// Rows of the embedding and of the head, 1 to `VOCAB_SIZE_MAX`.
    pub vocab_size: u32,
    /// Longest context in positions, 1 to `POSITION_COUNT_MAX`.
    pub position_max: u32,
    /// Term added to the mean square inside every RMSNorm; finite, > 0.
    pub rms_norm_eps: f32,
    /// Rotary embedding.
    pub rope: Rope,
    /// The head's weight is the embedding; there is no `lm_head.weight`.
    pub tied_head: bool,
    /// `q_proj`, `k_proj` and `v_proj` have biases.
    pub qkv_bias: bool,
    /// `o_proj` has a bias.
    pub output_bias: bool,
    /// `gate_proj`, `up_proj` and `down_proj` have biases.
    pub mlp_bias: bool,
    /// Query and key heads are normalised (`q_norm`, `k_norm`) before RoPE.
    pub qk_norm: bool,
    /// A query at position p sees the keys p-window+1 to p only, on every layer; >= 1.
    pub sliding_window: Option<u32>,
    /// Which matrices are stored as FP8, if some are.
    pub fp8: Option<Fp8Modules>,
    /// Tokens that end generation; each below `vocab_size`, at most `EOS_COUNT_MAX`.
    pub eos_ids: Vec<u32>,
    /// Token that begins a sequence; below `vocab_size`.
    pub bos_id: Option<u32>,
}

/// Why a `config.json` or `generation_config.json` was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The text is not JSON.
    #[error("{file} is not valid JSON: {source}")]
    Json {
        /// Name of the file.
        file: &'static str,
        /// Where and why the parser stopped.
        source: serde_json::Error,
    },
    /// The text is JSON, but not an object.
    #[error("{file} must hold one JSON object")]
    NotObject {
        /// Name of the file.
        file: &'static str,
    },
    /// A key without a default is absent.
    #[error("{file} has no key `{key}` (accepted: {accepted})")]
    Missing {
        /// Name of the file.
        file: &'static str,
        /// The key.
        key: String,
        /// What the key may hold.
        accepted: String,
    },
    /// A key holds something that is not supported.
    #[error("{file}: `{key}` is {value} (accepted: {accepted})")]
    Value {
        /// Name of the file.
        file: &'static str,
        /// The key, with its parent where it is nested.
        key: String,
        /// The value found, as JSON, shortened.
        value: String,
        /// What the key may hold.
        accepted: String,
    },
}

impl ModelConfig {
    /// Reads the text of a `config.json`.
    ///
    /// Errors:  `ConfigError`, naming the key, its value and what is accepted.
    pub fn parse(json: &str) -> Result<Self, ConfigError> {
        let root = fields::parse_object("config.json", json)?;
        let fields = Fields::root("config.json", &root);
        let architecture = architecture(&fields)?;
        refuse_unsupported(&fields, architecture)?;
        let hidden_dim = dim(&fields, "hidden_size", HIDDEN_DIM_MAX)?;
        let (head_count, kv_head_count, head_dim) = heads(&fields, hidden_dim)?;
        let layer_count = fields.integer("num_hidden_layers", 1..=LAYER_COUNT_MAX)?;
        let vocab_size = fields.integer("vocab_size", 1..=VOCAB_SIZE_MAX)?;
        let position_max = fields.integer("max_position_embeddings", 1..=POSITION_COUNT_MAX)?;
        let family = architecture.family();
        let has_bias = fields.boolean("attention_bias")? == Some(true);
        let has_bias = has_bias && family.attention_bias == AttentionBias::ByKey;
        let eos_ids = fields.token_ids("eos_token_id", vocab_size)?.unwrap_or_default();
        let bos_id = fields.optional_integer("bos_token_id", 0..=vocab_size - 1)?;
        Ok(Self {
            architecture,
            hidden_dim,
            intermediate_dim: dim(&fields, "intermediate_size", INTERMEDIATE_DIM_MAX)?,
            layer_count,
            head_count,
            kv_head_count,
            head_dim,
            vocab_size,
            position_max,
            rms_norm_eps: fields.number("rms_norm_eps", 1e-12..=1.0)?.unwrap_or(1e-6) as f32,
            rope: rope_keys::rope(&fields, position_max)?,
            tied_head: fields.boolean("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: has_bias || family.attention_bias == AttentionBias::QkvAlways,
            output_bias: has_bias,
            mlp_bias: fields.boolean("mlp_bias")?.unwrap_or(false),
            qk_norm: family.has_qk_norm,
            sliding_window: sliding_window(&fields, family.window, layer_count)?,
            fp8: fp8_keys::fp8(&fields, family.names.head)?,
            eos_ids,
            bos_id,
        })
    }

    /// Replaces `eos_ids` by those of a `generation_config.json`, if it has any.
    ///
    /// Errors:  `ConfigError`; `self` is unchanged then.
    pub fn override_eos(&mut self, generation_config_json: &str) -> Result<(), ConfigError> {
        let file = "generation_config.json";
        let root = fields::parse_object(file, generation_config_json)?;
        if let Some(ids) = Fields::root(file, &root).token_ids("eos_token_id", self.vocab_size)? {
            self.eos_ids = ids;
        }
        Ok(())
    }

    /// Elements of all query heads together: rows of `q_proj`, columns of `o_proj`.
    pub const fn query_dim(&self) -> u32 {
        self.head_count * self.head_dim
    }

    /// Elements of all key (or value) heads together: rows of `k_proj` and of `v_proj`.
    pub const fn kv_dim(&self) -> u32 {
        self.kv_head_count * self.head_dim
    }
}

/// The family, from `model_type` or, where that is absent, from `architectures`.
fn architecture(fields: &Fields<'_>) -> Result<Architecture, ConfigError> {
    let known = |name: &str| {
        let matches = |a: &Architecture| a.model_type() == name || a.class_name() == name;
        Architecture::ALL.into_iter().find(matches)
    };
    let class = fields.first_text("architectures")?;
    if let Some(class) = class
        && !class.ends_with("ForCausalLM")
    {
        return Err(fields.refuse("architectures", "a class that ends in ForCausalLM"));
    }
    let (key, name) = match fields.text("model_type")? {
        Some(name) => ("model_type", Some(name)),
        None if class.is_some() => ("architectures", class),
        None => ("model_type", None),
    };
    name.and_then(known).ok_or_else(|| {
        let names: Vec<_> = Architecture::ALL.iter().map(|a| a.model_type()).collect();
        fields.refuse(key, &names.join(", "))
    })
}

/// Refuses what would change the result and is not implemented, instead of ignoring it.
fn refuse_unsupported(fields: &Fields<'_>, architecture: Architecture) -> Result<(), ConfigError> {
    if fields.text("hidden_act")?.is_some_and(|name| name != "silu") {
        return Err(fields.refuse("hidden_act", "silu"));
    }
    if fields.boolean("rope_interleaved")? == Some(true) {
        return Err(fields.refuse("rope_interleaved", "false"));
    }
    let has_mlp_bias = fields.boolean("mlp_bias")? == Some(true);
    if has_mlp_bias && !architecture.family().may_have_mlp_bias {
        return Err(fields.refuse("mlp_bias", &format!("false for {architecture}")));
    }
    let has_attention_bias = fields.boolean("attention_bias")? == Some(true);
    if has_attention_bias && architecture.family().attention_bias == AttentionBias::Never {
        return Err(fields.refuse("attention_bias", &format!("false for {architecture}")));
    }
    Ok(())
}

/// A dimension that weights are tiled along.
fn dim(fields: &Fields<'_>, key: &str, max: u32) -> Result<u32, ConfigError> {
    let value = fields.integer(key, DIM_MULTIPLE..=max)?;
    if !value.is_multiple_of(DIM_MULTIPLE) {
        return Err(fields.refuse(key, &format!("a multiple of {DIM_MULTIPLE} up to {max}")));
    }
    Ok(value)
}

/// Query heads, key/value heads and elements of a head.
fn heads(fields: &Fields<'_>, hidden_dim: u32) -> Result<(u32, u32, u32), ConfigError> {
    let head_count = fields.integer("num_attention_heads", 1..=QUERY_DIM_MAX)?;
    let key = "num_key_value_heads";
    let kv_head_count = fields.optional_integer(key, 1..=head_count)?.unwrap_or(head_count);
    if !head_count.is_multiple_of(kv_head_count) {
        return Err(fields.refuse(key, &format!("a divisor of num_attention_heads {head_count}")));
    }
    let head_dim = match fields.optional_integer("head_dim", 2..=HEAD_DIM_MAX)? {
        Some(head_dim) => head_dim,
        None if hidden_dim.is_multiple_of(head_count) => hidden_dim / head_count,
        None => {
            let accepted =
                format!("a divisor of hidden_size {hidden_dim} where head_dim is absent");
            return Err(fields.refuse("num_attention_heads", &accepted));
        }
    };
    if !head_dim.is_multiple_of(2) || !(2..=HEAD_DIM_MAX).contains(&head_dim) {
        let accepted = format!("an even head size up to {HEAD_DIM_MAX}; it is {head_dim}");
        return Err(fields.refuse("head_dim", &accepted));
    }
    // Both factors are below 2^18, so the product is exact.
    let query_dim = u64::from(head_count) * u64::from(head_dim);
    if query_dim > u64::from(QUERY_DIM_MAX) || !query_dim.is_multiple_of(u64::from(DIM_MULTIPLE)) {
        let accepted = format!(
            "head_count * head_dim a multiple of {DIM_MULTIPLE} up to {QUERY_DIM_MAX}; \
             it is {query_dim}"
        );
        return Err(fields.refuse("num_attention_heads", &accepted));
    }
    Ok((head_count, kv_head_count, head_dim))
}

/// The window that holds on every layer, if there is one.
///
/// Qwen windows the layers from `max_window_layers` on (or those that `layer_types` lists), and
/// only if `use_sliding_window` is set. A network that mixes both kinds of layer is refused.
fn sliding_window(
    fields: &Fields<'_>,
    source: Window,
    layer_count: u32,
) -> Result<Option<u32>, ConfigError> {
    let window = || fields.optional_integer("sliding_window", 1..=u32::MAX);
    match source {
        Window::Never => Ok(None),
        Window::EveryLayer => window(),
        Window::BySwitch => {
            if fields.boolean("use_sliding_window")? != Some(true) {
                return Ok(None);
            }
            let windowed_count = match fields.count_text("layer_types", "sliding_attention")? {
                Some(count) => count,
                None => {
                    let first = fields.optional_integer("max_window_layers", 0..=u32::MAX)?;
                    layer_count - first.unwrap_or(WINDOW_FIRST_LAYER).min(layer_count)
                }
            };
            match windowed_count {
                0 => Ok(None),
                count if count == layer_count => window(),
                _ => Err(fields.refuse("use_sliding_window", "false, or true for every layer")),
            }
        }
    }
}

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
