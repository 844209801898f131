//! Wide loads and stores, and the block's shared memory by 32-bit address.

use core::arch::{asm, global_asm};
use core::ops::Deref;

global_asm!(".extern .shared .align 128 .b8 tilert_mk_shared[];");

/// Four values.
pub type Quad = [f32; 4];

/// What has been read from the block's memory, of which what is not used is not read.
#[derive(Clone, Copy)]
pub struct Near<T>(pub T);

impl<T> Deref for Near<T> {
    type Target = T;

    #[inline(always)]
    fn deref(&self) -> &T {
        &self.0
    }
}

/// Shared address of the block's dynamic memory.
#[inline(always)]
pub fn shared_base() -> u32 {
    let base: u32;
    // Not pure: taking the address again is cheaper than keeping it over a call.
    // SAFETY: takes the address of the symbol above.
    unsafe {
        asm!("mov.u32 {b}, tilert_mk_shared;", b = out(reg32) base, options(nomem, nostack));
    }
    base
}

/// The generic address of a shared address.
#[inline(always)]
pub fn generic(shared: u32) -> u64 {
    let address: u64;
    // SAFETY: arithmetic on an address.
    unsafe {
        asm!("{{ .reg .u64 wide; cvt.u64.u32 wide, {s}; cvta.shared.u64 {a}, wide; }}",
             s = in(reg32) shared, a = out(reg64) address, options(pure, nomem, nostack));
    }
    address
}

