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

/// Ends the kernel with an error that the driver reports.
#[inline(always)]
pub fn trap() -> ! {
    // SAFETY: ends the kernel.
    unsafe { asm!("trap;", options(noreturn, nostack)) }
}
