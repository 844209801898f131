//! The contract between the host and the device of tilert-mk.
//!
//! Everything that both sides must agree on is here and nowhere else: the task record, the program
//! header, events and queues, the memory plan of the heap, the mailbox, sampling parameters, fault
//! and trace records. Sizes and offsets are asserted at compile time, so that a host and a kernel
//! built from the same sources cannot disagree. The crate is `no_std` and has no unsafe code: it
//! describes memory, it never touches it.

#![no_std]
#![forbid(unsafe_code)]

pub mod blocks;
pub mod event;
pub mod fault;
pub mod kv;
pub mod limits;
pub mod mailbox;
pub mod packed;
pub mod program;
pub mod queue;
pub mod sample;
pub mod sequence;
pub mod stamp;
pub mod task;
pub mod tile;
pub mod trace;

/// Version of the layouts in this crate; the kernel refuses a header with another one.
pub const ABI_VERSION: u32 = 9;
