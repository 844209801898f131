//! Exact binary floating point: a value is an integer times a power of two, rounded once at the
//! end to any format in any mode. Slow and obvious; the fast paths in `float.rs` are tested
//! against it.

use crate::types::Round;

/// A binary format: fraction bits and exponent bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fmt {
    pub(crate) frac: u32,
    pub(crate) exp: u32,
    /// `e4m3` has no infinity and one NaN a sign.
    pub(crate) finite: bool,
}

pub(crate) const F16: Fmt = Fmt { frac: 10, exp: 5, finite: false };
pub(crate) const BF16: Fmt = Fmt { frac: 7, exp: 8, finite: false };
pub(crate) const TF32: Fmt = Fmt { frac: 10, exp: 8, finite: false };
pub(crate) const F32: Fmt = Fmt { frac: 23, exp: 8, finite: false };
pub(crate) const F64: Fmt = Fmt { frac: 52, exp: 11, finite: false };
pub(crate) const E4M3: Fmt = Fmt { frac: 3, exp: 4, finite: true };
pub(crate) const E5M2: Fmt = Fmt { frac: 2, exp: 5, finite: false };

/// A number. `Fin` is `mant * 2^exp`, and a little more in magnitude when `sticky`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Num {
    Nan,
    Inf(bool),
    Fin { neg: bool, mant: u128, exp: i32, sticky: bool },
}

impl Fmt {
    fn bias(self) -> i32 {
        (1 << (self.exp - 1)) - 1
    }

    pub(crate) fn sign_bit(self) -> u64 {
        1 << (self.frac + self.exp)
    }

    fn inf(self) -> u64 {
        ((1 << self.exp) - 1) << self.frac
    }

    /// The largest finite value.
    pub(crate) fn max(self) -> u64 {
        if self.finite { 0x7e } else { self.inf() - 1 }
    }

    /// The NaN that the hardware produces.
    pub(crate) fn nan(self) -> u64 {
        if self == F64 { 0x7ff8 << 48 } else { self.sign_bit() - 1 }
    }
}

/// Reads the bits of a format.
pub(crate) fn unpack(bits: u64, fmt: Fmt) -> Num {
    let neg = bits & fmt.sign_bit() != 0;
    let frac = bits & ((1 << fmt.frac) - 1);
    let field = (bits >> fmt.frac) & ((1 << fmt.exp) - 1);
    if fmt.finite && bits & 0x7f == 0x7f {
        return Num::Nan;
    }
    if !fmt.finite && field == (1 << fmt.exp) - 1 {
        return if frac == 0 { Num::Inf(neg) } else { Num::Nan };
    }
    let mant = if field == 0 { frac } else { frac | 1 << fmt.frac };
    let exp = (field.max(1) as i32) - fmt.bias() - fmt.frac as i32;
    Num::Fin { neg, mant: mant.into(), exp, sticky: false }
}

fn round_up(round: Round, neg: bool, odd: bool, half: bool, rest: bool) -> bool {
    match round {
        Round::Rn => half && (rest || odd),
        Round::Rna => half,
        Round::Rz => false,
        Round::Rm => neg && (half || rest),
        Round::Rp => !neg && (half || rest),
    }
}

/// Divides by `2^shift`, rounding to an integer.
fn shift_round(mant: u128, shift: i32, sticky: bool, neg: bool, round: Round) -> u128 {
    if shift <= 0 {
        let kept = if shift < -127 { 0 } else { mant << -shift };
        return kept + u128::from(round_up(round, neg, kept & 1 == 1, false, sticky));
    }
    if shift > 127 {
        return u128::from(round_up(round, neg, false, false, sticky || mant != 0));
    }
    let kept = mant >> shift;
    let half = mant >> (shift - 1) & 1 == 1;
    let rest = sticky || mant & ((1 << (shift - 1)) - 1) != 0;
    kept + u128::from(round_up(round, neg, kept & 1 == 1, half, rest))
}

/// Rounds to a format. `satfinite` turns overflow and infinity into the largest finite value.
pub(crate) fn pack(num: Num, fmt: Fmt, round: Round, satfinite: bool) -> u64 {
    let sign = |neg: bool| if neg { fmt.sign_bit() } else { 0 };
    let infinite = |neg| {
        sign(neg)
            | match (satfinite, fmt.finite) {
                (true, _) => fmt.max(),
                (false, true) => 0x7f,
                (false, false) => fmt.inf(),
            }
    };
    let (neg, mant, exp, sticky) = match num {
        Num::Nan => return fmt.nan(),
        Num::Inf(neg) => return infinite(neg),
        Num::Fin { neg, mant, exp, sticky } => (neg, mant, exp, sticky),
    };
    if mant == 0 && !sticky {
        return sign(neg);
    }
    let top = 127 - mant.leading_zeros() as i32 + exp;
    let lowest = 1 - fmt.bias();
    let unit = top.max(lowest) - fmt.frac as i32;
    let kept = shift_round(mant, unit - exp, sticky, neg, round);
    // A carry out of the fraction moves into the exponent field by itself.
    let field = (top.max(lowest) + fmt.bias() - 1) as u64;
    let bits = if top < lowest { kept as u64 } else { (field << fmt.frac) + kept as u64 };
    if bits > fmt.max() {
        let away = match round {
            Round::Rz => false,
            Round::Rm => neg,
            Round::Rp => !neg,
            Round::Rn | Round::Rna => true,
        };
        return if away { infinite(neg) } else { sign(neg) | fmt.max() };
    }
    sign(neg) | bits
}

