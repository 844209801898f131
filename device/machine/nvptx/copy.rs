//! Copies from global to shared memory that complete on a barrier.

use core::arch::asm;

/// A cache policy for data that is read once a step.
#[cfg(tilert_sm90)]
#[inline(always)]
fn evict_first() -> u64 {
    let policy: u64;
    // SAFETY: makes a value.
    unsafe {
        asm!("createpolicy.fractional.L2::evict_first.b64 {p}, 1.0;", p = out(reg64) policy,
             options(pure, nomem, nostack));
    }
    policy
}

/// Begins a copy by the copy engine.
///
/// # Safety
/// Addresses and `bytes` are multiples of 16 and valid; the source is not written while the kernel
/// runs; nobody uses the target until the barrier's phase, which expects these bytes, is complete.
#[cfg(tilert_sm90)]
#[inline(always)]
pub unsafe fn bulk(to: u32, from: u64, bytes: u32, barrier: u32) {
    let policy = evict_first();
    // SAFETY: by this function's contract.
    unsafe {
        asm!("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint \
              [{t}], [{f}], {n}, [{b}], {p};",
             t = in(reg32) to, f = in(reg64) from, n = in(reg32) bytes, b = in(reg32) barrier,
             p = in(reg64) policy, options(nostack));
    }
}

/// Asks for a line of memory in the cache of the whole GPU.
///
/// # Safety
/// The address is valid.
#[inline(always)]
pub unsafe fn request(address: u64) {
    // SAFETY: by this function's contract; it changes no memory.
    unsafe {
        asm!("prefetch.global.L2::evict_last [{p}];", p = in(reg64) address, options(nostack))
    };
}

/// Begins a copy of 16 bytes by this thread.
///
/// # Safety
/// As for `bulk`; the barrier learns of it by `arrive_copied`.
#[cfg(not(tilert_sm90))]
#[inline(always)]
pub unsafe fn vector(to: u32, from: u64) {
    // SAFETY: by this function's contract.
    unsafe {
        asm!("cp.async.cg.shared.global [{t}], [{f}], 16;", t = in(reg32) to, f = in(reg64) from,
             options(nostack));
    }
}

/// Arrives on the barrier once this thread's copies so far are complete.
///
/// # Safety
/// `barrier` is an initialised barrier.
#[cfg(not(tilert_sm90))]
#[inline(always)]
pub unsafe fn arrive_copied(barrier: u32) {
    // SAFETY: by this function's contract.
    unsafe {
        asm!("cp.async.mbarrier.arrive.noinc.shared.b64 [{b}];", b = in(reg32) barrier,
             options(nostack));
    }
}
