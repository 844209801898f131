//! The program header: where everything is, and the sizes the ops share.

use crate::event::EVENT_STRIDE_BYTES;
use crate::kv::KvGeometry;
use crate::limits::{ATTENTION_SPLIT_MAX, PE_COUNT_MAX, SPLIT_ROWS};
use crate::mailbox::MailboxView;
use crate::queue::CURSOR_STRIDE_BYTES;
use crate::sequence::{SequenceState, StepState};
use crate::stamp::STAMPED_GROUP;

/// Sizes of the model and of the engine that the ops share.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct Dims {
    /// Values in a hidden state.
    pub hidden_dim: u32,
    /// Values between the two halves of the feed-forward network.
    pub intermediate_dim: u32,
    /// Query heads.
    pub head_count: u32,
    /// Entries of the vocabulary.
    pub vocab_size: u32,
    /// Added to the mean square in every RMSNorm.
    pub rms_norm_eps: f32,
    /// Multiplies attention scores: `head_dim^-1/2`.
    pub attention_scale: f32,
    /// Tokens a step processes at most.
    pub step_tokens_max: u32,
    /// Rows of the largest linear task.
    pub task_rows_max: u32,
    /// Values in the longest input row of a linear task.
    pub prologue_dim_max: u32,
    /// Bins of the sampler's histogram: `SAMPLE_BIN_COUNT`, as a number that compilers do not know.
    pub sample_bin_count: u32,
    /// 1 if values are stamped (`stamp.rs`), else 0.
    pub is_stamped: u32,
    /// Tasks that compute logits, each of which leaves the best of its own; 0 if none does.
    pub head_task_count: u32,
    /// Splits of a token up to which the projection after attention merges them; where there are more, the
    /// attention tasks of each KV head merge them together.
    pub late_splits_max: u32,
    /// The KV cache.
    pub kv: KvGeometry,
}

impl Dims {
    /// Values of one token's queries, keys and values.
    #[inline]
    pub const fn qkv_dim(&self) -> u32 {
        (self.head_count + 2 * self.kv.kv_head_count) * self.kv.head_dim
    }

    /// Query heads of each KV head.
    #[inline]
    pub const fn heads_per_kv(&self) -> u32 {
        self.head_count / self.kv.kv_head_count
    }

    /// Values of one attention split: the weighted sum of values, the largest score, the sum of
    /// weights, and padding to a multiple of 16.
    #[inline]
    pub const fn split_values(&self) -> u32 {
        (self.kv.head_dim + 2).next_multiple_of(16)
    }

    /// Whether attention merges the splits of a token that has `split_count`.
    #[inline]
    pub const fn joins_splits(&self, split_count: u32) -> bool {
        split_count > self.late_splits_max
    }

    /// Of each head's rows in the splits region, those that the projection merges for a token with
    /// `split_count` splits: the first, and how many.
    #[inline]
    pub const fn rows_to_merge(&self, split_count: u32) -> [u32; 2] {
        if self.joins_splits(split_count) { [ATTENTION_SPLIT_MAX, 1] } else { [0, split_count] }
    }

    /// Index of the first value of row `split_idx` of `(token_idx, head_idx)` in the splits
    /// region, `[tokens, head_count, SPLIT_ROWS, split_values] f32`.
    #[inline]
    pub const fn split_idx(&self, token_idx: u32, head_idx: u32, split_idx: u32) -> u64 {
        let row = token_idx as u64 * self.head_count as u64 + head_idx as u64;
        (row * SPLIT_ROWS as u64 + split_idx as u64) * self.split_values() as u64
    }

    /// Values of a worker's scratch for the input rows of a linear task or the rotated queries of an
    /// attention task; rows begin at multiples of `INPUT_ROW_MULTIPLE`.
    #[inline]
    pub const fn scratch_input_values(&self) -> u64 {
        let attention = self.heads_per_kv() * self.kv.head_dim;
        let row = if attention > self.prologue_dim_max { attention } else { self.prologue_dim_max };
        self.step_tokens_max as u64 * row.next_multiple_of(INPUT_ROW_MULTIPLE) as u64
    }

