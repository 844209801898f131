//! Rotary position embedding: frequencies, the YaRN factor, and the tables of cos and sin.
//!
//! Invariant: everything here depends on the configuration alone, so the tables are computed once
//! and every machine reads the same bits. The rotation itself is in `reference.rs` and in the
//! device ops. Frequencies follow the order of `f32` operations of `transformers`, because at
//! position 100000 one ulp of a frequency is up to 0.006 radians.

use crate::config::{ModelConfig, RopeScaling};
use std::f64::consts::TAU;

/// The cosine and sine of every angle up to a position, times the attention factor.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTables {
    /// `[positions, head_dim / 2]`, row-major.
    pub cos: Vec<f32>,
    /// `[positions, head_dim / 2]`, row-major.
    pub sin: Vec<f32>,
}

/// The angle per position of each pair of elements, in radians.
///
/// Shapes:  result `[head_dim / 2]`; entry i rotates the pair (i, i + head_dim / 2) of a head.
/// Numerics: the power is rounded once to f32; the rest is f32 arithmetic.
/// Source:  Su et al. 2021 (RoPE); Llama 3.1 model card; Peng et al. 2023 (YaRN).
pub fn inv_freq(config: &ModelConfig) -> Vec<f32> {
    let theta = f64::from(config.rope.theta as f32);
    let head_dim = config.head_dim;
    let period = |i: u32| {
        let exponent = (2 * i) as f32 / head_dim as f32;
        theta.powf(f64::from(exponent)) as f32
    };
    let periods = (0..head_dim / 2).map(period);
    match config.rope.scaling {
        RopeScaling::Default => periods.map(|period| 1.0 / period).collect(),
        RopeScaling::Linear { factor } => {
            periods.map(|period| 1.0 / period / factor as f32).collect()
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => {
            let bounds = (low_freq_factor, high_freq_factor);
            periods.map(|period| llama3(1.0 / period, factor, bounds, original_positions)).collect()
        }
        RopeScaling::Yarn { factor, .. } => {
            let (low, high) = yarn_ramp(config);
            let blend = |(i, period): (usize, f32)| {
                let ramp = ((i as f32 - low) / (high - low)).clamp(0.0, 1.0);
                let keep = 1.0 - ramp;
                1.0 / (factor as f32 * period) * (1.0 - keep) + 1.0 / period * keep
            };
            periods.enumerate().map(blend).collect()
        }
    }
}

/// One frequency after Llama 3.1's rule; `bounds` are the low and the high frequency factor.
fn llama3(inv: f32, factor: f64, bounds: (f64, f64), original_positions: u32) -> f32 {
    let (low, high) = bounds;
    let trained = f64::from(original_positions);
    let wavelength = TAU as f32 / inv;
    if wavelength < (trained / high) as f32 {
        return inv;
    }
    if wavelength > (trained / low) as f32 {
        return inv / factor as f32;
    }
    let smooth = (trained as f32 / wavelength - low as f32) / (high - low) as f32;
    (1.0 - smooth) * inv / factor as f32 + smooth * inv
}

/// The pair indices at which YaRN's ramp begins and ends; never equal.
///
/// Any other scaling has no ramp; 0 and 1 stand for it.
fn yarn_ramp(config: &ModelConfig) -> (f32, f32) {
    let RopeScaling::Yarn { original_positions, beta_fast, beta_slow, truncate, .. } =
        config.rope.scaling
    else {
        return (0.0, 1.0);
    };
    let dim = f64::from(config.head_dim);
    // The pair that makes `turns` full turns over the trained context.
    let pair = |turns: f64| {
        let ratio = f64::from(original_positions) / (turns * TAU);
        dim * ratio.ln() / (2.0 * config.rope.theta.ln())
    };
    let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, high) = (low.max(0.0), high.min(dim - 1.0));
    // Equal ends would divide by zero.
    let high = if low == high { high + 0.001 } else { high };
    (low as f32, high as f32)
}

