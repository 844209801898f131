//! Events: monotonic arrival counters.
//!
//! An event of a program is signalled a fixed number of times in each step. Nothing is ever reset:
//! the wait target of step `epoch` is `arrivals_per_step * epoch`, in arithmetic modulo 2^32. Epochs
//! count from 1, so a counter that nobody has touched is "before the first step".

/// Index of an event in a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct EventId(pub u32);

impl EventId {
    /// No event: a task with it waits for nothing or signals nobody.
    pub const NONE: EventId = EventId(u32::MAX);

    /// Whether this names an event.
    #[inline]
    pub const fn is_some(self) -> bool {
        self.0 != u32::MAX
    }
}

/// Bytes from one event counter to the next: a cache line each, so that waiters of one event do not
/// slow down signals to another.
pub const EVENT_STRIDE_BYTES: u64 = 64;

/// Counter value at which an event is complete for the step `epoch`.
#[inline]
pub const fn target(arrivals_per_step: u32, epoch: u32) -> u32 {
    arrivals_per_step.wrapping_mul(epoch)
}

/// Whether a counter that shows `seen` has reached `target`.
///
/// Bounds: counters and targets are never 2^31 or more apart, since a step is only begun when the
/// previous one is complete and has far fewer arrivals than that.
#[inline]
pub const fn is_reached(seen: u32, target: u32) -> bool {
    seen.wrapping_sub(target) as i32 >= 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_survive_the_wrap() {
        for epoch in [1u32, 2, 1 << 20, u32::MAX - 1, u32::MAX, 0, 1] {
            for arrivals in [1u32, 3, 97, 5000] {
                let now = target(arrivals, epoch);
                assert!(is_reached(now, now));
                assert!(is_reached(now.wrapping_add(1), now));
                assert!(!is_reached(now.wrapping_sub(1), now));
                assert_eq!(target(arrivals, epoch.wrapping_add(1)), now.wrapping_add(arrivals));
            }
        }
    }
}
