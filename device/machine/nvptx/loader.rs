//! The loading warp: claims tasks ahead of the computing warps and streams their weights.
//!
//! Two rings pass between the roles, each slot with a "full" and an "empty" barrier. A task's record
//! goes into a task slot, then its pages are filled in the order of `shared/tile.rs`; both block
//! only when a ring is full. The loader depends on nothing but the computing warps' progress, and
//! they wait for pages of tasks they have taken, which the loader is filling: neither can wait for
//! ever. It leaves when the computing warps say so, after its last copy is complete, since a copy
//! must not outlive the block that owns its target.

use tilert_mk_shared::task::{LinearArgs, Opcode, Task, TokenRows};
use tilert_mk_shared::tile::{
    CHUNK_COLUMNS, COMPUTE_WARPS, EMPTY_BARRIERS, FULL_BARRIERS, NOTICE_WORD, STAGE_WORD, STEP,
    STEP_WORD, STOP_WORD, TASK_EMPTY_BARRIERS, TASK_FULL_BARRIERS, TASK_SLOT_BYTES,
    TASK_SLOT_COUNT, TASK_SLOTS, TASK_WORD, WARP_LANES, page_rows,
};

use super::block::Block;
use super::digest::{self, Digest};
use super::feed::{Fed, Feed, NO_TASK};
use super::kind::Loop;
use super::memory::{load_shared_word, store_shared_pair, store_shared_word};
use super::op_block::OpBlock;
use super::record::record;
use super::ring::{PageCursor, RingCursor};
use super::{barrier, copy, sreg, step, warp};
use crate::worker::Worker;

/// Bytes of a cache line.
const LINE_BYTES: u32 = 128;
/// Bytes of the record in a task slot; the task's index, its step and its first page follow.
pub const RECORD_BYTES: u32 = size_of::<Task>() as u32;

/// Prepares the barriers of both rings. One thread, before any other uses them.
#[inline(always)]
pub fn init(shared: u32, page_count: u32) {
    // The copy engine adds its bytes to one arrival; without one, every lane arrives.
    let page_arrivals = if cfg!(tilert_sm90) { 1 } else { WARP_LANES };
    for page in 0..page_count {
        // SAFETY: barriers that nobody uses yet.
        unsafe {
            barrier::init(shared + FULL_BARRIERS + page * 8, page_arrivals);
            barrier::init(shared + EMPTY_BARRIERS + page * 8, COMPUTE_WARPS);
        }
    }
    for slot in 0..TASK_SLOT_COUNT {
        // SAFETY: barriers that nobody uses yet.
        unsafe {
            barrier::init(shared + TASK_FULL_BARRIERS + slot * 8, 1);
            barrier::init(shared + TASK_EMPTY_BARRIERS + slot * 8, 1);
        }
    }
    // SAFETY: words of the block's memory.
    unsafe {
        store_shared_pair(shared + STEP, [0; 2]);
        store_shared_word(shared + STOP_WORD, 0);
        store_shared_word(shared + TASK_WORD, 0);
        store_shared_word(shared + STAGE_WORD, 0);
        store_shared_word(shared + STEP_WORD, 0);
        store_shared_word(shared + NOTICE_WORD, 0);
    }
    barrier::fence_init();
}

/// The loading warp's loop.
#[inline(always)]
pub fn load(worker: &Worker<OpBlock<Loop>>) {
    let block = worker.machine;
    let lane = block.warp_lane();
    let tasks = RingCursor::tasks(block.shared);
    let mut feed = Feed::new(worker, lane);
    loop {
        let fed = feed.take();
        if !take_empty(block, lane, &tasks) {
            break;
        }
        barrier::sync_warp();
        let slot = block.shared + TASK_SLOTS + tasks.index() * TASK_SLOT_BYTES;
        fill_slot(slot, lane, &fed, &block.pages);
        barrier::sync_warp();
        let task = record(slot);
        let is_linear = fed.task_idx != NO_TASK && task.opcode == Opcode::Linear as u16;
        let args = LinearArgs::unpack(&task);
        let is_packed = is_linear & digest::is_packed(&args);
        if lane == 0 {
            let digest = if is_packed {
                Digest::new(&args, worker.header().input_bytes, block.pages.page_bytes())
            } else {
                Digest::default()
            };
            digest.write(slot);
            // SAFETY: an initialised barrier.
            unsafe { barrier::arrive(tasks.full()) };
        }
        tasks.advance();
        if fed.task_idx == NO_TASK {
            break;
        }
        if !is_linear {
            continue;
        }
        if args.token_rows == TokenRows::Logits && !has_logits(block, lane, fed.epoch) {
            continue;
        }
        request_norm(lane, &args);
        let goes_on = if is_packed {
            stream_packed(block, lane, packed(&args, block.pages.page_bytes()), task.signal_event.0)
        } else {
            stream(block, lane, &task)
        };
        if !goes_on {
            break;
        }
    }
    block.pages.ring.drain();
}

