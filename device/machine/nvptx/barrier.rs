//! Barriers: of the computing threads, and the `mbarrier`s of pages and task slots.

use core::arch::asm;
use tilert_mk_shared::tile::COMPUTE_LANES;

/// Waits for all computing threads; their accesses before come before those after.
#[inline(always)]
pub fn sync_compute() {
    // SAFETY: every computing thread calls this the same number of times (`Machine::sync`).
    unsafe { asm!("barrier.cta.sync 1, {n};", n = const COMPUTE_LANES, options(nostack)) };
}

/// Waits for all threads of the block.
#[inline(always)]
pub fn sync_block() {
    // SAFETY: every thread of the block calls this once, at the start of the kernel.
    unsafe { asm!("barrier.cta.sync 0;", options(nostack)) };
}

/// Waits for the lanes of this warp.
#[inline(always)]
pub fn sync_warp() {
    // SAFETY: all 32 lanes call this together.
    unsafe { asm!("bar.warp.sync 0xffffffff;", options(nostack)) };
}

/// The first of the barriers that a warp has for itself, after those of the block and of its computing threads.
#[cfg(tilert_sm90)]
pub const OWN_BARRIERS: u32 = 2;

/// Waits for the lanes of this computing warp, on its own barrier of the block, and tells the assembler that they
/// go on together, which `sync_warp` does not. The text tells the places of such barriers apart.
#[cfg(tilert_sm90)]
macro_rules! sync_own_warp {
    ($text:expr) => {
        // SAFETY: all 32 lanes call this together; the barriers are one for each warp, and for nothing else.
        unsafe {
            core::arch::asm!(
                concat!("barrier.cta.sync.aligned {barrier}, 32; // ", $text),
                barrier = in(reg32) barrier::OWN_BARRIERS + sreg::thread_idx() / 32,
                options(nostack),
            );
        }
    };
}
#[cfg(tilert_sm90)]
pub(super) use sync_own_warp;

/// Makes a barrier of `arrivals` a phase.
///
/// # Safety
/// `barrier` is the shared address of 8 aligned bytes that nobody uses yet.
#[inline(always)]
pub unsafe fn init(barrier: u32, arrivals: u32) {
    // SAFETY: by this function's contract.
    unsafe {
        asm!("mbarrier.init.shared.b64 [{b}], {n};", b = in(reg32) barrier,
             n = in(reg32) arrivals, options(nostack));
    }
}

/// Makes initialised barriers known to the copy engine.
#[inline(always)]
pub fn fence_init() {
    #[cfg(tilert_sm90)]
    // SAFETY: a fence.
    unsafe {
        asm!("fence.mbarrier_init.release.cluster;", options(nostack))
    };
}

/// Arrives once; this thread's accesses before come before those of who waits.
///
/// # Safety
/// `barrier` is an initialised barrier.
#[inline(always)]
pub unsafe fn arrive(barrier: u32) {
    // SAFETY: by this function's contract.
    unsafe {
        asm!("{{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [{b}]; }}",
             b = in(reg32) barrier, options(nostack));
    }
}

/// Arrives once, and lets the phase also wait for `bytes` of copies.
///
/// # Safety
/// `barrier` is an initialised barrier, and copies of so many bytes complete on it.
#[cfg(tilert_sm90)]
#[inline(always)]
pub unsafe fn arrive_expect(barrier: u32, bytes: u32) {
    // SAFETY: by this function's contract.
    unsafe {
        asm!("{{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [{b}], {n}; }}",
             b = in(reg32) barrier, n = in(reg32) bytes, options(nostack));
    }
}

/// The instruction that tests a phase.
#[cfg(tilert_sm90)]
macro_rules! test {
    () => {
        "mbarrier.try_wait.parity.shared::cta.b64"
    };
}
/// The same on older chips, where it does not wait.
#[cfg(not(tilert_sm90))]
macro_rules! test {
    () => {
        "mbarrier.test_wait.parity.shared.b64"
    };
}

/// Waits until the phase of `parity` is complete; false if it is not within as many nanoseconds as the
/// word at offset `LIMIT` of the block's memory says.
///
/// # Safety
/// `barrier` is an initialised barrier; nobody writes the limit, a `u64`.
#[inline(always)]
#[expect(named_asm_labels, reason = "PTX labels are local to the braces around them")]
pub unsafe fn wait<const LIMIT: u32>(barrier: u32, parity: u32) -> bool {
    let done: u32;
    // One statement: this is in many places, where registers are scarce. The clock is read only if
    // the first test has failed.
    // SAFETY: by this function's contract.
    unsafe {
        asm!("{{ .reg .pred p; .reg .u64 end, now;", "mov.u32 {d}, 1;",
             concat!(test!(), " p, [{b}], {y};"), "@p bra DONE;",
             "mov.u64 now, %globaltimer;", "ld.shared.u64 end, [tilert_mk_shared + {l}];",
             "add.u64 end, end, now;",
             "TEST:", ".pragma \"nounroll\";",
             concat!(test!(), " p, [{b}], {y};"), "@p bra DONE;",
             "mov.u64 now, %globaltimer;", "setp.lt.u64 p, now, end;", "@p bra TEST;",
             "mov.u32 {d}, 0;", "DONE: }}",
             d = out(reg32) done, b = in(reg32) barrier, y = in(reg32) parity, l = const LIMIT,
             options(nostack));
    }
    done != 0
}

/// Whether the phase of `parity` is complete; may wait a little for it.
///
/// # Safety
/// `barrier` is an initialised barrier.
#[inline(always)]
pub unsafe fn test(barrier: u32, parity: u32) -> bool {
    let done: u32;
    // SAFETY: by this function's contract.
    unsafe {
        asm!(concat!("{{ .reg .pred p; ", test!(), " p, [{b}], {n};"),
             "selp.u32 {d}, 1, 0, p; }}",
             b = in(reg32) barrier, n = in(reg32) parity, d = out(reg32) done, options(nostack));
    }
    done != 0
}
