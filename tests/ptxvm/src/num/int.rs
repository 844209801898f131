//! Integer, logic and bit-field instructions. Results are cut to the register by the caller.

use crate::program::Par;
use crate::types::{Ty, mask, sext};

/// The operand as a number of the type.
#[inline]
pub(crate) fn val(ty: Ty, x: u64) -> i128 {
    if ty.signed() { sext(x, ty.bits()).into() } else { (x & mask(ty.bytes())).into() }
}

fn clamp(ty: Ty, x: i128) -> u64 {
    let (low, high) = if ty.signed() {
        (-(1i128 << (ty.bits() - 1)), (1i128 << (ty.bits() - 1)) - 1)
    } else {
        (0, (1i128 << ty.bits()) - 1)
    };
    x.clamp(low, high) as u64
}

pub(crate) fn mov(_: &Par, a: u64, _: u64, _: u64) -> u64 {
    a
}

pub(crate) fn add(_: &Par, a: u64, b: u64, _: u64) -> u64 {
    a.wrapping_add(b)
}

pub(crate) fn add_sat(p: &Par, a: u64, b: u64, _: u64) -> u64 {
    clamp(p.ty, val(p.ty, a) + val(p.ty, b))
}

pub(crate) fn sub(_: &Par, a: u64, b: u64, _: u64) -> u64 {
    a.wrapping_sub(b)
}

pub(crate) fn sub_sat(p: &Par, a: u64, b: u64, _: u64) -> u64 {
    clamp(p.ty, val(p.ty, a) - val(p.ty, b))
}

pub(crate) fn mul_lo(_: &Par, a: u64, b: u64, _: u64) -> u64 {
    a.wrapping_mul(b)
}

pub(crate) fn mad_lo(_: &Par, a: u64, b: u64, c: u64) -> u64 {
    a.wrapping_mul(b).wrapping_add(c)
}

fn product(p: &Par, a: u64, b: u64) -> u128 {
    if p.ty.signed() {
        (val(p.ty, a) * val(p.ty, b)) as u128
    } else {
        (val(p.ty, a) as u128) * (val(p.ty, b) as u128)
    }
}

pub(crate) fn mul_hi(p: &Par, a: u64, b: u64, _: u64) -> u64 {
    (product(p, a, b) >> p.ty.bits()) as u64
}

pub(crate) fn mad_hi(p: &Par, a: u64, b: u64, c: u64) -> u64 {
    mul_hi(p, a, b, 0).wrapping_add(c)
}

/// `mad.hi.sat.s32`.
pub(crate) fn mad_hi_sat(p: &Par, a: u64, b: u64, c: u64) -> u64 {
    clamp(p.ty, val(p.ty, mul_hi(p, a, b, 0)) + val(p.ty, c))
}

pub(crate) fn mul_wide(p: &Par, a: u64, b: u64, _: u64) -> u64 {
    product(p, a, b) as u64
}

pub(crate) fn mad_wide(p: &Par, a: u64, b: u64, c: u64) -> u64 {
    (product(p, a, b) as u64).wrapping_add(c)
}

fn product24(p: &Par, a: u64, b: u64) -> i128 {
    if p.ty.signed() {
        i128::from(sext(a, 24)) * i128::from(sext(b, 24))
    } else {
        i128::from(a & 0xff_ffff) * i128::from(b & 0xff_ffff)
    }
}

pub(crate) fn mul24(p: &Par, a: u64, b: u64, _: u64) -> u64 {
    (product24(p, a, b) >> p.sel) as u64
}

pub(crate) fn mad24(p: &Par, a: u64, b: u64, c: u64) -> u64 {
    mul24(p, a, b, 0).wrapping_add(c)
}

pub(crate) fn sad(p: &Par, a: u64, b: u64, c: u64) -> u64 {
    ((val(p.ty, a) - val(p.ty, b)).unsigned_abs() as u64).wrapping_add(c)
}

/// Division by zero gives all ones, as the hardware's sequence does; PTX leaves it open.
pub(crate) fn div(p: &Par, a: u64, b: u64, _: u64) -> u64 {
    let divisor = val(p.ty, b);
    if divisor == 0 { u64::MAX } else { (val(p.ty, a) / divisor) as u64 }
}

pub(crate) fn rem(p: &Par, a: u64, b: u64, _: u64) -> u64 {
    let divisor = val(p.ty, b);
    if divisor == 0 { a } else { (val(p.ty, a) % divisor) as u64 }
}

pub(crate) fn abs(p: &Par, a: u64, _: u64, _: u64) -> u64 {
    val(p.ty, a).unsigned_abs() as u64
}

pub(crate) fn neg(_: &Par, a: u64, _: u64, _: u64) -> u64 {
    a.wrapping_neg()
}

