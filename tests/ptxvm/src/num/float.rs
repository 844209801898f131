//! Floating-point arithmetic. Round-to-nearest f32 and f64 use the host's IEEE operations; every
//! other mode and format goes through the exact arithmetic of `soft.rs`.
//!
//! The `.approx` instructions return the f64 result rounded to f32: within half an ulp of the true
//! value (up to cases that lie too near a tie for f64 to tell). Hardware may differ in the last
//! bits, so a kernel must not depend on them.

use super::soft::{self, Fmt, Num, pack, unpack};
use crate::program::Par;
use crate::types::{Round, Ty};

/// The NaN that every f32 instruction returns.
const NAN32: u64 = 0x7fff_ffff;

/// The format of one element of a type.
pub(crate) fn fmt(ty: Ty) -> Fmt {
    match ty {
        Ty::F16 | Ty::F16x2 => soft::F16,
        Ty::Bf16 | Ty::Bf16x2 => soft::BF16,
        Ty::Tf32 => soft::TF32,
        Ty::F64 => soft::F64,
        Ty::E4m3x2 => soft::E4M3,
        Ty::E5m2x2 => soft::E5M2,
        _ => soft::F32,
    }
}

fn f32_of(x: u64) -> f32 {
    f32::from_bits(x as u32)
}

fn f64_of(x: u64) -> f64 {
    f64::from_bits(x)
}

fn bits32(x: f32) -> u64 {
    if x.is_nan() { NAN32 } else { x.to_bits().into() }
}

/// Subnormal numbers of the format become zero of the same sign.
pub(crate) fn flush(x: u64, f: Fmt) -> u64 {
    let magnitude = x & (f.sign_bit() - 1);
    if magnitude >> f.frac == 0 { x & f.sign_bit() } else { x }
}

fn input(p: &Par, x: u64) -> u64 {
    if p.ftz { flush(x, fmt(p.ty)) } else { x }
}

/// Flushes, saturates to [0, 1] or applies `.relu`, as the instruction says.
fn finish(p: &Par, x: u64) -> u64 {
    let f = fmt(p.ty);
    let mut x = if p.ftz { flush(x, f) } else { x };
    let nan = matches!(unpack(x, f), Num::Nan);
    let negative = x & f.sign_bit() != 0;
    if p.sat {
        let one = pack(soft::from_int(1), f, Round::Rn, false);
        if nan || negative {
            x = 0;
        } else if x > one {
            x = one;
        }
    }
    if p.relu {
        if nan {
            x = f.nan();
        } else if negative {
            x = 0;
        }
    }
    x
}

/// Applies an elementwise function to packed halves where the type is packed.
fn lanes(p: &Par, a: u64, b: u64, c: u64, f: impl Fn(&Par, u64, u64, u64) -> u64) -> u64 {
    let single = match p.ty {
        Ty::F16x2 => Ty::F16,
        Ty::Bf16x2 => Ty::Bf16,
        _ => return f(p, a, b, c),
    };
    let q = Par { ty: single, ..*p };
    let low = f(&q, a & 0xffff, b & 0xffff, c & 0xffff) & 0xffff;
    let high = f(&q, a >> 16 & 0xffff, b >> 16 & 0xffff, c >> 16 & 0xffff) & 0xffff;
    low | high << 16
}

fn soft_op(p: &Par, a: u64, b: u64, c: u64, f: impl Fn(Round, Num, Num, Num) -> Num) -> u64 {
    lanes(p, a, b, c, |p, a, b, c| {
        let m = fmt(p.ty);
        let get = |x| unpack(input(p, x), m);
        finish(p, pack(f(p.round, get(a), get(b), get(c)), m, p.round, false))
    })
}

/// The addition that the compiler picks for plain `.rn.f32`.
pub(crate) fn add_f32(_: &Par, a: u64, b: u64, _: u64) -> u64 {
    bits32(f32_of(a) + f32_of(b))
}

pub(crate) fn sub_f32(_: &Par, a: u64, b: u64, _: u64) -> u64 {
    bits32(f32_of(a) - f32_of(b))
}

pub(crate) fn mul_f32(_: &Par, a: u64, b: u64, _: u64) -> u64 {
    bits32(f32_of(a) * f32_of(b))
}

