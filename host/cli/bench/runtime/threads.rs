//! Two threads that hand something to each other, on cores of their own where there are two.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tilert_mk_device::event;
use tilert_mk_device::machine::EventCounter;
use tilert_mk_device::machine::memory::Span;

use super::samples::Samples;

/// Hand-offs of which a sample is the mean: both ways, this often.
pub(super) const BATCH: u32 = 2 * ROUND_TRIPS;
const ROUND_TRIPS: u32 = 4;
/// Polls after which a thread lets another run: both may have only one core.
const POLLS_PER_YIELD: u32 = 10_000;

/// A counter that shares no cache line, nor the line that is prefetched with its own.
#[repr(align(128))]
struct Padded(EventCounter);

impl Padded {
    fn new() -> Padded {
        Padded(EventCounter::new(0))
    }

    fn wait(&self, goal: u32) {
        let mut polls = 0u32;
        while !event::poll(&self.0, goal) {
            std::hint::spin_loop();
            polls += 1;
            if polls.is_multiple_of(POLLS_PER_YIELD) {
                std::thread::yield_now();
            }
        }
    }
}

/// Times from a signal until the other thread has seen it.
pub(super) fn signal(samples: &mut Samples) {
    hand_over(|| {}, || {}, samples);
}

/// Times from the begin of a copy into the other thread's memory until that thread has seen the
/// signal after it.
pub(super) fn put(byte_count: usize, samples: &mut Samples) {
    let source = vec![1u8; byte_count];
    let mut inboxes = [vec![0u8; byte_count], vec![0u8; byte_count]];
    let addresses = inboxes.each_mut().map(|inbox| inbox.as_mut_ptr().expose_provenance() as u64);
    let put = |inbox: usize| {
        // SAFETY: an inbox, which outlives both threads; only the thread that sends to it touches it
        // until they have ended.
        let inbox: Span<u8> = unsafe { Span::new(addresses[inbox], byte_count) };
        inbox.as_mut_slice().copy_from_slice(&source);
    };
    hand_over(|| put(0), || put(1), samples);
}

/// Sends back and forth until there are enough samples; `send` and `reply` come before the signals.
fn hand_over(send: impl Fn() + Sync, reply: impl Fn() + Sync, samples: &mut Samples) {
    let (ping, pong) = (Padded::new(), Padded::new());
    let is_over = AtomicBool::new(false);
    let cores = core_affinity::get_core_ids().unwrap_or_default();
    let pin = |idx: usize| {
        if let (true, Some(core)) = (cores.len() > 1, cores.get(idx)) {
            // Unpinned threads measure too, if less steadily.
            let _ = core_affinity::set_for_current(*core);
        }
    };
    std::thread::scope(|scope| {
        let (ping, pong, is_over) = (&ping, &pong, &is_over);
        let (pin, send, reply) = (&pin, &send, &reply);
        scope.spawn(move || {
            pin(1);
            for epoch in 1u32.. {
                ping.wait(epoch);
                // Ordered by the signal.
                if is_over.load(Ordering::Relaxed) {
                    return;
                }
                reply();
                event::signal(&pong.0);
            }
        });
        scope.spawn(move || {
            pin(0);
            let mut epoch = 0u32;
            let mut round_trips = || -> Duration {
                let begin = Instant::now();
                for _ in 0..ROUND_TRIPS {
                    epoch += 1;
                    send();
                    event::signal(&ping.0);
                    pong.wait(epoch);
                }
                begin.elapsed()
            };
            // The first may include the other thread's start.
            let _ = round_trips();
            while samples.record(round_trips()) {}
            is_over.store(true, Ordering::Relaxed);
            event::signal(&ping.0);
        });
    });
}

#[cfg(test)]
mod tests {
    use super::super::samples::Limits;
    use super::*;

    #[test]
    fn both_threads_end_with_the_samples() {
        let limits = Limits { samples: 50, time: Duration::from_secs(60) };
        for byte_count in [0, 1, 4096] {
            let mut samples = Samples::new(BATCH, limits).unwrap();
            put(byte_count, &mut samples);
            let row = samples.row("put".into());
            assert_eq!(row.samples, 50);
            assert!(row.p50_ns > 0.0, "{row:?}");
        }
    }
}
