//! Conversions: exhaustive for 8- and 16-bit types, against the host elsewhere.

use crate::common::{agree, eval};
use half::{bf16, f16};
use proptest::prelude::*;

fn all16() -> Vec<[u64; 3]> {
    (0..1 << 16).map(|x| [x, 0, 0]).collect()
}

fn nan32(x: f32) -> u64 {
    if x.is_nan() { 0x7fff_ffff } else { x.to_bits().into() }
}

#[test]
fn widening_halves() {
    let h = |x: u64| f16::from_bits(x as u16).to_f32();
    agree("cvt.f32.f16 D, A;", [16, 32, 32, 32], &all16(), |x, _, _| nan32(h(x)));
    let wide = [16, 32, 32, 64];
    let numbers: Vec<_> = all16().into_iter().filter(|c| !h(c[0]).is_nan()).collect();
    agree("cvt.f64.f16 D, A;", wide, &numbers, |x, _, _| f64::from(h(x)).to_bits());
    agree("cvt.f32.bf16 D, A;", [16, 32, 32, 32], &all16(), |x, _, _| x << 16);
}

/// Every value of a 16-bit format as f32, its neighbours, and the points half-way to the next.
fn around(to_f32: impl Fn(u16) -> f32) -> Vec<[u64; 3]> {
    let mut out = Vec::new();
    for bits in 0..=u16::MAX {
        let (x, next) = (to_f32(bits), to_f32(bits.wrapping_add(1)));
        let middle = ((f64::from(x) + f64::from(next)) / 2.0) as f32;
        for y in [x, middle] {
            for bits in [y.to_bits().wrapping_sub(1), y.to_bits(), y.to_bits().wrapping_add(1)] {
                out.push([bits.into(), 0, 0]);
            }
        }
    }
    out
}

#[test]
fn narrowing_to_halves() {
    let narrow = [32, 32, 32, 16];
    let f = |x: u64| f32::from_bits(x as u32);
    let cases = around(|b| f16::from_bits(b).to_f32());
    agree("cvt.rn.f16.f32 D, A;", narrow, &cases, |x, _, _| {
        if f(x).is_nan() { 0x7fff } else { f16::from_f32(f(x)).to_bits().into() }
    });
    let toward_zero = |x: f32| {
        let near = f16::from_f32(x);
        let over = near.to_f32().abs() > x.abs();
        near.to_bits() - u16::from(over)
    };
    agree("cvt.rz.f16.f32 D, A;", narrow, &cases, |x, _, _| {
        if f(x).is_nan() { 0x7fff } else { toward_zero(f(x)).into() }
    });
    let cases = around(|b| bf16::from_bits(b).to_f32());
    agree("cvt.rn.bf16.f32 D, A;", narrow, &cases, |x, _, _| {
        if f(x).is_nan() { 0x7fff } else { bf16::from_f32(f(x)).to_bits().into() }
    });
    agree("cvt.rn.bf16x2.f32 D, A, B;", [32; 4], &cases, |x, _, _| {
        let half = if f(x).is_nan() { 0x7fff } else { bf16::from_f32(f(x)).to_bits().into() };
        half << 16
    });
    agree("cvt.rn.relu.bf16x2.f32 D, B, A;", [32; 4], &cases, |x, _, _| {
        let y = f(x);
        if y.is_nan() { 0x7fff } else { bf16::from_f32(y.max(0.0) + 0.0).to_bits().into() }
    });
    // tf32 keeps ten bits of the fraction, ties away from zero.
    agree("cvt.rna.tf32.f32 D, A;", [32; 4], &cases, |x, _, _| {
        if f(x).is_nan() { 0x7fff_ffff } else { (x + 0x1000) & !0x1fff }
    });
}

/// The value of an 8-bit float; `None` for NaN.
fn small(bits: u8, fraction: u32, bias: i32) -> Option<f64> {
    let exponent = i32::from(bits & 0x7f) >> fraction;
    let mantissa = f64::from(bits & ((1 << fraction) - 1)) / f64::from(1 << fraction);
    let sign = if bits & 0x80 != 0 { -1.0 } else { 1.0 };
    if fraction == 3 && bits & 0x7f == 0x7f {
        return None;
    }
    if fraction == 2 && exponent == 31 {
        return if mantissa == 0.0 { Some(sign * f64::INFINITY) } else { None };
    }
    Some(if exponent == 0 {
        sign * mantissa * f64::from(1 - bias).exp2()
    } else {
        sign * (1.0 + mantissa) * f64::from(exponent - bias).exp2()
    })
}

