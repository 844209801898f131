//! The program header, which the kernel's first thread has copied near.
//!
//! A value of it is read where it is used, by an address that is known to the assembler: through a
//! reference the compiler would not know that it is in shared memory, and such loads take longer and
//! need a descriptor each.

use core::arch::asm;

use tilert_mk_shared::program::ProgramHeader;
use tilert_mk_shared::tile::HEADER;

use super::memory::{Near, generic};
use super::sreg;

/// Words of the header.
const WORD_COUNT: usize = size_of::<ProgramHeader>() / 8;

macro_rules! words {
    ($again:ident, $($idx:literal)*) => { [$(word::<{ HEADER + $idx * 8 }>($again)),*] };
}

/// The header.
#[inline(always)]
pub fn header() -> Near<ProgramHeader> {
    // Of which the compiler knows nothing: words are read again, registers are scarce.
    let again = sreg::fresh(0);
    let words: [u64; WORD_COUNT] = words!(
        again, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30
        31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52
    );
    // SAFETY: the words of a header, in their order.
    Near(unsafe { core::mem::transmute::<[u64; WORD_COUNT], ProgramHeader>(words) })
}

/// The word at an offset of the block's memory.
#[inline(always)]
fn word<const OFFSET: u32>(again: u32) -> u64 {
    let word: u64;
    // SAFETY: a word of the header, which is written before the first barrier of the block, and never
    // again. Pure, so that words nobody uses are not loaded.
    unsafe {
        asm!("ld.shared.b64 {w}, [tilert_mk_shared + {o}]; // {a}", w = out(reg64) word,
             o = const OFFSET, a = in(reg32) again, options(pure, readonly, nostack));
    }
    word
}

/// The same by reference, for code outside of ops.
#[inline(always)]
pub fn reference<'a>(shared: u32) -> &'a ProgramHeader {
    // SAFETY: written before the first barrier of the block, and never again.
    unsafe { &*(generic(shared + HEADER) as *const ProgramHeader) }
}

/// The same for code that calls ops: the offset becomes part of each load, so that no address is
/// kept over a call.
#[inline(always)]
pub fn reference_over_calls<'a>(shared: u32) -> &'a ProgramHeader {
    // SAFETY: as in `reference`; generic addresses of shared memory are adjacent.
    unsafe { &*((generic(shared) + u64::from(HEADER)) as *const ProgramHeader) }
}
