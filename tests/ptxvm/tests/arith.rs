//! Arithmetic against the host's.

use crate::common::{agree, eval};
use half::{bf16, f16};
use proptest::prelude::*;

const W32: [u32; 4] = [32; 4];
const W64: [u32; 4] = [64; 4];
const W16: [u32; 4] = [16; 4];

/// Bit patterns with many special and close exponents.
fn floats32() -> impl Strategy<Value = u64> {
    let special = prop::sample::select(vec![
        0u32,
        1 << 31,
        1,
        0x007f_ffff,
        0x0080_0000,
        0x3f80_0000,
        0x7f7f_ffff,
        0x7f80_0000,
        0xff80_0000,
        0x7fc0_0000,
    ]);
    let near = (0u32..2, 110u32..140, 0u32..1 << 23).prop_map(|(s, e, m)| s << 31 | e << 23 | m);
    prop_oneof![1 => special, 3 => any::<u32>(), 4 => near].prop_map(u64::from)
}

fn floats64() -> impl Strategy<Value = u64> {
    let near = (0u64..2, 1000u64..1050, 0u64..1 << 52).prop_map(|(s, e, m)| s << 63 | e << 52 | m);
    let special = prop::sample::select(vec![0, 1 << 63, 1, f64::MAX.to_bits(), 0x7ff0 << 48]);
    prop_oneof![1 => special, 3 => any::<u64>(), 4 => near]
}

fn triples(one: impl Strategy<Value = u64>) -> impl Strategy<Value = Vec<[u64; 3]>> {
    prop::collection::vec(prop::array::uniform3(one), 512)
}

fn f(x: u64) -> f32 {
    f32::from_bits(x as u32)
}

fn b(x: f32) -> u64 {
    if x.is_nan() { 0x7fff_ffff } else { x.to_bits().into() }
}

fn d(x: u64) -> f64 {
    f64::from_bits(x)
}

/// A canonical NaN: payloads of f64 are the host's business.
fn n(x: f64) -> u64 {
    if x.is_nan() { 0x7ff8 << 48 } else { x.to_bits() }
}

fn nan64(mut cases: Vec<[u64; 3]>) -> Vec<[u64; 3]> {
    cases.retain(|c| c.iter().all(|x| !d(*x).is_nan()));
    cases
}

