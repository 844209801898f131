//! Matrix products of `mma.sync.m16n8kK`.
//!
//! Rounding: products are exact, and each is added to the f32 accumulator in the order of k with
//! one rounding to nearest. Hardware adds groups of products with a wider, truncating adder, so
//! its last bits may differ; the PTX ISA leaves the order and precision open.

use crate::program::MmaShape;
use crate::types::Ty;
use half::f16;

/// A fragment: up to four registers of each of the 32 lanes.
pub(crate) type Frag = [[u32; 32]; 4];

/// The element's value; every type here fits an f64.
fn element(frag: &Frag, lane: usize, index: usize, ty: Ty) -> f64 {
    let per = 4 / width(ty);
    let word = frag[index / per][lane];
    let part = word >> (index % per * width(ty) * 8);
    match ty {
        Ty::F16 => f16::from_bits(part as u16).to_f64(),
        Ty::Bf16 => f64::from(f32::from_bits(part << 16)),
        // The low 13 bits are ignored.
        Ty::Tf32 => f64::from(f32::from_bits(part & !0x1fff)),
        Ty::S8 => f64::from(part as i8),
        _ => f64::from(part as u8),
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
    let k_count = shape.k as usize;
    let (mut rows, mut cols) = ([[0.0; 32]; 16], [[0.0; 32]; 8]);
    for k in 0..k_count {
        for (row, values) in rows.iter_mut().enumerate() {
            let (lane, index) = place_a(row, k, shape.a);
            values[k] = element(a, lane, index, shape.a);
        }
        for (col, values) in cols.iter_mut().enumerate() {
            let (lane, index) = place_b(k, col, shape.b);
            values[k] = element(b, lane, index, shape.b);
        }
    }
    let mut out = [[0; 32]; 4];
    for (row, x) in rows.iter().enumerate() {
        for (col, y) in cols.iter().enumerate() {
            let terms = x[..k_count].iter().zip(&y[..k_count]).map(|(x, y)| x * y);
            let lane = row % 8 * 4 + col / 2;
            let index = row / 8 * 2 + col % 2;
            match shape.d {
                Ty::F16 => {
                    let shift = 16 * (index % 2);
                    let start = f16::from_bits((c[index / 2][lane] >> shift) as u16).to_f32();
                    let half = f16::from_f32(f32::from_bits(dot(start, terms))).to_bits();
                    let half = if half & 0x7fff > 0x7c00 { 0x7fff } else { half };
                    out[index / 2][lane] |= u32::from(half) << shift;
                }
                Ty::F32 => out[index][lane] = dot(f32::from_bits(c[index][lane]), terms),
                // Sums of 8-bit products are exact in f64.
                _ => {
                    let sum = (f64::from(c[index][lane] as i32) + terms.sum::<f64>()) as i64;
                    let clamped = sum.clamp(i32::MIN.into(), i32::MAX.into());
                    out[index][lane] = if shape.sat { clamped } else { sum } as u32;
                }
            }
        }
    }
    out
}

fn dot(start: f32, terms: impl Iterator<Item = f64>) -> u32 {
    // The product of two 11-bit significands is exact in f64. The sum is rounded to odd there, so
    // that the second rounding, to f32, is right.
    let sum = terms.fold(start, |sum, term| add_rounded(f64::from(sum), term));
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
