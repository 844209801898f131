//! What a check reports.

use std::fmt;

/// The kind of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FindingKind {
    /// An access outside every allocation.
    OutOfBounds,
    /// An address that is not a multiple of the access's size.
    Misaligned,
    /// A read of memory that nobody wrote.
    UninitialisedMemory,
    /// A read of a register that nothing wrote.
    UninitialisedRegister,
    /// Two accesses, at least one a write, that nothing orders.
    DataRace,
    /// A plain write and an asynchronous copy without `fence.proxy.async` between them.
    ProxyRace,
    /// A barrier that some threads never reach, or reach in a wrong way.
    Barrier,
    /// Wrong use of an `mbarrier`.
    Mbarrier,
    /// A warp-wide instruction whose member mask does not fit the threads that execute it.
    WarpSync,
    /// Threads that wait without anything happening.
    NoProgress,
    /// The step limit was reached with blocks still running.
    StillRunning,
    /// `trap` or a failed assertion.
    Trap,
    /// A write to constant memory or parameters, or another operation that memory forbids.
    BadAccess,
}

/// One finding. Equal kinds at the same instruction are reported once and counted.
#[derive(Clone, Debug)]
pub struct Finding {
    /// What is wrong.
    pub kind: FindingKind,
    /// The same in words, with the other party of a race.
    pub message: String,
    /// Line of the PTX text.
    pub line: u32,
    /// The source place that a `.loc` gives, as `file:line`.
    pub source: Option<String>,
    /// The function that holds the instruction.
    pub function: String,
    /// Name of the device.
    pub device: String,
    /// Number of the launch.
    pub launch: u32,
    /// Block in the grid.
    pub block: u32,
    /// Warp in the block.
    pub warp: u32,
    /// The first lane concerned.
    pub lane: u32,
    /// The address concerned, as allocation and offset.
    pub place: Option<String>,
    /// What the annotator says about the block at that moment.
    pub note: Option<String>,
    /// How often it happened.
    pub count: u64,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at line {}", self.kind, self.line)?;
        if let Some(source) = &self.source {
            write!(f, " ({source})")?;
        }
        write!(f, " in {}: {}", self.function, self.message)?;
        if let Some(place) = &self.place {
            write!(f, " [{place}]")?;
        }
        let Finding { device, block, warp, lane, .. } = self;
        write!(f, "; {device} block {block} warp {warp} lane {lane}")?;
        if let Some(note) = &self.note {
            write!(f, "; {note}")?;
        }
        if self.count > 1 {
            write!(f, "; {} times", self.count)?;
        }
        Ok(())
    }
}