/// Whether a step has logits: in one without, tasks that compute logits take no weights. Waits until the
/// computing warps know it, which comes before they run the task, or the block stops.
#[inline(always)]
fn has_logits(block: &Block, lane: u32, epoch: u32) -> bool {
    let (with, without) = (step::word(epoch, true), step::word(epoch, false));
    let mut has_logits = false;
    if lane == 0 {
        // SAFETY: words of the block's memory.
        let word = |offset| unsafe { load_shared_word(block.shared + offset) };
        let mut seen = word(STEP_WORD);
        while seen != with && seen != without && word(STOP_WORD) == 0 {
            seen = word(STEP_WORD);
        }
        has_logits = seen == with;
    }
    warp::take_word(u32::from(has_logits), 0) != 0
}

/// Asks for the weights of a task's norm, which every block of its stage needs at its very begin;
/// blocks ask for different lines. Weights stream through the cache meanwhile, so it has lost them.
#[inline(always)]
fn request_norm(lane: u32, args: &LinearArgs) {
    if args.norm_weight != 0 {
        let mut line = lane * sreg::block_count() + sreg::block_idx();
        while line * LINE_BYTES < args.in_dim * 4 {
            // SAFETY: a line of the norm's weight, which the host has bound.
            unsafe { copy::request(args.norm_weight + u64::from(line * LINE_BYTES)) };
            line += WARP_LANES * sreg::block_count();
        }
    }
}

/// Waits for an empty slot; false if the block stops. All lanes of the warp; lane 0 has the edge to
/// who emptied the slot, the others after the next `sync_warp`.
#[inline(always)]
fn take_empty(block: &Block, lane: u32, ring: &RingCursor) -> bool {
    let goes_on = lane != 0 || wait_empty(block, ring);
    warp::take_word(u32::from(goes_on), 0) != 0
}

/// The same, for one lane.
#[inline(always)]
fn wait_empty(block: &Block, ring: &RingCursor) -> bool {
    while !ring.test_empty() {
        // SAFETY: a word of the block's memory.
        if unsafe { load_shared_word(block.shared + STOP_WORD) } != 0 {
            return false;
        }
    }
    true
}

/// Leaves a task's record, a word by each lane, and says which task it is.
#[inline(always)]
fn fill_slot(slot: u32, lane: u32, fed: &Fed, pages: &PageCursor) {
    // SAFETY: words of the slot, which is empty: the computing warps do not look at it.
    unsafe {
        store_shared_word(slot + lane * 4, fed.word);
        if lane == 0 {
            store_shared_word(slot + RECORD_BYTES, fed.task_idx);
            store_shared_word(slot + RECORD_BYTES + 4, fed.epoch);
            store_shared_word(slot + RECORD_BYTES + 8, pages.ring.index());
            store_shared_word(slot + RECORD_BYTES + 12, pages.ring.parity());
        }
    }
}

/// Fills a page for each part of a task's weights; false if the block stops.
#[inline(always)]
fn stream(block: &Block, lane: u32, task: &Task) -> bool {
    let args = LinearArgs::unpack(task);
    let value_bytes = args.format.value_bytes() as u32;
    let (row_bytes, rows) = (args.in_dim * value_bytes, page_rows(args.format));
    for idx in 0..task.segment_count() {
        let segment = task.segment(idx);
        let mut from = segment.weights;
        let mut left = segment.row_count;
        while left > 0 {
            let mut first = 0;
            while first < row_bytes {
                let pitch = (CHUNK_COLUMNS * value_bytes).min(row_bytes - first);
                if !take_empty(block, lane, &block.pages.ring) {
                    return false;
                }
                let from = from + u64::from(first);
                let row_count = rows.min(left);
                fill(&block.pages, lane, &Part { from, row_bytes, pitch, row_count });
                block.pages.ring.advance();
                first += pitch;
            }
            from += u64::from(rows * row_bytes);
            left -= rows.min(left);
        }
    }
    true
}

