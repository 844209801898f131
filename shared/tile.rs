//! How a GPU's block stages weights: pages, and what else its shared memory holds.
//!
//! Of each segment of a linear task with f32 or f16 weights, `page_rows` rows at a time are cut into
//! chunks of `CHUNK_COLUMNS` columns, and each chunk fills a page; a warp multiplies `ROWS_PER_WARP`
//! rows by 32 vectors of 16 bytes. Bf16 weights are packed (`packed.rs`), and pages are parts of the
//! packed bytes. Both the warp that loads and the warps that multiply walk pages in this order, so
//! nothing but the pages themselves passes between them.

use crate::limits::HEAD_DIM_MAX;
use crate::program::ProgramHeader;
use crate::sequence::StepState;
use crate::task::{Task, WeightFormat};

/// Columns of a page of f32 or f16 weights.
pub const CHUNK_COLUMNS: u32 = 1024;
/// Rows of a page that one warp multiplies.
pub const ROWS_PER_WARP: u32 = 8;
/// Lanes of a warp.
pub const WARP_LANES: u32 = 32;
/// Warps of a block that compute; one more loads.
pub const COMPUTE_WARPS: u32 = 8;
/// Threads that compute.
pub const COMPUTE_LANES: u32 = COMPUTE_WARPS * WARP_LANES;
/// Threads of a block.
pub const BLOCK_THREADS: u32 = COMPUTE_LANES + WARP_LANES;
/// Bytes of a page of weights that are not codes of 8 bits.
pub const PAGE_BYTES: u32 = 32768;
/// Bytes of a page of codes of 8 bits: with their scales two blocks of 64 rows.
pub const CODE_PAGE_BYTES: u32 = 34 << 10;
/// Pages of a ring at most.
pub const PAGE_COUNT_MAX: u32 = 8;
/// Tasks that are staged ahead at most.
pub const TASK_SLOT_COUNT: u32 = 4;
/// Bytes from one staged task to the next: the record, then its index, its step, its first page, and
/// what the loading warp has worked out of it.
pub const TASK_SLOT_BYTES: u32 = 256;
/// Rows of a linear task on a GPU, over all its segments, at most.
pub const TILE_ROWS_MAX: u32 = 64;
/// Tokens of a step on a GPU at most.
pub const GPU_STEP_TOKENS_MAX: u32 = 8;
/// Bytes of shared memory from `INPUTS` on for input rows at least, and at most. Rows that do not fit
/// stay in the heap.
pub const INPUT_BYTES_MIN: u32 = 20 << 10;
/// See `INPUT_BYTES_MIN`.
pub const INPUT_BYTES_MAX: u32 = 96 << 10;
/// Pages that a ring has at least.
pub const PAGE_COUNT_MIN: u32 = 2;
/// Queries that attention takes together at most.
pub const ATTENTION_QUERIES: u32 = 4;
/// Values of those queries at most: longer ones are fewer.
pub const ATTENTION_VALUES: u32 = 512;

/// Bytes of one load of a lane.
const VECTOR_BYTES: u32 = 16;

/// Values in one load of a lane.
#[inline]
pub const fn vector_values(format: WeightFormat) -> u32 {
    VECTOR_BYTES / format.value_bytes() as u32
}

/// Warps that share the columns of a page.
#[inline]
pub const fn column_warps(format: WeightFormat) -> u32 {
    CHUNK_COLUMNS / (WARP_LANES * vector_values(format))
}

/// Rows of a page.
#[inline]
pub const fn page_rows(format: WeightFormat) -> u32 {
    COMPUTE_WARPS / column_warps(format) * ROWS_PER_WARP
}

/// Bytes of `value_count` f32 values.
const fn f32_bytes(value_count: u32) -> u32 {
    value_count * 4
}

/// Bytes of the pages of a program that has weights in a format, if another needs no larger ones.
#[inline]
pub const fn page_bytes(format: WeightFormat) -> u32 {
    match format {
        WeightFormat::Fp8 | WeightFormat::Q8 => CODE_PAGE_BYTES,
        _ => PAGE_BYTES,
    }
}

