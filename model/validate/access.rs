//! Which parts of the heap a task touches.
//!
//! Rows of activations belong to the tokens of a step, of which every task may process all. So an
//! access is a range of columns, in all rows; of the KV cache, a split of one head of one layer in all
//! slots; of everything else, the whole. A worker's scratch is its own and needs no order.

use tilert_mk_shared::limits::{ATTENTION_SPLIT_MAX, SPLIT_ROWS};
use tilert_mk_shared::program::{Dims, HeapPlan};
use tilert_mk_shared::task::AttentionArgs;

/// A part of the heap that tasks share, or the mailbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Region {
    /// Tokens of the step.
    Step,
    /// States of the slots.
    Sequences,
    /// Tokens of the sequences.
    Tokens,
    /// Marks of the tokens that a sequence contains.
    TokenMarks,
    /// The residual stream.
    Hidden,
    /// Queries, keys and values.
    Qkv,
    /// Splits of attention.
    Splits,
    /// Between the halves of the feed-forward network.
    Intermediate,
    /// Logits.
    Logits,
    /// The best of each head task's logits.
    Bests,
    /// The sampler's workspace.
    Sample,
    /// Commands and outputs.
    Mailbox,
    /// The KV cache.
    Kv,
}

/// Number of regions.
pub(super) const REGION_KINDS: usize = 13;

impl Region {
    /// All regions, in the order of their numbers.
    pub(super) const ALL: [Region; REGION_KINDS] = [
        Region::Step,
        Region::Sequences,
        Region::Tokens,
        Region::TokenMarks,
        Region::Hidden,
        Region::Qkv,
        Region::Splits,
        Region::Intermediate,
        Region::Logits,
        Region::Bests,
        Region::Sample,
        Region::Mailbox,
        Region::Kv,
    ];

    /// What its accesses count.
    pub const fn unit(self) -> &'static str {
        match self {
            Region::Kv => "head",
            Region::Hidden | Region::Qkv | Region::Splits | Region::Intermediate => "column",
            Region::Logits | Region::Bests => "column",
            _ => "part",
        }
    }

    /// Whether its contents are made in each step: a read needs a write before it in the step, and
    /// a write needs a read after it.
    pub(super) const fn is_step_local(self) -> bool {
        matches!(
            self,
            Region::Step
                | Region::Hidden
                | Region::Qkv
                | Region::Splits
                | Region::Intermediate
                | Region::Logits
                | Region::Bests
        )
    }

    /// Heap offset and values in a row, of a region whose rows belong to tokens.
    pub(super) fn rows(self, dims: &Dims, plan: &HeapPlan) -> Option<(u64, u64)> {
        Some(match self {
            Region::Hidden => (plan.hidden, dims.hidden_dim.into()),
            Region::Qkv => (plan.qkv, dims.qkv_dim().into()),
            Region::Splits => (plan.splits, dims.split_idx(1, 0, 0)),
            Region::Intermediate => (plan.intermediate, dims.intermediate_dim.into()),
            Region::Logits => (plan.logits, dims.vocab_size.into()),
            _ => return None,
        })
    }
}

impl std::fmt::Display for Region {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Region::Step => "step",
            Region::Sequences => "sequences",
            Region::Tokens => "tokens",
            Region::TokenMarks => "token_marks",
            Region::Hidden => "hidden",
            Region::Qkv => "qkv",
            Region::Splits => "splits",
            Region::Intermediate => "intermediate",
            Region::Logits => "logits",
            Region::Bests => "bests",
            Region::Sample => "sample",
            Region::Mailbox => "mailbox",
            Region::Kv => "kv",
        })
    }
}

/// A range of a region that a task reads or writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Access {
    pub(super) region: Region,
    pub(super) first: u64,
    pub(super) end: u64,
    pub(super) is_write: bool,
}

/// The accesses of one task, collected.
#[derive(Default)]
pub(super) struct Accesses(pub(super) Vec<Access>);

impl Accesses {
    pub(super) fn read(&mut self, region: Region, first: u64, end: u64) {
        self.0.push(Access { region, first, end, is_write: false });
    }

