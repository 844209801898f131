//! Work queues: the order in which a worker takes its tasks.
//!
//! A queue is a span of task indices that repeats in every step. Its cursor is one 64-bit word, the
//! next position to claim, that only moves forward:
//!
//! | bits   | field      | meaning                                        |
//! |--------|------------|------------------------------------------------|
//! | 63..32 | `epoch`    | step of the next claim, from 1, modulo 2^32    |
//! | 31..0  | `position` | index of the next claim in the queue's span    |
//!
//! A claim is a compare-and-swap from one cursor to its successor; whoever succeeds owns the task.
//! Queue `w` belongs to worker `w`; the queue after the last worker's is shared by all.

/// Where a queue's entries are in the program's list of task indices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct QueueSpan {
    /// Index of the first entry.
    pub first: u32,
    /// Number of entries in each step; 0 for a queue that is never used.
    pub count: u32,
}

/// Bytes from one cursor to the next: two cache lines, since adjacent-line prefetch pairs them.
pub const CURSOR_STRIDE_BYTES: u64 = 128;

/// The next position of a queue to claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// Step of the claim.
    pub epoch: u32,
    /// Index in the queue's span.
    pub position: u32,
}

impl Cursor {
    /// First claim of the first step.
    pub const START: Cursor = Cursor { epoch: 1, position: 0 };

    /// The packed word.
    #[inline]
    pub const fn pack(self) -> u64 {
        (self.epoch as u64) << 32 | self.position as u64
    }

    /// The cursor in a packed word.
    #[inline]
    pub const fn unpack(word: u64) -> Cursor {
        Cursor { epoch: (word >> 32) as u32, position: word as u32 }
    }

    /// The claim `back` before this one in a queue of `count` entries, at least `back`; none before
    /// the first step.
    #[inline]
    pub const fn before(self, back: u32, count: u32) -> Option<Cursor> {
        if back <= self.position {
            Some(Cursor { epoch: self.epoch, position: self.position - back })
        } else if self.epoch == Cursor::START.epoch {
            None
        } else {
            let position = self.position + count - back;
            Some(Cursor { epoch: self.epoch.wrapping_sub(1), position })
        }
    }

    /// The claim after this one in a queue of `count` entries.
    #[inline]
    pub const fn next(self, count: u32) -> Cursor {
        if self.position + 1 < count {
            Cursor { epoch: self.epoch, position: self.position + 1 }
        } else {
            Cursor { epoch: self.epoch.wrapping_add(1), position: 0 }
        }
    }
}

/// Whether the claim `(epoch, task_idx)` comes before `other` in the order of the program.
#[inline]
pub const fn comes_before(epoch: u32, task_idx: u32, other_epoch: u32, other_idx: u32) -> bool {
    let ahead = other_epoch.wrapping_sub(epoch) as i32;
    ahead > 0 || (ahead == 0 && task_idx < other_idx)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_walks_all_entries_of_each_step() {
        let mut cursor = Cursor::START;
        for epoch in 1..4 {
            for position in 0..5 {
                assert_eq!(Cursor::unpack(cursor.pack()), Cursor { epoch, position });
                let next = cursor.next(5);
                assert_eq!(next.before(1, 5), Some(cursor));
                assert_eq!(next.next(5).before(2, 5), Some(cursor));
                cursor = next;
            }
        }
        let last = Cursor { epoch: u32::MAX, position: 4 };
        assert_eq!(last.next(5), Cursor { epoch: 0, position: 0 });
    }

    #[test]
    fn program_order_survives_the_wrap() {
        assert!(comes_before(1, 9, 2, 0));
        assert!(comes_before(u32::MAX, 9, 0, 0));
        assert!(!comes_before(0, 0, u32::MAX, 9));
        assert!(comes_before(7, 3, 7, 4) && !comes_before(7, 4, 7, 4));
    }
}