/// Offset of the pages' "full" barriers, 8 bytes each.
pub const FULL_BARRIERS: u32 = 0;
/// Offset of the pages' "empty" barriers.
pub const EMPTY_BARRIERS: u32 = FULL_BARRIERS + PAGE_COUNT_MAX * 8;
/// Offset of the task slots' "full" barriers.
pub const TASK_FULL_BARRIERS: u32 = EMPTY_BARRIERS + PAGE_COUNT_MAX * 8;
/// Offset of the task slots' "empty" barriers.
pub const TASK_EMPTY_BARRIERS: u32 = TASK_FULL_BARRIERS + TASK_SLOT_COUNT * 8;
/// Offset of two words for the leader's results in ops.
pub const OP_WORDS: u32 = TASK_EMPTY_BARRIERS + TASK_SLOT_COUNT * 8;
/// Offset of a word that is 1 once the block stops.
pub const STOP_WORD: u32 = OP_WORDS + 8;
/// Offset of the index of the task that runs.
pub const TASK_WORD: u32 = STOP_WORD + 4;
/// Offset of two words for the leader's results in the loop around ops.
pub const LOOP_WORDS: u32 = TASK_WORD + 4;
/// Offset of a word that is 1 once the computing warps know that the device stops.
pub const NOTICE_WORD: u32 = LOOP_WORDS + 8;
/// Offset of the event of the latest linear stage whose input has come.
pub const STAGE_WORD: u32 = NOTICE_WORD + 4;
/// Offset of a word for the loading warp: the latest step that has begun, and whether it has logits.
pub const STEP_WORD: u32 = STAGE_WORD + 4;
/// Offset of the program header.
pub const HEADER: u32 = (STEP_WORD + 4).next_multiple_of(8);
/// Offset of the step's description, which each block copies once a step.
pub const STEP: u32 = (HEADER + size_of::<ProgramHeader>() as u32).next_multiple_of(16);
/// Offset of what each computing warp knows from one task to the next.
pub const PROGRESS: u32 = (STEP + size_of::<StepState>() as u32).next_multiple_of(16);
/// Bytes of that for one warp.
pub const PROGRESS_BYTES: u32 = 48;
/// Offset of the task slots.
pub const TASK_SLOTS: u32 = (PROGRESS + COMPUTE_WARPS * PROGRESS_BYTES).next_multiple_of(128);
/// Offset of `[SAMPLE_BIN_COUNT] u64` bins, or `[tokens, COMPUTE_WARPS] f32` sums.
pub const REDUCTION: u32 = TASK_SLOTS + TASK_SLOT_COUNT * TASK_SLOT_BYTES;
/// Offset of `[rows, tokens, column_warps] f32` partial products, or of what attention keeps.
pub const PARTIALS: u32 = REDUCTION + 2048;
const PARTIAL_BYTES: u32 =
    f32_bytes(TILE_ROWS_MAX * GPU_STEP_TOKENS_MAX * column_warps(WeightFormat::F32));
/// Rows that are kept as bf16 parts at most, for products on tensor cores.
pub const PART_ROWS_MAX: u32 = 2;
/// Parts of a value.
pub const PARTS: u32 = 3;
/// Values of a piece of input rows that are not near as a whole, at most.
pub const PIECE_VALUES: u32 = 2048;
/// Blocks of columns of packed weights that are multiplied together at most, a power of two.
pub const BLOCKS_TOGETHER_MAX: u32 = 4;
const NARROW_PARTIAL_BYTES: u32 = f32_bytes(TILE_ROWS_MAX * PART_ROWS_MAX * COMPUTE_WARPS);
/// Offset of what attention keeps for each warp: `[ATTENTION_VALUES] f32` of rotated queries, then of
/// weighted values.
pub const ATTENTION_SUMS: u32 = PARTIALS;
/// Offset of attention's `[ATTENTION_QUERIES, COMPUTE_WARPS, 2] f32`: the largest score of each
/// warp, and its sum of weights.
pub const ATTENTION_SCORES: u32 = ATTENTION_SUMS + f32_bytes(COMPUTE_WARPS * ATTENTION_VALUES);
/// Offset of the token's own key and value, `[2, HEAD_DIM_MAX] f32`.
pub const ATTENTION_ROW: u32 = ATTENTION_SCORES + f32_bytes(ATTENTION_QUERIES * COMPUTE_WARPS * 2);
/// Offset of each warp's addresses of what belongs to a token, `[8] u64`, and four numbers.
pub const ATTENTION_PLACES: u32 = ATTENTION_ROW + f32_bytes(2 * HEAD_DIM_MAX);
/// Bytes of those of one warp.
pub const ATTENTION_PLACE_BYTES: u32 = 8 * 8 + 16;
const ATTENTION_END: u32 = ATTENTION_PLACES + COMPUTE_WARPS * ATTENTION_PLACE_BYTES;
/// Offset of input rows that are kept as parts.
pub const INPUTS: u32 = PARTIALS + NARROW_PARTIAL_BYTES;
/// Offset of other input rows: more partial products come before them.
pub const WIDE_INPUTS: u32 = PARTIALS + PARTIAL_BYTES;
const _: () = assert!(NARROW_PARTIAL_BYTES <= PARTIAL_BYTES);
const _: () = assert!(ATTENTION_END <= INPUTS + INPUT_BYTES_MIN);
const _: () = assert!((ATTENTION_SCORES | ATTENTION_ROW | ATTENTION_PLACES).is_multiple_of(16));
/// What a block's shared memory is divided into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedPlan {
    /// Bytes of the area of input rows.
    pub input_bytes: u32,
    /// Pages of the ring.
    pub page_count: u32,
    /// Bytes of each.
    pub page_bytes: u32,
}

