//! What can be wrong with a program. Every variant names tasks, events or regions in plain words.

use super::access::Region;
use tilert_mk_shared::task::{Precision, WeightFormat};

/// A program that must not run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValidateError {
    /// A size of the model or the engine is outside its bound.
    #[error("{what} is {value}, which is not in 1 to {limit}")]
    Limit {
        /// The size.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The largest allowed.
        limit: u64,
    },
    /// The heap is laid out for other sizes.
    #[error("the heap plan does not belong to the program's sizes, workers and events")]
    Plan,
    /// A list has another length than it must.
    #[error("the program has {found} {what}, not {expected}")]
    Count {
        /// What is counted.
        what: &'static str,
        /// How many there are.
        found: u64,
        /// How many there must be.
        expected: u64,
    },
    /// A task's arguments contradict themselves, the model or the heap.
    #[error("task `{task}`: {defect}")]
    Task {
        /// The task.
        task: String,
        /// What is wrong with it.
        defect: TaskDefect,
    },
    /// A task's weights do not fit the staging memory.
    #[error("task `{task}` needs {bytes} bytes of {what}, more than {limit}")]
    Staging {
        /// The task.
        task: String,
        /// Of what.
        what: &'static str,
        /// How many bytes.
        bytes: u64,
        /// The most allowed.
        limit: u64,
    },
    /// A task is announced though something that waits for it does not look at stamps, or is not
    /// though all of that does, see `Task::is_announced`.
    #[error("task `{task}` announces event {event}, or does not, against what waits for it")]
    Announced {
        /// The task.
        task: String,
        /// The event.
        event: u32,
    },
    /// What waits for a task that may have no rows does not also wait for what that task would read.
    #[error("without rows `{task}` does not look for event {event}, and nothing after it does")]
    Unseen {
        /// The task.
        task: String,
        /// The event.
        event: u32,
    },
    /// Two tasks wait for each other's splits but cannot run at the same time.
    #[error("tasks `{task}` and `{other}` exchange splits within their stage but {why}")]
    Exchange {
        /// One task.
        task: String,
        /// The other.
        other: String,
        /// What is in the way.
        why: &'static str,
    },
    /// A task says that what it adds to is of another stage than any can be.
    #[error("task `{task}` adds to what event {age} before its own has left")]
    ResidualAge {
        /// The task.
        task: String,
        /// How many events before.
        age: u32,
    },
    /// A task looks for the stamp of another stage than the one that has written last.
    #[error(
        "task `{task}` expects {region} {at} of event {expected}, but `{writer}` has written it"
    )]
    Stamp {
        /// The task.
        task: String,
        /// The region.
        region: Region,
        /// The place in it.
        at: u64,
        /// The event it expects.
        expected: u32,
        /// The last writer.
        writer: String,
    },
    /// Two tasks share a prologue key but not the prologue, or not the moment it is valid at.
    #[error("tasks `{task}` and `{other}` share a prologue key but not the prologue")]
    PrologueKey {
        /// One task.
        task: String,
        /// The other.
        other: String,
    },
    /// A row of a matrix is multiplied by no task or by two, or a vector is never used.
    #[error("row {row} of tensor `{tensor}` is used {count} times in a step, not once")]
    TensorRow {
        /// The tensor.
        tensor: String,
        /// Its first such row.
        row: u64,
        /// How often it is used.
        count: u64,
    },
    /// A matrix is FP8 and has no scales of its own, or they do not have a value for each block.
    #[error("the scales of tensor `{tensor}` do not suit it, or are another's")]
    Scales {
        /// The matrix.
        tensor: String,
    },
    /// A queue's span does not follow the span before it, or does not end inside the entries.
    #[error(
        "queue {queue_idx} has entries {first} to {end}, which do not follow queue {queue_idx}-1"
    )]
    QueueSpan {
        /// The queue.
        queue_idx: u32,
        /// Its first entry.
        first: u64,
        /// The entry after its last.
        end: u64,
    },
    /// A queue names a task that does not exist.
    #[error("queue {queue_idx} names task {task_idx}, which does not exist")]
    QueueEntry {
        /// The queue.
        queue_idx: u32,
        /// The index.
        task_idx: u32,
    },
    /// A queue leaves the order of the program.
    #[error("queue {queue_idx} has task `{task}` after `{previous}`, against the program's order")]
    QueueOrder {
        /// The queue.
        queue_idx: u32,
        /// The task that comes too late.
        task: String,
        /// The task before it.
        previous: String,
    },
    /// A task is in no queue, or in more than one.
    #[error("task `{task}` is in {count} queues, not in one")]
    QueueCount {
        /// The task.
        task: String,
        /// In how many.
        count: u32,
    },
    /// A task waits for or signals an event that does not exist.
    #[error("task `{task}` names event {event}, but there are only {event_count}")]
    EventRange {
        /// The task.
        task: String,
        /// The event.
        event: u32,
        /// Events of the program.
        event_count: u32,
    },
    /// The declared arrivals of an event are not its signals.
    #[error("event {event} declares {declared} arrivals a step but is signalled {signals} times")]
    Arrivals {
        /// The event.
        event: u32,
        /// What the program says.
        declared: u32,
        /// What its tasks do.
        signals: u32,
    },
    /// A task waits for fewer or more arrivals than there are.
    #[error("task `{task}` waits for {wait_count} arrivals of event {event}, which has {arrivals}")]
    WaitCount {
        /// The task.
        task: String,
        /// The event.
        event: u32,
        /// What it waits for.
        wait_count: u32,
        /// What there will be.
        arrivals: u32,
    },
    /// The step's first task does not wait for the end of the step before.
    #[error("task `{task}` does not wait for the end of the step before")]
    AdmitUnordered {
        /// The task.
        task: String,
    },
    /// The program's begin event is not the one that `Admit` alone signals.
    #[error(
        "event {event} does not tell that a step has begun: `{task}` must be its one signaller"
    )]
    BeginEvent {
        /// The event.
        event: u32,
        /// The task that admits.
        task: String,
    },
    /// Events wait for each other.
    #[error("task `{task}` closes a cycle: event {event} waits for itself")]
    Cycle {
        /// A task of the cycle.
        task: String,
        /// The event it waits for.
        event: u32,
    },
    /// A task is listed before one that it waits for.
    #[error("task `{task}` is listed before `{signaller}`, for which it waits (event {event})")]
    ListOrder {
        /// The task.
        task: String,
        /// The one it needs.
        signaller: String,
        /// The event between them.
        event: u32,
    },
    /// A task that signals may run in another step than the one it belongs to.
    #[error("task `{task}` signals event {event} but is not ordered {between}")]
    OutsideStep {
        /// The task.
        task: String,
        /// The event it signals.
        event: u32,
        /// What is missing.
        between: &'static str,
    },
    /// Two tasks touch the same bytes at the same time, and one of them writes.
    #[error(
        "tasks `{first}` and `{second}`{} both use {region} {unit} {at}, unordered, and one writes",
        if *.across_steps { " of adjacent steps" } else { "" },
        unit = .region.unit()
    )]
    Race {
        /// One task.
        first: String,
        /// The other.
        second: String,
        /// What they share.
        region: Region,
        /// The first shared column, or plane.
        at: u64,
        /// Whether they belong to two adjacent steps.
        across_steps: bool,
    },
    /// A task reads what nothing before it has written in this step.
    #[error("task `{task}` reads {region} {} {at}, which no task before it writes", .region.unit())]
    Unwritten {
        /// The task.
        task: String,
        /// Where it reads.
        region: Region,
        /// The first such column.
        at: u64,
    },
    /// A task reads what is partly left over from an earlier stage.
    #[error(
        "task `{task}` reads {region} {} {at} as `{writer}` left it, but others as `{newer}` did",
        .region.unit()
    )]
    Stale {
        /// The task.
        task: String,
        /// Where it reads.
        region: Region,
        /// The first column with another writer than those before it.
        at: u64,
        /// Its last writer.
        writer: String,
        /// The last writer of the other columns.
        newer: String,
    },
    /// What a task writes is overwritten, or the step ends, before anything reads it.
    #[error("task `{task}` writes {region} {} {at}, which nobody reads", .region.unit())]
    Unread {
        /// The task.
        task: String,
        /// Where it writes.
        region: Region,
        /// The first such column.
        at: u64,
    },
    /// A head of the KV cache is not appended to by exactly one task.
    #[error(
        "split {split_idx} of KV head {kv_head_idx} of layer {layer_idx} is appended to by {count} \
         tasks, not one"
    )]
    KvHead {
        /// The layer.
        layer_idx: u32,
        /// The head.
        kv_head_idx: u32,
        /// Split of the head's positions.
        split_idx: u32,
        /// How many tasks append.
        count: u32,
    },
}

