//! How a token is chosen from logits, by sorting.

use tilert_mk_shared::sample::{SamplingParams, random_bits};

/// One, as an integer probability: weights are rounded down to multiples of its inverse.
const ONE: f64 = (1u64 << 40) as f64;

/// Changes the logits of tokens that the prompt or the answer contains.
///
/// Shapes:  `logits` `[vocab_size]`; every token below `vocab_size`.
/// Numerics: f32, in the order of the definition: the repetition penalty first.
/// Source:  Keskar et al. 2019 for the repetition penalty; the OpenAI API for the other two.
pub fn penalise(logits: &mut [f32], prompt: &[u32], answer: &[u32], params: &SamplingParams) {
    for (token, logit) in (0u32..).zip(logits) {
        let count = answer.iter().filter(|id| **id == token).count();
        if count > 0 || prompt.contains(&token) {
            let penalty = params.repetition_penalty;
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
        if count > 0 {
            *logit -= params.frequency_penalty * count as f32 + params.presence_penalty;
        }
    }
}

/// The token chosen from penalised logits for the place `counter` of an answer; none if a logit is
/// not a number.
///
/// Shapes:  `[vocab_size]`, not empty.
/// Numerics: exponentials in f64, rounded down to 40 bits below one; exact from there on.
pub fn sample(logits: &[f32], params: &SamplingParams, counter: u32) -> Option<u32> {
    if logits.iter().any(|logit| logit.is_nan()) {
        return None;
    }
    let best = super::argmax(logits);
    if params.temperature == 0.0 {
        return Some(best);
    }
    let weight = |token: u32| {
        let scaled = (logits[token as usize] - logits[best as usize]) / params.temperature;
        (f64::from(scaled).exp() * ONE) as u64
    };
    let mut kept: Vec<(u32, u64)> =
        (0..logits.len() as u32).map(|token| (token, weight(token))).collect();
    // Stable: tokens of equal weight stay in the order of their indices.
    kept.sort_by_key(|(_, weight)| std::cmp::Reverse(*weight));
    if params.top_k > 0 {
        kept.truncate(params.top_k as usize);
    }
    let total: u64 = kept.iter().map(|(_, weight)| weight).sum();
    if params.top_p < 1.0 {
        let wanted = ((total as f64 * f64::from(params.top_p)) as u64).max(1);
        let mut covered = 0;
        kept.retain(|(_, weight)| {
            let is_needed = covered < wanted;
            covered += weight;
            is_needed
        });
    }
    let floor = (f64::from(params.min_p) * ONE) as u64;
    kept.retain(|(_, weight)| *weight >= floor.max(1));
    kept.sort_by_key(|(token, _)| *token);
    let total: u64 = kept.iter().map(|(_, weight)| weight).sum();
    let random = random_bits(params.seed, u64::from(counter));
    let left = ((u128::from(random) * u128::from(total)) >> 64) as u64;
    let mut covered = 0;
    let chosen = kept.iter().find(|(_, weight)| {
        covered += weight;
        covered > left
    });
    chosen.map(|(token, _)| *token)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WARM: SamplingParams = SamplingParams { temperature: 1.0, ..SamplingParams::GREEDY };

    /// How often each of `logits` is chosen in 4000 places.
    fn counts(logits: &[f32], params: &SamplingParams) -> Vec<u32> {
        let mut counts = vec![0; logits.len()];
        for counter in 0..4000 {
            counts[sample(logits, params, counter).unwrap() as usize] += 1;
        }
        counts
    }

    #[test]
    fn draws_are_as_frequent_as_probable() {
        // Probabilities 1/2, 1/4, 1/8, 1/8; 130 is four standard deviations of the first count.
        let logits = [8f32, 4.0, 2.0, 2.0].map(f32::ln);
        for (count, expected) in counts(&logits, &WARM).iter().zip([2000u32, 1000, 500, 500]) {
            assert!(count.abs_diff(expected) < 130, "{count} not {expected}");
        }
    }

    #[test]
    fn filters_keep_what_they_say() {
        let logits = [2f32, 8.0, 2.0, 4.0].map(f32::ln);
        let kept = |params| counts(&logits, &params).iter().map(|n| *n > 0).collect::<Vec<_>>();
        assert_eq!(kept(SamplingParams { top_k: 3, ..WARM }), [true, true, false, true]);
        assert_eq!(kept(SamplingParams { top_p: 0.5, ..WARM }), [false, true, false, false]);
        assert_eq!(kept(SamplingParams { top_p: 0.7, ..WARM }), [false, true, false, true]);
        assert_eq!(kept(SamplingParams { min_p: 0.4, ..WARM }), [false, true, false, true]);
        assert_eq!(sample(&logits, &SamplingParams::GREEDY, 0), Some(1));
        assert_eq!(sample(&[0.0, f32::NAN], &WARM, 0), None);
    }

    #[test]
    fn penalties_by_hand() {
        let params = SamplingParams {
            repetition_penalty: 2.0,
            frequency_penalty: 0.5,
            presence_penalty: 0.25,
            ..SamplingParams::GREEDY
        };
        let mut logits = [4.0, -4.0, 4.0, 1.0];
        penalise(&mut logits, &[0, 1], &[1, 2, 2], &params);
        assert_eq!(logits, [2.0, -8.75, 0.75, 1.0]);
    }
}