pub(crate) fn fma_f32(_: &Par, a: u64, b: u64, c: u64) -> u64 {
    bits32(f32_of(a).mul_add(f32_of(b), f32_of(c)))
}

pub(crate) fn add_f64(_: &Par, a: u64, b: u64, _: u64) -> u64 {
    (f64_of(a) + f64_of(b)).to_bits()
}

pub(crate) fn sub_f64(_: &Par, a: u64, b: u64, _: u64) -> u64 {
    (f64_of(a) - f64_of(b)).to_bits()
}

pub(crate) fn mul_f64(_: &Par, a: u64, b: u64, _: u64) -> u64 {
    (f64_of(a) * f64_of(b)).to_bits()
}

pub(crate) fn fma_f64(_: &Par, a: u64, b: u64, c: u64) -> u64 {
    f64_of(a).mul_add(f64_of(b), f64_of(c)).to_bits()
}

pub(crate) fn add(p: &Par, a: u64, b: u64, _: u64) -> u64 {
    soft_op(p, a, b, 0, |r, x, y, _| soft::add(x, y, r))
}

pub(crate) fn sub(p: &Par, a: u64, b: u64, _: u64) -> u64 {
    soft_op(p, a, b, 0, |r, x, y, _| soft::add(x, soft::negate(y), r))
}

pub(crate) fn mul(p: &Par, a: u64, b: u64, _: u64) -> u64 {
    soft_op(p, a, b, 0, |_, x, y, _| soft::mul(x, y))
}

pub(crate) fn fma(p: &Par, a: u64, b: u64, c: u64) -> u64 {
    soft_op(p, a, b, c, |r, x, y, z| soft::add(soft::mul(x, y), z, r))
}

pub(crate) fn div(p: &Par, a: u64, b: u64, _: u64) -> u64 {
    soft_op(p, a, b, 0, |_, x, y, _| soft::div(x, y))
}

pub(crate) fn rcp(p: &Par, a: u64, _: u64, _: u64) -> u64 {
    soft_op(p, a, 0, 0, |_, x, _, _| soft::div(soft::from_int(1), x))
}

pub(crate) fn sqrt(p: &Par, a: u64, _: u64, _: u64) -> u64 {
    soft_op(p, a, 0, 0, |_, x, _, _| soft::sqrt(x))
}

/// Evaluates in f64 and rounds once to the type.
fn approx(p: &Par, a: u64, f: impl Fn(f64) -> f64) -> u64 {
    lanes(p, a, 0, 0, |p, a, _, _| {
        let m = fmt(p.ty);
        let x = f64_of(pack(unpack(input(p, a), m), soft::F64, Round::Rn, false));
        finish(p, pack(unpack(f(x).to_bits(), soft::F64), m, Round::Rn, false))
    })
}

pub(crate) fn rsqrt(p: &Par, a: u64, _: u64, _: u64) -> u64 {
    approx(p, a, |x| if x == 0.0 { 1.0 / x } else { 1.0 / x.sqrt() })
}

pub(crate) fn ex2(p: &Par, a: u64, _: u64, _: u64) -> u64 {
    approx(p, a, f64::exp2)
}

pub(crate) fn lg2(p: &Par, a: u64, _: u64, _: u64) -> u64 {
    approx(p, a, f64::log2)
}

pub(crate) fn sin(p: &Par, a: u64, _: u64, _: u64) -> u64 {
    approx(p, a, f64::sin)
}

pub(crate) fn cos(p: &Par, a: u64, _: u64, _: u64) -> u64 {
    approx(p, a, f64::cos)
}

pub(crate) fn tanh(p: &Par, a: u64, _: u64, _: u64) -> u64 {
    approx(p, a, f64::tanh)
}

pub(crate) fn neg(p: &Par, a: u64, _: u64, _: u64) -> u64 {
    lanes(p, a, 0, 0, |p, a, _, _| input(p, a) ^ fmt(p.ty).sign_bit())
}

pub(crate) fn abs(p: &Par, a: u64, _: u64, _: u64) -> u64 {
    lanes(p, a, 0, 0, |p, a, _, _| input(p, a) & !fmt(p.ty).sign_bit())
}

