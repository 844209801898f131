//! The bodies of the primitives that sample.

use super::lanes::{LANES, exp};
use crate::machine::best::{Best, key};

/// The best of values whose indices begin at `first`: the largest key, then the first value that has it.
#[inline(always)]
pub(super) fn best_of(first: u32, values: &[f32]) -> Best {
    let (whole, rest) = values.as_chunks::<LANES>();
    let mut keys = [0; LANES];
    for values in whole {
        for (largest, value) in keys.iter_mut().zip(values) {
            *largest = key(*value).max(*largest);
        }
    }
    let mut largest = 0;
    for key in keys {
        largest = key.max(largest);
    }
    for value in rest {
        largest = key(*value).max(largest);
    }
    for (start, values) in (first..).step_by(LANES).zip(values.chunks(LANES)) {
        let mut is_there = false;
        for value in values {
            is_there |= key(*value) == largest;
        }
        if is_there {
            for (index, value) in (start..).zip(values) {
                if key(*value) == largest {
                    return Best::of_key(largest, index);
                }
            }
        }
    }
    Best::NONE
}

/// `weights = e^((logits - largest) / temperature) * one`, rounded down; no logit is above `largest`.
#[inline(always)]
pub(super) fn weigh(logits: &[f32], largest: f32, temperature: f32, one: f32, weights: &mut [u64]) {
    for (weight, logit) in weights.iter_mut().zip(logits) {
        *weight = floor(exp((*logit - largest) / temperature) * one);
    }
}

/// A value from 0 to less than 2^63, rounded down, in steps that become vectors.
#[inline(always)]
fn floor(value: f32) -> u64 {
    /// The exponent of values whose lowest bit is 1.
    const UNIT: i32 = 127 + 23;
    let bits = value.to_bits();
    let digits = u64::from(bits & 0x7f_ffff | 0x80_0000);
    let shift = (bits >> 23) as i32 - UNIT;
    digits << shift.clamp(0, 63) >> (-shift).clamp(0, 63)
}

#[cfg(test)]
mod tests {
    use super::super::{Isa, best_of};
    use super::floor;
    use crate::machine::best::Best;

    #[test]
    fn values_are_rounded_down() {
        for value in [0.0, f32::MIN_POSITIVE / 2.0, 0.3, 0.999_999_9, 1.0, 1.5, 16_777_215.0] {
            assert_eq!(floor(value), value as u64, "{value}");
        }
        for step in 0..40_000 {
            let value = (step as f32 * 0.001).exp2();
            assert_eq!(floor(value), value as u64, "{value}");
        }
    }

    #[test]
    fn the_best_is_that_of_all_values_one_by_one() {
        let isas = [Isa::Avx512, Isa::Avx2, Isa::Portable];
        for len in [0, 1, 31, 32, 33, 64, 100] {
            for seed in 0..20u32 {
                // Few values, so that many are equal; some are not numbers.
                let value = |idx: u32| (idx + 7 * seed).wrapping_mul(2_654_435_761) >> 29;
                let value = |idx| if value(idx) == 7 { f32::NAN } else { value(idx) as f32 - 4.0 };
                let mut values: Vec<f32> = (0..len).map(value).collect();
                if seed % 2 == 0 {
                    values.retain(|value| !value.is_nan());
                }
                let each = (3..).zip(&values).map(|(index, value)| Best::of(*value, index));
                let expected = each.max().unwrap_or(Best::NONE);
                for isa in isas.into_iter().filter(|isa| isa.is_supported()) {
                    assert_eq!(best_of(isa, 3, &values), expected, "{isa:?}: {values:?}");
                }
            }
        }
    }
}
