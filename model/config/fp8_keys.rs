//! The quantisation part of `config.json`: which matrices the checkpoint stores as FP8.
//!
//! One layout is read, that of DeepSeek-V3: E4M3 codes with a scale for each 128 rows and 128
//! columns. Everything else is refused here. Activations are not quantised, whatever was to become
//! of them. Used by `config.rs` only.
//! Source: `FineGrainedFP8Config` of transformers; `ignored_layers` is the other name of its list.

use super::ConfigError;
use super::fields::Fields;
use std::collections::BTreeSet;
use tilert_mk_shared::blocks::FP8_BLOCK;

/// Modules whose matrices are stored as FP8: all but some.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fp8Modules {
    /// Names of modules, or where they begin or end, that are stored as the embedding is.
    plain: BTreeSet<String>,
}

impl Fp8Modules {
    /// Whether the matrix of a module, such as `model.layers.0.mlp.up_proj`, is FP8.
    pub fn contains(&self, module: &str) -> bool {
        let dots = || module.match_indices('.').map(|(at, _)| at);
        let begins = dots().map(|at| &module[..at]);
        let ends = dots().map(|at| &module[at + 1..]);
        !begins.chain(ends).chain([module]).any(|part| self.plain.contains(part))
    }
}

/// Reads the key `quantization_config`; `head` is the module that nobody converts.
///
/// Errors:  a method, a type or a size of blocks that is not supported.
pub(super) fn fp8(root: &Fields<'_>, head: &str) -> Result<Option<Fp8Modules>, ConfigError> {
    let Some(fields) = root.child("quantization_config")? else {
        return Ok(None);
    };
    let only = "fp8, whose matrices have scales for blocks of 128 x 128";
    if fields.text("quant_method")? != Some("fp8") {
        return Err(fields.refuse("quant_method", only));
    }
    for (key, accepted) in [("fmt", "e4m3"), ("activation_scheme", "dynamic")] {
        if fields.text(key)?.is_some_and(|value| value != accepted) {
            return Err(fields.refuse(key, accepted));
        }
    }
    if fields.integers("weight_block_size") != Some(vec![FP8_BLOCK as u64; 2]) {
        return Err(fields.refuse("weight_block_size", "[128, 128]"));
    }
    let mut plain = BTreeSet::from([head.to_owned()]);
    for key in ["modules_to_not_convert", "ignored_layers"] {
        plain.extend(fields.texts(key)?.into_iter().map(str::to_owned));
    }
    Ok(Some(Fp8Modules { plain }))
}
