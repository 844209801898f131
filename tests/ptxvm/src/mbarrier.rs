//! The state of an `mbarrier` object. The 64-bit word in memory is opaque, as PTX has it.

use crate::race::Clock;

/// The largest number of arrivals of a phase.
pub(crate) const COUNT_MAX: u32 = (1 << 20) - 1;

/// One object.
#[derive(Clone, Debug)]
pub(crate) struct Mbarrier {
    /// Number of the current phase.
    pub(crate) phase: u64,
    /// Arrivals that each phase expects.
    pub(crate) expected: u32,
    pub(crate) pending: i64,
    /// Bytes still expected in this phase; negative while completions run ahead.
    pub(crate) tx: i64,
    /// What has been released to the barrier so far, and by completed phases.
    pub(crate) arriving: Clock,
    pub(crate) completed: Clock,
}

impl Mbarrier {
    pub(crate) fn new(count: u32) -> Mbarrier {
        Mbarrier {
            phase: 0,
            expected: count,
            pending: count.into(),
            tx: 0,
            arriving: Clock::default(),
            completed: Clock::default(),
        }
    }

    /// Raises the expected bytes of this phase.
    pub(crate) fn expect(&mut self, bytes: u32) -> Result<(), String> {
        self.tx += i64::from(bytes);
        if self.tx > i64::from(COUNT_MAX) {
            return Err(format!("the expected bytes overflow: {} > {COUNT_MAX}", self.tx));
        }
        Ok(())
    }

    /// Counts arrived bytes and says whether the phase ended.
    pub(crate) fn complete(&mut self, bytes: u32) -> Result<bool, String> {
        self.tx -= i64::from(bytes);
        if self.tx < -i64::from(COUNT_MAX) {
            return Err(format!("the arrived bytes underflow: {}", self.tx));
        }
        Ok(self.advance())
    }

    /// Counts arrivals and says whether the phase ended.
    pub(crate) fn arrive(&mut self, count: u32) -> Result<bool, String> {
        if i64::from(count) > self.pending {
            let (phase, pending) = (self.phase, self.pending);
            return Err(format!(
                "{count} arrivals in phase {phase}, which expects only {pending} more"
            ));
        }
        self.pending -= i64::from(count);
        Ok(self.advance())
    }

    fn advance(&mut self) -> bool {
        if self.pending != 0 || self.tx != 0 {
            return false;
        }
        self.phase += 1;
        self.pending = self.expected.into();
        self.completed = self.arriving.clone();
        true
    }
}
