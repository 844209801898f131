//! Stamped values: words that tell by themselves whether they are what a stage has stored.
//!
//! A word goes and comes in one relaxed access of 64 bits, so its value is as new as its stamp. A
//! read repeats its loads until all stamps are right. They are relaxed: loads of a lane are in
//! flight together, and caches stay as they are.

use core::arch::asm;
use core::mem::offset_of;

use tilert_mk_shared::event::{EVENT_STRIDE_BYTES, target};
use tilert_mk_shared::mailbox::{Mailbox, StopWord};
use tilert_mk_shared::program::ProgramHeader;
use tilert_mk_shared::stamp::{STAMPED_GROUP, STAMPED_HALF, stamp, stamped_index};
use tilert_mk_shared::task::Task;
use tilert_mk_shared::tile::{HEADER, NOTICE_WORD, PROGRESS, PROGRESS_BYTES};

use super::block::{Block, QUAD, TURN};
use super::compute;
use super::header::header;
use super::loader::RECORD_BYTES;
use super::memory::{Quad, load_shared_word, shared_base};
use super::peer::{self, scope};
use crate::event;
use crate::machine::EventCounter;

/// Words of four adjacent values.
pub type Words = [u64; QUAD as usize];

/// Nanoseconds of a wait after which the warp also asks whether the device stops: reads of the host's
/// memory come one after the other, from all warps of the GPU.
const PATIENCE_NS: u64 = 1 << 20;
/// Where the first warp's deadline is, 0 if it has not waited in this op.
const DEADLINES: u32 = PROGRESS + PROGRESS_BYTES - 8;
/// Bytes from the first two words of a quad to the others.
const HALF_BYTES: u32 = STAMPED_HALF * 8;
const _: () = assert!(TURN.is_multiple_of(STAMPED_GROUP));

/// Address of the word of the value at heap address `address`.
#[inline(always)]
pub fn place(header: &ProgramHeader, address: u64) -> u64 {
    let index = (address - header.heap - header.plan.hidden) as u32 / 4;
    header.heap + header.plan.stamped + u64::from(stamped_index(index) * 8)
}

/// Whether the value at heap address `address` is stamped.
#[inline(always)]
fn is_stamped(header: &ProgramHeader, address: u64) -> bool {
    address - header.heap - header.plan.hidden < header.plan.logits - header.plan.hidden
}

/// The stamp of what the task in the block's slot reads, if it was stored `age` events before that.
#[inline(always)]
pub fn input_stamp(block: &Block, age: u32) -> u32 {
    of_slot(block, offset_of!(Task, wait_event) as u32, age)
}

/// The stamp of what it stores.
#[inline(always)]
pub fn output_stamp(block: &Block) -> u32 {
    of_slot(block, offset_of!(Task, signal_event) as u32, 0)
}

#[inline(always)]
fn of_slot(block: &Block, event: u32, age: u32) -> u32 {
    let slot = block.slot.get();
    // SAFETY: words of the slot, which is full while the op runs.
    let (epoch, event) =
        unsafe { (load_shared_word(slot + RECORD_BYTES + 4), load_shared_word(slot + event)) };
    stamp(epoch, event - age, header().event_count)
}

/// When to look at words.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Looks {
    /// At once, and again until all are there: for few words, which mostly are or soon will be.
    AtOnce,
    /// Once the tasks that store them are announced: many looks at many words would slow down all
    /// other traffic.
    AfterHint,
    /// They are there, or as good as.
    Sure,
}

/// What `take` takes, once all its stamps are right. `take` leaves the difference between the
/// stamps that it has seen and those that it wants in its second result, 0 for none.
///
/// If the device stops, whatever is there; unless words are sure to come, all warps learn of it when
/// the op has ended, if the block meets once more in it.
#[inline(always)]
pub fn wait<T>(block: &Block, looks: Looks, mut take: impl FnMut() -> (T, u32)) -> T {
    if looks == Looks::AfterHint {
        let (counter, goal) = hint(block);
        // SAFETY: an event of the program.
        let counter = unsafe { EventCounter::at(counter) };
        while !event::poll_hint(counter, goal) && goes_on::<PATIENCE_NS>() {}
    }
    loop {
        let (values, difference) = take();
        if difference == 0 {
            return values;
        }
        let goes_on = match looks {
            Looks::Sure => goes_on::<{ u64::MAX }>(),
            _ => goes_on::<PATIENCE_NS>(),
        };
        if !goes_on {
            return values;
        }
    }
}