macro_rules! quad_load {
    ($(#[$doc:meta])* $name:ident($address:ty, $class:ident) -> $value:ty = $instruction:literal) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// The address is a multiple of 16 and valid for 16 bytes of the state space, which no
        /// thread writes meanwhile.
        #[inline(always)]
        pub unsafe fn $name(address: $address) -> [$value; 4] {
            let (a, b, c, d): ($value, $value, $value, $value);
            // SAFETY: by this function's contract.
            unsafe {
                asm!(concat!($instruction, " {{{a}, {b}, {c}, {d}}}, [{p}];"),
                     a = out(reg32) a, b = out(reg32) b, c = out(reg32) c, d = out(reg32) d,
                     p = in($class) address, options(readonly, nostack));
            }
            [a, b, c, d]
        }
    };
}

quad_load! {
    /// Four words of shared memory.
    load_shared_words(u32, reg32) -> u32 = "ld.shared.v4.u32"
}
quad_load! {
    /// Four values of shared memory.
    load_shared(u32, reg32) -> f32 = "ld.shared.v4.f32"
}
quad_load! {
    /// Four values of global memory.
    load_global(u64, reg64) -> f32 = "ld.global.v4.f32"
}
quad_load! {
    /// Four words of global memory that nobody writes while the kernel runs.
    load_constant_words(u64, reg64) -> u32 = "ld.global.nc.v4.u32"
}
quad_load! {
    /// Four values of global memory that nobody writes while the kernel runs.
    load_constant(u64, reg64) -> f32 = "ld.global.nc.v4.f32"
}

/// A word of global memory that nobody writes while the kernel runs.
///
/// # Safety
/// The address is a multiple of 4 and valid.
#[inline(always)]
pub unsafe fn load_constant_word(address: u64) -> u32 {
    let value: u32;
    // SAFETY: by this function's contract. Neither pure nor `nomem`: the load stays where it is, well
    // before its value is needed.
    unsafe {
        asm!("ld.global.nc.u32 {v}, [{p}];", v = out(reg32) value, p = in(reg64) address,
             options(readonly, nostack));
    }
    value
}

/// Stores four values in shared memory.
///
/// # Safety
/// The address is a multiple of 16 and valid for 16 bytes that no other thread uses meanwhile.
#[inline(always)]
pub unsafe fn store_shared(address: u32, [a, b, c, d]: Quad) {
    // SAFETY: by this function's contract.
    unsafe {
        asm!("st.shared.v4.f32 [{p}], {{{a}, {b}, {c}, {d}}};", p = in(reg32) address,
             a = in(reg32) a, b = in(reg32) b, c = in(reg32) c, d = in(reg32) d,
             options(nostack));
    }
}

/// Stores two words in shared memory.
///
/// # Safety
/// The address is a multiple of 8 and valid for 8 bytes that no other thread uses meanwhile.
#[inline(always)]
pub unsafe fn store_shared_pair(address: u32, [a, b]: [u32; 2]) {
    // SAFETY: by this function's contract.
    unsafe {
        asm!("st.shared.v2.u32 [{p}], {{{a}, {b}}};", p = in(reg32) address, a = in(reg32) a,
             b = in(reg32) b, options(nostack));
    }
}

/// The upper halves of two words, the first one's below. PTX: `prmt`.
#[inline(always)]
pub fn upper_halves(a: u32, b: u32) -> u32 {
    let value: u32;
    // SAFETY: arithmetic.
    unsafe {
        asm!("prmt.b32 {v}, {a}, {b}, 0x7632;", v = out(reg32) value, a = in(reg32) a,
             b = in(reg32) b, options(pure, nomem, nostack));
    }
    value
}

/// Stores four values in global memory.
///
/// # Safety
/// As for `store_shared`, in global memory.
#[inline(always)]
pub unsafe fn store_global(address: u64, [a, b, c, d]: Quad) {
    // SAFETY: by this function's contract.
    unsafe {
        asm!("st.global.v4.f32 [{p}], {{{a}, {b}, {c}, {d}}};", p = in(reg64) address,
             a = in(reg32) a, b = in(reg32) b, c = in(reg32) c, d = in(reg32) d,
             options(nostack));
    }
}

/// Two words of shared memory.
///
/// # Safety
/// The address is a multiple of 8 and valid for 8 bytes, which no thread writes meanwhile.
#[inline(always)]
pub unsafe fn load_shared_pair(address: u32) -> [u32; 2] {
    let (a, b): (u32, u32);
    // SAFETY: by this function's contract.
    unsafe {
        asm!("ld.shared.v2.u32 {{{a}, {b}}}, [{p}];", a = out(reg32) a, b = out(reg32) b,
             p = in(reg32) address, options(readonly, nostack));
    }
    [a, b]
}

/// Two values of global memory.
///
/// # Safety
/// The address is a multiple of 8 and valid for 8 bytes, and no thread writes there meanwhile.
#[inline(always)]
pub unsafe fn load_global_pair(address: u64) -> [f32; 2] {
    let (a, b): (f32, f32);
    // SAFETY: by this function's contract.
    unsafe {
        asm!("ld.global.v2.f32 {{{a}, {b}}}, [{p}];", a = out(reg32) a, b = out(reg32) b,
             p = in(reg64) address, options(readonly, nostack));
    }
    [a, b]
}

/// One value of shared memory.
///
/// # Safety
/// The address is a multiple of 4 and valid, and no thread writes there meanwhile.
#[inline(always)]
pub unsafe fn load_shared_f32(address: u32) -> f32 {
    let value: f32;
    // SAFETY: by this function's contract.
    unsafe {
        asm!("ld.shared.f32 {v}, [{p}];", v = out(reg32) value, p = in(reg32) address,
             options(readonly, nostack));
    }
    value
}

/// Stores one value in shared memory.
///
/// # Safety
/// The address is a multiple of 4 and valid, and no other thread uses it meanwhile.
#[inline(always)]
pub unsafe fn store_shared_f32(address: u32, value: f32) {
    // SAFETY: by this function's contract.
    unsafe {
        asm!("st.shared.f32 [{p}], {v};", p = in(reg32) address, v = in(reg32) value,
             options(nostack));
    }
}

/// One word of shared memory that other threads may write: relaxed, for the block.
///
/// # Safety
/// The address is a multiple of 4 and valid.
#[inline(always)]
pub unsafe fn load_shared_word(address: u32) -> u32 {
    let value: u32;
    // SAFETY: by this function's contract.
    unsafe {
        asm!("ld.relaxed.cta.shared.u32 {v}, [{p}];", v = out(reg32) value, p = in(reg32) address,
             options(nostack));
    }
    value
}

/// Stores one word in shared memory that other threads may read: relaxed, for the block.
///
/// # Safety
/// The address is a multiple of 4 and valid.
#[inline(always)]
pub unsafe fn store_shared_word(address: u32, value: u32) {
    // SAFETY: by this function's contract.
    unsafe {
        asm!("st.relaxed.cta.shared.u32 [{p}], {v};", p = in(reg32) address, v = in(reg32) value,
             options(nostack));
    }
}

/// Adds to a 64-bit word in shared memory.
///
/// # Safety
/// The address is a multiple of 8 and valid.
#[inline(always)]
pub unsafe fn add_shared_u64(address: u32, amount: u64) {
    // SAFETY: by this function's contract.
    unsafe {
        asm!("red.relaxed.cta.shared.add.u64 [{p}], {v};", p = in(reg32) address,
             v = in(reg64) amount, options(nostack));
    }
}

/// A binary16, widened.
#[inline(always)]
pub fn widen_f16(bits: u16) -> f32 {
    let value: f32;
    // SAFETY: arithmetic.
    unsafe {
        asm!("cvt.f32.f16 {v}, {b};", v = out(reg32) value, b = in(reg16) bits,
             options(pure, nomem, nostack));
    }
    value
}
