//! The task record: one tile of one operator, 128 bytes.
//!
//! A task waits for at most one event and signals at most one. What its op needs is packed into
//! words and references by the `…Args` types here; the model crate packs, the device unpacks.
//! References are byte addresses in the device's memory for weights, and byte offsets in the
//! device's heap for everything a step computes.

mod linear;

use crate::blocks::BlockShape;
use crate::event::EventId;
pub use linear::{
    Epilogue, LINEAR_WEIGHTS, LinearArgs, Precision, Prologue, RESIDUAL_AGE_MAX, Segment, TokenRows,
};

/// What a task does; selects the op in `device/ops`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Opcode {
    /// Computes nothing; measures the cost of a stage.
    Empty = 0,
    /// Decides which tokens the step processes.
    Admit = 1,
    /// Looks up the embeddings of the step's tokens.
    Embed = 2,
    /// Multiplies rows of weight matrices by the step's activations.
    Linear = 3,
    /// Appends to the KV cache and attends over it, for one KV head.
    Attention = 4,
    /// Chooses next tokens from logits and publishes them.
    Sample = 5,
}

impl Opcode {
    /// The opcode stored as `raw`.
    #[inline]
    pub const fn from_raw(raw: u16) -> Option<Opcode> {
        Some(match raw {
            0 => Opcode::Empty,
            1 => Opcode::Admit,
            2 => Opcode::Embed,
            3 => Opcode::Linear,
            4 => Opcode::Attention,
            5 => Opcode::Sample,
            _ => return None,
        })
    }

    /// Name for traces and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Opcode::Empty => "empty",
            Opcode::Admit => "admit",
            Opcode::Embed => "embed",
            Opcode::Linear => "linear",
            Opcode::Attention => "attention",
            Opcode::Sample => "sample",
        }
    }
}

/// How the values of a weight matrix are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum WeightFormat {
    /// IEEE binary32.
    F32 = 0,
    /// IEEE binary16.
    F16 = 1,
    /// The upper half of a binary32.
    Bf16 = 2,
    /// Integers of 8 bits, with a scale for each row's 32 columns; see `blocks.rs`.
    Q8 = 3,
    /// Integers of 4 bits, likewise.
    Q4 = 4,
    /// Binary8 with 4 bits of exponent (E4M3), with a scale for each 128 columns of 128 rows; see
    /// `blocks.rs`.
    Fp8 = 5,
}

impl WeightFormat {
    /// Bytes of one value, rounded up.
    #[inline]
    pub const fn value_bytes(self) -> u64 {
        match self {
            WeightFormat::F32 => 4,
            WeightFormat::F16 | WeightFormat::Bf16 => 2,
            WeightFormat::Q8 | WeightFormat::Q4 | WeightFormat::Fp8 => 1,
        }
    }

    /// Whether scales belong to the values: rows then lie in strips of blocks (`blocks.rs`).
    #[inline]
    pub const fn is_blocked(self) -> bool {
        matches!(self, WeightFormat::Q8 | WeightFormat::Q4 | WeightFormat::Fp8)
    }

    /// Bytes of a row of `in_dim` values with its scales.
    #[inline]
    pub const fn row_bytes(self, in_dim: u32) -> u64 {
        match BlockShape::of(self) {
            Some(shape) => shape.row_bytes(in_dim),
            None => in_dim as u64 * self.value_bytes(),
        }
    }

    #[inline]
    const fn from_raw(raw: u16) -> WeightFormat {
        match raw {
            0 => WeightFormat::F32,
            1 => WeightFormat::F16,
            2 => WeightFormat::Bf16,
            3 => WeightFormat::Q8,
            4 => WeightFormat::Q4,
            _ => WeightFormat::Fp8,
        }
    }
}

/// Flag of tasks that are announced, see `Task::is_announced`.
const ANNOUNCED: u16 = 1 << 15;

/// One tile task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C, align(128))]
pub struct Task {
    /// An `Opcode`.
    pub opcode: u16,
    /// Small choices of the op, packed by its `…Args` type.
    pub flags: u16,
    /// Event to wait for.
    pub wait_event: EventId,
    /// Arrivals of that event in each step.
    pub wait_count: u32,
    /// Event to signal once.
    pub signal_event: EventId,
    /// Op-specific words.
    pub words: [u32; 10],
    /// Op-specific references.
    pub refs: [u64; 9],
}