/// Address of the event that the task in the block's slot waits for, and its count in this step.
#[inline(always)]
fn hint(block: &Block) -> (u64, u32) {
    let slot = block.slot.get();
    let word = |offset: usize| {
        // SAFETY: words of the slot, which is full while the op runs.
        unsafe { load_shared_word(slot + offset as u32) }
    };
    let (event, count) = (word(offset_of!(Task, wait_event)), word(offset_of!(Task, wait_count)));
    let header = header();
    let offset = header.plan.events + u64::from(event) * EVENT_STRIDE_BYTES;
    (header.heap + offset, target(count, word(RECORD_BYTES as usize + 4)))
}

/// Whether to look again. Ends the kernel if the warp has looked for too long in this op; asks whether
/// the device stops if it has looked for longer than `PATIENCE`.
///
/// One statement, of which only the result is in a register: it is in many loops over many values.
#[inline(always)]
#[expect(named_asm_labels, reason = "PTX labels are local to the braces around them")]
fn goes_on<const PATIENCE: u64>() -> bool {
    let verdict: u32;
    // SAFETY: words of the block's memory, of which all lanes make relaxed accesses, of the header,
    // and the mailbox's stop word.
    unsafe {
        asm!("{{ .reg .u64 now, end, more; .reg .u32 warp, word; .reg .pred p;",
             "mov.u64 now, %globaltimer; mov.u32 warp, %tid.x; shr.u32 warp, warp, 5;",
             "mul.lo.u32 warp, warp, {bytes}; mov.u32 word, tilert_mk_shared;",
             "add.u32 warp, warp, word; mov.u32 {v}, 0;",
             "ld.relaxed.cta.shared.u64 end, [warp + {deadline}];",
             "setp.ne.u64 p, end, 0; @p bra LATER;",
             "ld.shared.u64 more, [tilert_mk_shared + {limit}]; add.u64 end, now, more;",
             "st.relaxed.cta.shared.u64 [warp + {deadline}], end; bra DONE;",
             "LATER: setp.lt.u64 p, now, end; @p bra IN_TIME; mov.u32 {v}, 2; bra DONE;",
             "IN_TIME: ld.shared.u64 more, [tilert_mk_shared + {limit}];",
             "sub.u64 end, end, more; sub.u64 now, now, end;",
             "setp.lt.u64 p, now, {patience}; @p bra DONE;",
             "ld.shared.u64 more, [tilert_mk_shared + {mailbox}];",
             "ld.relaxed.sys.global.u32 word, [more + {stop}];",
             "setp.eq.u32 p, word, {run}; @p bra DONE; mov.u32 {v}, 1;",
             "st.relaxed.cta.shared.u32 [tilert_mk_shared + {notice}], {v}; DONE: }}",
             v = out(reg32) verdict, bytes = const PROGRESS_BYTES, deadline = const DEADLINES,
             limit = const HEADER + offset_of!(ProgramHeader, wait_ns_max) as u32,
             patience = const PATIENCE,
             mailbox = const HEADER + offset_of!(ProgramHeader, mailbox) as u32,
             stop = const offset_of!(Mailbox, stop), run = const StopWord::Run as u32,
             notice = const NOTICE_WORD, options(nostack));
    }
    if verdict > 1 {
        compute::values_overdue();
    }
    verdict == 0
}

/// Forgets how long the warp has looked. For one lane of it, before the warp meets in an op.
#[inline(always)]
pub fn forget(warp_idx: u32) {
    let place = shared_base() + DEADLINES + warp_idx * PROGRESS_BYTES;
    // SAFETY: the warp's word.
    unsafe {
        asm!("st.relaxed.cta.shared.u64 [{p}], {z};", p = in(reg32) place, z = in(reg64) 0u64,
             options(nostack));
    }
}

/// How the stamps of words differ from `stamp`; 0 if they do not.
#[inline(always)]
pub fn difference(words: &[u64], stamp: u32) -> u32 {
    words.iter().fold(0, |difference, word| difference | ((word >> 32) as u32 ^ stamp))
}

/// The values of words.
#[inline(always)]
pub fn values<const N: usize>(words: [u64; N]) -> [f32; N] {
    words.map(|word| f32::from_bits(word as u32))
}

/// Words of zeros with a stamp, for what is not there.
#[inline(always)]
pub fn zeros<const N: usize>(stamp: u32) -> [u64; N] {
    [u64::from(stamp) << 32; N]
}

