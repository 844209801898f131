//! Tiles: whether they can be used, their shapes, and their instructions.
//!
//! The compiler uses no tiles, so what an instruction leaves in one stays there until the next of
//! these. They are statements with effects, whose order the compiler keeps.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::sync::OnceLock;

use super::{COLUMNS, SIDE};

/// Whether the chip multiplies bf16 in tiles and the system lets this process do so. Asks it once.
pub(in super::super) fn is_usable() -> bool {
    static IS_USABLE: OnceLock<bool> = OnceLock::new();
    *IS_USABLE.get_or_init(|| has_tiles() && is_permitted())
}

/// Whether the chip has tiles with products of bf16, and the system keeps tiles for threads.
// `cpuid` is unsafe in older versions of Rust that this is compiled with.
#[allow(unused_unsafe)]
fn has_tiles() -> bool {
    /// In `edx` of leaf 7: products of bf16, and tiles.
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    /// In `XCR0`: configurations of tiles, and tiles.
    const TILE_STATES: u64 = 1 << 17 | 1 << 18;
    #[target_feature(enable = "xsave")]
    fn states() -> u64 {
        // SAFETY: the caller has found that the system has enabled `xgetbv`.
        unsafe { _xgetbv(0) }
    }
    // The first says that the system has enabled `xgetbv`.
    let has_vectors = std::arch::is_x86_feature_detected!("avx512f")
        && std::arch::is_x86_feature_detected!("avx512bf16")
        && std::arch::is_x86_feature_detected!("xsave");
    // SAFETY: every chip of 64 bits has `cpuid`.
    if !has_vectors || unsafe { __cpuid(0) }.eax < 7 {
        return false;
    }
    // SAFETY: as above.
    let features = unsafe { __cpuid_count(7, 0) }.edx;
    let has_products = features & (AMX_BF16 | AMX_TILE) == AMX_BF16 | AMX_TILE;
    // SAFETY: `xsave` is there, as found above.
    has_products && unsafe { states() } & TILE_STATES == TILE_STATES
}

/// Asks the system to let this process use tiles: Linux keeps room for them only if it was asked.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_PRCTL: u64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XFEATURE_XTILEDATA: u64 = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: this call takes numbers and touches no memory of the process; `syscall` overwrites
    // `rcx` and `r11`.
    unsafe {
        asm!("syscall", inout("rax") result, in("rdi") ARCH_REQ_XCOMP_PERM,
             in("rsi") XFEATURE_XTILEDATA, out("rcx") _, out("r11") _, options(nostack));
    }
    result == 0
}

/// Other systems are not asked.
#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// Shapes of the tiles, as `ldtilecfg` reads them.
#[repr(C, align(64))]
pub(super) struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    row_counts: [u8; 16],
}

/// The tile of sums of a tile of weights and one of inputs.
pub(super) const fn sums_tile(r: usize, t: usize) -> usize {
    r * SIDE + t
}

impl Shapes {
    /// For tiles of as many rows, and of as many tokens: sums are tiles 0 to 3, weights 4 and 5,
    /// inputs 6 and 7.
    pub(super) fn new(counts: Counts) -> Shapes {
        let mut shapes = Shapes {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            row_counts: [0; 16],
        };
        let mut set = |tile: usize, row_count: usize, row_bytes: usize| {
            // The chip refuses a shape of which one is zero and the other is not.
            if row_count > 0 && row_bytes > 0 {
                shapes.row_counts[tile] = row_count as u8;
                shapes.row_bytes[tile] = row_bytes as u16;
            }
        };
        for side in 0..SIDE {
            set(4 + side, counts.rows[side], COLUMNS * 2);
            set(6 + side, COLUMNS / 2, counts.tokens[side] * 4);
            for t in 0..SIDE {
                set(sums_tile(side, t), counts.rows[side], counts.tokens[t] * 4);
            }
        }
        shapes
    }

    /// Gives this thread's tiles these shapes, and zeros as values.
    ///
    /// # Safety
    /// The chip has tiles, `is_usable`.
    #[inline(always)]
    pub(super) unsafe fn apply(&self) {
        // SAFETY: 64 bytes of a palette that every such chip has, with at most 16 rows of 64 bytes.
        // The compiler uses no tiles.
        unsafe {
            asm!("ldtilecfg [{at}]", at = in(reg) self, options(nostack, preserves_flags));
        }
    }
}

/// Rows and tokens of the tiles, at most 16 each.
#[derive(Clone, Copy, Default, PartialEq)]
pub(super) struct Counts {
    pub(super) rows: [usize; SIDE],
    pub(super) tokens: [usize; SIDE],
}

/// Makes the system give this thread room for its tiles, which it does when they are first used.
///
/// # Safety
/// The chip has tiles, `is_usable`.
pub(in super::super) unsafe fn touch() {
    // SAFETY: by the caller's word.
    unsafe { Shapes::new(Counts { rows: [1; SIDE], tokens: [1; SIDE] }).apply() };
    // SAFETY: its shape is a row of a token.
    unsafe { zero::<0>() };
    // SAFETY: by the caller's word.
    unsafe { release() };
}

/// Makes a tile's values zeros.
///
/// # Safety
/// `Shapes::apply` has given the tile a shape.
#[inline(always)]
pub(super) unsafe fn zero<const TILE: usize>() {
    // SAFETY: by the caller's word; the compiler uses no tiles.
    unsafe { asm!("tilezero tmm{tile}", tile = const TILE, options(nostack, preserves_flags)) };
}

/// Gives up this thread's tiles, which the system else keeps for it.
///
/// # Safety
/// The chip has tiles.
#[inline(always)]
pub(super) unsafe fn release() {
    // SAFETY: by the caller's word; the compiler uses no tiles.
    unsafe { asm!("tilerelease", options(nostack, preserves_flags)) };
}

/// Loads a tile from rows that are `stride` bytes apart.
///
/// # Safety
/// `Shapes::apply` has given the tile a shape, of rows that can be read.
#[inline(always)]
pub(super) unsafe fn load<const TILE: usize>(at: *const u8, stride: usize) {
    // SAFETY: by the caller's word; the compiler uses no tiles.
    unsafe {
        asm!("tileloadd tmm{tile}, [{at} + {stride}*1]", tile = const TILE, at = in(reg) at,
             stride = in(reg) stride, options(nostack, preserves_flags, readonly));
    }
}

/// Stores a tile to rows that are `stride` bytes apart.
///
/// # Safety
/// `Shapes::apply` has given the tile a shape, of rows that can be written.
#[inline(always)]
pub(super) unsafe fn store<const TILE: usize>(at: *mut u8, stride: usize) {
    // SAFETY: by the caller's word; the compiler uses no tiles.
    unsafe {
        asm!("tilestored [{at} + {stride}*1], tmm{tile}", tile = const TILE, at = in(reg) at,
             stride = in(reg) stride, options(nostack, preserves_flags));
    }
}

/// Adds the products of a tile of weights and one of inputs.
///
/// # Safety
/// `Shapes::apply` has given the three shapes that fit.
#[inline(always)]
pub(super) unsafe fn add<const SUMS: usize, const WEIGHTS: usize, const INPUTS: usize>() {
    // SAFETY: by the caller's word; the compiler uses no tiles. Not `nomem`, so that it stays
    // between its loads and stores.
    unsafe {
        asm!("tdpbf16ps tmm{sums}, tmm{weights}, tmm{inputs}", sums = const SUMS,
             weights = const WEIGHTS, inputs = const INPUTS,
             options(nostack, preserves_flags, readonly));
    }
}
