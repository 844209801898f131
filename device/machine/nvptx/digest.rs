//! What the loading warp works out of a task's record for the computing warps.

use tilert_mk_shared::packed::{BLOCK_COLUMNS, Packing};
use tilert_mk_shared::task::{LinearArgs, Prologue, WeightFormat};

use super::inputs::{is_narrow, piece_blocks};
use super::loader::RECORD_BYTES;
use super::memory::{load_shared_words, store_shared};

/// Offset of the digest in a task slot.
const DIGEST: u32 = RECORD_BYTES + 16;

/// Whether a linear task's weights are packed: other formats than these are none of this PTX.
#[inline(always)]
pub fn is_packed(args: &LinearArgs) -> bool {
    if cfg!(tilert_integers) {
        matches!(args.format, WeightFormat::Q8 | WeightFormat::Q4)
    } else {
        matches!(args.format, WeightFormat::Bf16 | WeightFormat::Fp8)
    }
}

/// How the weights of a task are that `is_packed`.
#[inline(always)]
pub fn packing(args: &LinearArgs) -> Packing {
    let (one, other) = if cfg!(tilert_integers) {
        (WeightFormat::Q4, WeightFormat::Q8)
    } else {
        (WeightFormat::Fp8, WeightFormat::Bf16)
    };
    let format = if args.format == one { one } else { other };
    Packing::new(args.row_count(), args.in_dim, format)
}

/// What the computing warps would work out of a task's record, each of them, in every task.
#[derive(Clone, Copy, Default)]
pub struct Digest {
    /// Input rows that are kept as parts at most.
    pub narrow_rows_max: u32,
    /// See `piece_columns`: in blocks, of one row and of two, 8 bits each.
    piece_blocks: u32,
    /// Twice the groups of rows, and one if the last has 8 rows.
    pub groups: u32,
    /// Blocks of a page.
    pub page_blocks: u32,
    /// Bytes of a unit.
    pub unit_bytes: u32,
}

impl Digest {
    /// Of a task with packed weights; `input_bytes` and `page_bytes` are the program's.
    #[inline(always)]
    pub fn new(args: &LinearArgs, input_bytes: u32, page_bytes: u32) -> Digest {
        let packing = packing(args);
        let is_whole = |rows| is_narrow(rows, args.in_dim, input_bytes);
        let has_pieces = cfg!(tilert_sm90) && args.prologue == Prologue::None;
        // Of one row and of two.
        let blocks = [1, 2].map(|rows| match has_pieces && !is_whole(rows) {
            true => piece_blocks(rows, input_bytes),
            false => 0,
        });
        let narrow = [1, 2].map(|rows| u32::from(is_whole(rows) || blocks[rows as usize - 1] > 0));
        Digest {
            narrow_rows_max: narrow[0] + narrow[1],
            piece_blocks: blocks[0] | blocks[1] << 8,
            groups: packing.group_count() * 2 + u32::from(packing.ends_in_half()),
            page_blocks: packing.page_blocks(page_bytes),
            unit_bytes: packing.unit_bytes(),
        }
    }

    /// Leaves it in a slot. For one lane, before the slot is full.
    #[inline(always)]
    pub fn write(&self, slot: u32) {
        let rows = self.narrow_rows_max << 16 | self.piece_blocks;
        let words = [rows, self.groups, self.page_blocks, self.unit_bytes];
        // SAFETY: words of the slot, which the computing warps do not look at yet.
        unsafe { store_shared(slot + DIGEST, words.map(f32::from_bits)) };
    }

    /// That of the task in a full slot.
    #[inline(always)]
    pub fn read(slot: u32) -> Digest {
        // SAFETY: words of a full slot, which the loading warp does not touch.
        let words = unsafe { load_shared_words(slot + DIGEST) };
        let [rows, groups, page_blocks, unit_bytes] = words;
        let (narrow_rows_max, piece_blocks) = (rows >> 16, rows & 0xffff);
        Digest { narrow_rows_max, piece_blocks, groups, page_blocks, unit_bytes }
    }

    /// Columns of a piece of `rows` input rows, up to `narrow_rows_max`; 0 if they are near as a whole.
    #[inline(always)]
    pub fn piece_columns(&self, rows: u32) -> u32 {
        (self.piece_blocks >> (rows * 8 - 8) & 0xff) * BLOCK_COLUMNS
    }
}