    /// Values of a worker's scratch for the products of a linear task.
    #[inline]
    pub const fn scratch_output_values(&self) -> u64 {
        self.step_tokens_max as u64 * self.task_rows_max.next_multiple_of(16) as u64
    }

    /// Where the weights of all tokens, `[vocab_size] u64`, are in the sampler's workspace.
    #[inline]
    pub const fn sample_weights_offset(&self) -> u64 {
        align_up(self.vocab_size as u64 * 4)
    }

    /// Where the histogram, `[SAMPLE_BIN_COUNT] u64`, is in the sampler's workspace.
    #[inline]
    pub const fn sample_bins_offset(&self) -> u64 {
        self.sample_weights_offset() + align_up(self.vocab_size as u64 * 8)
    }

    /// Bytes of one worker's scratch.
    #[inline]
    pub const fn scratch_bytes(&self) -> u64 {
        align_up((self.scratch_input_values() + self.scratch_output_values()) * 4)
    }
}

/// Input rows in a worker's scratch are so many values apart, or a multiple: two cache lines.
pub const INPUT_ROW_MULTIPLE: u32 = 32;
/// Alignment of every heap region: two cache lines.
pub const REGION_ALIGN_BYTES: u64 = 128;

const fn align_up(bytes: u64) -> u64 {
    bytes.next_multiple_of(REGION_ALIGN_BYTES)
}

/// Bins of the sampler's histogram: one for each value of a byte.
pub const SAMPLE_BIN_COUNT: u64 = 256;

/// Heap offsets of every region, in bytes; the same on each device of a job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct HeapPlan {
    /// Queue cursors, `CURSOR_STRIDE_BYTES` apart.
    pub cursors: u64,
    /// One `StepState`.
    pub step: u64,
    /// `[slot_count] SequenceState`.
    pub sequences: u64,
    /// One `MailboxView`.
    pub mailbox_view: u64,
    /// `[slot_count, context_max] u32`: each sequence's tokens.
    pub tokens: u64,
    /// `[slot_count, vocab_size] u32`: bit 31 if the prompt has the token; below, its count in the
    /// answer.
    pub token_marks: u64,
    /// `[context_max, head_dim / 2] f32`.
    pub rope_cos: u64,
    /// `[context_max, head_dim / 2] f32`.
    pub rope_sin: u64,
    /// `[tokens, hidden_dim] f32`: the residual stream.
    pub hidden: u64,
    /// `[tokens, qkv_dim] f32`.
    pub qkv: u64,
    /// `[tokens, head_count, SPLIT_ROWS, split_values] f32`.
    pub splits: u64,
    /// `[tokens, intermediate_dim] f32`.
    pub intermediate: u64,
    /// `[tokens, vocab_size] f32`.
    pub logits: u64,
    /// The sampler's workspace: `[vocab_size] f32` logits after penalties, then what
    /// `Dims::sample_weights_offset` and `Dims::sample_bins_offset` say.
    pub sample: u64,
    /// The values from `hidden` to `logits` in words with their stamps, if they are stamped.
    pub stamped: u64,
    /// Event counters, `EVENT_STRIDE_BYTES` apart.
    pub events: u64,
    /// `[task_count] u64`: the step in which each linear task was last committed.
    pub commits: u64,
    /// `[tokens, head_task_count] u64`: the best of each task's logits, packed as in `machine/best.rs`.
    pub bests: u64,
    /// `[worker_count]` scratches of `Dims::scratch_bytes`.
    pub scratch: u64,
    /// The KV cache, see `KvGeometry`.
    pub kv: u64,
    /// Bytes of the whole heap.
    pub total_bytes: u64,
}