const _: () = assert!(size_of::<Task>() == 128 && align_of::<Task>() == 128);

impl Task {
    /// A task of `opcode` without arguments and events.
    pub const fn new(opcode: Opcode) -> Task {
        Task {
            opcode: opcode as u16,
            flags: 0,
            wait_event: EventId::NONE,
            wait_count: 0,
            signal_event: EventId::NONE,
            words: [0; 10],
            refs: [0; 9],
        }
    }
}

impl Task {
    /// Whether the task is announced: where values are stamped (`stamp.rs`), it signals as soon as
    /// nothing can keep it from storing them, and whoever waits for it looks at each value's stamp.
    #[inline]
    pub const fn is_announced(&self) -> bool {
        self.flags & ANNOUNCED != 0
    }

    /// Whether the op reads nothing but stamped values of what other tasks of the step have left, so
    /// that it may begin once the step has, and wait for its input itself.
    #[inline]
    pub const fn waits_itself(&self) -> bool {
        match Opcode::from_raw(self.opcode) {
            Some(Opcode::Attention | Opcode::Linear) => true,
            Some(Opcode::Empty) => EmptyArgs::unpack(self).count != 0,
            _ => false,
        }
    }
}

/// Arguments of `Opcode::Empty`: where values are stamped (`stamp.rs`), it may look at those of the stage
/// before it and leave some, as tasks do that compute something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct EmptyArgs {
    /// Values that it looks at; 0 for none.
    pub count: u32,
    /// Heap offset of the first.
    pub from: u64,
    /// Values that it leaves.
    pub len: u32,
    /// Heap offset of the first; 0 for none.
    pub to: u64,
    /// See `Task::is_announced`.
    pub is_announced: bool,
}

impl EmptyArgs {
    /// The task record with these arguments and no events.
    pub const fn pack(&self) -> Task {
        let mut task = Task::new(Opcode::Empty);
        task.flags = if self.is_announced { ANNOUNCED } else { 0 };
        task.words[0] = self.count;
        task.words[1] = self.len;
        task.refs[0] = self.from;
        task.refs[1] = self.to;
        task
    }

    /// The arguments of an empty task.
    #[inline]
    pub const fn unpack(task: &Task) -> EmptyArgs {
        EmptyArgs {
            count: task.words[0],
            from: task.refs[0],
            len: task.words[1],
            to: task.refs[1],
            is_announced: task.is_announced(),
        }
    }
}

/// Arguments of `Opcode::Attention`: one KV head, or a part of its splits.
///
/// The task has the splits `part_idx`, `part_idx + part_count` and so on: it appends the step's keys
/// and values whose positions are in them, and attends to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttentionArgs {
    /// Layer in the KV cache.
    pub layer_idx: u32,
    /// KV head.
    pub kv_head_idx: u32,
    /// Which part of the head's splits.
    pub part_idx: u32,
    /// Parts into which the head's splits are dealt, at most `ATTENTION_SPLIT_MAX`.
    pub part_count: u32,
    /// Of the columns that the head's queries have together, those of which the task merges the splits,
    /// where attention does (`Dims::late_splits_max`); the end last.
    pub columns: [u32; 2],
    /// Heap offset of `[tokens, (head_count + 2 * kv_head_count) * head_dim] f32`: queries, keys,
    /// values.
    pub qkv: u64,
    /// Heap offset of the first token's splits of the head's queries (`Dims::split_idx`).
    pub splits: u64,
    /// Address of the query norm's weight, `[head_dim] f32`; 0 for none.
    pub query_norm: u64,
    /// Address of the key norm's weight, `[head_dim] f32`; 0 for none.
    pub key_norm: u64,
    /// See `Task::is_announced`.
    pub is_announced: bool,
}

impl AttentionArgs {
    /// The task record with these arguments and no events.
    pub const fn pack(&self) -> Task {
        let mut task = Task::new(Opcode::Attention);
        task.flags = if self.is_announced { ANNOUNCED } else { 0 };
        task.words[0] = self.layer_idx;
        task.words[1] = self.kv_head_idx;
        task.words[2] = self.part_idx;
        task.words[3] = self.part_count;
        task.words[4] = self.columns[0];
        task.words[5] = self.columns[1];
        task.refs[0] = self.qkv;
        task.refs[1] = self.splits;
        task.refs[2] = self.query_norm;
        task.refs[3] = self.key_norm;
        task
    }