#[test]
fn eight_bit_floats() {
    for (name, fraction, bias) in [("e4m3x2", 3, 7), ("e5m2x2", 2, 15)] {
        let op = format!("cvt.rn.f16x2.{name} D, A;");
        agree(&op, [16, 32, 32, 32], &all16(), |x, _, _| {
            let half = |b: u64| match small(b as u8, fraction, bias) {
                None => 0x7fff,
                Some(v) => u64::from(f16::from_f64(v).to_bits()),
            };
            half(x & 255) | half(x >> 8) << 16
        });
        // From every 16-bit prefix of an f32, to the nearest finite value, ties to even.
        let values: Vec<(u8, f64)> = (0..0x7f)
            .filter_map(|b| Some((b, small(b, fraction, bias).filter(|v| v.is_finite())?)))
            .collect();
        let op = format!("cvt.rn.satfinite.{name}.f32 D, B, A;");
        let cases: Vec<_> = all16().iter().map(|c| [c[0] << 16, 0, 0]).collect();
        agree(&op, [32, 32, 32, 16], &cases, |x, _, _| {
            let value = f64::from(f32::from_bits(x as u32));
            if value.is_nan() {
                return 0x7f;
            }
            let distance = |v: f64| (v - value.abs()).abs();
            let best = values.iter().min_by(|p, q| {
                let order = distance(p.1).partial_cmp(&distance(q.1)).unwrap();
                order.then((p.0 & 1).cmp(&(q.0 & 1)))
            });
            // Far above, all distances are equal to f64.
            let best = if value.abs() > 1e6 { values.last() } else { best };
            u64::from(best.unwrap().0) | if value.is_sign_negative() { 0x80 } else { 0 }
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn integers_and_floats(raw in prop::collection::vec(any::<u64>(), 512)) {
        let cases: Vec<[u64; 3]> = raw.iter().map(|&x| [x, 0, 0]).collect();
        let w = [64, 64, 64, 64];
        let f = |x: u64| f32::from_bits(x as u32);
        let to32 = [64, 64, 64, 32];
        agree("cvt.rn.f32.s64 D, A;", to32, &cases, |x, _, _| (x as i64 as f32).to_bits().into());
        agree("cvt.rn.f32.u32 D, A;", [32; 4], &cases, |x, _, _| (x as f32).to_bits().into());
        agree("cvt.rn.f32.s32 D, A;", [32; 4], &cases, |x, _, _| {
            u64::from((x as u32 as i32 as f32).to_bits())
        });
        agree("cvt.rn.f64.u64 D, A;", w, &cases, |x, _, _| (x as f64).to_bits());
        agree("cvt.rz.f32.u32 D, A;", [32; 4], &cases, |x, _, _| {
            let near = x as f32;
            let over = f64::from(near) > x as f64;
            (near.to_bits() - u32::from(over)).into()
        });
        agree("cvt.rn.f32.f64 D, A;", to32, &cases, |x, _, _| nan32(f64::from_bits(x) as f32));
        // Float bits near one, so that not everything saturates.
        let near: Vec<[u64; 3]> = raw
            .iter()
            .map(|&x| [(x & 0x80ff_ffff) | (100 + (x >> 32) % 70) << 23, 0, 0])
            .collect();
        agree("cvt.rzi.s32.f32 D, A;", [32; 4], &near, |x, _, _| f(x) as i32 as u64);
        agree("cvt.rzi.u32.f32 D, A;", [32; 4], &near, |x, _, _| (f(x) as u32).into());
        agree("cvt.rni.s64.f32 D, A;", [32, 32, 32, 64], &near, |x, _, _| {
            f(x).round_ties_even() as i64 as u64
        });
        agree("cvt.rmi.s32.f32 D, A;", [32; 4], &near, |x, _, _| f(x).floor() as i32 as u64);
        agree("cvt.rpi.f32.f32 D, A;", [32; 4], &near, |x, _, _| f(x).ceil().to_bits().into());
        agree("cvt.rni.f32.f32 D, A;", [32; 4], &near, |x, _, _| {
            f(x).round_ties_even().to_bits().into()
        });
        agree("cvt.sat.f32.f32 D, A;", [32; 4], &near, |x, _, _| {
            (f(x).clamp(0.0, 1.0) + 0.0).to_bits().into()
        });
        agree("cvt.s64.s8 D, A;", w, &cases, |x, _, _| x as i8 as i64 as u64);
        agree("cvt.u32.u16 D, A;", to32, &cases, |x, _, _| x & 0xffff);
        agree("cvt.sat.u8.s32 D, A;", [32, 32, 32, 32], &cases, |x, _, _| {
            (x as u32 as i32).clamp(0, 255) as u64
        });
        agree("cvt.sat.s16.s64 D, A;", [64, 64, 64, 16], &cases, |x, _, _| {
            (x as i64).clamp(-32768, 32767) as u64
        });
    }
}

#[test]
fn not_a_number_to_integer() {
    let nan = u64::from(f32::NAN.to_bits());
    assert_eq!(eval("cvt.rzi.s32.f32 D, A;", [32; 4], &[[nan, 0, 0]]), [0]);
    assert_eq!(eval("cvt.rzi.s64.f32 D, A;", [32, 32, 32, 64], &[[nan, 0, 0]]), [1 << 63]);
    let nan = f64::NAN.to_bits();
    assert_eq!(eval("cvt.rzi.s32.f64 D, A;", [64, 64, 64, 32], &[[nan, 0, 0]]), [1 << 31]);
}
