//! Claiming tasks from queues.
//!
//! Order: a claim transfers nothing but the right to run a task, whose inputs are ordered by its
//! event; relaxed order is enough.

use crate::machine::CursorCounter;
use tilert_mk_shared::queue::Cursor;

/// The next claim of a queue, not taken.
#[inline(always)]
pub fn peek(cursor: &CursorCounter) -> Cursor {
    Cursor::unpack(cursor.load_relaxed())
}

/// Takes the claim `seen` of a queue of `count` entries, unless somebody else has.
#[inline(always)]
pub fn claim(cursor: &CursorCounter, seen: Cursor, count: u32) -> bool {
    cursor.replace_relaxed(seen.pack(), seen.next(count).pack())
}