/// `N` quads of each of `M` rows of `dim` values, from column `base` on, whose words are at `firsts`:
/// one for each turn of the computing lanes; zeros past the end. All loads are in flight together.
#[inline(always)]
pub fn quads<const M: usize, const N: usize>(
    block: &Block,
    looks: Looks,
    firsts: [u64; M],
    base: u32,
    dim: u32,
    stamp: u32,
) -> [[Quad; N]; M] {
    wait(block, looks, || {
        let mut words = [[zeros(stamp); N]; M];
        for (row, first) in words.iter_mut().zip(&firsts) {
            for (step, words) in (0u32..).zip(row) {
                if base + step * TURN < dim {
                    // SAFETY: rows are multiples of four values, and the column is in the row. Whole
                    // groups further on, words lie as they do here.
                    *words = unsafe { load_quad(first + u64::from(step * TURN) * 8) };
                }
            }
        }
        let seen = words.as_flattened().as_flattened();
        (words.map(|row| row.map(values)), difference(seen, stamp))
    })
}

/// One value at heap address `address`.
#[inline(always)]
pub fn value(block: &Block, address: u64, stamp: u32) -> f32 {
    let place = place(&header(), address);
    wait(block, Looks::Sure, || {
        // SAFETY: a word of the heap.
        let word = unsafe { load_word(place) };
        (f32::from_bits(word as u32), difference(&[word], stamp))
    })
}

/// Stores a value at heap address `address`, with a stamp if it has one.
#[inline(always)]
pub fn store(address: u64, value: f32, stamp: u32) {
    if is_stamped(&header(), address) {
        store_stamped(address, value, stamp);
    } else {
        // SAFETY: a value of the heap that this lane alone stores.
        unsafe { (peer::on_first(address) as *mut f32).write(value) };
    }
}

/// Stores a value that has a stamp at heap address `address`.
#[inline(always)]
pub fn store_stamped(address: u64, value: f32, stamp: u32) {
    let word = u64::from(stamp) << 32 | u64::from(value.to_bits());
    let place = place(&header(), address);
    // SAFETY: a word of each PE's heap that this lane alone stores.
    peer::for_each_heap(|distance| unsafe {
        asm!(concat!("st.relaxed.", scope!(), ".global.b64 [{p}], {w};"),
             p = in(reg64) place.wrapping_add(distance), w = in(reg64) word, options(nostack));
    });
}

/// Stores four adjacent values at heap address `address`, of a multiple of four.
#[inline(always)]
pub fn store_quad(address: u64, quad: Quad, stamp: u32) {
    let [a, b, c, d] = quad.map(|value| u64::from(stamp) << 32 | u64::from(value.to_bits()));
    let place = place(&header(), address);
    // SAFETY: words of each PE's heap that this lane alone stores.
    peer::for_each_heap(|distance| unsafe {
        asm!(concat!("st.relaxed.", scope!(), ".global.v2.b64 [{p}], {{{a}, {b}}};"),
             concat!("st.relaxed.", scope!(), ".global.v2.b64 [{p} + {h}], {{{c}, {d}}};"),
             p = in(reg64) place.wrapping_add(distance), h = const HALF_BYTES,
             a = in(reg64) a, b = in(reg64) b, c = in(reg64) c, d = in(reg64) d,
             options(nostack));
    });
}

/// The word at an address from `place`.
///
/// # Safety
/// The address is of a word of the heap.
#[inline(always)]
pub unsafe fn load_word(place: u64) -> u64 {
    let word: u64;
    // SAFETY: by this function's contract.
    unsafe {
        asm!(concat!("ld.relaxed.", scope!(), ".global.b64 {w}, [{p}];"), w = out(reg64) word, p = in(reg64) place,
             options(nostack));
    }
    word
}

/// The words of two adjacent values, of which the first is at an address from `place`.
///
/// # Safety
/// The address is of a word of the heap, of a multiple of two values.
#[inline(always)]
pub unsafe fn load_pair(place: u64) -> [u64; 2] {
    let (a, b): (u64, u64);
    // SAFETY: by this function's contract.
    unsafe {
        asm!(concat!("ld.relaxed.", scope!(), ".global.v2.b64 {{{a}, {b}}}, [{p}];"), a = out(reg64) a,
             b = out(reg64) b, p = in(reg64) place, options(nostack));
    }
    [a, b]
}

/// The words of four adjacent values, of which the first is at an address from `place`.
///
/// # Safety
/// The address is of a word of the heap, of a multiple of four values.
#[inline(always)]
pub unsafe fn load_quad(place: u64) -> Words {
    // SAFETY: by this function's contract.
    let ([a, b], [c, d]) = unsafe { (load_pair(place), load_pair(place + u64::from(HALF_BYTES))) };
    [a, b, c, d]
}
