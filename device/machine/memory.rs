//! Views of device memory and the counters in it.
//!
//! All memory is named by addresses in the program header and in task records. A `Span` turns one
//! into a typed view. Views of the same bytes may exist in several workers; that no two of them
//! conflict is what the program's events establish, as `model/lower` arranges them.

use std::sync::atomic::{AtomicU32, AtomicU64};

/// A typed view of `len` values at an address of this device.
#[derive(Clone, Copy, Debug)]
pub struct Span<T> {
    first: *mut T,
    len: usize,
}

impl<T: Copy> Span<T> {
    /// A view of `len` values at `address`.
    ///
    /// # Safety
    /// The address is aligned for `T` and valid for `len` values until the workers have ended, and
    /// conflicting accesses are ordered by the program's events.
    #[inline]
    pub unsafe fn new(address: u64, len: usize) -> Span<T> {
        Span { first: address as *mut T, len }
    }

    /// The values `first..first + len` of this view.
    #[inline]
    pub fn sub(&self, first: usize, len: usize) -> Span<T> {
        assert!(first <= self.len && len <= self.len - first, "a view exceeds its region");
        Span { first: self.first.wrapping_add(first), len }
    }

    /// The value at `index`.
    #[inline]
    pub fn read(&self, index: usize) -> T {
        assert!(index < self.len, "a read exceeds its region");
        // SAFETY: in bounds by the assertion; valid, aligned and ordered by the contract of `new`.
        unsafe { self.first.add(index).read() }
    }

    /// Stores `value` at `index`.
    #[inline]
    pub fn write(&self, index: usize, value: T) {
        assert!(index < self.len, "a write exceeds its region");
        // SAFETY: in bounds by the assertion; valid, aligned and ordered by the contract of `new`.
        unsafe { self.first.add(index).write(value) }
    }

    /// The values, for reading.
    #[inline]
    pub fn as_slice(&self) -> &[T] {
        // SAFETY: valid and aligned by the contract of `new`, which also orders every write before
        // or after the task that holds this borrow.
        unsafe { std::slice::from_raw_parts(self.first, self.len) }
    }

    /// The values, for writing.
    #[inline]
    #[expect(clippy::mut_from_ref, reason = "a view is a name of memory, not its owner")]
    pub fn as_mut_slice(&self) -> &mut [T] {
        // SAFETY: valid and aligned by the contract of `new`; an op borrows a region for writing
        // only where its task is the sole one that the program lets touch it.
        unsafe { std::slice::from_raw_parts_mut(self.first, self.len) }
    }
}

/// The 32-bit counter at `address`.
///
/// # Safety
/// The address is aligned and valid until the workers have ended, and is only used as a counter.
#[inline]
pub unsafe fn counter_u32<'a>(address: u64) -> &'a AtomicU32 {
    // SAFETY: by this function's contract.
    unsafe { AtomicU32::from_ptr(address as *mut u32) }
}

/// The 64-bit counter at `address`.
///
/// # Safety
/// As for `counter_u32`.
#[inline]
pub unsafe fn counter_u64<'a>(address: u64) -> &'a AtomicU64 {
    // SAFETY: by this function's contract.
    unsafe { AtomicU64::from_ptr(address as *mut u64) }
}
