//! Matrix products of `mma.sync.m16n8kK`.
//!
//! Rounding: products are exact, and each is added to the f32 accumulator in the order of k with
//! one rounding to nearest. Hardware adds groups of products with a wider, truncating adder, so
//! its last bits may differ; the PTX ISA leaves the order and precision open.

use super::soft::{self, pack, unpack};
use crate::program::MmaShape;
use crate::types::{Round, Ty, sext};

/// A fragment: up to four registers of each of the 32 lanes.
pub(crate) type Frag = [[u32; 32]; 4];

fn element(frag: &Frag, lane: usize, index: usize, ty: Ty) -> (f64, i64) {
    let per = 4 / width(ty);
    let word = frag[index / per][lane];
    let part = word >> (index % per * width(ty) * 8);
    let float =
        |bits: u64, fmt| f64::from_bits(pack(unpack(bits, fmt), soft::F64, Round::Rn, false));
    match ty {
        Ty::F16 => (float(u64::from(part & 0xffff), soft::F16), 0),
        Ty::Bf16 => (float(u64::from(part & 0xffff), soft::BF16), 0),
        // The low 13 bits are ignored.
        Ty::Tf32 => (float(u64::from(part >> 13), soft::TF32), 0),
        Ty::S8 => (0.0, sext(u64::from(part & 0xff), 8)),
        _ => (0.0, i64::from(part & 0xff)),
    }
}

fn width(ty: Ty) -> usize {
    match ty {
        Ty::F16 | Ty::Bf16 => 2,
        Ty::Tf32 => 4,
        _ => 1,
    }
}

/// Where element (row, k) of A lives: lane and index among the lane's elements.
fn place_a(row: usize, k: usize, ty: Ty) -> (usize, usize) {
    // Each register holds `per` neighbouring k; four lanes side by side cover 4 * per of them.
    let per = 4 / width(ty);
    let group = 4 * per;
    let lane = row % 8 * 4 + k % group / per;
    let register = row / 8 + k / group * 2;
    (lane, register * per + k % per)
}

fn place_b(k: usize, col: usize, ty: Ty) -> (usize, usize) {
    let per = 4 / width(ty);
    let group = 4 * per;
    (col * 4 + k % group / per, k / group * per + k % per)
}

/// Multiplies the fragments of a warp.
pub(crate) fn mma(shape: MmaShape, a: &Frag, b: &Frag, c: &Frag) -> Frag {
    let mut out = [[0; 32]; 4];
    let k_count = shape.k as usize;
    for row in 0..16 {
        for col in 0..8 {
            let lane = row % 8 * 4 + col / 2;
            let index = row / 8 * 2 + col % 2;
            let term = |k| {
                let (la, ia) = place_a(row, k, shape.a);
                let (lb, ib) = place_b(k, col, shape.b);
                (element(a, la, ia, shape.a), element(b, lb, ib, shape.b))
            };
            if shape.d == Ty::F16 {
                let word = c[index / 2][lane] >> (16 * (index % 2)) & 0xffff;
                let start = pack(unpack(word.into(), soft::F16), soft::F32, Round::Rn, false);
                let sum = dot(start as u32, k_count, term);
                let half = pack(unpack(sum.into(), soft::F32), soft::F16, Round::Rn, false);
                out[index / 2][lane] |= (half as u32) << (16 * (index % 2));
            } else if shape.d == Ty::F32 {
                out[index][lane] = dot(c[index][lane], k_count, term);
            } else {
                let start = i64::from(c[index][lane] as i32);
                let sum = (0..k_count).fold(start, |s, k| s + term(k).0.1 * term(k).1.1);
                let clamped = sum.clamp(i32::MIN.into(), i32::MAX.into());
                out[index][lane] = if shape.sat { clamped } else { sum } as u32;
            }
        }
    }
    out
}

fn dot(start: u32, k_count: usize, term: impl Fn(usize) -> ((f64, i64), (f64, i64))) -> u32 {
    let sum = (0..k_count).fold(f32::from_bits(start), |sum, k| {
        let ((x, _), (y, _)) = term(k);
        // The product of two 11-bit significands is exact in f64, and f64 holds 53 bits; the sum
        // is rounded to odd there so that the second rounding to f32 is right.
        add_rounded(f64::from(sum), x * y)
    });
    if sum.is_nan() { 0x7fff_ffff } else { sum.to_bits() }
}

/// `a + b` rounded once to f32.
fn add_rounded(a: f64, b: f64) -> f32 {
    let sum = a + b;
    if !sum.is_finite() {
        return sum as f32;
    }
    let back = sum - a;
    let error = (a - (sum - back)) + (b - back);
    if error == 0.0 || sum.to_bits() & 1 == 1 {
        return sum as f32;
    }
    // Round to odd: the last bit says that something was lost.
    let toward = (error > 0.0) == (sum > 0.0);
    f64::from_bits(if toward { sum.to_bits() + 1 } else { sum.to_bits() - 1 }) as f32
}
