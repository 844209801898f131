//! The access history of memory: records, one or more for each aligned word.

use crate::types::Scope;

/// The strength of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Strength {
    Weak,
    Strong(Scope),
}

/// One remembered access.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Record {
    pub(crate) warp: u32,
    pub(crate) clock: u32,
    pub(crate) lanes: u32,
    /// Bytes (4 bits), write, scope + 1 (3 bits), log2 of the size (3 bits), asynchronous,
    /// pc (20 bits).
    meta: u32,
}

impl Record {
    #[inline]
    pub(crate) fn new(warp: u32, clock: u32, lanes: u32, kind: Kind, pc: u32) -> Record {
        let scope = match kind.strength {
            Strength::Weak => 0,
            Strength::Strong(s) => s as u32 + 1,
        };
        let meta = u32::from(kind.write) << 4
            | scope << 5
            | (kind.bytes.ilog2() & 7) << 8
            | u32::from(kind.asynchronous) << 11
            | pc << 12;
        Record { warp, clock, lanes, meta }
    }

    #[inline]
    pub(crate) fn with_bytes(self, bytes: u32) -> Record {
        Record { meta: self.meta & !15 | bytes, ..self }
    }

    #[inline]
    pub(crate) fn bytes(self) -> u32 {
        self.meta & 15
    }

    #[inline]
    pub(crate) fn is_write(self) -> bool {
        self.meta >> 4 & 1 == 1
    }

    #[inline]
    pub(crate) fn is_weak(self) -> bool {
        self.meta >> 5 & 7 == 0
    }

    #[inline]
    pub(crate) fn scope(self) -> Option<Scope> {
        [None, Some(Scope::Cta), Some(Scope::Cluster), Some(Scope::Gpu), Some(Scope::Sys)]
            [(self.meta >> 5 & 7) as usize]
    }

    #[inline]
    pub(crate) fn is_async(self) -> bool {
        self.meta >> 11 & 1 == 1
    }

    /// Whether there is a record at all.
    #[inline]
    pub(crate) fn is_some(self) -> bool {
        self.meta != 0
    }

    /// Of the same kind, by the same warp in the same interval.
    #[inline]
    pub(crate) fn joins(self, new: Record) -> bool {
        (self.meta, self.warp, self.clock) == (new.meta, new.warp, new.clock)
    }

    /// Whether an old access need not be kept beside this one, if it is ordered before it: it is
    /// covered, and not weak where this one is strong, which races with less.
    #[inline]
    pub(crate) fn stands_for(self, old: Record) -> bool {
        old.bytes() & !self.bytes() == 0 && (self.is_weak() || !old.is_weak())
    }

    /// Whether this read adds nothing to an old one, by the same lanes in the same interval.
    /// Between them lies no write to be checked: a plain one would have replaced the old record,
    /// and a strong one was checked against it.
    #[inline]
    pub(crate) fn repeats(self, old: Record) -> bool {
        (self.warp, self.clock) == (old.warp, old.clock)
            && self.lanes & !old.lanes == 0
            && self.bytes() & !old.bytes() == 0
            && (self.meta ^ old.meta) & 0xff0 == 0
    }

    /// Of the same size and number of bytes each.
    #[inline]
    pub(crate) fn same_size(self, other: Record) -> bool {
        self.meta >> 8 & 7 == other.meta >> 8 & 7
    }

    #[inline]
    pub(crate) fn pc(self) -> u32 {
        self.meta >> 12
    }

    /// In words, for the message of a race.
    pub(crate) fn describe(self) -> String {
        let what = if self.is_write() { "write" } else { "read" };
        let how = match self.scope() {
            _ if self.is_async() => "asynchronous ".to_string(),
            None => String::new(),
            Some(scope) => format!("strong {scope:?}-scope ").to_lowercase(),
        };
        format!("{how}{what}")
    }
}

/// What an access is, apart from who makes it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    pub(crate) write: bool,
    pub(crate) strength: Strength,
    pub(crate) bytes: u32,
    pub(crate) asynchronous: bool,
}

#[derive(Clone, Default)]
pub(crate) struct Cell {
    pub(crate) near: [Record; 2],
    /// Boxed, so that a word which needs no more than two records stays small.
    #[allow(clippy::box_collection, reason = "a third of the size of a vector in place")]
    pub(crate) more: Option<Box<Vec<Record>>>,
}

const PAGE_CELLS: usize = 256;

/// The most accesses that are remembered for one word; the oldest makes room.
pub(crate) const CELL_MAX: usize = 512;

/// The access history of a region, allocated as it is touched.
#[derive(Default)]
pub(crate) struct Shadow {
    pages: Vec<Option<Box<[Cell; PAGE_CELLS]>>>,
}

impl Shadow {
    #[inline]
    pub(crate) fn cell(&mut self, word: u64) -> &mut Cell {
        let (page, slot) = (word as usize / PAGE_CELLS, word as usize % PAGE_CELLS);
        if self.pages.len() <= page {
            self.pages.resize_with(page + 1, || None);
        }
        let cells = self.pages[page]
            .get_or_insert_with(|| Box::new(std::array::from_fn(|_| Cell::default())));
        &mut cells[slot]
    }

    /// A write that is remembered for a range.
    pub(crate) fn write_in(&self, offset: u64, len: u64) -> Option<Record> {
        (offset / 4..(offset + len).div_ceil(4)).find_map(|word| {
            let page = self.pages.get(word as usize / PAGE_CELLS)?.as_ref()?;
            let cell = &page[word as usize % PAGE_CELLS];
            let more = cell.more.iter().flat_map(|m| m.iter());
            cell.near.iter().chain(more).find(|r| r.is_some() && r.is_write()).copied()
        })
    }

    /// Forgets everything about a range: the host wrote it while nothing ran.
    pub(crate) fn clear(&mut self, offset: u64, len: u64) {
        for word in offset / 4..(offset + len).div_ceil(4) {
            if self.pages.get(word as usize / PAGE_CELLS).is_some_and(|p| p.is_some()) {
                *self.cell(word) = Cell::default();
            }
        }
    }
}
