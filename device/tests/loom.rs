//! Every interleaving, and every value that the memory model lets a load see, of the queue, the
//! event and the mailbox. Run with
//! `RUSTFLAGS="--cfg loom" cargo test -p tilert-mk-device --release --test loom`.
//!
//! Plain data is in cells that report any access that no edge orders. Each protocol is also run with
//! an edge taken away, and then the checker must object: that shows that it can.

#![cfg(loom)]

use std::sync::Mutex;

use loom::cell::UnsafeCell;
use loom::model::Builder;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use loom::thread;
use tilert_mk_device::machine::{CursorCounter, EventCounter, HostCounter};
use tilert_mk_device::{event, queue, takeover};
use tilert_mk_shared::event::{is_reached, target};
use tilert_mk_shared::queue::Cursor;

/// Preemptions in one execution of the larger models. Two suffice for almost every known bug of
/// concurrent code (Musuvathi and Qadeer, PLDI 2007); one more is affordable.
const PREEMPTION_COUNT_MAX: usize = 3;

fn check_bounded(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(PREEMPTION_COUNT_MAX);
    builder.check(model);
}

/// Memory that is no counter.
struct Plain(UnsafeCell<u32>);

impl Plain {
    fn new() -> Plain {
        Plain(UnsafeCell::new(0))
    }

    fn read(&self) -> u32 {
        // SAFETY: the checker fails the test before an access that races with a write.
        self.0.with(|value| unsafe { *value })
    }

    fn write(&self, new: u32) {
        // SAFETY: the checker fails the test before a write that races with any access.
        self.0.with_mut(|value| unsafe { *value = new });
    }
}

// SAFETY: the checker reports accesses that are not ordered.
unsafe impl Send for Plain {}
// SAFETY: as above.
unsafe impl Sync for Plain {}

/// A counter that is signalled and polled.
trait Event: Send + Sync + 'static {
    fn new() -> Self;
    fn signal(&self);
    fn poll(&self, goal: u32) -> bool;

    fn wait(&self, goal: u32) {
        while !self.poll(goal) {
            thread::yield_now();
        }
    }
}

/// `device/event.rs`.
impl Event for EventCounter {
    fn new() -> Self {
        EventCounter::new(0)
    }

    fn signal(&self) {
        event::signal(self);
    }

    fn poll(&self, goal: u32) -> bool {
        event::poll(self, goal)
    }
}

/// A copy whose signal does not release.
struct RelaxedSignal(AtomicU32);

impl Event for RelaxedSignal {
    fn new() -> Self {
        RelaxedSignal(AtomicU32::new(0))
    }

    fn signal(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn poll(&self, goal: u32) -> bool {
        let is_complete = is_reached(self.0.load(Ordering::Relaxed), goal);
        if is_complete {
            fence(Ordering::Acquire);
        }
        is_complete
    }
}

/// A copy whose poll does not acquire.
struct RelaxedPoll(AtomicU32);

impl Event for RelaxedPoll {
    fn new() -> Self {
        RelaxedPoll(AtomicU32::new(0))
    }

    fn signal(&self) {
        self.0.fetch_add(1, Ordering::Release);
    }

