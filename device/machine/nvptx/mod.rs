//! The machine layer of NVIDIA GPUs: a worker is one block, resident on one SM.
//!
//! Warps 0 to 7 compute and are the lanes of the worker; warp 8 claims tasks ahead of them and
//! streams their weights into a ring of pages in shared memory.

pub mod attend;
pub mod barrier;
pub mod block;
pub mod copy;
pub mod counter;
pub mod feed;
pub mod inputs;
pub mod kernel;
pub mod loader;
pub mod memory;
pub mod multiply;
pub mod ops;
pub mod sreg;
pub mod tensor;
pub mod warp;

/// `a * b + c`, rounded once.
#[inline(always)]
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    core::intrinsics::fmaf32(a, b, c)
}
