//! Waiting for and signalling events.
//!
//! Order: a signal is one release increment after the task's stores; a wait polls with relaxed loads
//! and then fences with acquire order, so everything that the signallers stored is visible.

use std::sync::atomic::{AtomicU32, Ordering, fence};
use tilert_mk_shared::event::is_reached;

/// Counts one arrival; publishes what this worker stored before.
#[inline]
pub fn signal(counter: &AtomicU32) {
    counter.fetch_add(1, Ordering::Release);
}

/// Whether the counter has reached `target`; if so, the signallers' stores are visible.
#[inline]
pub fn poll(counter: &AtomicU32, target: u32) -> bool {
    let is_complete = is_reached(counter.load(Ordering::Relaxed), target);
    if is_complete {
        fence(Ordering::Acquire);
    }
    is_complete
}