    fn poll(&self, goal: u32) -> bool {
        is_reached(self.0.load(Ordering::Relaxed), goal)
    }
}

/// `signaller_count` tasks write and signal; another waits for all and reads.
fn fan_in<E: Event>(signaller_count: u32) {
    check_bounded(move || {
        let cells: Vec<_> = (0..signaller_count).map(|_| Plain::new()).collect();
        let shared = Arc::new((E::new(), cells));
        for idx in 0..signaller_count {
            let shared = shared.clone();
            thread::spawn(move || {
                shared.1[idx as usize].write(idx + 1);
                shared.0.signal();
            });
        }
        shared.0.wait(target(signaller_count, 1));
        for (idx, cell) in (0..signaller_count).zip(&shared.1) {
            assert_eq!(cell.read(), idx + 1);
        }
    });
}

#[test]
fn a_signal_publishes_plain_data() {
    fan_in::<EventCounter>(1);
}

#[test]
fn a_complete_event_publishes_what_each_of_its_signallers_wrote() {
    fan_in::<EventCounter>(2);
    fan_in::<EventCounter>(3);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_signal_that_does_not_release_is_caught() {
    fan_in::<RelaxedSignal>(2);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_poll_that_does_not_acquire_is_caught() {
    fan_in::<RelaxedPoll>(2);
}

/// A maker fills a cell that a taker reads, and again in the next steps: the same counters, never
/// reset, order the reads of one step before the writes of the next.
fn steps<E: Event>() {
    const STEP_COUNT: u32 = 3;
    check_bounded(|| {
        let shared = Arc::new((E::new(), E::new(), Plain::new()));
        let maker = shared.clone();
        thread::spawn(move || {
            let (made, taken, cell) = &*maker;
            for epoch in 1..=STEP_COUNT {
                taken.wait(target(1, epoch - 1));
                cell.write(epoch);
                made.signal();
            }
        });
        let (made, taken, cell) = &*shared;
        for epoch in 1..=STEP_COUNT {
            made.wait(target(1, epoch));
            assert_eq!(cell.read(), epoch);
            taken.signal();
        }
    });
}

#[test]
fn events_order_the_next_step_without_a_reset() {
    steps::<EventCounter>();
}

#[test]
#[should_panic(expected = "Causality violation")]
fn reuse_after_a_relaxed_signal_is_caught() {
    steps::<RelaxedSignal>();
}

/// A cursor that is looked at and taken.
trait Claims: Send + Sync + 'static {
    fn new() -> Self;
    fn peek(&self) -> Cursor;
    fn claim(&self, seen: Cursor, count: u32) -> bool;
}

/// `device/queue.rs`.
impl Claims for CursorCounter {
    fn new() -> Self {
        CursorCounter::new(Cursor::START.pack())
    }

    fn peek(&self) -> Cursor {
        queue::peek(self)
    }

    fn claim(&self, seen: Cursor, count: u32) -> bool {
        queue::claim(self, seen, count)
    }
}

/// A copy that looks and stores instead of comparing and swapping.
struct TornClaim(AtomicU64);

impl Claims for TornClaim {
    fn new() -> Self {
        TornClaim(AtomicU64::new(Cursor::START.pack()))
    }

    fn peek(&self) -> Cursor {
        Cursor::unpack(self.0.load(Ordering::Relaxed))
    }

    fn claim(&self, seen: Cursor, count: u32) -> bool {
        let is_mine = self.peek() == seen;
        if is_mine {
            self.0.store(seen.next(count).pack(), Ordering::Relaxed);
        }
        is_mine
    }
}

/// Workers claim from one queue of `count` entries for some steps.
fn claim_all<C: Claims>(worker_count: u32, count: u32, step_count: u32) {
    check_bounded(move || {
        let cursor = Arc::new(C::new());
        let claimed = Arc::new(Mutex::new(Vec::new()));
        let work = move |cursor: Arc<C>, claimed: Arc<Mutex<Vec<(u32, u32)>>>| {
            let mut last = (0, 0);
            loop {
                let seen = cursor.peek();
                if seen.epoch > step_count {
                    return;
                }
                if cursor.claim(seen, count) {
                    let mine = (seen.epoch, seen.position);
                    assert!(last < mine, "a worker claims in the order of the queue");
                    last = mine;
                    claimed.lock().unwrap().push(mine);
                }
            }
        };
        let others: Vec<_> = (1..worker_count)
            .map(|_| {
                let (cursor, claimed) = (cursor.clone(), claimed.clone());
                thread::spawn(move || work(cursor, claimed))
            })
            .collect();
        work(cursor, claimed.clone());
        for other in others {
            other.join().unwrap();
        }
        let mut claimed = claimed.lock().unwrap().clone();
        claimed.sort_unstable();
        let all = (1..=step_count).flat_map(|epoch| (0..count).map(move |at| (epoch, at)));
        assert_eq!(claimed, all.collect::<Vec<_>>(), "each entry of each step once");
    });
}

#[test]
fn two_workers_claim_each_task_of_each_step_once() {
    claim_all::<CursorCounter>(2, 2, 2);
}

#[test]
fn three_workers_claim_each_task_once() {
    claim_all::<CursorCounter>(3, 2, 1);
    claim_all::<CursorCounter>(3, 1, 2);
}

#[test]
#[should_panic(expected = "each entry of each step once")]
fn a_claim_that_is_not_atomic_is_caught() {
    claim_all::<TornClaim>(2, 2, 1);
}

/// A way to commit a task once.
trait Commits: Send + Sync + 'static {
    fn new() -> Self;
    fn commit(&self, epoch: u32) -> bool;
}

/// `device/takeover.rs`.
impl Commits for CursorCounter {
    fn new() -> Self {
        CursorCounter::new(0)
    }

    fn commit(&self, epoch: u32) -> bool {
        takeover::commit(self, epoch)
    }
}

/// Looks, then stores.
struct TornCommit(AtomicU64);

impl Commits for TornCommit {
    fn new() -> Self {
        TornCommit(AtomicU64::new(0))
    }

