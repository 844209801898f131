//! One small function per operator. Slices have the lengths that their shapes say; that is the
//! caller's duty, and a mismatch is a programmer's error that an assertion reports.

/// The embedding of a token.
///
/// Shapes:  `table` `[vocab_size, hidden_dim]`; result `[hidden_dim]`, empty for an unknown token.
pub fn embed(table: &[f32], hidden_dim: usize, token: u32) -> Vec<f32> {
    table.chunks_exact(hidden_dim).nth(token as usize).unwrap_or_default().to_vec()
}

/// Root-mean-square norm: `weight * x / sqrt(mean(x^2) + eps)`.
///
/// Shapes:  `x`, `weight` and the result `[dim]`.
/// Numerics: all in f64, one rounding.
/// Source:  Zhang and Sennrich 2019.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    assert_eq!(x.len(), weight.len(), "rms_norm: x and weight");
    let sum: f64 = x.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
    let scale = 1.0 / (sum / x.len() as f64 + f64::from(eps)).sqrt();
    x.iter().zip(weight).map(|(v, w)| (f64::from(*v) * scale * f64::from(*w)) as f32).collect()
}

/// Product of a matrix and a vector.
///
/// Shapes:  `weight` `[rows, x.len()]` row-major; result `[rows]`.
/// Numerics: f64 sum in column order, one rounding.
pub fn matvec(weight: &[f32], x: &[f32]) -> Vec<f32> {
    assert!(weight.len().is_multiple_of(x.len()), "matvec: weight is not rows of x");
    weight.chunks_exact(x.len()).map(|row| dot(row, x) as f32).collect()
}

/// Inner product in f64.
///
/// Shapes:  both `[dim]`.
pub fn dot(left: &[f32], right: &[f32]) -> f64 {
    assert_eq!(left.len(), right.len(), "dot: lengths");
    left.iter().zip(right).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Adds `term` to `sum`, element by element.
///
/// Shapes:  both `[dim]`.
pub fn add(sum: &mut [f32], term: &[f32]) {
    assert_eq!(sum.len(), term.len(), "add: lengths");
    for (value, term) in sum.iter_mut().zip(term) {
        *value += term;
    }
}

/// Rotates the pairs (i, i + head_dim / 2) of one head.
///
/// Shapes:  `head` `[head_dim]`; `cos` and `sin` `[head_dim / 2]`.
/// Numerics: f64, one rounding.
/// Source:  half-split layout of `transformers` (`rotate_half`).
pub fn rope(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = head.split_at_mut(head.len() / 2);
    assert!(first.len() == cos.len() && first.len() == sin.len(), "rope: table length");
    for ((a, b), (cos, sin)) in first.iter_mut().zip(second).zip(cos.iter().zip(sin)) {
        let (cos, sin) = (f64::from(*cos), f64::from(*sin));
        let (x, y) = (f64::from(*a), f64::from(*b));
        *a = (x * cos - y * sin) as f32;
        *b = (y * cos + x * sin) as f32;
    }
}

/// Replaces scores by probabilities.
///
/// Shapes:  `[scores]`; empty stays empty.
/// Numerics: exponentials and their sum in f64, after the largest score is subtracted.
pub fn softmax(scores: &mut [f32]) {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp = |score: f32| (f64::from(score) - f64::from(max)).exp();
    let sum: f64 = scores.iter().map(|score| exp(*score)).sum();
    for score in scores {
        *score = (exp(*score) / sum) as f32;
    }
}

/// Dimensions of one layer's attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query heads.
    pub head_count: u32,
    /// Key/value heads; query head i reads head i / (head_count / kv_head_count).
    pub kv_head_count: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Most recent keys that a query sees, itself included; all of them if `None`.
    pub sliding_window: Option<u32>,
}

/// Attention of one query, the newest token, over the cache that already includes it.
///
/// Shapes:  `query` and result `[head_count, head_dim]`; `keys` and `values`
///          `[positions, kv_head_count, head_dim]`.
/// Numerics: f64 sums; scores and probabilities are rounded to f32.
/// Source:  Vaswani et al. 2017; grouped heads, Ainslie et al. 2023.
pub fn attention(shape: &AttentionShape, query: &[f32], keys: &[f32], values: &[f32]) -> Vec<f32> {
    let head_dim = shape.head_dim as usize;
    let row_dim = head_dim * shape.kv_head_count as usize;
    let group = (shape.head_count / shape.kv_head_count) as usize;
    let position_count = keys.len() / row_dim;
    let visible_count = shape.sliding_window.map_or(position_count, |window| window as usize);
    let hidden_count = position_count.saturating_sub(visible_count);
    assert_eq!(query.len(), head_dim * shape.head_count as usize, "attention: query");
    assert_eq!(keys.len(), values.len(), "attention: keys and values");
    let scale = 1.0 / f64::from(shape.head_dim).sqrt();
    let mut result = Vec::with_capacity(query.len());
    for (head_idx, head) in query.chunks_exact(head_dim).enumerate() {
        let kv_head_idx = head_idx / group;
        // Every position is `kv_head_count` chunks of `head_dim`.
        let of_head = |cache| visible(cache, head_dim, row_dim, kv_head_idx).skip(hidden_count);
        let mut scores: Vec<f32> =
            of_head(keys).map(|key| (dot(head, key) * scale) as f32).collect();
        softmax(&mut scores);
        let mut sums = vec![0f64; head_dim];
        for (value, probability) in of_head(values).zip(&scores) {
            for (sum, element) in sums.iter_mut().zip(value) {
                *sum += f64::from(*probability) * f64::from(*element);
            }
        }
        result.extend(sums.iter().map(|sum| *sum as f32));
    }
    result
}