impl SharedPlan {
    /// Divides `shared_bytes` for `row_bytes` of input rows and pages of `page_bytes`; none if they are too few.
    #[inline]
    pub const fn new(shared_bytes: u32, row_bytes: u32, page_bytes: u32) -> Option<SharedPlan> {
        let least = ring(INPUT_BYTES_MIN) + PAGE_COUNT_MIN * page_bytes;
        if shared_bytes < least {
            return None;
        }
        let wanted = row_bytes.next_multiple_of(256);
        let room = shared_bytes - least + INPUT_BYTES_MIN;
        let limit = if room < INPUT_BYTES_MAX { room } else { INPUT_BYTES_MAX };
        let input_bytes = if wanted < limit { wanted } else { limit };
        let input_bytes =
            if input_bytes > INPUT_BYTES_MIN { input_bytes } else { INPUT_BYTES_MIN } & !255;
        let count = (shared_bytes - ring(input_bytes)) / page_bytes;
        let page_count = if count < PAGE_COUNT_MAX { count } else { PAGE_COUNT_MAX };
        // What is left lets more rows be near.
        let left = shared_bytes - ring(input_bytes) - page_count * page_bytes;
        let input_bytes = (input_bytes + left) & !255;
        let input_bytes = if input_bytes < limit { input_bytes } else { limit & !255 };
        Some(SharedPlan { input_bytes, page_count, page_bytes })
    }

    /// Shared memory of a block.
    #[inline]
    pub const fn shared_bytes(&self) -> u32 {
        ring(self.input_bytes) + self.page_count * self.page_bytes
    }
}

/// Values between rows that are kept as parts. Adjacent rows begin 64 bytes apart, modulo 128: a lane's
/// loads of both share no bank.
pub const PART_PADDING: u32 = 32;

/// Values from one row of `dim` values as bf16 parts to the next.
#[inline]
pub const fn part_pitch(dim: u32) -> u32 {
    dim.next_multiple_of(64) + PART_PADDING
}

/// Bytes of a row of `dim` values as bf16 parts.
#[inline]
pub const fn part_bytes(dim: u32) -> u32 {
    PARTS * part_pitch(dim) * 2
}

/// Offset of the ring of pages.
#[inline]
pub const fn ring(input_bytes: u32) -> u32 {
    (INPUTS + input_bytes).next_multiple_of(128)
}

const _: () = assert!(OP_WORDS.is_multiple_of(8), "a leader's two words differ in one bit");
const _: () = assert!(size_of::<Task>() as u32 + 32 <= TASK_SLOT_BYTES);
const _: () = assert!(page_rows(WeightFormat::F16) * CHUNK_COLUMNS * 2 == PAGE_BYTES);
const _: () = assert!(page_rows(WeightFormat::F32) * CHUNK_COLUMNS * 4 == PAGE_BYTES);
const _: () = assert!((PARTIALS | INPUTS | WIDE_INPUTS).is_multiple_of(128));
const _: () = assert!(WIDE_INPUTS < INPUTS + INPUT_BYTES_MIN);
const _: () = assert!(
    SharedPlan::new(99 << 10, part_bytes(8192), PAGE_BYTES).is_some(),
    "GPUs with 99 KiB a block have a ring"
);