/// The factor on cos and on sin: 1 unless the scaling is YaRN.
///
/// Numerics: computed in f64, rounded once.
/// Source:  `transformers` `_compute_yarn_parameters`; plain YaRN gives 0.1 ln(factor) + 1.
pub fn attention_factor(config: &ModelConfig) -> f32 {
    let RopeScaling::Yarn { factor, attention_factor, mscale, mscale_all_dim, .. } =
        config.rope.scaling
    else {
        return 1.0;
    };
    let magnitude = |coefficient: f64| match factor {
        factor if factor <= 1.0 => 1.0,
        factor => 0.1 * coefficient * factor.ln() + 1.0,
    };
    let value = match (attention_factor, mscale, mscale_all_dim) {
        (Some(given), _, _) => given,
        (None, Some(top), Some(bottom)) if top != 0.0 && bottom != 0.0 => {
            magnitude(top) / magnitude(bottom)
        }
        _ => magnitude(1.0),
    };
    value as f32
}

/// Cosines and sines for the positions from 0 to `positions - 1`.
///
/// Shapes:  both tables `[positions, head_dim / 2]`.
/// Units:   `positions` in tokens.
/// Bounds:  takes 4 * positions * head_dim bytes; the caller bounds `positions`.
/// Numerics: as `row`.
pub fn tables(config: &ModelConfig, positions: u32) -> RopeTables {
    let (inv_freq, factor) = (inv_freq(config), attention_factor(config));
    let mut result = RopeTables { cos: Vec::new(), sin: Vec::new() };
    let count = positions as usize * inv_freq.len();
    result.cos.reserve_exact(count);
    result.sin.reserve_exact(count);
    for position in 0..positions {
        let (cos, sin) = row(&inv_freq, factor, position);
        result.cos.extend(cos);
        result.sin.extend(sin);
    }
    result
}

