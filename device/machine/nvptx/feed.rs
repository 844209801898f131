//! The tasks of a block, in the order of its queue.
//!
//! On a GPU nobody else takes a worker's tasks, so its queue needs no shared cursor, and what comes
//! next is known: the loading warp asks for a task's record while it streams the weights of the task
//! before, since a read of memory under load takes as long as a page.

use tilert_mk_shared::queue::Cursor;
use tilert_mk_shared::tile::WARP_LANES;

use super::kind::Loop;
use super::loader::RECORD_BYTES;
use super::memory::load_constant_word;
use super::op_block::OpBlock;
use super::warp;
use crate::worker::Worker;

/// Index of a task that does not exist: the queue is empty for good.
pub const NO_TASK: u32 = u32::MAX;
/// Bytes of a word.
const WORD_BYTES: u64 = 4;

/// A task as the lanes of the loading warp hold it.
#[derive(Clone, Copy)]
pub struct Fed {
    /// Its index in the program.
    pub task_idx: u32,
    /// The step.
    pub epoch: u32,
    /// This lane's word of the record.
    pub word: u32,
}

/// The queue of the block's worker. For all lanes of one warp together.
pub struct Feed {
    /// Address of this lane's word of the program's first record.
    records: u64,
    /// Address of this lane's entry of the queue, and this lane's index.
    entries: u64,
    lane: u32,
    /// Entries of the queue.
    count: u32,
    cursor: Cursor,
    /// The lane's entry of the 32 around the cursor.
    entry: u32,
    /// The task at the cursor; its word may still be on its way.
    next: Fed,
}

impl Feed {
    /// The begin of the worker's queue.
    #[inline(always)]
    pub fn new(worker: &Worker<OpBlock<Loop>>, lane: u32) -> Feed {
        let (span, header) = (worker.span(worker.worker_idx), worker.header());
        let mut feed = Feed {
            records: header.tasks + u64::from(lane) * WORD_BYTES,
            entries: header.queue_entries + u64::from(span.first + lane) * WORD_BYTES,
            lane,
            count: span.count,
            cursor: Cursor::START,
            entry: 0,
            next: Fed { task_idx: NO_TASK, epoch: 0, word: 0 },
        };
        if feed.count > 0 {
            feed.request();
        }
        feed
    }

    /// Takes the next task and asks for the one after it; `NO_TASK` if the queue is empty.
    #[inline(always)]
    pub fn take(&mut self) -> Fed {
        let taken = self.next;
        if self.count > 0 {
            self.cursor = self.cursor.next(self.count);
            self.request();
        }
        taken
    }

    /// Asks for the task at the cursor.
    #[inline(always)]
    fn request(&mut self) {
        let Cursor { epoch, position } = self.cursor;
        if position.is_multiple_of(WARP_LANES) && position + self.lane < self.count {
            let address = self.entries + u64::from(position) * WORD_BYTES;
            // SAFETY: an entry of the queue, which nobody writes.
            self.entry = unsafe { load_constant_word(address) };
        }
        let task_idx = warp::take_word(self.entry, position % WARP_LANES);
        let address = self.records + u64::from(task_idx) * u64::from(RECORD_BYTES);
        // SAFETY: a word of a task of the program, which nobody writes.
        self.next = Fed { task_idx, epoch, word: unsafe { load_constant_word(address) } };
    }
}

// Each lane holds a word of a record.
const _: () = assert!(RECORD_BYTES as u64 == WORD_BYTES * WARP_LANES as u64);
