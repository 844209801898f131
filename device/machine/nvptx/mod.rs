//! The machine layer of NVIDIA GPUs: a worker is one block, resident on one SM.
//!
//! Warps 0 to 7 compute and are the lanes of the worker; warp 8 claims tasks ahead of them and
//! streams their weights into a ring of pages in shared memory.

pub mod attention;
pub mod barrier;
pub mod best;
pub mod block;
pub mod compute;
pub mod copy;
pub mod counter;
pub mod digest;
pub mod empty;
pub mod feed;
pub mod finish;
pub mod header;
pub mod inputs;
pub mod kernel;
pub mod kind;
pub mod loader;
pub mod memory;
pub mod merge;
pub mod multiply;
pub mod op_block;
pub mod ops;
pub mod peer;
pub mod record;
pub mod ring;
pub mod rows;
pub mod sreg;
pub mod stamped;
pub mod step;
pub mod tensor;
pub mod warp;

use core::arch::asm;

/// `a / b` within 2 units in the last place, for `b` between `2^-126` and `2^126`.
/// PTX: `div.full.ftz.f32`.
#[inline(always)]
pub fn divide(a: f32, b: f32) -> f32 {
    let value: f32;
    // SAFETY: arithmetic.
    unsafe {
        asm!("div.full.ftz.f32 {v}, {a}, {b};", v = out(reg32) value, a = in(reg32) a,
             b = in(reg32) b, options(pure, nomem, nostack));
    }
    value
}

/// `1 / sqrt(x)` of a normal `x`: the chip's approximation, corrected once.
/// PTX: `rsqrt.approx.ftz.f32`.
#[inline(always)]
pub fn rsqrt(x: f32) -> f32 {
    let root: f32;
    // SAFETY: arithmetic.
    unsafe {
        asm!("rsqrt.approx.ftz.f32 {r}, {x};", r = out(reg32) root, x = in(reg32) x,
             options(pure, nomem, nostack));
    }
    let rest = fma(-x * root, root, 1.0);
    fma(root * 0.5, rest, root)
}

/// `a * b + c`, rounded once.
#[inline(always)]
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    core::intrinsics::fmaf32(a, b, c)
}

/// `2^x`. PTX: `ex2.approx.ftz.f32`.
#[inline(always)]
pub fn exp2(x: f32) -> f32 {
    let value: f32;
    // SAFETY: arithmetic.
    unsafe {
        asm!("ex2.approx.ftz.f32 {v}, {x};", v = out(reg32) value, x = in(reg32) x,
             options(pure, nomem, nostack));
    }
    value
}

/// `e^x`, by the chip's power of two: within 2 units in the last place of the scaled argument.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let power = if x < -87.0 { 0.0 } else { exp2(x.min(88.0) * core::f32::consts::LOG2_E) };
    if x.is_nan() { x } else { power }
}
