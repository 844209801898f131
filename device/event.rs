//! Signalling events and polling for them.
//!
//! Order: a signal releases what its worker stored before, on every lane: the lanes have met at
//! `Machine::sync`, and the leader's release is cumulative. A poll is an acquiring load: when it
//! succeeds, every later read of the worker sees what was stored before the signals that made the
//! counter reach its target. Relaxed polls with one fence after the last were slower on an H100,
//! 1203 us a token instead of 1164: a fence also waits for the thread's own accesses.

use crate::machine::{EventCounter, fence_release};
use tilert_mk_shared::event::is_reached;

/// Adds one arrival. Called by the leader after the worker's lanes have met.
#[inline(always)]
pub fn signal(counter: &EventCounter) {
    counter.add_release(1);
}

/// The same for an event of which each device has a counter: one fence orders all additions. A release for
/// each would wait for the additions before it to reach their devices.
#[inline(always)]
pub fn signal_all<'a>(counters: impl Iterator<Item = &'a EventCounter>) {
    fence_release();
    counters.for_each(announce);
}

/// Adds one arrival in no order with anything else, where values tell by themselves that they are
/// there (`shared/stamp.rs`). Called by one lane.
#[inline(always)]
pub fn announce(counter: &EventCounter) {
    counter.add_relaxed(1);
}

/// Whether the counter has reached `target`, which says nothing about any other memory.
#[inline(always)]
pub fn poll_hint(counter: &EventCounter, target: u32) -> bool {
    is_reached(counter.load_relaxed(), target)
}

/// Whether the counter has reached `target`; if so, what preceded its signals is visible.
#[inline(always)]
pub fn poll(counter: &EventCounter, target: u32) -> bool {
    is_reached(counter.load_acquire(), target)
}
