//! Schedule: the order of each worker's queue.
//!
//! A queue keeps the order of the program, which is what makes waiting safe. There is one queue for
//! each worker, then the shared one, which is empty: idle workers take what is ready from others.

use tilert_mk_shared::queue::QueueSpan;

/// Spans and entries of all queues, from the worker of each task.
///
/// Shapes:  spans `[worker_count + 1]`, entries `[tasks]`.
/// Bounds:  every home is below `worker_count`.
pub(crate) fn queues(homes: &[u32], worker_count: u32) -> (Vec<QueueSpan>, Vec<u32>) {
    let mut spans = vec![QueueSpan::default(); worker_count as usize + 1];
    for home in homes {
        spans[*home as usize].count += 1;
    }
    let mut first = 0;
    for span in &mut spans {
        span.first = first;
        first += span.count;
    }
    let mut next: Vec<u32> = spans.iter().map(|span| span.first).collect();
    let mut entries = vec![0; homes.len()];
    for (task_idx, home) in (0u32..).zip(homes) {
        entries[next[*home as usize] as usize] = task_idx;
        next[*home as usize] += 1;
    }
    (spans, entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_keep_the_order_of_the_program() {
        let (spans, entries) = queues(&[0, 2, 0, 2, 2], 3);
        assert_eq!(entries, [0, 2, 1, 3, 4]);
        let counts: Vec<_> = spans.iter().map(|span| (span.first, span.count)).collect();
        assert_eq!(counts, [(0, 2), (2, 0), (2, 3), (5, 0)]);
    }
}
