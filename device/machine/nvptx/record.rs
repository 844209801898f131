//! The record of the task that runs, in its slot in shared memory.
//!
//! Read where it is used, as the header is (`header.rs`), and for the same reasons.

use core::arch::asm;

use tilert_mk_shared::task::Task;

use super::memory::Near;
use super::sreg;

/// Words of a record.
const WORD_COUNT: usize = size_of::<Task>() / 8;

macro_rules! words {
    ($slot:ident, $again:ident, $($idx:literal)*) => { [$(word::<{ $idx * 8 }>($slot, $again)),*] };
}

/// That in a full slot.
#[inline(always)]
pub fn record(slot: u32) -> Near<Task> {
    // Of which the compiler knows nothing: words are read again, registers are scarce.
    let again = sreg::fresh(0);
    let words: [u64; WORD_COUNT] = words!(slot, again, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    // SAFETY: the words of a record, in their order.
    Near(unsafe { core::mem::transmute::<[u64; WORD_COUNT], Task>(words) })
}

/// The word at an offset of a record.
#[inline(always)]
fn word<const OFFSET: u32>(slot: u32, again: u32) -> u64 {
    let word: u64;
    // SAFETY: a word of a full slot, which nobody writes while the task runs. Pure, so that words nobody
    // uses are not loaded.
    unsafe {
        asm!("ld.shared.b64 {w}, [{s} + {o}]; // {a}", w = out(reg64) word, s = in(reg32) slot,
             o = const OFFSET, a = in(reg32) again, options(pure, readonly, nostack));
    }
    word
}