/// Packed 16-bit minimum, maximum and addition share this.
fn halves(p: &Par, a: u64, b: u64, f: impl Fn(i128, i128) -> i128) -> u64 {
    let ty = if p.ty == Ty::S32 { Ty::S16 } else { Ty::U16 };
    let low = f(val(ty, a), val(ty, b)) as u64 & 0xffff;
    let high = f(val(ty, a >> 16), val(ty, b >> 16)) as u64 & 0xffff;
    low | high << 16
}

fn relu(p: &Par, x: i128) -> i128 {
    if p.relu { x.max(0) } else { x }
}

/// `sel` 1 marks the packed form, whose `ty` is the 32-bit type of the same sign.
pub(crate) fn min(p: &Par, a: u64, b: u64, _: u64) -> u64 {
    if p.sel == 1 {
        return halves(p, a, b, |x, y| relu(p, x.min(y)));
    }
    relu(p, val(p.ty, a).min(val(p.ty, b))) as u64
}

pub(crate) fn max(p: &Par, a: u64, b: u64, _: u64) -> u64 {
    if p.sel == 1 {
        return halves(p, a, b, |x, y| relu(p, x.max(y)));
    }
    relu(p, val(p.ty, a).max(val(p.ty, b))) as u64
}

pub(crate) fn add_halves(p: &Par, a: u64, b: u64, _: u64) -> u64 {
    halves(p, a, b, |x, y| x + y)
}

pub(crate) fn and(_: &Par, a: u64, b: u64, _: u64) -> u64 {
    a & b
}

pub(crate) fn or(_: &Par, a: u64, b: u64, _: u64) -> u64 {
    a | b
}

pub(crate) fn xor(_: &Par, a: u64, b: u64, _: u64) -> u64 {
    a ^ b
}

pub(crate) fn not(p: &Par, a: u64, _: u64, _: u64) -> u64 {
    if p.ty == Ty::Pred { a ^ 1 } else { !a }
}

pub(crate) fn cnot(p: &Par, a: u64, _: u64, _: u64) -> u64 {
    u64::from(a & mask(p.ty.bytes()) == 0)
}

pub(crate) fn shl(p: &Par, a: u64, b: u64, _: u64) -> u64 {
    let by = b & 0xffff_ffff;
    if by >= p.ty.bits().into() { 0 } else { a << by }
}

pub(crate) fn shr(p: &Par, a: u64, b: u64, _: u64) -> u64 {
    let by = (b & 0xffff_ffff).min(p.ty.bits().into()).min(127) as u32;
    (val(p.ty, a) >> by) as u64
}

/// Funnel shift; `sel` bit 0 is right, bit 1 is wrap.
pub(crate) fn shf(p: &Par, a: u64, b: u64, c: u64) -> u64 {
    let both = (b << 32) | (a & 0xffff_ffff);
    let by = if p.sel & 2 != 0 { c & 31 } else { (c & 0xffff_ffff).min(32) };
    if p.sel & 1 != 0 { both >> by } else { (both << by) >> 32 }
}

pub(crate) fn lop3(p: &Par, a: u64, b: u64, c: u64) -> u64 {
    let mut out = 0;
    for i in 0..8 {
        if p.sel >> i & 1 == 1 {
            let pick = |x: u64, bit: u32| if i >> bit & 1 == 1 { x } else { !x };
            out |= pick(a, 2) & pick(b, 1) & pick(c, 0);
        }
    }
    out
}

pub(crate) fn popc(p: &Par, a: u64, _: u64, _: u64) -> u64 {
    (a & mask(p.ty.bytes())).count_ones().into()
}

pub(crate) fn clz(p: &Par, a: u64, _: u64, _: u64) -> u64 {
    (a & mask(p.ty.bytes())).leading_zeros().wrapping_sub(64 - p.ty.bits()).into()
}

pub(crate) fn brev(p: &Par, a: u64, _: u64, _: u64) -> u64 {
    a.reverse_bits() >> (64 - p.ty.bits())
}

/// The place of the top significant bit; `sel` 1 gives the shift that brings it to the top.
pub(crate) fn bfind(p: &Par, a: u64, _: u64, _: u64) -> u64 {
    let value = val(p.ty, a);
    let bits = if value < 0 { !value } else { value } as u64 & mask(p.ty.bytes());
    if bits == 0 {
        return 0xffff_ffff;
    }
    let place = 63 - bits.leading_zeros();
    u64::from(if p.sel == 1 { p.ty.bits() - 1 - place } else { place })
}

pub(crate) fn bfe(p: &Par, a: u64, b: u64, c: u64) -> u64 {
    let bits = u64::from(p.ty.bits());
    let (at, len) = (b & 0xff, c & 0xff);
    let signed = p.ty.signed();
    let value = val(p.ty, a);
    if len == 0 {
        return 0;
    }
    // Past the top, the sign (or zero) repeats.
    let moved = value >> at.min(127);
    let len = len.min(bits);
    let field = moved & ((1i128 << len) - 1);
    // The sign bit of the field, or of the operand where the field reaches past the top.
    let sign_at = (at + len - 1).min(bits - 1);
    let negative = signed && value >> sign_at & 1 == 1;
    let filled = if negative { field | (-1i128 << len) } else { field };
    let keep = bits.saturating_sub(at);
    if negative && len > keep { (filled | (-1i128 << keep)) as u64 } else { filled as u64 }
}