    fn commit(&self, epoch: u32) -> bool {
        let is_mine = self.0.load(Ordering::Relaxed) < u64::from(epoch);
        if is_mine {
            self.0.store(epoch.into(), Ordering::Relaxed);
        }
        is_mine
    }
}

/// Two workers run the same task of two steps; one of them also begins each step and reads its
/// result. The output is plain memory: the checker objects if both store.
fn take_over<C: Commits>() {
    check_bounded(|| {
        let [begin, done] = [0; 2].map(EventCounter::new);
        let shared = Arc::new((C::new(), Plain::new(), begin, done));
        let run = |(commits, out, begin, done): &(C, Plain, EventCounter, EventCounter), epoch| {
            begin.wait(target(1, epoch));
            if commits.commit(epoch) {
                out.write(out.read() + epoch);
                event::signal(done);
            }
        };
        let other = {
            let shared = shared.clone();
            thread::spawn(move || (1..=2).for_each(|epoch| run(&shared, epoch)))
        };
        let (_, out, begin, done) = &*shared;
        for (epoch, sum) in [(1, 1), (2, 3)] {
            event::signal(begin);
            run(&shared, epoch);
            done.wait(target(1, epoch));
            assert_eq!(out.read(), sum, "the task's results are added once");
        }
        other.join().unwrap();
        assert_eq!(done.load_relaxed(), 2, "each step is signalled once");
    });
}

#[test]
fn a_task_that_two_workers_run_is_committed_by_one() {
    take_over::<CursorCounter>();
}

#[test]
#[should_panic]
fn a_commit_that_is_not_atomic_is_caught() {
    take_over::<TornCommit>();
}

/// Two workers share a queue whose three tasks are a chain that ends where it begins: one writes,
/// one changes what it reads, one reads and lets the next step begin.
#[test]
fn workers_that_share_a_queue_run_a_chain_of_tasks_over_two_steps() {
    const STEP_COUNT: u32 = 2;
    check_bounded(|| {
        let events: [EventCounter; 3] = std::array::from_fn(|_| EventCounter::new(0));
        let shared = Arc::new((<CursorCounter as Claims>::new(), events, Plain::new()));
        let work = |shared: Arc<(CursorCounter, [EventCounter; 3], Plain)>| {
            let (cursor, [end, begun, changed], cell) = &*shared;
            loop {
                let seen = queue::peek(cursor);
                if seen.epoch > STEP_COUNT {
                    return;
                }
                if !queue::claim(cursor, seen, 3) {
                    continue;
                }
                let epoch = seen.epoch;
                match seen.position {
                    0 => {
                        end.wait(target(1, epoch - 1));
                        cell.write(epoch * 10);
                        event::signal(begun);
                    }
                    1 => {
                        begun.wait(target(1, epoch));
                        cell.write(cell.read() + 1);
                        event::signal(changed);
                    }
                    _ => {
                        changed.wait(target(1, epoch));
                        assert_eq!(cell.read(), epoch * 10 + 1);
                        event::signal(end);
                    }
                }
            }
        };
        let other = shared.clone();
        let other = thread::spawn(move || work(other));
        work(shared);
        other.join().unwrap();
    });
}

/// A word of the mailbox.
trait Word: Send + Sync + 'static {
    fn new() -> Self;
    fn load_own(&self) -> u32;
    fn load(&self) -> u32;
    fn store(&self, value: u32);
}

impl Word for HostCounter {
    fn new() -> Self {
        HostCounter::new(0)
    }

    fn load_own(&self) -> u32 {
        self.load_relaxed()
    }

    fn load(&self) -> u32 {
        self.load_acquire()
    }

    fn store(&self, value: u32) {
        self.store_release(value);
    }
}

/// A copy whose store does not release.
struct RelaxedStore(AtomicU32);

impl Word for RelaxedStore {
    fn new() -> Self {
        RelaxedStore(AtomicU32::new(0))
    }

    fn load_own(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }

    fn load(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }

    fn store(&self, value: u32) {
        self.0.store(value, Ordering::Relaxed);
    }
}

/// A copy whose load does not acquire.
struct RelaxedLoad(AtomicU32);

impl Word for RelaxedLoad {
    fn new() -> Self {
        RelaxedLoad(AtomicU32::new(0))
    }

    fn load_own(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }

    fn load(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }

    fn store(&self, value: u32) {
        self.0.store(value, Ordering::Release);
    }
}

/// One ring of the mailbox, with two slots: the words and orders of `shared/mailbox.rs`, as
/// `publish` and `Engine::next_output` use them. Its own type because the mailbox's words are 4
/// bytes of raw memory, which the checker's counters are not.
struct Ring<Tail, Head> {
    tail: Tail,
    head: Head,
    slots: [Plain; 2],
}

