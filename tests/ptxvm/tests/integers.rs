//! Integer instructions against the host's, and the worked examples of the PTX ISA.

use crate::common::{agree, eval};
use proptest::prelude::*;

const W32: [u32; 4] = [32; 4];
const W64: [u32; 4] = [64; 4];

fn words() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0),
        Just(u64::MAX),
        Just(1 << 31),
        Just(1 << 63),
        0u64..70,
        any::<u64>(),
        any::<u32>().prop_map(|x| i64::from(x as i32) as u64),
    ]
}

fn triples() -> impl Strategy<Value = Vec<[u64; 3]>> {
    prop::collection::vec((words(), words(), words()).prop_map(|(a, b, c)| [a, b, c]), 512)
}

fn s(x: u64) -> i64 {
    i64::from(x as u32 as i32)
}

fn u(x: i64) -> u64 {
    x as u64
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn products(cases in triples()) {
        agree("mul.lo.s32 D, A, B;", W32, &cases, |x, y, _| u(s(x).wrapping_mul(s(y))));
        agree("mul.hi.s32 D, A, B;", W32, &cases, |x, y, _| u((s(x) * s(y)) >> 32));
        agree("mul.hi.u32 D, A, B;", W32, &cases, |x, y, _| (x * y) >> 32);
        agree("mul.hi.u64 D, A, B;", W64, &cases, |x, y, _| {
            ((u128::from(x) * u128::from(y)) >> 64) as u64
        });
        agree("mul.hi.s64 D, A, B;", W64, &cases, |x, y, _| {
            ((i128::from(x as i64) * i128::from(y as i64)) >> 64) as u64
        });
        agree("mul.wide.s32 D, A, B;", [32, 32, 32, 64], &cases, |x, y, _| u(s(x) * s(y)));
        agree("mad.wide.u32 D, A, B, C;", [32, 32, 64, 64], &cases, |x, y, z| {
            (x * y).wrapping_add(z)
        });
        agree("mad.lo.u32 D, A, B, C;", W32, &cases, |x, y, z| x.wrapping_mul(y).wrapping_add(z));
        agree("mad.hi.s32 D, A, B, C;", W32, &cases, |x, y, z| u(((s(x) * s(y)) >> 32) + s(z)));
        agree("mul24.lo.u32 D, A, B;", W32, &cases, |x, y, _| (x & 0xff_ffff) * (y & 0xff_ffff));
        agree("sad.u32 D, A, B, C;", W32, &cases, |x, y, z| x.abs_diff(y).wrapping_add(z));
        agree("add.sat.s32 D, A, B;", W32, &cases, |x, y, _| {
            u((s(x) + s(y)).clamp(i32::MIN.into(), i32::MAX.into()))
        });
    }

    #[test]
    fn quotients(mut cases in triples()) {
        cases.retain(|c| c[1] as u32 != 0);
        agree("div.u32 D, A, B;", W32, &cases, |x, y, _| x / y);
        agree("rem.u64 D, A, B;", W64, &cases, |x, y, _| x % y);
        agree("div.s32 D, A, B;", W32, &cases, |x, y, _| u(s(x) / s(y)));
        agree("rem.s32 D, A, B;", W32, &cases, |x, y, _| u(s(x) % s(y)));
    }

    #[test]
    fn shifts_and_fields(cases in triples()) {
        agree("shl.b32 D, A, B;", W32, &cases, |x, y, _| if y < 32 { x << y } else { 0 });
        agree("shr.u32 D, A, B;", W32, &cases, |x, y, _| if y < 32 { x >> y } else { 0 });
        agree("shr.s32 D, A, B;", W32, &cases, |x, y, _| u(s(x) >> y.min(31)));
        agree("shr.s64 D, A, B;", [64, 32, 32, 64], &cases, |x, y, _| u((x as i64) >> y.min(63)));
        agree("shf.l.wrap.b32 D, A, B, C;", W32, &cases, |x, y, z| {
            ((y << 32 | x) << (z & 31)) >> 32
        });
        agree("shf.r.clamp.b32 D, A, B, C;", W32, &cases, |x, y, z| (y << 32 | x) >> z.min(32));
        agree("popc.b64 D, A;", [64, 32, 32, 32], &cases, |x, _, _| x.count_ones().into());
        agree("clz.b32 D, A;", W32, &cases, |x, _, _| (x as u32).leading_zeros().into());
        agree("brev.b32 D, A;", W32, &cases, |x, _, _| (x as u32).reverse_bits().into());
        agree("bfind.u32 D, A;", W32, &cases, |x, _, _| {
            if x == 0 { u64::MAX } else { u64::from(31 - (x as u32).leading_zeros()) }
        });
        agree("bfe.u32 D, A, B, C;", W32, &cases, |x, y, z| {
            let (at, len) = (y & 255, z & 255);
            let moved = if at < 32 { x >> at } else { 0 };
            if len < 32 { moved & ((1 << len) - 1) } else { moved }
        });
        agree("bfe.s32 D, A, B, C;", W32, &cases, bfe_signed);
        agree("bfi.b32 D, A, B, 7, 9;", W32, &cases, |x, y, _| (y & !(511 << 7)) | (x & 511) << 7);
        agree("lop3.b32 D, A, B, C, 0xe8;", W32, &cases, |x, y, z| x & y | x & z | y & z);
        agree("lop3.b32 D, A, B, C, 0x1e;", W32, &cases, |x, y, z| x ^ (y | z));
    }

    #[test]
    fn bytes_and_extremes(cases in triples()) {
        agree("prmt.b32 D, A, B, C;", W32, &cases, |x, y, z| {
            let bytes = (y << 32 | x).to_le_bytes();
            (0..4).fold(0, |out, i| {
                let pick = z >> (4 * i) & 15;
                let byte = bytes[(pick & 7) as usize];
                let byte = if pick & 8 == 0 { byte } else { ((byte as i8) >> 7) as u8 };
                out | u64::from(byte) << (8 * i)
            })
        });
        agree("dp4a.s32.u32 D, A, B, C;", W32, &cases, |x, y, z| {
            (0..4).fold(z, |sum, i| {
                let product = i64::from((x >> (8 * i)) as i8) * i64::from((y >> (8 * i)) as u8);
                sum.wrapping_add(product as u64)
            })
        });
        agree("min.s32 D, A, B;", W32, &cases, |x, y, _| u(s(x).min(s(y))));
        agree("max.u64 D, A, B;", W64, &cases, |x, y, _| x.max(y));
        agree("max.s16x2 D, A, B;", W32, &cases, |x, y, _| {
            let half = |i: u32| ((x >> i) as i16).max((y >> i) as i16) as u16;
            u64::from(half(0)) | u64::from(half(16)) << 16
        });
        agree("add.u16x2 D, A, B;", W32, &cases, |x, y, _| {
            let half = |i: u32| ((x >> i) as u16).wrapping_add((y >> i) as u16);
            u64::from(half(0)) | u64::from(half(16)) << 16
        });
        agree("abs.s32 D, A;", W32, &cases, |x, _, _| u(s(x).abs()));
        agree("cnot.b32 D, A;", W32, &cases, |x, _, _| u64::from(x == 0));
        agree("slct.u32.s32 D, A, B, C;", W32, &cases, |x, y, z| if s(z) >= 0 { x } else { y });
    }

    #[test]
    fn comparisons(cases in triples()) {
        let set = |cmp: &str| {
            format!("{{ .reg .pred p; setp.{cmp} p, A, B; selp.u32 D, 1, 0, p; }}")
        };
        agree(&set("lt.s32"), W32, &cases, |x, y, _| (s(x) < s(y)).into());
        agree(&set("hi.u32"), W32, &cases, |x, y, _| (x > y).into());
        agree(&set("ge.u64"), [64, 64, 32, 32], &cases, |x, y, _| (x >= y).into());
        let f = |x: u64| f32::from_bits(x as u32);
        agree(&set("lt.f32"), W32, &cases, |x, y, _| (f(x) < f(y)).into());
        agree(&set("ltu.f32"), W32, &cases, |x, y, _| {
            let order = f(x).partial_cmp(&f(y));
            order.is_none_or(std::cmp::Ordering::is_lt).into()
        });
        agree(&set("num.f32"), W32, &cases, |x, y, _| (!f(x).is_nan() && !f(y).is_nan()).into());
        agree("set.ge.u32.s32 D, A, B;", W32, &cases, |x, y, _| {
            if s(x) >= s(y) { u64::MAX } else { 0 }
        });
        agree("set.eq.f32.u32 D, A, B;", W32, &cases, |x, y, _| {
            if x == y { 0x3f80_0000 } else { 0 }
        });
    }

    #[test]
    fn carries(cases in triples()) {
        let wide = "{ .reg .b32 l, h, m, k; mov.b64 {l, h}, A; mov.b64 {m, k}, B;
                    add.cc.u32 l, l, m; addc.u32 h, h, k; mov.b64 D, {l, h}; }";
        agree(wide, W64, &cases, |x, y, _| x.wrapping_add(y));
        let minus = wide.replace("add.cc", "sub.cc").replace("addc", "subc");
        agree(&minus, W64, &cases, |x, y, _| x.wrapping_sub(y));
        let product = "{ .reg .b32 l, h; mul.lo.u32 l, A, B; mul.hi.u32 h, A, B;
                       mad.lo.cc.u32 l, A, C, l; madc.hi.u32 h, A, C, h; mov.b64 D, {l, h}; }";
        agree(product, [32, 32, 32, 64], &cases, |x, y, z| {
            (x * y).wrapping_add(x * z)
        });
    }
}

