//! Trace records: when a worker claimed, staged, started and finished a task.

/// One task as one worker saw it. Times are nanoseconds on the device's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct TraceRecord {
    /// Index of the task in the program.
    pub task_idx: u32,
    /// Step of the task; 0 marks a record that was never written.
    pub epoch: u32,
    /// The task was claimed and the loads of its weights were about to be issued.
    pub claimed_ns: u64,
    /// The loads had been issued; the wait for its input event began.
    pub staged_ns: u64,
    /// The input event was complete; the op began.
    pub started_ns: u64,
    /// The op was done; its output event was about to be signalled.
    pub finished_ns: u64,
    /// Bit 0: the task was taken from another worker's queue.
    pub flags: u64,
}

/// Flag of a task that was taken from another worker's queue.
pub const TRACE_STOLEN: u64 = 1;

const _: () = assert!(size_of::<TraceRecord>() == 48);
