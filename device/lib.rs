//! The persistent kernel of tilert-mk, for the CPU machine.
//!
//! `worker` is the loop; `queue` and `event` are what it claims from and waits for; `ops` has one
//! file for each opcode; `machine` owns memory, counters and arithmetic.

pub mod event;
pub mod machine;
pub mod ops;
pub mod queue;
pub mod worker;