/// `bfi` takes four operands: position and length arrive packed in `c`.
pub(crate) fn bfi(p: &Par, a: u64, b: u64, c: u64) -> u64 {
    let bits = u64::from(p.ty.bits());
    let (at, len) = (c & 0xff, c >> 8 & 0xff);
    if at >= bits || len == 0 {
        return b;
    }
    let field = ((1u128 << len.min(bits)) - 1) << at;
    let field = field as u64 & mask(p.ty.bytes());
    (b & !field) | (a << at) & field
}

pub(crate) fn bmsk(p: &Par, a: u64, b: u64, _: u64) -> u64 {
    let (a, b) = if p.sel == 1 {
        (a & 31, b & 31)
    } else {
        ((a & 0xffff_ffff).min(32), (b & 0xffff_ffff).min(32))
    };
    (((1u128 << b) - 1) << a) as u64 & 0xffff_ffff
}

pub(crate) fn szext(p: &Par, a: u64, b: u64, _: u64) -> u64 {
    let n = if p.sel == 1 { b & 31 } else { (b & 0xffff_ffff).min(32) } as u32;
    match (n, p.ty.signed()) {
        (0, _) => 0,
        (n, true) => sext(a, n) as u64,
        (n, false) => a & ((1u64 << n) - 1),
    }
}

pub(crate) fn fns(_: &Par, a: u64, b: u64, c: u64) -> u64 {
    let (word, base, offset) = (a as u32, b as u32 & 31, c as u32 as i32);
    let set = |i: u32| word >> i & 1 == 1;
    let hit = match offset {
        0 => set(base).then_some(base),
        1.. => (base..32).filter(|&i| set(i)).nth(offset as usize - 1),
        _ => (0..=base).rev().filter(|&i| set(i)).nth((-i64::from(offset)) as usize - 1),
    };
    hit.unwrap_or(u32::MAX).into()
}

/// `sel`: 0 default, then f4e b4e rc8 ecl ecr rc16.
pub(crate) fn prmt(p: &Par, a: u64, b: u64, c: u64) -> u64 {
    let both = (b << 32) | (a & 0xffff_ffff);
    let byte = |i: u64| both >> ((i & 7) * 8) & 0xff;
    let mut out = 0;
    for i in 0..4u64 {
        let s = c & 3;
        let value = match p.sel {
            0 => {
                let pick = c >> (i * 4) & 0xf;
                let b = byte(pick);
                if pick & 8 == 0 { b } else { 0u64.wrapping_sub(b >> 7) & 0xff }
            }
            1 => byte(s + i),
            2 => byte(s.wrapping_sub(i)),
            3 => byte(s),
            4 => byte(i.max(s)),
            5 => byte(i.min(s)),
            _ => byte((c & 1) * 2 + (i & 1)),
        };
        out |= value << (i * 8);
    }
    out
}

/// `dp4a`: `from` is the type of `b`; `ty` that of `a`.
pub(crate) fn dp4a(p: &Par, a: u64, b: u64, c: u64) -> u64 {
    let pick = |ty: Ty, x: u64, i: u32| {
        let byte = x >> (8 * i) & 0xff;
        if ty.signed() { sext(byte, 8) } else { byte as i64 }
    };
    (0..4).fold(c, |sum, i| sum.wrapping_add((pick(p.ty, a, i) * pick(p.from, b, i)) as u64))
}

/// `dp2a`: `sel` 1 takes the high half of `b`.
pub(crate) fn dp2a(p: &Par, a: u64, b: u64, c: u64) -> u64 {
    let wide = |x: u64, i: u32| {
        let half = x >> (16 * i) & 0xffff;
        if p.ty.signed() { sext(half, 16) } else { half as i64 }
    };
    let narrow = |x: u64, i: u32| {
        let byte = x >> (16 * p.sel + 8 * i) & 0xff;
        if p.from.signed() { sext(byte, 8) } else { byte as i64 }
    };
    (0..2).fold(c, |sum, i| sum.wrapping_add((wide(a, i) * narrow(b, i)) as u64))
}

/// `selp`; the predicate is `c`.
pub(crate) fn selp(_: &Par, a: u64, b: u64, c: u64) -> u64 {
    if c & 1 == 1 { a } else { b }
}

/// `slct` by a signed integer; the float form is in `float.rs`.
pub(crate) fn slct(_: &Par, a: u64, b: u64, c: u64) -> u64 {
    if c as u32 as i32 >= 0 { a } else { b }
}
