//! Signalling events and polling for them.
//!
//! Order: a signal releases what its worker stored before, on every lane: the lanes have met at
//! `Machine::sync`, and the leader's release is cumulative. A poll is relaxed; when it succeeds, one
//! acquire fence follows, and every later read of the worker sees what was stored before the
//! signals that made the counter reach its target.

use crate::machine::{EventCounter, fence_acquire};
use tilert_mk_shared::event::is_reached;

/// Adds one arrival. Called by the leader after the worker's lanes have met.
#[inline(always)]
pub fn signal(counter: &EventCounter) {
    counter.add_release(1);
}

/// Whether the counter has reached `target`; if so, what preceded its signals is visible.
#[inline(always)]
pub fn poll(counter: &EventCounter, target: u32) -> bool {
    if is_reached(counter.load_relaxed(), target) {
        fence_acquire();
        return true;
    }
    false
}
