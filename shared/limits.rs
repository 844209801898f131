//! Every bound of the runtime, with the relations between them checked at compile time.

/// Tokens one step may process: a prefill chunk, or decode rows of several sequences.
pub const STEP_TOKENS_MAX: u32 = 64;
/// Tokens a step of decoding or speculative verification processes at most.
pub const DECODE_TOKENS_MAX: u32 = 8;
/// Sequences that can be resident in the KV cache at once.
pub const SLOT_COUNT_MAX: u32 = 64;
/// Workers (pinned threads, or blocks of a GPU) of all devices.
pub const WORKER_COUNT_MAX: u32 = 2048;
/// Devices that run a program together.
pub const PE_COUNT_MAX: usize = 8;
/// Row segments of one linear task: query, key and value rows, or gate and up rows.
pub const SEGMENT_COUNT_MAX: usize = 3;
/// Partial results into which attention over one sequence is split at most.
pub const ATTENTION_SPLIT_MAX: u32 = 16;
/// Rows of a head in the splits region: its splits, then what they are together, where attention
/// merges them.
pub const SPLIT_ROWS: u32 = ATTENTION_SPLIT_MAX + 1;
/// Neighbouring positions that belong to the same attention split.
pub const ATTENTION_BLOCK: u32 = 64;
/// Query heads that share one KV head.
pub const HEADS_PER_KV_MAX: u32 = 64;
/// Values in one attention head.
pub const HEAD_DIM_MAX: u32 = 256;
/// Rows in one segment of a linear task.
pub const SEGMENT_ROWS_MAX: u32 = 1024;
/// Token ids that end a sequence.
pub const STOP_ID_COUNT_MAX: usize = 8;
/// Entries of the vocabulary.
pub const VOCAB_MAX: u32 = 1 << 18;
/// Commands in flight from the host to a device.
pub const COMMAND_COUNT_MAX: u32 = 128;
/// Outputs in flight from a device to the host.
pub const OUTPUT_COUNT_MAX: u32 = 4096;
/// Time after which a wait inside a step is a fault, unless the host says otherwise.
pub const WAIT_NS_MAX: u64 = 20_000_000_000;

const _: () = assert!(DECODE_TOKENS_MAX <= STEP_TOKENS_MAX);
const _: () = assert!(SLOT_COUNT_MAX <= STEP_TOKENS_MAX, "one decode row per slot fits a step");
// A start and a cancel of each slot find room; the host waits before it writes more.
const _: () = assert!(2 * SLOT_COUNT_MAX <= COMMAND_COUNT_MAX);
// One step publishes at most a token and an end for each of its rows.
const _: () = assert!(2 * STEP_TOKENS_MAX < OUTPUT_COUNT_MAX);
const _: () = assert!(OUTPUT_COUNT_MAX.is_power_of_two() && COMMAND_COUNT_MAX.is_power_of_two());