/// Number of regions in a heap.
pub const REGION_COUNT: usize = 20;

impl HeapPlan {
    /// Lays out a heap for `worker_count` workers and a program of as many events and tasks.
    pub const fn new(
        dims: &Dims,
        worker_count: u32,
        event_count: u32,
        task_count: u32,
    ) -> HeapPlan {
        let kv = &dims.kv;
        let tokens = dims.step_tokens_max as u64;
        let slots = kv.slot_count as u64;
        let rope = kv.context_max as u64 * (kv.head_dim / 2) as u64 * 4;
        let hidden = tokens * dims.hidden_dim as u64 * 4;
        let qkv = tokens * dims.qkv_dim() as u64 * 4;
        let splits = dims.split_idx(dims.step_tokens_max, 0, 0) * 4;
        let intermediate = tokens * dims.intermediate_dim as u64 * 4;
        let stamped = align_up(hidden) + align_up(qkv) + align_up(splits) + align_up(intermediate);
        let groups = stamped.div_ceil(STAMPED_GROUP as u64 * 4) * dims.is_stamped as u64;
        let sizes: [u64; REGION_COUNT] = [
            (worker_count as u64 + 1) * CURSOR_STRIDE_BYTES,
            size_of::<StepState>() as u64,
            slots * size_of::<SequenceState>() as u64,
            size_of::<MailboxView>() as u64,
            slots * kv.context_max as u64 * 4,
            slots * dims.vocab_size as u64 * 4,
            rope,
            rope,
            hidden,
            qkv,
            splits,
            intermediate,
            tokens * dims.vocab_size as u64 * 4,
            dims.sample_bins_offset() + SAMPLE_BIN_COUNT * 8,
            groups * STAMPED_GROUP as u64 * 8,
            event_count as u64 * EVENT_STRIDE_BYTES,
            task_count as u64 * 8,
            // At least one, so that regions differ.
            tokens * dims.head_task_count as u64 * 8 + 8,
            worker_count as u64 * dims.scratch_bytes(),
            kv.value_count() * 4,
        ];
        let mut offsets = [0u64; REGION_COUNT + 1];
        let mut i = 0;
        while i < REGION_COUNT {
            offsets[i + 1] = offsets[i] + align_up(sizes[i]);
            i += 1;
        }
        HeapPlan {
            cursors: offsets[0],
            step: offsets[1],
            sequences: offsets[2],
            mailbox_view: offsets[3],
            tokens: offsets[4],
            token_marks: offsets[5],
            rope_cos: offsets[6],
            rope_sin: offsets[7],
            hidden: offsets[8],
            qkv: offsets[9],
            splits: offsets[10],
            intermediate: offsets[11],
            logits: offsets[12],
            sample: offsets[13],
            stamped: offsets[14],
            events: offsets[15],
            commits: offsets[16],
            bests: offsets[17],
            scratch: offsets[18],
            kv: offsets[19],
            total_bytes: offsets[20],
        }
    }

