//! How a GPU's block stages weights: pages, and what else its shared memory holds.
//!
//! Of each segment of a linear task, `page_rows` rows at a time are cut into chunks of
//! `CHUNK_COLUMNS` columns, and each chunk fills a page. Both the warp that loads and the warps that
//! multiply walk pages in this order, so nothing but the pages themselves passes between them.
//! A warp multiplies `ROWS_PER_WARP` rows by 32 vectors of 16 bytes.

use crate::program::ProgramHeader;
use crate::task::{Task, WeightFormat};

/// Columns of a page.
pub const CHUNK_COLUMNS: u32 = 1024;
/// Rows of a page that one warp multiplies.
pub const ROWS_PER_WARP: u32 = 4;
/// Lanes of a warp.
pub const WARP_LANES: u32 = 32;
/// Warps of a block that compute; one more loads.
pub const COMPUTE_WARPS: u32 = 8;
/// Threads that compute.
pub const COMPUTE_LANES: u32 = COMPUTE_WARPS * WARP_LANES;
/// Threads of a block.
pub const BLOCK_THREADS: u32 = COMPUTE_LANES + WARP_LANES;
/// Bytes of a page.
pub const PAGE_BYTES: u32 = 16384;
/// Pages of a ring at most.
pub const PAGE_COUNT_MAX: u32 = 16;
/// Tasks that are staged ahead at most.
pub const TASK_SLOT_COUNT: u32 = 4;
/// Bytes from one staged task to the next: the record, then its index, its step and its
/// first page.
pub const TASK_SLOT_BYTES: u32 = 256;
/// Rows of a linear task on a GPU, over all its segments, at most.
pub const TILE_ROWS_MAX: u32 = 64;
/// Tokens of a step on a GPU at most.
pub const GPU_STEP_TOKENS_MAX: u32 = 8;
/// Input values that shared memory holds at least, and at most. What does not fit stays in the heap.
pub const INPUT_VALUES_MIN: u32 = 8192;
/// See `INPUT_VALUES_MIN`.
pub const INPUT_VALUES_MAX: u32 = 16384;
/// Query heads times head dimension that attention handles at once.
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

/// Offset of the pages' "full" barriers, 8 bytes each.
pub const FULL_BARRIERS: u32 = 0;
/// Offset of the pages' "empty" barriers.
pub const EMPTY_BARRIERS: u32 = FULL_BARRIERS + PAGE_COUNT_MAX * 8;
/// Offset of the task slots' "full" barriers.
pub const TASK_FULL_BARRIERS: u32 = EMPTY_BARRIERS + PAGE_COUNT_MAX * 8;
/// Offset of the task slots' "empty" barriers.
pub const TASK_EMPTY_BARRIERS: u32 = TASK_FULL_BARRIERS + TASK_SLOT_COUNT * 8;
/// Offset of two words for the leader's results, and one that says that the block stops.
pub const WORDS: u32 = TASK_EMPTY_BARRIERS + TASK_SLOT_COUNT * 8;
/// Offset of the program header.
pub const HEADER: u32 = (WORDS + 12).next_multiple_of(8);
/// Offset of the task slots.
pub const TASK_SLOTS: u32 =
    (HEADER + size_of::<ProgramHeader>() as u32).next_multiple_of(128);
/// Offset of `[SAMPLE_BIN_COUNT] u64` bins, or `[tokens, COMPUTE_WARPS] f32` sums.
pub const REDUCTION: u32 = TASK_SLOTS + TASK_SLOT_COUNT * TASK_SLOT_BYTES;
/// Offset of `[rows, tokens, column_warps] f32` partial products, or of attention's partial results.
pub const PARTIALS: u32 = REDUCTION + 2048;
const PARTIAL_BYTES: u32 =
    f32_bytes(TILE_ROWS_MAX * GPU_STEP_TOKENS_MAX * column_warps(WeightFormat::F32));
/// Values of attention's partial results of one warp: weighted values, scores and weights.
pub const ATTENTION_PARTIAL_VALUES: u32 = ATTENTION_VALUES + 2 * 8;
const ATTENTION_BYTES: u32 = f32_bytes(COMPUTE_WARPS * ATTENTION_PARTIAL_VALUES);
/// Offset of `[tokens, rows] f32` products.
pub const PRODUCTS: u32 =
    PARTIALS + if PARTIAL_BYTES > ATTENTION_BYTES { PARTIAL_BYTES } else { ATTENTION_BYTES };
/// Offset of the input rows.
pub const INPUTS: u32 = PRODUCTS + f32_bytes(TILE_ROWS_MAX * GPU_STEP_TOKENS_MAX);
/// Values of the area of input rows for a longest row of `row_values`.
#[inline]
pub const fn input_values(row_values: u32) -> u32 {
    let values = row_values.next_multiple_of(256);
    if values < INPUT_VALUES_MIN {
        INPUT_VALUES_MIN
    } else if values > INPUT_VALUES_MAX {
        INPUT_VALUES_MAX
    } else {
        values
    }
}

/// Offset of the ring of pages.
#[inline]
pub const fn pages(input_values: u32) -> u32 {
    (INPUTS + f32_bytes(input_values)).next_multiple_of(1024)
}

/// Pages that fit a block of `shared_bytes`; none if not even two do.
#[inline]
pub const fn page_count(shared_bytes: u32, input_values: u32) -> Option<u32> {
    let first = pages(input_values);
    if shared_bytes < first + 2 * PAGE_BYTES {
        return None;
    }
    let count = (shared_bytes - first) / PAGE_BYTES;
    Some(if count < PAGE_COUNT_MAX { count } else { PAGE_COUNT_MAX })
}

/// Shared memory of a block with a ring of `page_count` pages.
#[inline]
pub const fn shared_bytes(page_count: u32, input_values: u32) -> u32 {
    pages(input_values) + page_count * PAGE_BYTES
}

const _: () = assert!(size_of::<Task>() as u32 + 16 <= TASK_SLOT_BYTES);
const _: () = assert!(page_rows(WeightFormat::Bf16) * CHUNK_COLUMNS * 2 == PAGE_BYTES);
const _: () = assert!(page_rows(WeightFormat::F32) * CHUNK_COLUMNS * 4 == PAGE_BYTES);
const _: () = assert!((PARTIALS | PRODUCTS | INPUTS).is_multiple_of(128));
const _: () = assert!(page_count(99 << 10, INPUT_VALUES_MIN).is_some(), "GPUs with 99 KiB a block have a ring");