/// What is wrong with one task.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TaskDefect {
    /// No op has this number.
    #[error("opcode {0} is unknown")]
    Opcode(u16),
    /// Bits that the op does not use, or values it does not know, are set.
    #[error("arguments that {0} does not have are set")]
    Stray(&'static str),
    /// A number is outside its bound.
    #[error("{what} is {value}, not in {least} to {most}")]
    Bound {
        /// The number.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The smallest allowed.
        least: u64,
        /// The largest allowed.
        most: u64,
    },
    /// A dimension is not what the model says.
    #[error("{what} is {value}, not {expected}")]
    Dimension {
        /// The dimension.
        what: &'static str,
        /// Its value.
        value: u64,
        /// What it must be.
        expected: u64,
    },
    /// Segments do not go together, or do not suit the epilogue.
    #[error("{0}")]
    Segments(&'static str),
    /// The tiles of one matrix differ in more than their rows.
    #[error("{what} differs from that of task `{other}`, which belongs to the same operator")]
    Disagrees {
        /// What differs.
        what: &'static str,
        /// The task before it.
        other: String,
    },
    /// Its matrices are to be read in another format.
    #[error("the weights are {0:?}, but those of its matrices are not")]
    Format(WeightFormat),
    /// Products are of another precision.
    #[error("its precision is {0:?}, but the program's is not")]
    Precision(Precision),
    /// A heap offset is not in the first row of a region of activations.
    #[error("{what} is heap offset {offset}, which does not begin a row that it may use")]
    Offset {
        /// Which reference.
        what: &'static str,
        /// The offset.
        offset: u64,
    },
    /// Rows are not as far apart as the region's.
    #[error("{what} is {stride}, but rows of {region} are {width} apart")]
    Stride {
        /// Which stride.
        what: &'static str,
        /// Its value.
        stride: u64,
        /// The region.
        region: Region,
        /// Its row.
        width: u64,
    },
    /// Columns reach past the end of a row.
    #[error("{what} ends at column {end} of {region}, which has {width}")]
    Columns {
        /// Which columns.
        what: &'static str,
        /// The column after the last.
        end: u64,
        /// The region.
        region: Region,
        /// Its row.
        width: u64,
    },
    /// A region is not one that the task's prologue, epilogue or rows are made for.
    #[error("{what} is in {region}, which does not suit the task")]
    Role {
        /// Which reference.
        what: &'static str,
        /// The region.
        region: Region,
    },
    /// A reference names no tensor.
    #[error("{what} names no tensor: {reference:#x}")]
    Tensor {
        /// Which reference.
        what: &'static str,
        /// Its value.
        reference: u64,
    },
    /// A tensor has another shape than the task needs.
    #[error("{what} is `{tensor}`, whose shape {shape:?} does not suit it")]
    Shape {
        /// Which reference.
        what: &'static str,
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
    },
    /// Rows reach past the end of a tensor, or do not begin at a row.
    #[error("{what} needs {rows} rows from byte {byte} of `{tensor}`, which has {tensor_rows}")]
    Rows {
        /// Which reference.
        what: &'static str,
        /// The tensor.
        tensor: String,
        /// Offset of the first row in bytes.
        byte: u64,
        /// Rows wanted.
        rows: u64,
        /// Rows of the tensor.
        tensor_rows: u64,
    },
}
