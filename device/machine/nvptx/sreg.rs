//! Special registers, the clock, pauses.

use core::arch::asm;

macro_rules! register {
    ($(#[$doc:meta])* $name:ident = $register:literal) => {
        $(#[$doc])*
        #[inline(always)]
        pub fn $name() -> u32 {
            let value: u32;
            // Not pure: reading it again is cheaper than keeping it over a call.
            // SAFETY: reads a register that does not change while the thread runs.
            unsafe {
                asm!(
                    concat!("mov.u32 {v}, %", $register, ";"),
                    v = out(reg32) value,
                    options(nomem, nostack, preserves_flags)
                );
            }
            value
        }
    };
}

register! {
    /// This thread's index in its block.
    thread_idx = "tid.x"
}
register! {
    /// This block's index.
    block_idx = "ctaid.x"
}
register! {
    /// Blocks of this device.
    block_count = "nctaid.x"
}

/// The same value, of which the compiler knows nothing: what is computed from it is not kept.
#[inline(always)]
pub fn fresh(value: u32) -> u32 {
    let same: u32;
    // SAFETY: copies a register.
    unsafe {
        asm!("mov.u32 {s}, {v};", s = out(reg32) same, v = in(reg32) value,
             options(nomem, nostack));
    }
    same
}

/// Nanoseconds on the GPU's clock. PTX: `%globaltimer`.
#[inline(always)]
pub fn now_ns() -> u64 {
    let value: u64;
    // SAFETY: reads a register; volatile, since its value changes.
    unsafe { asm!("mov.u64 {v}, %globaltimer;", v = out(reg64) value, options(nomem, nostack)) };
    value
}

/// Pauses for about `ns`.
#[inline(always)]
pub fn sleep_ns(ns: u32) {
    // SAFETY: only delays the thread.
    unsafe { asm!("nanosleep.u32 {ns};", ns = in(reg32) ns, options(nomem, nostack)) };
}

/// Ends this thread.
#[inline(always)]
pub fn exit() -> ! {
    // SAFETY: ends the thread.
    unsafe { asm!("exit;", options(noreturn, nostack)) }
}

/// Ends the kernel with an error that the driver reports.
#[inline(always)]
pub fn trap() -> ! {
    // SAFETY: ends the kernel.
    unsafe { asm!("trap;", options(noreturn, nostack)) }
}
