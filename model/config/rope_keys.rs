//! The RoPE part of `config.json`, in its old and its new spelling.
//!
//! Hub files have `rope_theta` at the top and `rope_scaling`, which may be null; transformers 5
//! writes both into `rope_parameters`. The type is under `rope_type` or, in older files, `type`.
//! Used by `config.rs` only.

use super::fields::Fields;
use super::{ConfigError, POSITION_COUNT_MAX, Rope, RopeScaling};
use std::ops::RangeInclusive;

/// Bounds of every factor: wide enough for any real file, narrow enough for `f32` arithmetic.
const FACTOR: RangeInclusive<f64> = 1e-6..=1e6;
/// Bounds of theta. Above 1, because YaRN divides by its logarithm; finite as an `f32`.
const THETA: RangeInclusive<f64> = 1.000_001..=1e12;
/// Theta of files that name none (the default of the four Python classes).
const THETA_DEFAULT: f64 = 1e4;

/// Reads theta and the scaling.
///
/// Errors:  an unknown type, a number out of bounds, a missing parameter, a partial rotation.
pub(super) fn rope(root: &Fields<'_>, position_max: u32) -> Result<Rope, ConfigError> {
    let parameters = match root.child("rope_scaling")? {
        Some(parameters) => Some(parameters),
        None => root.child("rope_parameters")?,
    };
    full_rotation(root)?;
    let top_theta = root.number("rope_theta", THETA)?;
    let Some(parameters) = parameters else {
        let theta = top_theta.unwrap_or(THETA_DEFAULT);
        return Ok(Rope { theta, scaling: RopeScaling::Default });
    };
    full_rotation(&parameters)?;
    if let Some(key) = parameters.nested_key() {
        return Err(parameters.refuse(key, "one set of numbers for all layers"));
    }
    let theta = parameters.number("rope_theta", THETA)?.or(top_theta).unwrap_or(THETA_DEFAULT);
    Ok(Rope { theta, scaling: scaling(&parameters, position_max)? })
}

/// Refuses a rotation of only a part of each head.
fn full_rotation(fields: &Fields<'_>) -> Result<(), ConfigError> {
    let key = "partial_rotary_factor";
    match fields.number(key, FACTOR)? {
        Some(part) if part != 1.0 => Err(fields.refuse(key, "1")),
        _ => Ok(()),
    }
}

/// The scaling that the object of parameters asks for.
fn scaling(fields: &Fields<'_>, position_max: u32) -> Result<RopeScaling, ConfigError> {
    let key = if fields.present("rope_type") { "rope_type" } else { "type" };
    match fields.text(key)?.unwrap_or("default") {
        "default" => Ok(RopeScaling::Default),
        "linear" => Ok(RopeScaling::Linear { factor: factor(fields, "factor")? }),
        "llama3" => llama3(fields),
        "yarn" => yarn(fields, position_max),
        _ => Err(fields.refuse(key, "default, linear, llama3, yarn")),
    }
}

/// A factor that must be there.
fn factor(fields: &Fields<'_>, key: &str) -> Result<f64, ConfigError> {
    let accepted = "a number greater than 0";
    fields.number(key, FACTOR)?.ok_or_else(|| fields.refuse(key, accepted))
}

fn llama3(fields: &Fields<'_>) -> Result<RopeScaling, ConfigError> {
    let low_freq_factor = factor(fields, "low_freq_factor")?;
    let high_freq_factor = factor(fields, "high_freq_factor")?;
    if high_freq_factor <= low_freq_factor {
        let accepted = format!("more than low_freq_factor {low_freq_factor}");
        return Err(fields.refuse("high_freq_factor", &accepted));
    }
    Ok(RopeScaling::Llama3 {
        factor: factor(fields, "factor")?,
        low_freq_factor,
        high_freq_factor,
        original_positions: fields
            .integer("original_max_position_embeddings", 1..=POSITION_COUNT_MAX)?,
    })
}

fn yarn(fields: &Fields<'_>, position_max: u32) -> Result<RopeScaling, ConfigError> {
    let original = "original_max_position_embeddings";
    let beta_fast = fields.number("beta_fast", FACTOR)?.unwrap_or(32.0);
    let beta_slow = fields.number("beta_slow", FACTOR)?.unwrap_or(1.0);
    if beta_fast < beta_slow {
        let accepted = format!("at most beta_fast {beta_fast}");
        return Err(fields.refuse("beta_slow", &accepted));
    }
    Ok(RopeScaling::Yarn {
        factor: factor(fields, "factor")?,
        original_positions: fields
            .optional_integer(original, 1..=POSITION_COUNT_MAX)?
            .unwrap_or(position_max),
        beta_fast,
        beta_slow,
        truncate: fields.boolean("truncate")?.unwrap_or(true),
        attention_factor: fields.number("attention_factor", FACTOR)?,
        mscale: fields.number("mscale", 0.0..=1e6)?,
        mscale_all_dim: fields.number("mscale_all_dim", 0.0..=1e6)?,
    })
}
