//! How long a host that may not spin sleeps between looks at the mailbox.
//!
//! Its thread takes the core of a worker, where there is one for each core: some 20 us of a worker's time for each
//! look. So it looks when it expects something, and else so seldom that what comes waits little beside the
//! time that the request has taken.

use std::time::{Duration, Instant};

/// The shortest sleep.
const SLEEP_MIN: Duration = Duration::from_micros(100);
/// What comes waits at most a sleep of this part of the request's time so far,
const DELAY_PART: u32 = 32;
/// and at most this, if it does not come before it is expected.
const DELAY_MAX: Duration = Duration::from_millis(1);
/// The longest sleep: the caller is asked after each whether it wants to go on.
const SLEEP_MAX: Duration = Duration::from_millis(10);

/// When outputs came.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    begun: Instant,
    last: Instant,
    /// Between the last two looks that found something new.
    interval: Duration,
}

impl Pace {
    /// That of a request which begins now.
    pub(super) fn new() -> Pace {
        let now = Instant::now();
        Pace { begun: now, last: now, interval: Duration::ZERO }
    }

    /// Notes that a look has found something, and that the look before had not.
    pub(super) fn note_news(&mut self) {
        let now = Instant::now();
        // How long the first takes says nothing about the second: it came after the prompt.
        let is_first = self.last == self.begun;
        self.interval = if is_first { Duration::ZERO } else { now - self.last };
        self.last = now;
    }

    /// How long to sleep before the next look.
    pub(super) fn sleep(&self) -> Duration {
        sleep_for(self.begun.elapsed(), self.last.elapsed(), self.interval)
    }
}

/// See `Pace::sleep`: for a request of this age, whose last news is `waited` old.
fn sleep_for(age: Duration, waited: Duration, interval: Duration) -> Duration {
    let delay = (age / DELAY_PART).clamp(SLEEP_MIN, DELAY_MAX);
    interval.saturating_sub(waited + delay).clamp(delay, SLEEP_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks at a request whose outputs come every `interval_us`, and the longest that one waits for a look.
    fn follow(interval_us: u64, count: u64) -> (u32, Duration) {
        let interval = Duration::from_micros(interval_us);
        let (mut now, mut last, mut seen_interval) =
            (Duration::ZERO, Duration::ZERO, Duration::ZERO);
        let (mut seen, mut looks, mut longest) = (0, 0, Duration::ZERO);
        while seen < count {
            now += sleep_for(now, now - last, seen_interval);
            looks += 1;
            let there = (now.as_micros() as u64 / interval_us).min(count);
            if there > seen {
                longest = longest.max(now - interval * (seen + 1) as u32);
                seen_interval = if seen == 0 { Duration::ZERO } else { now - last };
                (seen, last) = (there, now);
            }
        }
        (looks, longest)
    }

    #[test]
    fn slow_outputs_are_looked_for_when_they_are_due() {
        for interval_us in [5_000, 20_000, 300_000] {
            let (looks, longest) = follow(interval_us, 100);
            let asleep = (interval_us * 100).div_ceil(SLEEP_MAX.as_micros() as u64) as u32;
            assert!(looks < 4 * 100 + asleep + 400, "{interval_us} us: {looks} looks");
            assert!(longest <= DELAY_MAX, "{interval_us} us: {longest:?}");
        }
    }

    #[test]
    fn what_comes_waits_a_small_part_of_the_request() {
        // 64 tokens of 50 us: the last is seen within a part of 3.2 ms.
        let (looks, longest) = follow(50, 64);
        assert!(longest <= SLEEP_MIN + Duration::from_micros(50), "{longest:?}");
        assert!(looks <= 33, "{looks}");
        let (looks, longest) = follow(50, 6400);
        assert!(longest <= DELAY_MAX, "{longest:?}");
        assert!(looks < 450, "{looks}");
    }
}
