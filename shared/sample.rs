//! Sampling parameters of a request, and the counter-based generator behind them.

/// How the next token is chosen from the logits.
///
/// Filters apply in this order: penalties, temperature, top-k, top-p, min-p; each sees what the one
/// before it left. Penalties follow the field's usual definitions: `repetition_penalty` divides a
/// positive and multiplies a negative logit of every token that the prompt or the answer contains;
/// `frequency_penalty` and `presence_penalty` count tokens of the answer alone.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct SamplingParams {
    /// 0 chooses the largest logit, the lowest index on a tie.
    pub temperature: f32,
    /// Keep this many largest logits; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this fraction as probable as the most probable; 0 keeps all.
    pub min_p: f32,
    /// 1 leaves logits alone.
    pub repetition_penalty: f32,
    /// Subtracted once per occurrence in the answer.
    pub frequency_penalty: f32,
    /// Subtracted once if the answer contains the token.
    pub presence_penalty: f32,
    /// Keeps `seed` aligned.
    pub reserved: u32,
    /// Key of the generator. Token `n` of the answer uses counter `n` and nothing else.
    pub seed: u64,
}

impl SamplingParams {
    /// The largest logit, without penalties.
    pub const GREEDY: SamplingParams = SamplingParams {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        frequency_penalty: 0.0,
        presence_penalty: 0.0,
        reserved: 0,
        seed: 0,
    };

    /// Whether any penalty changes the logits.
    #[inline]
    pub fn has_penalty(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.frequency_penalty != 0.0
            || self.presence_penalty != 0.0
    }
}

const _: () = assert!(size_of::<SamplingParams>() == 40);

/// 64 random bits for `(seed, counter)`: Philox 4x32 with 10 rounds.
///
/// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#[inline]
pub const fn random_bits(seed: u64, counter: u64) -> u64 {
    const MULTIPLIER_0: u64 = 0xD251_1F53;
    const MULTIPLIER_1: u64 = 0xCD9E_8D57;
    const WEYL_0: u32 = 0x9E37_79B9;
    const WEYL_1: u32 = 0xBB67_AE85;
    let (mut key_0, mut key_1) = (seed as u32, (seed >> 32) as u32);
    let (mut c0, mut c1, mut c2, mut c3) = (counter as u32, (counter >> 32) as u32, 0u32, 0u32);
    let mut round = 0;
    while round < 10 {
        let product_0 = MULTIPLIER_0 * c0 as u64;
        let product_1 = MULTIPLIER_1 * c2 as u64;
        let next_0 = (product_1 >> 32) as u32 ^ c1 ^ key_0;
        let next_2 = (product_0 >> 32) as u32 ^ c3 ^ key_1;
        (c0, c1, c2, c3) = (next_0, product_1 as u32, next_2, product_0 as u32);
        key_0 = key_0.wrapping_add(WEYL_0);
        key_1 = key_1.wrapping_add(WEYL_1);
        round += 1;
    }
    (c1 as u64) << 32 | c0 as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of Random123 for an all-zero key and counter: 6627e8d5 e169c58d …
    #[test]
    fn philox_known_answer() {
        assert_eq!(random_bits(0, 0), 0xe169_c58d_6627_e8d5);
    }
}
