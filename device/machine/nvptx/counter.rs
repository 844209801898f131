//! Counters in global and host memory, with the scope in the type.
//!
//! `core::sync::atomic` loses the order of read-modify-writes on this target (rust-lang/rust#136480),
//! so every access is one PTX instruction here. None of the statements is `nomem`: what the thread
//! stored before stays before.

use core::arch::asm;
use core::cell::UnsafeCell;

use super::peer::scope;

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident, $value:ty, $class:ident, $($load:tt)+) => {
        $(#[$doc])*
        #[repr(transparent)]
        pub struct $name(UnsafeCell<$value>);

        impl $name {
            /// The counter at `address`.
            ///
            /// # Safety
            /// The address is aligned, valid until the kernel ends, and only a counter.
            #[inline(always)]
            pub unsafe fn at<'a>(address: u64) -> &'a $name {
                // SAFETY: by this function's contract; the type is transparent over its word.
                unsafe { &*(address as *const $name) }
            }

            /// The value, in no order with anything else.
            #[inline(always)]
            pub fn load_relaxed(&self) -> $value {
                let value: $value;
                // SAFETY: `self` is an aligned word of global or host memory.
                unsafe {
                    asm!(concat!($($load)+, " {v}, [{p}];"), v = out($class) value,
                         p = in(reg64) self.0.get(), options(nostack));
                }
                value
            }
        }
    };
}

counter! {
    /// An event: blocks of all PEs add to it, and those of one poll it.
    EventCounter, u32, reg32, "ld.relaxed.", scope!(), ".global.u32"
}
counter! {
    /// A word between the host and a GPU.
    HostCounter, u32, reg32, "ld.relaxed.sys.global.u32"
}
counter! {
    /// A queue's cursor.
    CursorCounter, u64, reg64, "ld.relaxed.gpu.global.u64"
}

impl EventCounter {
    /// The value; what preceded the signals that made it is visible after.
    #[inline(always)]
    pub fn load_acquire(&self) -> u32 {
        let value: u32;
        // SAFETY: `self` is an aligned word of global memory.
        unsafe {
            asm!(concat!("ld.acquire.", scope!(), ".global.u32 {v}, [{p}];"), v = out(reg32) value,
                 p = in(reg64) self.0.get(), options(nostack));
        }
        value
    }

    /// Adds `arrivals`; what the block stored before its last barrier comes first.
    #[inline(always)]
    pub fn add_release(&self, arrivals: u32) {
        // SAFETY: `self` is an aligned word of global memory.
        unsafe {
            asm!(concat!("red.release.", scope!(), ".global.add.u32 [{p}], {v};"), p = in(reg64) self.0.get(),
                 v = in(reg32) arrivals, options(nostack));
        }
    }

    /// The same, in no order with anything else.
    #[inline(always)]
    pub fn add_relaxed(&self, arrivals: u32) {
        // SAFETY: `self` is an aligned word of global memory.
        unsafe {
            asm!(concat!("red.relaxed.", scope!(), ".global.add.u32 [{p}], {v};"), p = in(reg64) self.0.get(),
                 v = in(reg32) arrivals, options(nostack));
        }
    }
}

/// Orders what the block stored before its last barrier before what this thread stores after.
#[inline(always)]
pub fn fence_release() {
    // SAFETY: orders accesses.
    unsafe { asm!(concat!("fence.acq_rel.", scope!(), ";"), options(nostack)) };
}

impl HostCounter {
    /// The value; what the host stored before it is visible after.
    #[inline(always)]
    pub fn load_acquire(&self) -> u32 {
        let value: u32;
        // SAFETY: `self` is an aligned word of host memory.
        unsafe {
            asm!("ld.acquire.sys.global.u32 {v}, [{p}];", v = out(reg32) value,
                 p = in(reg64) self.0.get(), options(nostack));
        }
        value
    }

    /// Stores `value` after everything this thread stored before.
    #[inline(always)]
    pub fn store_release(&self, value: u32) {
        // SAFETY: `self` is an aligned word of host memory.
        unsafe {
            asm!("st.release.sys.global.u32 [{p}], {v};", p = in(reg64) self.0.get(),
                 v = in(reg32) value, options(nostack));
        }
    }

    /// Stores `value` and returns the old one.
    #[inline(always)]
    pub fn swap_relaxed(&self, value: u32) -> u32 {
        let old: u32;
        // SAFETY: `self` is an aligned word of host memory.
        unsafe {
            asm!("atom.relaxed.sys.global.exch.b32 {o}, [{p}], {v};", o = out(reg32) old,
                 p = in(reg64) self.0.get(), v = in(reg32) value, options(nostack));
        }
        old
    }
}

impl CursorCounter {
    /// Stores `new` if the value is `old`.
    #[inline(always)]
    pub fn replace_relaxed(&self, old: u64, new: u64) -> bool {
        let seen: u64;
        // SAFETY: `self` is an aligned word of global memory.
        unsafe {
            asm!("atom.relaxed.gpu.global.cas.b64 {o}, [{p}], {a}, {b};", o = out(reg64) seen,
                 p = in(reg64) self.0.get(), a = in(reg64) old, b = in(reg64) new,
                 options(nostack));
        }
        seen == old
    }
}