/// Rounds to an integer. `None` for NaN; the caller clamps.
pub(crate) fn to_int(num: Num, round: Round) -> Option<i128> {
    match num {
        Num::Nan => None,
        Num::Inf(neg) => Some(if neg { i128::MIN } else { i128::MAX }),
        Num::Fin { neg, mant, exp, sticky } => {
            let big = 127 - mant.leading_zeros() as i32 + exp > 100;
            if mant != 0 && big {
                return Some(if neg { i128::MIN } else { i128::MAX });
            }
            let value = shift_round(mant, -exp, sticky, neg, round) as i128;
            Some(if neg { -value } else { value })
        }
    }
}

/// An integer as an exact number.
pub(crate) fn from_int(value: i128) -> Num {
    Num::Fin { neg: value < 0, mant: value.unsigned_abs(), exp: 0, sticky: false }
}

pub(crate) fn negate(x: Num) -> Num {
    match x {
        Num::Nan => Num::Nan,
        Num::Inf(neg) => Num::Inf(!neg),
        Num::Fin { neg, mant, exp, sticky } => Num::Fin { neg: !neg, mant, exp, sticky },
    }
}

/// The exact product of two unrounded operands of at most 64 bits each.
pub(crate) fn mul(x: Num, y: Num) -> Num {
    match (x, y) {
        (Num::Nan, _) | (_, Num::Nan) => Num::Nan,
        (Num::Inf(n), Num::Inf(m)) => Num::Inf(n != m),
        (Num::Inf(n), Num::Fin { neg, mant, .. }) | (Num::Fin { neg, mant, .. }, Num::Inf(n)) => {
            if mant == 0 {
                Num::Nan
            } else {
                Num::Inf(n != neg)
            }
        }
        (Num::Fin { neg, mant, exp, .. }, Num::Fin { neg: n, mant: m, exp: e, .. }) => {
            Num::Fin { neg: neg != n, mant: mant * m, exp: exp + e, sticky: false }
        }
    }
}

/// The sum, exact or with a sticky bit far below any format's precision.
pub(crate) fn add(x: Num, y: Num, round: Round) -> Num {
    let (xn, xm, xe, yn, ym, ye) = match (x, y) {
        (Num::Nan, _) | (_, Num::Nan) => return Num::Nan,
        (Num::Inf(a), Num::Inf(b)) => return if a == b { x } else { Num::Nan },
        (Num::Inf(_), _) => return x,
        (_, Num::Inf(_)) => return y,
        (Num::Fin { neg, mant, exp, .. }, Num::Fin { neg: n, mant: m, exp: e, .. }) => {
            (neg, mant, exp, n, m, e)
        }
    };
    if xm == 0 && ym == 0 {
        let neg = if xn == yn { xn } else { round == Round::Rm };
        return Num::Fin { neg, mant: 0, exp: 0, sticky: false };
    }
    if xm == 0 {
        return y;
    }
    if ym == 0 {
        return x;
    }
    // Both get their top bit at place 125, so that the sum fits.
    let lift = |m: u128, e: i32| {
        let by = m.leading_zeros() as i32 - 2;
        (m << by, e - by)
    };
    let (a, b) = (lift(xm, xe), lift(ym, ye));
    let ((hn, hm, he), (ln, lm, le)) = if (a.1, a.0) >= (b.1, b.0) {
        ((xn, a.0, a.1), (yn, b.0, b.1))
    } else {
        ((yn, b.0, b.1), (xn, a.0, a.1))
    };
    let gap = (he - le) as u32;
    let (low, lost) =
        if gap > 127 { (0, true) } else { (lm >> gap, lm & ((1u128 << gap) - 1) != 0) };
    if hn == ln {
        return Num::Fin { neg: hn, mant: hm + low, exp: he, sticky: lost };
    }
    // With bits lost below, the true difference lies between two integers: take the lower one.
    let mant = hm - low - u128::from(lost);
    let neg = if mant == 0 && !lost { round == Round::Rm } else { hn };
    Num::Fin { neg, mant, exp: he, sticky: lost }
}

/// The quotient with 64 or more significant bits and a sticky bit.
pub(crate) fn div(x: Num, y: Num) -> Num {
    match (x, y) {
        (Num::Nan, _) | (_, Num::Nan) | (Num::Inf(_), Num::Inf(_)) => Num::Nan,
        (Num::Inf(n), Num::Fin { neg, .. }) => Num::Inf(n != neg),
        (Num::Fin { neg, .. }, Num::Inf(n)) => {
            Num::Fin { neg: n != neg, mant: 0, exp: 0, sticky: false }
        }
        (Num::Fin { neg, mant, exp, .. }, Num::Fin { neg: n, mant: m, exp: e, .. }) => {
            if m == 0 {
                return if mant == 0 { Num::Nan } else { Num::Inf(neg != n) };
            }
            if mant == 0 {
                return Num::Fin { neg: neg != n, mant: 0, exp: 0, sticky: false };
            }
            let by = mant.leading_zeros();
            let top = mant << by;
            let sticky = top % m != 0;
            Num::Fin { neg: neg != n, mant: top / m, exp: exp - by as i32 - e, sticky }
        }
    }
}

/// The square root with 60 or more significant bits and a sticky bit.
pub(crate) fn sqrt(x: Num) -> Num {
    match x {
        Num::Nan | Num::Inf(true) => Num::Nan,
        Num::Inf(false) => x,
        Num::Fin { mant: 0, .. } => x,
        Num::Fin { neg: true, .. } => Num::Nan,
        Num::Fin { mant, exp, .. } => {
            let mut by = mant.leading_zeros() as i32;
            by -= (exp - by) & 1;
            let lifted = mant << by;
            let root = lifted.isqrt();
            let sticky = root * root != lifted;
            Num::Fin { neg: false, mant: root, exp: (exp - by) / 2, sticky }
        }
    }
}