    /// The arguments of an attention task.
    #[inline]
    pub const fn unpack(task: &Task) -> AttentionArgs {
        AttentionArgs {
            layer_idx: task.words[0],
            kv_head_idx: task.words[1],
            part_idx: task.words[2],
            part_count: task.words[3],
            columns: [task.words[4], task.words[5]],
            qkv: task.refs[0],
            splits: task.refs[1],
            query_norm: task.refs[2],
            key_norm: task.refs[3],
            is_announced: task.is_announced(),
        }
    }

    /// The columns of a part, of `count`: whole fours, as many for each part as can be.
    pub const fn columns_of(count: u32, part_idx: u32, part_count: u32) -> [u32; 2] {
        let fours = count / 4;
        [fours * part_idx / part_count * 4, fours * (part_idx + 1) / part_count * 4]
    }
}

/// Arguments of `Opcode::Sample`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SampleArgs {
    /// Event of the stage before the head's, `NONE` if nothing computes logits. In a step without logits
    /// the head's tasks read nothing; where others do not wait for events either (`Task::waits_itself`),
    /// it is this task that waits for that stage, so that whatever comes after it comes after all.
    pub also_event: EventId,
    /// Arrivals of that event in each step.
    pub also_count: u32,
}

impl SampleArgs {
    /// The task record with these arguments and no events.
    pub const fn pack(&self) -> Task {
        let mut task = Task::new(Opcode::Sample);
        task.words[0] = self.also_event.0;
        task.words[1] = self.also_count;
        task
    }

    /// The arguments of a sampling task.
    #[inline]
    pub const fn unpack(task: &Task) -> SampleArgs {
        SampleArgs { also_event: EventId(task.words[0]), also_count: task.words[1] }
    }
}

/// Arguments of `Opcode::Embed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EmbedArgs {
    /// Format of the table.
    pub format: WeightFormat,
    /// Address of the table, `[vocab_size, hidden_dim]`.
    pub table: u64,
    /// Heap offset of the output, `[tokens, hidden_dim] f32`.
    pub hidden: u64,
}

impl EmbedArgs {
    /// The task record with these arguments and no events.
    pub const fn pack(&self) -> Task {
        let mut task = Task::new(Opcode::Embed);
        task.flags = self.format as u16;
        task.refs[0] = self.table;
        task.refs[1] = self.hidden;
        task
    }

    /// The arguments of an embedding task.
    #[inline]
    pub const fn unpack(task: &Task) -> EmbedArgs {
        EmbedArgs {
            format: WeightFormat::from_raw(task.flags),
            table: task.refs[0],
            hidden: task.refs[1],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_args_survive_packing() {
        let attention = AttentionArgs {
            layer_idx: 1,
            kv_head_idx: 2,
            part_idx: 5,
            part_count: 7,
            columns: [24, 32],
            qkv: 5 << 33,
            splits: 6 << 33,
            query_norm: 7 << 33,
            key_norm: 8 << 33,
            is_announced: true,
        };
        assert_eq!(AttentionArgs::unpack(&attention.pack()), attention);
        let all =
            |count: u32| [0, 1, 2, 3, 4, 5, 6].map(|idx| AttentionArgs::columns_of(count, idx, 7));
        assert_eq!(all(56), [0, 8, 16, 24, 32, 40, 48].map(|first| [first, first + 8]));
        assert_eq!(all(8), [[0, 0], [0, 0], [0, 0], [0, 4], [4, 4], [4, 4], [4, 8]]);
        let empty = EmptyArgs { count: 3, from: 9 << 33, len: 5, to: 10 << 33, is_announced: true };
        assert_eq!(EmptyArgs::unpack(&empty.pack()), empty);
        let embed = EmbedArgs { format: WeightFormat::F16, table: 1 << 50, hidden: 64 };
        assert_eq!(EmbedArgs::unpack(&embed.pack()), embed);
        let sample = SampleArgs { also_event: EventId(12), also_count: 13 };
        assert_eq!(SampleArgs::unpack(&sample.pack()), sample);
    }
}