    pub(super) fn write(&mut self, region: Region, first: u64, end: u64) {
        self.0.push(Access { region, first, end, is_write: true });
    }

    pub(super) fn update(&mut self, region: Region) {
        self.read(region, 0, 1);
        self.write(region, 0, 1);
    }

    /// `Admit` starts and cancels sequences and composes the step.
    pub(super) fn admit(&mut self) {
        self.write(Region::Step, 0, 1);
        for region in [Region::Sequences, Region::Tokens, Region::TokenMarks, Region::Mailbox] {
            self.update(region);
        }
    }

    /// `Sample` reads all logits, or the best of each task's, and moves the sequences on.
    pub(super) fn sample(&mut self, dims: &Dims) {
        self.read(Region::Step, 0, 1);
        self.read(Region::Logits, 0, dims.vocab_size.into());
        self.read(Region::Bests, 0, dims.head_task_count.into());
        for region in [Region::Sequences, Region::Tokens, Region::TokenMarks] {
            self.update(region);
        }
        self.update(Region::Sample);
        self.update(Region::Mailbox);
    }

    /// `Embed` fills all rows of the residual stream.
    pub(super) fn embed(&mut self, dims: &Dims) {
        self.read(Region::Step, 0, 1);
        self.write(Region::Hidden, 0, dims.hidden_dim.into());
    }

    /// A projection reads the splits of all heads, and what attention has merged where it does.
    pub(super) fn merge(&mut self, dims: &Dims) {
        let split_values = u64::from(dims.split_values());
        let joins = dims.joins_splits(ATTENTION_SPLIT_MAX);
        let rows = if joins { SPLIT_ROWS } else { ATTENTION_SPLIT_MAX };
        for head in 0..u64::from(dims.head_count) {
            let first = head * u64::from(SPLIT_ROWS) * split_values;
            self.read(Region::Splits, first, first + u64::from(rows) * split_values);
        }
    }

    /// `Attention` appends to its head's part of the cache and attends over it. What it reads of the splits
    /// of others, of its own stage, `stamps::check_exchange` looks at.
    pub(super) fn attention(&mut self, dims: &Dims, args: &AttentionArgs) {
        let dim = u64::from(dims.kv.head_dim);
        let (head_count, group) = (u64::from(dims.head_count), u64::from(dims.heads_per_kv()));
        let kv_head_count = u64::from(dims.kv.kv_head_count);
        let kv_head = u64::from(args.kv_head_idx);
        let query = kv_head * group;
        self.read(Region::Step, 0, 1);
        self.read(Region::Qkv, query * dim, (query + group) * dim);
        for head in [head_count + kv_head, head_count + kv_head_count + kv_head] {
            self.read(Region::Qkv, head * dim, (head + 1) * dim);
        }
        let plane = u64::from(args.layer_idx) * kv_head_count + kv_head;
        let (split_max, split_values) =
            (u64::from(ATTENTION_SPLIT_MAX), u64::from(dims.split_values()));
        let part_count = u64::from(args.part_count);
        // Splits of one part are neighbours only if there is one part.
        let (step, len) = if part_count == 1 { (split_max, split_max) } else { (part_count, 1) };
        for split in (u64::from(args.part_idx)..split_max).step_by(step as usize) {
            for head in query..query + group {
                let first = head * u64::from(SPLIT_ROWS) + split;
                self.write(Region::Splits, first * split_values, (first + len) * split_values);
            }
            let first = plane * split_max + split;
            self.read(Region::Kv, first, first + len);
            self.write(Region::Kv, first, first + len);
        }
        if !dims.joins_splits(ATTENTION_SPLIT_MAX) {
            return;
        }
        // Of all queries' columns one after the other.
        let columns = args.columns.map(u64::from);
        for head in 0..group {
            let [first, end] =
                columns.map(|column| column.clamp(head * dim, (head + 1) * dim) - head * dim);
            let row = ((query + head) * u64::from(SPLIT_ROWS) + split_max) * split_values;
            self.write(Region::Splits, row + first, row + end);
            // Who has a head's first columns leaves its score and sum of weights.
            if first == 0 && end > 0 {
                self.write(Region::Splits, row + dim, row + split_values);
            }
        }
    }
}