fn bfe_signed(x: u64, y: u64, z: u64) -> u64 {
    // As the pseudo code of the ISA has it.
    let (at, len) = (y & 255, z & 255);
    let sign = if len == 0 { 0 } else { x >> (at + len - 1).min(31) & 1 };
    (0..32).fold(0, |d, i| {
        let bit = if i < len && at + i <= 31 { x >> (at + i) & 1 } else { sign };
        d | bit << i
    })
}

#[test]
fn worked_examples() {
    let one = |op: &str, a: u64, b: u64, c: u64| eval(op, W32, &[[a, b, c]])[0];
    assert_eq!(one("prmt.b32 D, A, B, C;", 0x3322_1100, 0x7766_5544, 0x7531), 0x7755_3311);
    assert_eq!(one("prmt.b32.f4e D, A, B, C;", 0x3322_1100, 0x7766_5544, 1), 0x4433_2211);
    assert_eq!(one("prmt.b32.rc16 D, A, B, C;", 0x3322_1100, 0, 1), 0x3322_3322);
    assert_eq!(one("fns.b32 D, A, B, C;", 0b1010_1000, 4, 1), 5);
    assert_eq!(one("fns.b32 D, A, B, C;", 0b1010_1000, 4, -1i64 as u64), 3);
    assert_eq!(one("fns.b32 D, A, B, C;", 0b1010_1000, 4, 0), 0xffff_ffff);
    assert_eq!(one("bmsk.clamp.b32 D, A, B;", 4, 8, 0), 0xff0);
    assert_eq!(one("bmsk.clamp.b32 D, A, B;", 30, 8, 0), 0xc000_0000);
    assert_eq!(one("szext.clamp.s32 D, A, B;", 0x80, 8, 0), 0xffff_ff80);
    assert_eq!(one("dp2a.lo.s32.s32 D, A, B, C;", 0x0003_ffff, 0x0000_0502, 7), 20);
    assert_eq!(one("bfind.shiftamt.u32 D, A;", 0x0100_0000, 0, 0), 7);
    assert_eq!(one("bfind.s32 D, A;", 0xffff_fff0, 0, 0), 3);
}
