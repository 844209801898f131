//! Fault records: what a worker leaves behind when it cannot go on.

/// Why a device stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum FaultCode {
    /// No fault.
    None = 0,
    /// A wait inside a step passed its deadline.
    WaitTimeout = 1,
    /// A task record with an opcode or argument that this kernel does not know.
    BadTask = 2,
    /// The program header is of another version.
    BadHeader = 3,
    /// Staged weights did not arrive before the deadline.
    WeightsTimeout = 4,
    /// Stamped values did not arrive before the deadline, though their stage was announced.
    ValuesTimeout = 5,
}

impl FaultCode {
    /// The code stored as `raw`; an unknown value reads as `BadTask`.
    pub const fn from_raw(raw: u32) -> FaultCode {
        match raw {
            0 => FaultCode::None,
            1 => FaultCode::WaitTimeout,
            3 => FaultCode::BadHeader,
            4 => FaultCode::WeightsTimeout,
            5 => FaultCode::ValuesTimeout,
            _ => FaultCode::BadTask,
        }
    }
}

/// The first fault of a device. Written once, by whoever claims `claimed`; read by the host.
///
/// Order: the writer stores all fields, then raises the device's stop word with release order; the
/// host reads the record after it has seen the stop word with acquire order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct FaultRecord {
    /// 0 until a worker owns the record.
    pub claimed: u32,
    /// A `FaultCode`.
    pub code: u32,
    /// Worker that stopped.
    pub worker_idx: u32,
    /// Task it had claimed.
    pub task_idx: u32,
    /// Step of that task.
    pub epoch: u32,
    /// Event it waited for.
    pub event: u32,
    /// Counter value it waited for.
    pub expected: u32,
    /// Counter value it last saw.
    pub observed: u32,
    /// Time of the fault on the device's clock, in nanoseconds.
    pub time_ns: u64,
}

const _: () = assert!(size_of::<FaultRecord>() == 64);
// A worker writes the words from `code` to `observed` one by one.
const _: () = assert!(
    core::mem::offset_of!(FaultRecord, observed) - core::mem::offset_of!(FaultRecord, code) == 24
);
