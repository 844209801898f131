//! The kernel's entry.

use tilert_mk_shared::program::ProgramHeader;
use tilert_mk_shared::tile::{COMPUTE_LANES, HEADER, LOOP_WORDS};

use super::barrier::sync_block;
use super::kind::Loop;
use super::op_block::OpBlock;
use super::{header, loader, memory, peer, sreg};
use crate::worker::{Progress, Worker};

/// Runs a program until it is stopped: one block of `BLOCK_THREADS` threads for each worker, all
/// resident at once.
///
/// # Safety
/// The header is that of a bound program, see `Worker::new`, and the block has the dynamic shared
/// memory of its `SharedPlan`.
#[unsafe(no_mangle)]
pub unsafe extern "ptx-kernel" fn tilert_mk(header: ProgramHeader) {
    let (thread_idx, shared) = (sreg::thread_idx(), memory::shared_base());
    // The header is read from shared memory: as a parameter, its fields and what is computed from
    // them would be kept in registers for as long as the kernel runs, more than there are.
    if thread_idx == 0 {
        loader::init(shared, header.page_count);
        let near = memory::generic(shared + HEADER) as *mut ProgramHeader;
        // SAFETY: the area of the header, which nobody else uses before the barrier.
        unsafe { near.write(header) };
    }
    sync_block();
    if thread_idx < COMPUTE_LANES { compute() } else { load() }
}

// Functions of their own, like the ops: neither keeps registers for the other. Nothing is kept for
// when they return, since they do not.

#[inline(never)]
fn compute() -> ! {
    super::compute::run();
    sreg::exit()
}

#[inline(never)]
fn load() -> ! {
    let shared = memory::shared_base();
    let header = header::reference(shared);
    let block = OpBlock::<Loop>::new(sreg::thread_idx(), shared, header, LOOP_WORDS);
    // SAFETY: by the contract of the kernel; blocks have different indices.
    loader::load(&unsafe { Worker::new(header, peer::worker_idx(), &block, Progress::NONE) });
    sreg::exit()
}

/// A broken assertion ends the kernel; the driver reports it.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    sreg::trap()
}