/// `copysign d, a, b`: the sign of `a`, the magnitude of `b`.
pub(crate) fn copysign(p: &Par, a: u64, b: u64, _: u64) -> u64 {
    let sign = fmt(p.ty).sign_bit();
    (a & sign) | (b & (sign - 1))
}

/// A key that orders the bits of a format like its numbers, with -0 below +0.
fn key(x: u64, f: Fmt) -> i64 {
    let magnitude = (x & (f.sign_bit() - 1)) as i64;
    if x & f.sign_bit() != 0 { -1 - magnitude } else { magnitude }
}

fn pick(p: &Par, a: u64, b: u64, larger: bool) -> u64 {
    lanes(p, a, b, 0, |p, a, b, _| {
        let f = fmt(p.ty);
        let all = f.sign_bit() | (f.sign_bit() - 1);
        let (a, b) = (input(p, a & all), input(p, b & all));
        let nan = |x| matches!(unpack(x, f), Num::Nan);
        let out = match (nan(a), nan(b)) {
            (true, true) => f.nan(),
            (true, false) | (false, true) if p.nan => f.nan(),
            (true, false) => b,
            (false, true) => a,
            (false, false) => {
                if (key(a, f) < key(b, f)) != larger {
                    a
                } else {
                    b
                }
            }
        };
        finish(p, out)
    })
}

pub(crate) fn min(p: &Par, a: u64, b: u64, _: u64) -> u64 {
    pick(p, a, b, false)
}

pub(crate) fn max(p: &Par, a: u64, b: u64, _: u64) -> u64 {
    pick(p, a, b, true)
}

/// `min` and `max` of three operands.
pub(crate) fn min3(p: &Par, a: u64, b: u64, c: u64) -> u64 {
    pick(p, pick(p, a, b, false), c, false)
}

pub(crate) fn max3(p: &Par, a: u64, b: u64, c: u64) -> u64 {
    pick(p, pick(p, a, b, true), c, true)
}

/// `testp`: `sel` is finite, infinite, number, notanumber, normal, subnormal.
pub(crate) fn testp(p: &Par, a: u64, _: u64, _: u64) -> u64 {
    let f = fmt(p.ty);
    let small = (a & (f.sign_bit() - 1)) >> f.frac == 0;
    let num = unpack(a, f);
    let (nan, inf) = (num == Num::Nan, matches!(num, Num::Inf(_)));
    u64::from(match p.sel {
        0 => !nan && !inf,
        1 => inf,
        2 => !nan,
        3 => nan,
        4 => !nan && !inf && !small,
        _ => small && a & ((1 << f.frac) - 1) != 0,
    })
}

/// `slct` by a float.
pub(crate) fn slct(p: &Par, a: u64, b: u64, c: u64) -> u64 {
    let c = if p.ftz { flush(c, soft::F32) } else { c };
    if f32_of(c) >= 0.0 { a } else { b }
}

/// Compares by the code in `sel`: eq ne lt le gt ge, then +6 for the unordered forms, then `num`
/// and `nan`. Integers use the first six.
#[inline]
pub(crate) fn compare(p: &Par, a: u64, b: u64) -> bool {
    use std::cmp::Ordering::{Equal, Greater, Less};
    let ty = p.from;
    let order = if ty.float() {
        let f = fmt(ty);
        if ty == Ty::F32 && !p.ftz {
            f32_of(a).partial_cmp(&f32_of(b))
        } else if ty == Ty::F64 {
            f64_of(a).partial_cmp(&f64_of(b))
        } else {
            let get = |x| {
                let x = if p.ftz { flush(x, f) } else { x };
                f64_of(pack(unpack(x, f), soft::F64, Round::Rn, false))
            };
            get(a).partial_cmp(&get(b))
        }
    } else if ty.signed() {
        let bits = ty.bits();
        Some(crate::types::sext(a, bits).cmp(&crate::types::sext(b, bits)))
    } else {
        let m = crate::types::mask(ty.bytes());
        Some((a & m).cmp(&(b & m)))
    };
    let Some(order) = order else { return (6..12).contains(&p.sel) || p.sel == 13 };
    match p.sel {
        0 | 6 => order == Equal,
        1 | 7 => order != Equal,
        2 | 8 => order == Less,
        3 | 9 => order != Greater,
        4 | 10 => order == Greater,
        5 | 11 => order != Less,
        12 => true,
        _ => false,
    }
}
