//! Claiming tasks from queues.
//!
//! Order: a claim transfers nothing but the right to run a task, whose inputs are ordered by its
//! event; relaxed order is enough.

use std::sync::atomic::{AtomicU64, Ordering};
use tilert_mk_shared::queue::Cursor;

/// The next claim of a queue, not taken.
#[inline]
pub fn peek(cursor: &AtomicU64) -> Cursor {
    Cursor::unpack(cursor.load(Ordering::Relaxed))
}

/// Takes the claim `seen` of a queue of `count` entries, unless somebody else has.
#[inline]
pub fn claim(cursor: &AtomicU64, seen: Cursor, count: u32) -> bool {
    let next = seen.next(count).pack();
    cursor.compare_exchange(seen.pack(), next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_is_given_once() {
        let cursor = AtomicU64::new(Cursor::START.pack());
        let seen = peek(&cursor);
        assert!(claim(&cursor, seen, 2));
        assert!(!claim(&cursor, seen, 2));
        assert_eq!(peek(&cursor), Cursor { epoch: 1, position: 1 });
    }
}