impl<Tail: Word, Head: Word> Ring<Tail, Head> {
    fn new() -> Self {
        Ring { tail: Tail::new(), head: Head::new(), slots: [Plain::new(), Plain::new()] }
    }

    fn push(&self, value: u32) {
        let tail = self.tail.load_own();
        while tail.wrapping_sub(self.head.load()) >= 2 {
            thread::yield_now();
        }
        self.slots[tail as usize % 2].write(value);
        self.tail.store(tail.wrapping_add(1));
    }

    fn pop(&self) -> u32 {
        let head = self.head.load_own();
        while self.tail.load() == head {
            thread::yield_now();
        }
        let value = self.slots[head as usize % 2].read();
        self.head.store(head.wrapping_add(1));
        value
    }
}

/// One side writes five records through the two slots, the other reads them.
fn ring<Tail: Word, Head: Word>() {
    const RECORD_COUNT: u32 = 5;
    check_bounded(|| {
        let ring = Arc::new(Ring::<Tail, Head>::new());
        let writer = ring.clone();
        thread::spawn(move || (1..=RECORD_COUNT).for_each(|value| writer.push(value)));
        (1..=RECORD_COUNT).for_each(|value| assert_eq!(ring.pop(), value));
    });
}

#[test]
fn a_ring_hands_over_each_record_and_reuses_its_slots() {
    ring::<HostCounter, HostCounter>();
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_tail_that_does_not_release_is_caught() {
    ring::<RelaxedStore, HostCounter>();
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_tail_that_is_not_acquired_is_caught() {
    ring::<RelaxedLoad, HostCounter>();
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_head_that_does_not_release_is_caught() {
    ring::<HostCounter, RelaxedStore>();
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_head_that_is_not_acquired_is_caught() {
    ring::<HostCounter, RelaxedLoad>();
}

/// The host sends requests and takes answers; the device answers in a row of logits that it fills
/// again only when the host has taken the record about it.
#[test]
fn the_host_and_the_device_share_the_mailbox_and_the_logits() {
    const REQUEST_COUNT: u32 = 3;
    type Words = Ring<HostCounter, HostCounter>;
    check_bounded(|| {
        let shared = Arc::new((Words::new(), Words::new(), Plain::new()));
        let device = shared.clone();
        thread::spawn(move || {
            let (commands, outputs, logits) = &*device;
            for _ in 0..REQUEST_COUNT {
                let command = commands.pop();
                // `has_room`: all rows of logits have been taken.
                while outputs.head.load_acquire() != outputs.tail.load_relaxed() {
                    thread::yield_now();
                }
                logits.write(command * 10);
                outputs.push(command);
            }
        });
        let (commands, outputs, logits) = &*shared;
        commands.push(1);
        for request in 1..=REQUEST_COUNT {
            if request < REQUEST_COUNT {
                commands.push(request + 1);
            }
            // `next_output`, then the row, then `consume`.
            let head = outputs.head.load_relaxed();
            while outputs.tail.load_acquire() == head {
                thread::yield_now();
            }
            assert_eq!(outputs.slots[head as usize % 2].read(), request);
            assert_eq!(logits.read(), request * 10);
            outputs.head.store_release(head.wrapping_add(1));
        }
    });
}

/// The device's clock is there once the host sees `ready`.
#[test]
fn ready_publishes_the_clock() {
    loom::model(|| {
        let shared = Arc::new((HostCounter::new(0), Plain::new()));
        let device = shared.clone();
        thread::spawn(move || {
            device.1.write(7);
            device.0.store_release(1);
        });
        while shared.0.load_acquire() == 0 {
            thread::yield_now();
        }
        assert_eq!(shared.1.read(), 7);
    });
}

/// Of workers that fault at once one writes the record, and whoever sees the stop word sees it whole.
#[test]
fn one_fault_record_is_written_before_the_stop_word() {
    check_bounded(|| {
        let words = [(); 2].map(|()| HostCounter::new(0));
        let shared = Arc::new((words, Plain::new()));
        for worker in 1..=2 {
            let shared = shared.clone();
            thread::spawn(move || {
                let ([claimed, stop], record) = &*shared;
                if claimed.swap_relaxed(1) == 0 {
                    record.write(worker);
                    stop.store_release(2);
                }
            });
        }
        let ([_, stop], record) = &*shared;
        while stop.load_acquire() != 2 {
            thread::yield_now();
        }
        assert!([1, 2].contains(&record.read()));
    });
}