    /// Names and offsets of the regions in the order of their offsets, the end last.
    pub const fn regions(&self) -> [(&'static str, u64); REGION_COUNT + 1] {
        [
            ("cursors", self.cursors),
            ("step", self.step),
            ("sequences", self.sequences),
            ("mailbox_view", self.mailbox_view),
            ("tokens", self.tokens),
            ("token_marks", self.token_marks),
            ("rope_cos", self.rope_cos),
            ("rope_sin", self.rope_sin),
            ("hidden", self.hidden),
            ("qkv", self.qkv),
            ("splits", self.splits),
            ("intermediate", self.intermediate),
            ("logits", self.logits),
            ("sample", self.sample),
            ("stamped", self.stamped),
            ("events", self.events),
            ("commits", self.commits),
            ("bests", self.bests),
            ("scratch", self.scratch),
            ("kv", self.kv),
            ("end", self.total_bytes),
        ]
    }
}

/// What the host gives to every worker of a device. Addresses are in the device's memory.
///
/// Order: written before the workers start and never again.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct ProgramHeader {
    /// `ABI_VERSION`.
    pub abi_version: u32,
    /// Workers, of all PEs together; each has as many.
    pub worker_count: u32,
    /// Tasks of a step.
    pub task_count: u32,
    /// Events of a step.
    pub event_count: u32,
    /// Event that `Admit` signals: a step has begun.
    pub begin_event: u32,
    /// Records in each worker's trace ring, a power of two; 0 for no trace.
    pub trace_capacity: u32,
    /// Pages of each block's ring; 0 on the CPU.
    pub page_count: u32,
    /// Polls of an event between two looks at the stop word, the clock and other queues.
    pub polls_per_look: u32,
    /// Bytes of each block's area of input rows; 0 on the CPU.
    pub input_bytes: u32,
    /// The first worker of this PE, see `pe_count`.
    pub first_worker: u32,
    /// Time after which a wait inside a step is a fault.
    pub wait_ns_max: u64,
    /// Address of `[task_count] Task`.
    pub tasks: u64,
    /// Address of `[worker_count + 1] QueueSpan`.
    pub queue_spans: u64,
    /// Address of the queues' entries, task indices as `u32`.
    pub queue_entries: u64,
    /// Address of the heap.
    pub heap: u64,
    /// Address of the `Mailbox`, in memory that the host reaches too.
    pub mailbox: u64,
    /// Address of `[slot_count, context_max] u32`, in memory that the host reaches too: the prompts.
    pub prompts: u64,
    /// Address of the `FaultRecord`.
    pub fault: u64,
    /// Address of `[worker_count, trace_capacity] TraceRecord`.
    pub trace: u64,
    /// Shared sizes.
    pub dims: Dims,
    /// Where the heap's regions are.
    pub plan: HeapPlan,
    /// Devices that run the program together, processing elements (PEs) as in OpenSHMEM: each has a heap
    /// of its own with the same layout, and what others read too is stored in all heaps.
    pub pe_count: u32,
    /// Bytes of a page, see `tile::page_bytes`; 0 on the CPU.
    pub page_bytes: u32,
    /// What to add, modulo 2^64, to an address in this PE's heap to get that of the same place in the
    /// heap of each PE; 0 for itself.
    pub distances: [u64; PE_COUNT_MAX],
}

impl ProgramHeader {
    /// Workers of each PE.
    #[inline]
    pub const fn pe_worker_count(&self) -> u32 {
        self.worker_count / self.pe_count
    }
}

const _: () = assert!(size_of::<Dims>() == 72);
const _: () = assert!(size_of::<HeapPlan>() == 8 * (REGION_COUNT + 1));
const _: () =
    assert!(size_of::<ProgramHeader>() == 112 + 72 + 8 * (REGION_COUNT + 1) + 8 + 8 * PE_COUNT_MAX);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_aligned_and_in_order() {
        let dims = Dims {
            hidden_dim: 72,
            intermediate_dim: 160,
            head_count: 9,
            vocab_size: 257,
            step_tokens_max: 64,
            task_rows_max: 33,
            prologue_dim_max: 72,
            is_stamped: 1,
            kv: KvGeometry {
                layer_count: 3,
                slot_count: 2,
                kv_head_count: 3,
                context_max: 100,
                head_dim: 8,
            },
            ..Dims::default()
        };
        let plan = HeapPlan::new(&dims, 3, 17, 5);
        let regions = plan.regions();
        for pair in regions.windows(2) {
            assert!(pair[0].1 < pair[1].1, "{} before {}", pair[0].0, pair[1].0);
            assert_eq!(pair[1].1 % REGION_ALIGN_BYTES, 0);
        }
        assert_eq!(
            plan.total_bytes - plan.kv,
            (3u64 * 2 * 3 * 2 * 100 * 8 * 4).next_multiple_of(128)
        );
    }
}