/// A task's packed weights.
struct Weights {
    /// Address of the first byte.
    from: u64,
    /// Bytes in all.
    bytes: u32,
    /// Bytes of a page, but for the last.
    page_bytes: u32,
}

/// The packed weights of a task.
#[inline(always)]
fn packed(args: &LinearArgs, room: u32) -> Weights {
    let packing = digest::packing(args);
    let (bytes, page_bytes) = (packing.byte_count(), packing.page_bytes(room));
    Weights { from: args.segments[0].weights, bytes, page_bytes }
}

/// Fills pages with a task's packed weights; false if the block stops.
#[cfg(tilert_sm90)]
#[inline(always)]
fn stream_packed(block: &Block, lane: u32, weights: Weights, event: u32) -> bool {
    let pages = &block.pages;
    let Weights { mut from, bytes: mut left, page_bytes } = weights;
    let mut goes_on = true;
    // The copy engine needs one lane, and one lane needs no agreement with others.
    if lane == 0 {
        while left > 0 {
            goes_on = wait_empty(block, &pages.ring);
            if !goes_on {
                break;
            }
            pages.limit_copies(block.shared + STAGE_WORD, event);
            let (full, bytes) = (pages.ring.full(), page_bytes.min(left));
            // SAFETY: an initialised barrier, and a copy of as many bytes. Weights are bound, and
            // multiples of 16 bytes; the page is empty until its barrier says otherwise.
            unsafe {
                barrier::arrive_expect(full, bytes);
                copy::bulk(pages.address(), from, bytes, full);
            }
            pages.ring.advance();
            from += u64::from(bytes);
            left -= bytes;
        }
    }
    pages.ring.agree();
    warp::take_word(u32::from(goes_on), 0) != 0
}

/// The same on older chips, where all lanes copy.
#[cfg(not(tilert_sm90))]
#[inline(always)]
fn stream_packed(block: &Block, lane: u32, weights: Weights, _event: u32) -> bool {
    let Weights { mut from, bytes: mut left, page_bytes } = weights;
    while left > 0 {
        if !take_empty(block, lane, &block.pages.ring) {
            return false;
        }
        let bytes = page_bytes.min(left);
        fill(&block.pages, lane, &Part { from, row_bytes: bytes, pitch: bytes, row_count: 1 });
        block.pages.ring.advance();
        from += u64::from(bytes);
        left -= bytes;
    }
    true
}

/// What a page holds: rows of `pitch` bytes that are `row_bytes` apart in memory.
struct Part {
    from: u64,
    row_bytes: u32,
    pitch: u32,
    row_count: u32,
}

#[cfg(tilert_sm90)]
#[inline(always)]
fn fill(pages: &PageCursor, lane: u32, part: &Part) {
    let (full, bytes) = (pages.ring.full(), part.row_count * part.pitch);
    if lane == 0 {
        // SAFETY: an initialised barrier; the copies below have so many bytes.
        unsafe { barrier::arrive_expect(full, bytes) };
    }
    barrier::sync_warp();
    // Rows that touch go in one copy.
    let is_whole = part.pitch == part.row_bytes;
    let (copies, bytes) = if is_whole { (1, bytes) } else { (part.row_count, part.pitch) };
    if lane < copies {
        let from = part.from + u64::from(lane * part.row_bytes);
        // SAFETY: weights are bound and aligned to 16 bytes, rows are multiples of 16 bytes, and
        // the page is empty until its barrier says otherwise.
        unsafe { copy::bulk(pages.address() + lane * part.pitch, from, bytes, full) };
    }
}

#[cfg(not(tilert_sm90))]
#[inline(always)]
fn fill(pages: &PageCursor, lane: u32, part: &Part) {
    barrier::sync_warp();
    let vectors = part.pitch / 16;
    for row in 0..part.row_count {
        let mut vector = lane;
        while vector < vectors {
            let offset = vector * 16;
            let from = part.from + u64::from(row * part.row_bytes + offset);
            // SAFETY: as for the bulk copy of newer chips.
            unsafe { copy::vector(pages.address() + row * part.pitch + offset, from) };
            vector += WARP_LANES;
        }
    }
    // SAFETY: an initialised barrier that every lane arrives on.
    unsafe { copy::arrive_copied(pages.ring.full()) };
}
