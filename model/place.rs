//! Placement: which worker's queue a task goes to.
//!
//! Workers stream weights ahead of the stage that needs them, so what counts is the bytes of a
//! worker over the whole step; but a stage ends with its slowest worker, so each stage is even too.
//! Every stage is cut into runs of neighbouring tasks, one for each worker, as equal in number as
//! can be, and the runs with more bytes go to the workers that have had less so far.

/// One stage: the costs of its tasks in bytes, in the order of the program.
pub(crate) type StageCosts = Vec<u64>;

/// The worker of each task, stage after stage; `first_load` bytes are worker 0's already.
///
/// Shapes:  result `[tasks of all stages]`, each below `worker_count`.
/// Bounds:  `worker_count >= 1`.
/// Cost:    sorts the workers once for each stage.
pub(crate) fn place(stages: &[StageCosts], worker_count: u32, first_load: u64) -> Vec<u32> {
    let mut loads = vec![0u64; worker_count as usize];
    loads[0] = first_load;
    let mut homes = Vec::with_capacity(stages.iter().map(Vec::len).sum());
    let mut workers: Vec<u32> = (0..worker_count).collect();
    for costs in stages {
        let mut runs = runs(costs, worker_count);
        // Stable sorts: where all is equal, run `i` goes to worker `i`.
        runs.sort_by_key(|run| std::cmp::Reverse(run.bytes));
        workers.sort_unstable_by_key(|worker| (loads[*worker as usize], *worker));
        let first = homes.len();
        homes.resize(first + costs.len(), 0);
        for (run, worker) in runs.iter().zip(&workers) {
            homes[first + run.first..first + run.end].fill(*worker);
            loads[*worker as usize] += run.bytes;
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

    fn loads(stages: &[StageCosts], homes: &[u32], worker_count: u32) -> Vec<u64> {
        let mut loads = vec![0; worker_count as usize];
        for (cost, home) in stages.iter().flatten().zip(homes) {
            loads[*home as usize] += cost;
        }
        loads
    }

    #[test]
    fn equal_stages_are_dealt_in_order() {
        assert_eq!(place(&[vec![5; 4], vec![3; 6]], 2, 0), [0, 0, 1, 1, 0, 0, 0, 1, 1, 1]);
    }

    #[test]
    fn remainders_go_round() {
        // 5 tasks for 4 workers: in 4 stages each worker has one task more once.
        let stages = vec![vec![7; 5]; 4];
        assert_eq!(loads(&stages, &place(&stages, 4, 0), 4), [35; 4]);
        // Stages smaller than the workers: 3 tasks for 5 workers.
        let stages = vec![vec![2; 3]; 5];
        assert_eq!(loads(&stages, &place(&stages, 5, 0), 5), [6; 5]);
    }

    #[test]
    fn every_stage_is_even() {
        let homes = place(&[vec![1; 137]], 132, 0);
        for worker in 0..132 {
            let count = homes.iter().filter(|home| **home == worker).count();
            assert!((1..=2).contains(&count), "worker {worker} has {count}");
        }
        assert_eq!(place(&[vec![], vec![1]], 3, 0), [0]);
        assert_eq!(place(&[vec![1]], 3, 9), [1]);
    }
}
