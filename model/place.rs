//! Placement: which worker's queue a task goes to.
//!
//! Workers stream weights ahead of the stage that needs them, so what counts is the bytes of a
//! worker over the whole step; but a stage ends with its slowest worker, so each stage is even too.
//! Every stage is cut into runs of neighbouring tasks, one for each worker, as equal in number as
//! can be, and the runs with more bytes go to the workers that have had less so far. Some stages leave
//! workers alone that attention keeps for itself (`lower/apart.rs`).

/// One stage.
pub(crate) struct Stage {
    /// Costs of its tasks in bytes, in the order of the program.
    pub(crate) costs: Vec<u64>,
    /// The worker of each task that has one already.
    pub(crate) homes: Vec<Option<u32>>,
    /// The others are dealt to the first so many workers.
    pub(crate) worker_count: u32,
}

/// The worker of each task, stage after stage; `first_load` bytes are worker 0's already.
///
/// Shapes:  result `[tasks of all stages]`, each below `worker_count`.
/// Bounds:  `worker_count >= 1`, and that of each stage likewise.
/// Cost:    sorts the workers once for each stage.
pub(crate) fn place(stages: &[Stage], worker_count: u32, first_load: u64) -> Vec<u32> {
    let mut loads = vec![0u64; worker_count as usize];
    loads[0] = first_load;
    let mut homes = Vec::with_capacity(stages.iter().map(|stage| stage.costs.len()).sum());
    for Stage { costs, homes: known, worker_count } in stages {
        let mut workers: Vec<u32> = (0..*worker_count).collect();
        workers.sort_unstable_by_key(|worker| (loads[*worker as usize], *worker));
        let dealt: Vec<usize> = (0..costs.len()).filter(|task| known[*task].is_none()).collect();
        let dealt_costs: Vec<u64> = dealt.iter().map(|task| costs[*task]).collect();
        let mut runs = runs(&dealt_costs, *worker_count);
        // Stable sorts: where all is equal, run `i` goes to worker `i`.
        runs.sort_by_key(|run| std::cmp::Reverse(run.bytes));
        let first = homes.len();
        homes.extend(known.iter().map(|home| home.unwrap_or(0)));
        for (run, worker) in runs.iter().zip(&workers) {
            for task in &dealt[run.first..run.end] {
                homes[first + task] = *worker;
            }
        }
        for (home, cost) in homes[first..].iter().zip(costs) {
            loads[*home as usize] += cost;
        }
    }
    homes
}

/// Neighbouring tasks of a stage that go to the same worker.
struct Run {
    first: usize,
    end: usize,
    bytes: u64,
}

/// Cuts a stage into at most `worker_count` runs, none empty.
fn runs(costs: &[u64], worker_count: u32) -> Vec<Run> {
    let run_count = costs.len().min(worker_count as usize);
    let at = |run: usize| costs.len() * run / run_count.max(1);
    let run = |idx: usize| {
        let (first, end) = (at(idx), at(idx + 1));
        Run { first, end, bytes: costs[first..end].iter().sum() }
    };
    (0..run_count).map(run).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dealt(costs: Vec<u64>, worker_count: u32) -> Stage {
        Stage { homes: vec![None; costs.len()], costs, worker_count }
    }

    fn loads(stages: &[Stage], homes: &[u32], worker_count: u32) -> Vec<u64> {
        let mut loads = vec![0; worker_count as usize];
        for (cost, home) in stages.iter().flat_map(|stage| &stage.costs).zip(homes) {
            loads[*home as usize] += cost;
        }
        loads
    }

    #[test]
    fn equal_stages_are_dealt_in_order() {
        let stages = [dealt(vec![5; 4], 2), dealt(vec![3; 6], 2)];
        assert_eq!(place(&stages, 2, 0), [0, 0, 1, 1, 0, 0, 0, 1, 1, 1]);
    }

    #[test]
    fn remainders_go_round() {
        // 5 tasks for 4 workers: in 4 stages each worker has one task more once.
        let stages = [(); 4].map(|()| dealt(vec![7; 5], 4));
        assert_eq!(loads(&stages, &place(&stages, 4, 0), 4), [35; 4]);
        // Stages smaller than the workers: 3 tasks for 5 workers.
        let stages = [(); 5].map(|()| dealt(vec![2; 3], 5));
        assert_eq!(loads(&stages, &place(&stages, 5, 0), 5), [6; 5]);
    }

    #[test]
    fn every_stage_is_even() {
        let homes = place(&[dealt(vec![1; 137], 132)], 132, 0);
        for worker in 0..132 {
            let count = homes.iter().filter(|home| **home == worker).count();
            assert!((1..=2).contains(&count), "worker {worker} has {count}");
        }
        assert_eq!(place(&[dealt(vec![], 3), dealt(vec![1], 3)], 3, 0), [0]);
        assert_eq!(place(&[dealt(vec![1], 3)], 3, 9), [1]);
    }

    #[test]
    fn first_parts_have_workers_of_their_own() {
        // Two heads of three parts, of which one each is kept apart, on five workers.
        let attention = |own: [Option<u32>; 2]| {
            let homes = vec![own[0], None, None, own[1], None, None];
            let worker_count = if own[0].is_some() { 3 } else { 5 };
            Stage { costs: vec![4; 6], homes, worker_count }
        };
        let stages = |own, others| {
            let before = || dealt(vec![8; 3], others);
            [before(), attention(own), dealt(vec![2; 5], 5), before(), attention(own)]
        };
        let homes = place(&stages([Some(3), Some(4)], 3), 5, 0);
        assert_eq!(homes[..9], [0, 1, 2, 3, 1, 2, 4, 0, 0]);
        let second = &homes[14..];
        assert!(second[..3].iter().all(|home| *home < 3), "{second:?}");
        assert_eq!((second[3], second[6]), (3, 4));
        // With none the same stages are dealt to all.
        let homes = place(&stages([None, None], 5), 5, 0);
        assert_eq!(homes[..3], [0, 1, 2]);
        assert!(homes[3..9].contains(&4));
    }
}