/// The cosines and sines of one position.
///
/// Shapes:  `inv_freq` and both results `[head_dim / 2]`.
/// Numerics: angle = position * frequency in f32, as the checkpoints were trained; its cosine and
///          sine and the product with `factor` in f64, rounded once to f32.
pub fn row(inv_freq: &[f32], factor: f32, position: u32) -> (Vec<f32>, Vec<f32>) {
    let factor = f64::from(factor);
    let angles = inv_freq.iter().map(|inv| f64::from(position as f32 * inv));
    let turn = |angle: f64| ((angle.cos() * factor) as f32, (angle.sin() * factor) as f32);
    angles.map(turn).unzip()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A configuration with the given head size, theta and `rope_scaling`.
    fn config(head_dim: u32, theta: f64, scaling: &str) -> ModelConfig {
        let json = format!(
            r#"{{"model_type": "llama", "hidden_size": 64, "intermediate_size": 64,
            "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": {head_dim},
            "vocab_size": 16, "max_position_embeddings": 131072, "rope_theta": {theta},
            "rope_scaling": {scaling}}}"#
        );
        ModelConfig::parse(&json).unwrap()
    }

    fn close(left: f32, right: f64) {
        let relative = (f64::from(left) - right).abs() / right.abs();
        assert!(relative < 2e-7, "{left} is not {right}: relative difference {relative:e}");
    }

    #[test]
    fn default_is_the_geometric_series() {
        let inv = inv_freq(&config(8, 1e4, "null"));
        assert_eq!(inv.len(), 4);
        for (value, expected) in inv.iter().zip([1.0, 0.1, 0.01, 0.001]) {
            close(*value, expected);
        }
    }

    #[test]
    fn linear_divides_every_frequency() {
        let inv = inv_freq(&config(8, 1e4, r#"{"type": "linear", "factor": 4.0}"#));
        for (value, expected) in inv.iter().zip([0.25, 0.025, 0.0025, 0.00025]) {
            close(*value, expected);
        }
    }

    #[test]
    fn llama3_has_three_regions() {
        let scaling = r#"{"rope_type": "llama3", "factor": 32, "low_freq_factor": 1,
            "high_freq_factor": 4, "original_max_position_embeddings": 8192}"#;
        let plain = inv_freq(&config(64, 5e5, "null"));
        let inv = inv_freq(&config(64, 5e5, scaling));
        // Values computed with transformers 5.23 for Llama-3.2-1B.
        assert_eq!(inv[..15], plain[..15]);
        close(inv[14], 0.003_211_446_1);
        close(inv[15], 0.001_290_548);
        close(inv[16], 4.295_567_1e-4);
        close(inv[17], 9.708_286_2e-5);
        close(inv[18], 1.946_163_9e-5);
        close(inv[31], 9.418_306_5e-8);
        for (scaled, plain) in inv[18..].iter().zip(&plain[18..]) {
            assert_eq!(*scaled, plain / 32.0);
        }
    }

    #[test]
    fn yarn_keeps_fast_pairs_and_divides_slow_ones() {
        let scaling = r#"{"rope_type": "yarn", "factor": 4.0,
            "original_max_position_embeddings": 32768}"#;
        let config = config(128, 1e6, scaling);
        let plain = inv_freq(&super::tests::config(128, 1e6, "null"));
        let inv = inv_freq(&config);
        // c(32) = 23.59 and c(1) = 39.65 by the formula of the paper.
        assert_eq!(yarn_ramp(&config), (23.0, 40.0));
        assert_eq!(inv[..24], plain[..24]);
        for (scaled, plain) in inv[40..].iter().zip(&plain[40..]) {
            close(*scaled, f64::from(*plain) / 4.0);
        }
        let ramp = 8.0 / 17.0;
        close(inv[31], f64::from(plain[31]) * (ramp / 4.0 + (1.0 - ramp)));
        close(attention_factor(&config), 1.138_629_436_111_989);
    }

    #[test]
    fn yarn_without_truncation_ramps_between_fractions() {
        let scaling = r#"{"rope_type": "yarn", "factor": 4.0, "truncate": false,
            "original_max_position_embeddings": 32768}"#;
        let (low, high) = yarn_ramp(&config(128, 1e6, scaling));
        let expected = |turns: f64| 128.0 * (32768.0 / (TAU * turns)).ln() / (2.0 * 1e6f64.ln());
        close(low, expected(32.0));
        close(high, expected(1.0));
    }

    #[test]
    fn yarn_factor_from_the_file_or_from_mscale() {
        let factor = |extra: &str| {
            let scaling = format!(r#"{{"rope_type": "yarn", "factor": 40.0{extra}}}"#);
            attention_factor(&config(64, 1e4, &scaling))
        };
        assert_eq!(factor(r#", "attention_factor": 1.5, "mscale": 1.0"#), 1.5);
        assert_eq!(factor(r#", "mscale": 1.0, "mscale_all_dim": 1.0"#), 1.0);
        let magnitude = |coefficient: f64| 0.1 * coefficient * 40f64.ln() + 1.0;
        let both = factor(r#", "mscale": 0.7, "mscale_all_dim": 1.0"#);
        close(both, magnitude(0.7) / magnitude(1.0));
        // A zero or missing coefficient falls back to the plain formula.
        close(factor(r#", "mscale": 1.0, "mscale_all_dim": 0.0"#), magnitude(1.0));
        close(factor(r#", "mscale": 0.7"#), magnitude(1.0));
    }

    #[test]
    fn frequencies_are_finite_even_for_odd_yarn_contexts() {
        for original in [1, 2, 7, 64, 1 << 24] {
            let scaling = format!(
                r#"{{"type": "yarn", "factor": 4, "original_max_position_embeddings": {original}}}"#
            );
            for theta in [1.00001, 10.0, 1e12] {
                let inv = inv_freq(&config(8, theta, &scaling));
                assert!(inv.iter().all(|f| f.is_finite() && *f > 0.0), "{original} {theta}");
            }
        }
    }

    #[test]
    fn tables_hold_rows_of_cos_and_sin() {
        let config = config(8, 1e4, r#"{"type": "yarn", "factor": 4, "attention_factor": 2}"#);
        let tables = tables(&config, 3);
        assert_eq!((tables.cos.len(), tables.sin.len()), (12, 12));
        assert_eq!(tables.cos[..4], [2.0; 4]);
        assert_eq!(tables.sin[..4], [0.0; 4]);
        close(tables.cos[4], 2.0 * 1f64.cos());
        close(tables.sin[8], 2.0 * 2f64.sin());
    }
}
