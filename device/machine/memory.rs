//! Views of device memory.
//!
//! All memory is named by addresses in the program header and in task records. A `Span` turns one
//! into a typed view. Views of the same bytes may exist in several workers; that no two of them
//! conflict is what the program's events establish, as `model/validate` proves.

/// Asserts, except on a GPU: there a broken assertion could only end the kernel, and the interpreter
/// of the PTX checks every access against its allocation.
macro_rules! check {
    ($($condition:tt)*) => {
        #[cfg(not(target_arch = "nvptx64"))]
        assert!($($condition)*);
    };
}
pub(crate) use check;

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
    /// conflicting accesses are ordered by the program's events and the worker's `sync`.
    #[inline(always)]
    pub unsafe fn new(address: u64, len: usize) -> Span<T> {
        Span { first: address as *mut T, len }
    }

    /// The values `first..first + len` of this view.
    #[inline(always)]
    pub fn sub(&self, first: usize, len: usize) -> Span<T> {
        check!(first <= self.len && len <= self.len - first, "a view exceeds its region");
        Span { first: self.first.wrapping_add(first), len }
    }

    /// Number of values.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address of the first value.
    #[inline(always)]
    pub fn address(&self) -> u64 {
        self.first as u64
    }

    /// The value at `index`.
    #[inline(always)]
    pub fn read(&self, index: usize) -> T {
        check!(index < self.len, "a read exceeds its region");
        // SAFETY: in bounds by the assertion; valid, aligned and ordered by the contract of `new`.
        unsafe { self.first.add(index).read() }
    }

    /// Stores `value` at `index`.
    #[inline(always)]
    pub fn write(&self, index: usize, value: T) {
        check!(index < self.len, "a write exceeds its region");
        // SAFETY: in bounds by the assertion; valid, aligned and ordered by the contract of `new`.
        unsafe { self.first.add(index).write(value) }
    }

    /// The value at `index`, in place. Nobody writes it while the borrow lasts.
    #[inline(always)]
    pub fn get(&self, index: usize) -> &T {
        check!(index < self.len, "a borrow exceeds its region");
        // SAFETY: in bounds by the assertion; valid, aligned and ordered by the contract of `new`.
        unsafe { &*self.first.add(index) }
    }

    /// The value at `index`, for changing it in place. For one lane, and one borrow at a time.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "a view is a name of memory, not its owner")]
    pub fn get_mut(&self, index: usize) -> &mut T {
        check!(index < self.len, "a borrow exceeds its region");
        // SAFETY: in bounds by the assertion; valid, aligned and ordered by the contract of `new`.
        unsafe { &mut *self.first.add(index) }
    }

    /// The values, for reading.
    #[inline(always)]
    pub fn as_slice(&self) -> &[T] {
        // SAFETY: valid and aligned by the contract of `new`, which also orders every write before
        // or after the task that holds this borrow.
        unsafe { core::slice::from_raw_parts(self.first, self.len) }
    }

    /// The values, for writing.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "a view is a name of memory, not its owner")]
    pub fn as_mut_slice(&self) -> &mut [T] {
        // SAFETY: valid and aligned by the contract of `new`; an op borrows a region for writing
        // only where its task is the sole one that the program lets touch it.
        unsafe { core::slice::from_raw_parts_mut(self.first, self.len) }
    }
}
