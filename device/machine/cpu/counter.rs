//! The CPU machine's counters: atomic words with only the orders that the runtime uses.

#[cfg(loom)]
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident, $atomic:ident, $value:ty) => {
        $(#[$doc])*
        #[derive(Debug)]
        #[repr(transparent)]
        pub struct $name($atomic);

        impl $name {
            /// A counter that nobody shares yet.
            pub fn new(value: $value) -> $name {
                $name($atomic::new(value))
            }

            /// The counter at `address`.
            ///
            /// # Safety
            /// The address is aligned, valid until the workers have ended, and only a counter.
            #[inline(always)]
            pub unsafe fn at<'a>(address: u64) -> &'a $name {
                // SAFETY: by this function's contract; the type is transparent over its word.
                unsafe { &*(address as *const $name) }
            }

            /// The value, in no order with anything else.
            #[inline(always)]
            pub fn load_relaxed(&self) -> $value {
                self.0.load(Ordering::Relaxed)
            }
        }
    };
}

counter! {
    /// An event: workers of one device add to it and poll it.
    EventCounter, AtomicU32, u32
}
counter! {
    /// A word between the host and a device.
    HostCounter, AtomicU32, u32
}
counter! {
    /// A queue's cursor, or the step of a task's commit.
    CursorCounter, AtomicU64, u64
}

impl EventCounter {
    /// The value; what preceded the signals that made it is visible after.
    #[inline(always)]
    pub fn load_acquire(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }

    /// Adds `arrivals`; earlier stores of this thread come first.
    #[inline(always)]
    pub fn add_release(&self, arrivals: u32) {
        self.0.fetch_add(arrivals, Ordering::Release);
    }

    /// The same, in no order with anything else.
    #[inline(always)]
    pub fn add_relaxed(&self, arrivals: u32) {
        self.0.fetch_add(arrivals, Ordering::Relaxed);
    }
}

/// Orders earlier stores of this thread before its later ones.
#[inline(always)]
pub fn fence_release() {
    fence(Ordering::Release);
}

impl HostCounter {
    /// The value; what was stored before it was stored is visible after.
    #[inline(always)]
    pub fn load_acquire(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }

    /// Stores `value` after everything this thread stored before.
    #[inline(always)]
    pub fn store_release(&self, value: u32) {
        self.0.store(value, Ordering::Release);
    }

    /// Stores `value` and returns the old one.
    #[inline(always)]
    pub fn swap_relaxed(&self, value: u32) -> u32 {
        self.0.swap(value, Ordering::Relaxed)
    }

    /// Stores `new` if the value is `old`.
    pub fn replace_release(&self, old: u32, new: u32) -> bool {
        self.0.compare_exchange(old, new, Ordering::Release, Ordering::Relaxed).is_ok()
    }
}

impl CursorCounter {
    /// Stores `new` if the value is `old`.
    #[inline(always)]
    pub fn replace_relaxed(&self, old: u64, new: u64) -> bool {
        self.0.compare_exchange(old, new, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}
