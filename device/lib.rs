//! The persistent kernel of tilert-mk: one source for the CPU and for NVIDIA GPUs.
//!
//! `worker` is the loop; `queue` and `event` are what it claims from and waits for; `ops` has one
//! file for each opcode; `machine` owns memory, counters and arithmetic, once for each kind of
//! device. Ops are written for many lanes that run the same code: the CPU machine has one, a block
//! of a GPU has 256.

#![cfg_attr(target_arch = "nvptx64", no_std)]
#![cfg_attr(
    target_arch = "nvptx64",
    feature(abi_ptx, asm_experimental_arch, core_intrinsics),
    allow(internal_features)
)]

pub mod event;
pub mod machine;
pub mod ops;
pub mod queue;
pub mod takeover;
mod wait;
pub mod worker;
