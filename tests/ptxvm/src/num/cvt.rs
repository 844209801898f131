//! Conversions between all types, in every rounding mode.

use super::float::{flush, fmt};
use super::int::val;
use super::soft::{self, Num, from_int, pack, to_int, unpack};
use crate::program::Par;
use crate::types::{Round, Ty, mask};

/// `cvt` to an integer from an integer; `.sat` clamps.
pub(crate) fn int_int(p: &Par, a: u64, _: u64, _: u64) -> u64 {
    let x = val(p.from, a);
    if p.sat {
        return clamp(p.ty, x);
    }
    val(p.ty, x as u64) as u64
}

fn clamp(ty: Ty, x: i128) -> u64 {
    let bits = ty.bits();
    let (low, high) = if ty.signed() {
        (-(1i128 << (bits - 1)), (1i128 << (bits - 1)) - 1)
    } else {
        (0, (1i128 << bits) - 1)
    };
    x.clamp(low, high) as u64
}

fn source(p: &Par, a: u64) -> Num {
    let f = fmt(p.from);
    let a = a & mask(p.from.bytes());
    let a = if p.ftz && p.from == Ty::F32 { flush(a, f) } else { a };
    unpack(a, f)
}

/// `cvt` to an integer from a float, clamping to the range. NaN gives zero, or the top bit alone
/// where either side has 64 bits.
pub(crate) fn int_float(p: &Par, a: u64, _: u64, _: u64) -> u64 {
    match to_int(source(p, a), p.round) {
        Some(x) => clamp(p.ty, x),
        None if p.from == Ty::F64 || p.ty.bits() == 64 => 1 << (p.ty.bits() - 1),
        None => 0,
    }
}

/// `cvt` to a float from an integer.
pub(crate) fn float_int(p: &Par, a: u64, _: u64, _: u64) -> u64 {
    finish(p, pack(from_int(val(p.from, a)), fmt(p.ty), p.round, false))
}

fn finish(p: &Par, x: u64) -> u64 {
    let f = fmt(p.ty);
    let mut x = if p.ftz && p.ty == Ty::F32 { flush(x, f) } else { x };
    let nan = unpack(x, f) == Num::Nan;
    let negative = x & f.sign_bit() != 0;
    if p.sat {
        let one = pack(from_int(1), f, Round::Rn, false);
        x = if nan || negative { 0 } else { x.min(one) };
    }
    if p.relu && !nan && negative {
        x = 0;
    }
    x
}

/// `cvt` between floats. `sel` bit 0: round to an integral value; bit 1: `.satfinite`.
pub(crate) fn float_float(p: &Par, a: u64, _: u64, _: u64) -> u64 {
    let num = source(p, a);
    let f = fmt(p.ty);
    if p.sel & 1 == 1 {
        let Num::Fin { neg, .. } = num else { return finish(p, pack(num, f, Round::Rn, false)) };
        let value = match to_int(num, p.round) {
            Some(i128::MIN | i128::MAX) | None => num,
            Some(0) => Num::Fin { neg, mant: 0, exp: 0, sticky: false },
            Some(x) => from_int(x),
        };
        return finish(p, pack(value, f, Round::Rn, false));
    }
    // Between equal types, and to a wider one, a NaN keeps nothing: the canonical one is returned.
    finish(p, pack(num, f, p.round, p.sel & 2 != 0))
}

/// `cvt.rna.tf32.f32` and `cvt.rn.tf32.f32`: an f32 whose low 13 bits are zero.
pub(crate) fn tf32(p: &Par, a: u64, _: u64, _: u64) -> u64 {
    let num = unpack(a & 0xffff_ffff, soft::F32);
    if num == Num::Nan {
        return 0x7fff_ffff;
    }
    finish(p, pack(num, soft::TF32, p.round, p.sel & 2 != 0) << 13)
}

/// One half of a pair from an f32: the common conversions take the short way.
fn half_of(p: &Par, x: u64) -> u64 {
    let x = x as u32;
    let plain = p.round == Round::Rn && p.sel & 2 == 0 && !p.relu && !f32::from_bits(x).is_nan();
    match p.ty {
        Ty::Bf16x2 if plain => half::bf16::from_f32(f32::from_bits(x)).to_bits().into(),
        Ty::F16x2 if plain => half::f16::from_f32(f32::from_bits(x)).to_bits().into(),
        _ => narrow(p, unpack(x.into(), soft::F32)),
    }
}

/// `cvt.rn` of an f32 to f16 or bf16.
pub(crate) fn half_f32(p: &Par, a: u64, _: u64, _: u64) -> u64 {
    let x = f32::from_bits(a as u32);
    match p.ty {
        _ if x.is_nan() => 0x7fff,
        Ty::Bf16 => half::bf16::from_f32(x).to_bits().into(),
        _ => half::f16::from_f32(x).to_bits().into(),
    }
}

/// `f16` to `f32`.
pub(crate) fn f32_f16(_: &Par, a: u64, _: u64, _: u64) -> u64 {
    let x = half::f16::from_bits(a as u16).to_f32();
    if x.is_nan() { 0x7fff_ffff } else { x.to_bits().into() }
}

fn narrow(p: &Par, num: Num) -> u64 {
    let f = fmt(p.ty);
    let x = pack(num, f, p.round, p.sel & 2 != 0);
    if num == Num::Nan {
        return f.nan();
    }
    if p.relu && x & f.sign_bit() != 0 { 0 } else { x }
}

/// `cvt` of two f32 to a packed pair: `a` goes to the upper half.
pub(crate) fn pair_f32(p: &Par, a: u64, b: u64, _: u64) -> u64 {
    let half = p.ty.bits() / 2;
    half_of(p, a) << half | half_of(p, b)
}

/// `cvt` between packed pairs of small floats.
pub(crate) fn pair_pair(p: &Par, a: u64, _: u64, _: u64) -> u64 {
    let (to, from) = (p.ty.bits() / 2, p.from.bits() / 2);
    let get = |x: u64| unpack(x & ((1 << from) - 1), fmt(p.from));
    narrow(p, get(a >> from)) << to | narrow(p, get(a))
}

/// `bf16` to `f32`: a shift, except that a NaN stays as it is.
pub(crate) fn f32_bf16(_: &Par, a: u64, _: u64, _: u64) -> u64 {
    (a & 0xffff) << 16
}

/// `f32` from a 32-bit integer, to nearest.
pub(crate) fn f32_s32(_: &Par, a: u64, _: u64, _: u64) -> u64 {
    (a as i32 as f32).to_bits().into()
}

pub(crate) fn f32_u32(_: &Par, a: u64, _: u64, _: u64) -> u64 {
    (a as u32 as f32).to_bits().into()
}

/// `cvt.pack.sat.TO.FROM d, a, b`, whose third operand is kept shifted.
pub(crate) fn pack_sat(p: &Par, a: u64, b: u64, c: u64) -> u64 {
    let bits = p.ty.bits();
    let m = mask(p.ty.bytes());
    let low = clamp(p.ty, val(p.from, b)) & m;
    let high = clamp(p.ty, val(p.from, a)) & m;
    if bits == 16 { low | high << 16 } else { (c << 16) & 0xffff_0000 | high << 8 | low }
}
