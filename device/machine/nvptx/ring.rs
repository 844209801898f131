//! Positions in the rings of tasks and of pages, which pass between the loading warp and the others.

use core::cell::Cell;

use tilert_mk_shared::program::ProgramHeader;
use tilert_mk_shared::tile::{
    EMPTY_BARRIERS, FULL_BARRIERS, HEADER, TASK_EMPTY_BARRIERS, TASK_FULL_BARRIERS,
    TASK_SLOT_COUNT, ring,
};

use super::loader::RECORD_BYTES;
use super::memory::load_shared_pair;
#[cfg(tilert_sm90)]
use super::memory::load_shared_word;
#[cfg(tilert_sm90)]
use super::warp;
use super::{barrier, compute};

/// Copies under way at once in a block, of weights of the stage whose input it has. More fill the
/// queues of the memory system, in which events and activations then wait behind weights.
#[cfg(tilert_sm90)]
const COPY_COUNT_MAX: u32 = 2;
/// The same if the copy to begin is of a later stage: blocks that are behind go first.
#[cfg(tilert_sm90)]
const COPY_COUNT_AHEAD: u32 = 1;
/// Offset of the time that a wait may take.
const LIMIT: u32 = HEADER + core::mem::offset_of!(ProgramHeader, wait_ns_max) as u32;

/// A position in a ring: which slot, and the parity of its current phase.
pub struct RingCursor {
    index: Cell<u32>,
    parity: Cell<u32>,
    laps: Cell<u32>,
    count: u32,
    full: u32,
    empty: u32,
}

impl RingCursor {
    #[inline(always)]
    fn new(full: u32, empty: u32, count: u32) -> RingCursor {
        let (index, parity, laps) = (Cell::new(0), Cell::new(0), Cell::new(0));
        RingCursor { index, parity, laps, count, full, empty }
    }

    /// The slots of tasks.
    #[inline(always)]
    pub fn tasks(shared: u32) -> RingCursor {
        let (full, empty) = (shared + TASK_FULL_BARRIERS, shared + TASK_EMPTY_BARRIERS);
        RingCursor::new(full, empty, TASK_SLOT_COUNT)
    }

    /// Goes to a slot in a phase.
    #[inline(always)]
    pub fn go_to(&self, index: u32, parity: u32) {
        self.index.set(index);
        self.parity.set(parity);
    }

    /// The slot.
    #[inline(always)]
    pub fn index(&self) -> u32 {
        self.index.get()
    }

    /// The parity of its phase.
    #[inline(always)]
    pub fn parity(&self) -> u32 {
        self.parity.get()
    }

    /// Goes on to the next slot.
    #[inline(always)]
    pub fn advance(&self) {
        let next = self.index.get() + 1;
        if next == self.count {
            self.index.set(0);
            self.parity.set(self.parity.get() ^ 1);
            self.laps.set(1);
        } else {
            self.index.set(next);
        }
    }

    /// Tells all lanes where lane 0 is.
    #[cfg(tilert_sm90)]
    #[inline(always)]
    pub fn agree(&self) {
        for word in [&self.index, &self.parity, &self.laps] {
            word.set(warp::take_word(word.get(), 0));
        }
    }

    /// Shared address of the slot's "full" barrier.
    #[inline(always)]
    pub fn full(&self) -> u32 {
        self.full + self.index.get() * 8
    }

    /// Shared address of its "empty" barrier.
    #[inline(always)]
    pub fn empty(&self) -> u32 {
        self.empty + self.index.get() * 8
    }

    /// Waits until the slot is full.
    #[inline(always)]
    pub fn wait_full(&self) {
        wait(self.full(), self.parity.get());
    }

    /// Waits until every slot is full that has begun to be filled.
    #[inline(always)]
    pub fn drain(&self) {
        for slot in 0..self.count {
            let is_this_lap = slot < self.index.get();
            if is_this_lap || self.laps.get() > 0 {
                let parity = if is_this_lap { self.parity.get() } else { self.parity.get() ^ 1 };
                wait(self.full + slot * 8, parity);
            }
        }
    }

    /// Whether the slot is empty; may wait a little.
    #[inline(always)]
    pub fn test_empty(&self) -> bool {
        // SAFETY: an initialised barrier. The phase before its first counts as complete.
        unsafe { barrier::test(self.empty(), self.parity.get() ^ 1) }
    }
}

