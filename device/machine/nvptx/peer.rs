//! The other devices of a program, and what this one stores in their heaps.
//!
//! In PTX for several devices (`--cfg tilert_peers`) what other workers read too is stored in the heap of
//! each PE, and whoever reads it looks at its own PE's heap alone: a read of another device's memory would
//! take as long as a store there and back. Strong accesses then have the scope of the system. In PTX for
//! one device all this is the plain store.

use core::arch::asm;
use core::mem::offset_of;

use tilert_mk_shared::program::ProgramHeader;
use tilert_mk_shared::tile::HEADER;

use super::header::header;
use super::sreg;

/// Scope of strong accesses to the heap.
#[cfg(not(tilert_peers))]
macro_rules! scope {
    () => {
        "gpu"
    };
}
#[cfg(tilert_peers)]
macro_rules! scope {
    () => {
        "sys"
    };
}
pub(super) use scope;

/// Whether this is PTX for several devices.
pub const HAS_PEERS: bool = cfg!(tilert_peers);

/// Index of this block's worker among those of all PEs.
#[inline(always)]
pub fn worker_idx() -> u32 {
    if HAS_PEERS { header().first_worker + sreg::block_idx() } else { sreg::block_idx() }
}

/// What leads from an address in this PE's heap to the same place in the heap of `pe`.
#[inline(always)]
pub fn distance(pe: u32) -> u64 {
    if !HAS_PEERS {
        return 0;
    }
    let distance: u64;
    // SAFETY: a word of the header, which is written before the first barrier of the block, and never
    // again.
    unsafe {
        asm!("{{ .reg .u32 place; mov.u32 place, tilert_mk_shared; mad.lo.u32 place, {pe}, 8, place;",
             "ld.shared.b64 {d}, [place + {o}]; }}", d = out(reg64) distance, pe = in(reg32) pe,
             o = const HEADER + offset_of!(ProgramHeader, distances) as u32,
             options(pure, readonly, nostack));
    }
    distance
}

/// Calls `store` with the distance to each PE's heap.
#[inline(always)]
pub fn for_each_heap(mut store: impl FnMut(u64)) {
    if !HAS_PEERS {
        return store(0);
    }
    let (count, mut pe) = (header().pe_count, 0);
    while pe < count {
        store(distance(pe));
        pe += 1;
    }
}

/// Where the first PE has what is at `address` of this one's heap: what sampling alone reads.
#[inline(always)]
pub fn on_first(address: u64) -> u64 {
    address.wrapping_add(distance(0))
}