/// Attention of one head from its parts: of each `[head_dim]` values weighted by `exp(score -
/// largest)`, then the largest score, then the sum of the weights.
///
/// Shapes:  each part `[head_dim + 2]`; result `[head_dim]`.
/// Numerics: f64, one rounding.
/// Source:  Milakov and Gimelshein 2018.
pub fn merge(parts: &[&[f32]]) -> Vec<f32> {
    let Some(head_dim) = parts.first().map(|part| part.len() - 2) else { return Vec::new() };
    let largest = parts.iter().map(|part| part[head_dim]).fold(f32::NEG_INFINITY, f32::max);
    let (mut sums, mut total) = (vec![0f64; head_dim], 0f64);
    for part in parts {
        let weight = (f64::from(part[head_dim]) - f64::from(largest)).exp();
        total += weight * f64::from(part[head_dim + 1]);
        for (sum, value) in sums.iter_mut().zip(*part) {
            *sum += weight * f64::from(*value);
        }
    }
    sums.iter().map(|sum| (sum / total) as f32).collect()
}

/// The rows of one key/value head, oldest position first.
fn visible(
    cache: &[f32],
    head_dim: usize,
    row_dim: usize,
    kv_head_idx: usize,
) -> impl Iterator<Item = &[f32]> {
    cache.chunks_exact(row_dim).filter_map(move |row| row.chunks_exact(head_dim).nth(kv_head_idx))
}

/// The gate of the MLP: `silu(gate) * up` with `silu(x) = x / (1 + exp(-x))`.
///
/// Shapes:  both arguments and the result `[intermediate_dim]`.
/// Numerics: f64, one rounding.
/// Source:  Shazeer 2020 (SwiGLU).
pub fn silu_mul(gate: &[f32], up: &[f32]) -> Vec<f32> {
    assert_eq!(gate.len(), up.len(), "silu_mul: lengths");
    let silu = |x: f64| x / (1.0 + (-x).exp());
    gate.iter().zip(up).map(|(g, u)| (silu(f64::from(*g)) * f64::from(*u)) as f32).collect()
}

/// Index of the largest logit, the lowest one on ties; NaN never wins.
///
/// Shapes:  `[vocab_size]`; 0 for an empty or all-NaN slice.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (token, logit) in (0u32..).zip(logits) {
        if *logit > best.1 {
            best = (token, *logit);
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rms_norm_by_hand() {
        assert_eq!(rms_norm(&[3.0, 4.0], &[2.0, 1.0], 12.5), [1.2, 0.8]);
        assert_eq!(rms_norm(&[0.0; 3], &[1.0; 3], 1e-6), [0.0; 3]);
    }

    #[test]
    fn matvec_by_hand() {
        assert_eq!(matvec(&[1.0, 2.0, 3.0, 4.0], &[10.0, 1.0]), [12.0, 34.0]);
        // f32 accumulation would lose the one.
        assert_eq!(matvec(&[1e8, 1.0, -1e8], &[1.0; 3]), [1.0]);
    }

    #[test]
    fn rope_turns_half_split_pairs() {
        let mut head = [1.0, 2.0, 3.0, 4.0];
        rope(&mut head, &[0.0, 1.0], &[1.0, 0.0]);
        assert_eq!(head, [-3.0, 2.0, 1.0, 4.0]);
    }

    #[test]
    fn softmax_survives_large_scores() {
        let mut scores = [1000.0, 1000.0, -1000.0];
        softmax(&mut scores);
        assert_eq!(scores, [0.5, 0.5, 0.0]);
    }

    #[test]
    fn attention_groups_heads_and_honours_the_window() {
        let mut shape =
            AttentionShape { head_count: 4, kv_head_count: 2, head_dim: 1, sliding_window: None };
        // Zero queries weigh all positions alike; heads 0 and 1 read the first key/value head.
        let (keys, values) = ([1.0; 6], [1.0, 10.0, 2.0, 20.0, 6.0, 60.0]);
        assert_eq!(attention(&shape, &[0.0; 4], &keys, &values), [3.0, 3.0, 30.0, 30.0]);
        shape.sliding_window = Some(2);
        assert_eq!(attention(&shape, &[0.0; 4], &keys, &values), [4.0, 4.0, 40.0, 40.0]);
        shape.sliding_window = Some(1);
        assert_eq!(attention(&shape, &[0.0; 4], &keys, &values), [6.0, 6.0, 60.0, 60.0]);
    }

    #[test]
    fn merging_parts_is_attending_to_all() {
        // Weights 1 and 1/2 of the first part, 1 and 1 of the second, whose scores are ln 2 lower.
        let ln_2 = std::f32::consts::LN_2;
        let merged = merge(&[&[1.0 + 4.0, ln_2, 1.5], &[6.0 + 8.0, 0.0, 2.0]]);
        assert!((merged[0] - (5.0 + 7.0) / 2.5).abs() < 1e-6, "{merged:?}");
        assert!(merge(&[]).is_empty());
    }

    #[test]
    fn silu_mul_at_the_ends() {
        assert_eq!(silu_mul(&[0.0, 100.0, -1e4], &[5.0, 2.0, 1.0]), [0.0, 200.0, 0.0]);
    }

    #[test]
    fn argmax_takes_the_lowest_index() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), 1);
        assert_eq!(argmax(&[f32::NAN, -1.0]), 1);
        assert_eq!(argmax(&[]), 0);
        assert_eq!(argmax(&[f32::NEG_INFINITY; 2]), 0);
    }
}