/// The f32 that `rn` rounds to in another direction, given the sign of the exact value minus `rn`.
fn directed(rn: f32, above: f64, mode: &str) -> f32 {
    let up = match mode {
        "rp" => above > 0.0,
        "rm" => false,
        _ => above > 0.0 && rn < 0.0,
    };
    let down = match mode {
        "rm" => above < 0.0,
        "rp" => false,
        _ => above < 0.0 && rn > 0.0,
    };
    if up {
        rn.next_up()
    } else if down {
        rn.next_down()
    } else {
        rn
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn f32_to_nearest(cases in triples(floats32())) {
        agree("add.rn.f32 D, A, B;", W32, &cases, |x, y, _| b(f(x) + f(y)));
        agree("sub.f32 D, A, B;", W32, &cases, |x, y, _| b(f(x) - f(y)));
        agree("mul.rn.f32 D, A, B;", W32, &cases, |x, y, _| b(f(x) * f(y)));
        agree("div.rn.f32 D, A, B;", W32, &cases, |x, y, _| b(f(x) / f(y)));
        agree("sqrt.rn.f32 D, A;", W32, &cases, |x, _, _| b(f(x).sqrt()));
        agree("rcp.rn.f32 D, A;", W32, &cases, |x, _, _| b(1.0 / f(x)));
        agree("fma.rn.f32 D, A, B, C;", W32, &cases, |x, y, z| b(f(x).mul_add(f(y), f(z))));
        agree("mad.rn.f32 D, A, B, C;", W32, &cases, |x, y, z| b(f(x).mul_add(f(y), f(z))));
        agree("abs.f32 D, A;", W32, &cases, |x, _, _| x & 0x7fff_ffff);
        agree("neg.f32 D, A;", W32, &cases, |x, _, _| x ^ 0x8000_0000);
        agree("copysign.f32 D, A, B;", W32, &cases, |x, y, _| {
            u64::from(f(y).copysign(f(x)).to_bits())
        });
    }

    /// The exact arithmetic must agree with the host where the host is right: `.ftz` with operands
    /// and results that are not subnormal goes the slow way.
    #[test]
    fn soft_f32_to_nearest(cases in triples(floats32())) {
        let z = |x: f32| if x.is_subnormal() { 0f32.copysign(x) } else { x };
        let i = move |x: u64| z(f(x));
        let o = move |x: f32| b(z(x));
        // A product that rounds up to the smallest normal number is flushed by neither.
        agree("add.ftz.f32 D, A, B;", W32, &cases, |x, y, _| o(i(x) + i(y)));
        agree("mul.ftz.f32 D, A, B;", W32, &cases, |x, y, _| o(i(x) * i(y)));
        agree("fma.rn.ftz.f32 D, A, B, C;", W32, &cases, |x, y, w| o(i(x).mul_add(i(y), i(w))));
        agree("div.approx.ftz.f32 D, A, B;", W32, &cases, |x, y, _| o(i(x) / i(y)));
        agree("sqrt.approx.f32 D, A;", W32, &cases, |x, _, _| b(f(x).sqrt()));
        let sat = |x: f32| if x.is_nan() { 0 } else { b(x.clamp(0.0, 1.0) + 0.0) };
        agree("add.sat.f32 D, A, B;", W32, &cases, |x, y, _| sat(f(x) + f(y)));
        agree("fma.rn.sat.f32 D, A, B, C;", W32, &cases, |x, y, w| sat(f(x).mul_add(f(y), f(w))));
    }

    #[test]
    fn f32_directed(mut cases in triples(floats32())) {
        // Far from overflow, so that `rn` is finite and one step away at most.
        cases.retain(|c| c.iter().all(|&x| f(x).is_finite() && f(x).abs() < 1e18));
        for mode in ["rz", "rm", "rp"] {
            let product = |x: u64, y: u64, _| {
                let (exact, rn) = (f64::from(f(x)) * f64::from(f(y)), f(x) * f(y));
                let sum = directed(rn, exact - f64::from(rn), mode);
                // The sign of a zero that the exact value misses.
                b(if sum == 0.0 { 0f32.copysign(exact as f32) } else { sum })
            };
            agree(&format!("mul.{mode}.f32 D, A, B;"), W32, &cases, product);
            let sum = |x: u64, y: u64, _| {
                let (x, y) = (f64::from(f(x)), f64::from(f(y)));
                let s = x + y;
                let back = s - x;
                let error = (x - (s - back)) + (y - back);
                if s == 0.0 && error == 0.0 {
                    let negative = if mode == "rm" { x.is_sign_negative() || y.is_sign_negative() }
                        else { x.is_sign_negative() && y.is_sign_negative() };
                    return if negative { 1 << 31 } else { 0 };
                }
                let rn = x as f32 + y as f32;
                b(directed(rn, (s - f64::from(rn)) + error, mode))
            };
            agree(&format!("add.{mode}.f32 D, A, B;"), W32, &cases, sum);
        }
    }

    #[test]
    fn f64_to_nearest(cases in triples(floats64())) {
        let cases = nan64(cases);
        let c = |op: &str, host: fn(f64, f64, f64) -> f64| {
            for (case, got) in cases.iter().zip(eval(op, W64, &cases)) {
                let want = host(d(case[0]), d(case[1]), d(case[2]));
                assert_eq!(n(d(got)), n(want), "{op} of {case:x?}");
            }
        };
        c("add.f64 D, A, B;", |x, y, _| x + y);
        c("mul.rn.f64 D, A, B;", |x, y, _| x * y);
        c("fma.rn.f64 D, A, B, C;", f64::mul_add);
        c("div.rn.f64 D, A, B;", |x, y, _| x / y);
        // Behind a black box: a compiler that knows `x < 0` may drop the NaN test of `n`.
        c("sqrt.rn.f64 D, A;", |x, _, _| std::hint::black_box(x.sqrt()));
        c("rcp.rn.f64 D, A;", |x, _, _| 1.0 / x);
    }

    #[test]
    fn f64_directed(mut cases in triples(floats64())) {
        cases.retain(|c| c.iter().all(|&x| d(x).abs() < 1e150 && d(x).abs() > 1e-100));
        for (mode, sign) in [("rm", -1.0), ("rp", 1.0)] {
            let step = |rn: f64, above: f64| {
                match above * sign > 0.0 {
                    false => rn,
                    true if sign > 0.0 => rn.next_up(),
                    true => rn.next_down(),
                }
            };
            agree(&format!("mul.{mode}.f64 D, A, B;"), W64, &cases, |x, y, _| {
                let rn = d(x) * d(y);
                step(rn, d(x).mul_add(d(y), -rn)).to_bits()
            });
            agree(&format!("add.{mode}.f64 D, A, B;"), W64, &cases, |x, y, _| {
                let (x, y) = (d(x), d(y));
                let s = x + y;
                let back = s - x;
                step(s, (x - (s - back)) + (y - back)).to_bits()
            });
            agree(&format!("fma.{mode}.f64 D, A, B, C;"), W64, &cases, |x, y, z| {
                // The remainder of the product tells on which side the exact value lies when the
                // addition itself is exact or clearly inexact.
                let (x, y, z) = (d(x), d(y), d(z));
                let (high, low) = (x * y, x.mul_add(y, -(x * y)));
                let rn = x.mul_add(y, z);
                let (s1, s2) = two_sum(high, z);
                let (t1, t2) = two_sum(low, s2);
                let (u1, u2) = two_sum(s1 - rn, t1);
                step(rn, if u1 != 0.0 { u1 } else { u2 + t2 }).to_bits()
            });
        }
    }

    #[test]
    fn halves(cases in triples(any::<u16>().prop_map(u64::from))) {
        let h = |x: u64| f64::from(f16::from_bits(x as u16));
        let q = |x: f64| if x.is_nan() { 0x7fff } else { hf(x) };
        agree("add.rn.f16 D, A, B;", W16, &cases, |x, y, _| q(h(x) + h(y)));
        agree("mul.f16 D, A, B;", W16, &cases, |x, y, _| q(h(x) * h(y)));
        let g = |x: u64| f64::from(bf16::from_bits(x as u16));
        let p = |x: f64| if x.is_nan() { 0x7fff } else { bf(x) };
        agree("add.rn.bf16 D, A, B;", W16, &cases, |x, y, _| p(g(x) + g(y)));
        agree("mul.rn.bf16 D, A, B;", W16, &cases, |x, y, _| p(g(x) * g(y)));
        let both = |x: u64, y: u64, op: fn(f64, f64) -> f64| {
            q(op(h(x & 0xffff), h(y & 0xffff))) | q(op(h(x >> 16), h(y >> 16))) << 16
        };
        let pairs: Vec<[u64; 3]> =
            cases.iter().map(|c| [c[0] | c[1] << 16, c[2] | c[0] << 16, 0]).collect();
        agree("mul.f16x2 D, A, B;", W32, &pairs, |x, y, _| both(x, y, |x, y| x * y));
        agree("sub.f16x2 D, A, B;", W32, &pairs, |x, y, _| both(x, y, |x, y| x - y));
        // Integer operands keep the fused product exact in f64.
        let whole: Vec<[u64; 3]> = cases
            .iter()
            .map(|c| c.map(|x| u64::from(f16::from_f64(x as u8 as f64 - 100.0).to_bits())))
            .collect();
        agree("fma.rn.f16 D, A, B, C;", W16, &whole, |x, y, z| q(h(x) * h(y) + h(z)));
        let relu = |x: f64| if x.is_nan() { 0x7fff } else { q(x.max(0.0) + 0.0) };
        agree("fma.rn.relu.f16 D, A, B, C;", W16, &whole, |x, y, z| relu(h(x) * h(y) + h(z)));
    }

    #[test]
    fn extremes(cases in triples(floats32())) {
        // Equal numbers of different bits are the two zeros.
        let less = |x: f32, y: f32| x < y || (x == y && x.is_sign_negative());
        let min = move |x: f32, y: f32| {
            if x.is_nan() { y } else if y.is_nan() || less(x, y) { x } else { y }
        };
        let max = move |x: f32, y: f32| {
            if x.is_nan() { y } else if y.is_nan() || less(y, x) { x } else { y }
        };
        agree("min.f32 D, A, B;", W32, &cases, |x, y, _| b(min(f(x), f(y))));
        agree("max.f32 D, A, B;", W32, &cases, |x, y, _| b(max(f(x), f(y))));
        agree("max.NaN.f32 D, A, B;", W32, &cases, |x, y, _| {
            if f(x).is_nan() || f(y).is_nan() { 0x7fff_ffff } else { b(max(f(x), f(y))) }
        });
        agree("ex2.approx.f32 D, A;", W32, &cases, |x, _, _| b(f64::from(f(x)).exp2() as f32));
        agree("lg2.approx.f32 D, A;", W32, &cases, |x, _, _| b(f64::from(f(x)).log2() as f32));
        agree("rsqrt.approx.f32 D, A;", W32, &cases, |x, _, _| {
            b((1.0 / f64::from(f(x)).sqrt()) as f32)
        });
    }
}

fn two_sum(x: f64, y: f64) -> (f64, f64) {
    let s = x + y;
    let back = s - x;
    (s, (x - (s - back)) + (y - back))
}

/// An f64 rounded to odd in f32, which keeps what a second rounding needs.
fn odd(x: f64) -> f32 {
    let near = x as f32;
    let mut bits = near.to_bits();
    if f64::from(near) != x && near.is_finite() && bits & 1 == 0 {
        let outward = f64::from(near).abs() < x.abs();
        bits = if outward { bits + 1 } else { bits - 1 };
    }
    f32::from_bits(bits)
}

/// The bf16 nearest to an f64, rounding once.
fn bf(x: f64) -> u64 {
    bf16::from_f32(odd(x)).to_bits().into()
}

/// The f16 nearest to an f64, rounding once (`f16::from_f64` ignores the low bits).
fn hf(x: f64) -> u64 {
    f16::from_f32(odd(x)).to_bits().into()
}
