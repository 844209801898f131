//! The best of some values.

/// Bit of the key's values that are not negative.
const POSITIVE: u32 = 1 << 31;

/// The largest value of some, the first of equal ones. Of two, the larger one is the best of both: the
/// upper half is a key in the order of values, the lower one is less for later ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(transparent)]
pub struct Best(pub u64);

impl Best {
    /// Of no values.
    pub const NONE: Best = Best(0);

    /// Of one value.
    #[inline(always)]
    pub fn of(value: f32, index: u32) -> Best {
        Best::of_key(key(value), index)
    }

    /// Of one value whose `key` this is.
    #[inline(always)]
    pub fn of_key(key: u32, index: u32) -> Best {
        Best(u64::from(key) << 32 | u64::from(!index))
    }

    /// The index; none if a value is not a number or none is finite.
    #[inline(always)]
    pub fn chosen(self) -> Option<u32> {
        let key = (self.0 >> 32) as u32;
        let bits = if key & POSITIVE != 0 { key ^ POSITIVE } else { !key };
        f32::from_bits(bits).is_finite().then_some(!(self.0 as u32))
    }
}

/// A number in the order of values. What is not a number is above all that are; both zeros are equal.
#[inline(always)]
pub fn key(value: f32) -> u32 {
    let bits = (value + 0.0).to_bits();
    match bits & POSITIVE {
        _ if value.is_nan() => u32::MAX,
        0 => bits | POSITIVE,
        _ => !bits,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn best(values: &[f32]) -> Option<u32> {
        let of = |(index, value): (u32, &f32)| Best::of(*value, index);
        (0..).zip(values).map(of).max().unwrap_or(Best::NONE).chosen()
    }

    #[test]
    fn the_first_of_the_largest_is_best() {
        assert_eq!(best(&[1.0, 3.0, 3.0, 2.0]), Some(1));
        assert_eq!(best(&[-3.0, -1.0, -1.5, -1.0]), Some(1));
        assert_eq!(best(&[-1.0, -0.0, 0.0, -2.0]), Some(1));
        assert_eq!(best(&[f32::NEG_INFINITY, -5.0, -f32::MAX]), Some(1));
        assert_eq!(best(&[f32::MIN_POSITIVE / 2.0, f32::MAX]), Some(1));
    }

    #[test]
    fn without_numbers_nothing_is_best() {
        assert_eq!(best(&[]), None);
        assert_eq!(best(&[1.0, f32::NAN, f32::INFINITY]), None);
        assert_eq!(best(&[-f32::NAN, 2.0, 3.0]), None);
        assert_eq!(best(&[f32::NEG_INFINITY; 3]), None);
        assert_eq!(best(&[1.0, f32::INFINITY]), None);
    }
}