/// Waits until the phase of a barrier is complete.
#[inline(always)]
fn wait(barrier: u32, parity: u32) {
    // SAFETY: an initialised barrier, and a word of the header.
    if !unsafe { barrier::wait::<LIMIT>(barrier, parity) } {
        compute::weights_overdue();
    }
}

/// A position in the ring of pages.
pub struct PageCursor {
    /// The page.
    pub ring: RingCursor,
    /// The oldest copy that may be under way, and how many may be.
    #[cfg(tilert_sm90)]
    oldest: RingCursor,
    #[cfg(tilert_sm90)]
    copy_count: Cell<u32>,
    first: u32,
    #[cfg(any(tilert_fp8, tilert_integers))]
    page_bytes: u32,
}

impl PageCursor {
    /// The first page.
    #[inline(always)]
    pub fn new(shared: u32, header: &ProgramHeader) -> PageCursor {
        let (full, empty) = (shared + FULL_BARRIERS, shared + EMPTY_BARRIERS);
        PageCursor {
            ring: RingCursor::new(full, empty, header.page_count),
            #[cfg(tilert_sm90)]
            oldest: RingCursor::new(full, empty, header.page_count),
            #[cfg(tilert_sm90)]
            copy_count: Cell::new(0),
            first: shared + ring(header.input_bytes),
            #[cfg(any(tilert_fp8, tilert_integers))]
            page_bytes: header.page_bytes,
        }
    }

    /// Goes to the page that the loading warp noted in a task's slot.
    #[inline(always)]
    pub fn go_to(&self, slot: u32) {
        // SAFETY: words of a full slot, which the loading warp does not touch.
        let [index, parity] = unsafe { load_shared_pair(slot + RECORD_BYTES + 8) };
        self.ring.go_to(index, parity);
    }

    /// Waits until fewer copies are under way than may be; one more begins now, of a task that signals
    /// `event`.
    #[cfg(tilert_sm90)]
    #[inline(always)]
    pub fn limit_copies(&self, stage_word: u32, event: u32) {
        // SAFETY: a word of the block's memory.
        let is_now = unsafe { load_shared_word(stage_word) } == event;
        let limit = if is_now { COPY_COUNT_MAX } else { COPY_COUNT_AHEAD };
        while self.copy_count.get() >= limit {
            self.oldest.wait_full();
            self.oldest.advance();
            self.copy_count.set(self.copy_count.get() - 1);
        }
        self.copy_count.set(self.copy_count.get() + 1);
    }

    /// Bytes of a page. Without codes in the PTX they are all of one size, which saves what waits for pages a
    /// register.
    #[cfg(not(any(tilert_fp8, tilert_integers)))]
    #[inline(always)]
    pub fn page_bytes(&self) -> u32 {
        tilert_mk_shared::tile::PAGE_BYTES
    }

    /// Bytes of a page.
    #[cfg(any(tilert_fp8, tilert_integers))]
    #[inline(always)]
    pub fn page_bytes(&self) -> u32 {
        self.page_bytes
    }

    /// Shared address of the page.
    #[inline(always)]
    pub fn address(&self) -> u32 {
        self.first + self.ring.index.get() * self.page_bytes()
    }

    /// Waits until the page is full.
    #[inline(always)]
    pub fn wait_full(&self) {
        self.ring.wait_full();
    }

    /// Waits until the page after this one is full; its shared address.
    #[inline(always)]
    pub fn wait_next(&self) -> u32 {
        let next = self.ring.index.get() + 1;
        let is_wrapped = next == self.ring.count;
        let index = if is_wrapped { 0 } else { next };
        wait(self.ring.full + index * 8, self.ring.parity.get() ^ u32::from(is_wrapped));
        self.first + index * self.page_bytes()
    }

    /// Gives the page back and goes on to the next; called by all lanes of each computing warp.
    #[inline(always)]
    pub fn release(&self, lane: u32) {
        barrier::sync_warp();
        if lane == 0 {
            // SAFETY: an initialised barrier, with an arrival for each computing warp.
            unsafe { barrier::arrive(self.ring.empty()) };
        }
        self.ring.advance();
    }
}
