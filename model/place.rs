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
    /// To whom they go.
    pub(crate) homes: Homes,
}

/// To whom the tasks of a stage go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Homes {
    /// To all workers.
    All,
    /// To those that have none of attention's first parts.
    Others,
    /// This is attention, with `part_count` tasks for each KV head, of which the first ones go to the last
    /// workers, in each layer to the same.
    Attention {
        /// Tasks of a head.
        part_count: u32,
    },
}

/// The worker of each task, stage after stage; `first_load` bytes are worker 0's already. The first
/// `own_parts` of attention's parts, if any, have workers of their own.
///
/// Shapes:  result `[tasks of all stages]`, each below `worker_count`.
/// Bounds:  `worker_count >= 1`; fewer own workers than workers.
/// Cost:    sorts the workers once for each stage.
pub(crate) fn place(
    stages: &[Stage],
    worker_count: u32,
    first_load: u64,
    own_parts: u32,
) -> Vec<u32> {
    let mut loads = vec![0u64; worker_count as usize];
    loads[0] = first_load;
    let mut homes = Vec::with_capacity(stages.iter().map(|stage| stage.costs.len()).sum());
    let own_count = own_count(stages, own_parts);
    for Stage { costs, homes: who } in stages {
        let allowed = if *who == Homes::All { worker_count } else { worker_count - own_count };
        let mut workers: Vec<u32> = (0..allowed).collect();
        workers.sort_unstable_by_key(|worker| (loads[*worker as usize], *worker));
        // Which of its own worker, if it has one, a task is.
        let own = |task: usize| match who {
            Homes::Attention { part_count } if own_parts > 0 => {
                let (head, part) = (task as u32 / part_count, task as u32 % part_count);
                (part < own_parts).then_some(allowed + head * own_parts + part)
            }
            _ => None,
        };
        let dealt: Vec<usize> = (0..costs.len()).filter(|task| own(*task).is_none()).collect();
        let dealt_costs: Vec<u64> = dealt.iter().map(|task| costs[*task]).collect();
        let mut runs = runs(&dealt_costs, allowed);
        // Stable sorts: where all is equal, run `i` goes to worker `i`.
        runs.sort_by_key(|run| std::cmp::Reverse(run.bytes));
        let first = homes.len();
        homes.extend((0..costs.len()).map(|task| own(task).unwrap_or(0)));
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

/// Workers of attention's first parts: as many in each layer.
fn own_count(stages: &[Stage], own_parts: u32) -> u32 {
    let heads = |stage: &Stage| match stage.homes {
        Homes::Attention { part_count } => Some(stage.costs.len() as u32 / part_count),
        _ => None,
    };
    stages.iter().find_map(heads).unwrap_or(0) * own_parts
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

    fn of_all(costs: Vec<u64>) -> Stage {
        Stage { costs, homes: Homes::All }
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
        let stages = [of_all(vec![5; 4]), of_all(vec![3; 6])];
        assert_eq!(place(&stages, 2, 0, 0), [0, 0, 1, 1, 0, 0, 0, 1, 1, 1]);
    }

    #[test]
    fn remainders_go_round() {
        // 5 tasks for 4 workers: in 4 stages each worker has one task more once.
        let stages = [(); 4].map(|()| of_all(vec![7; 5]));
        assert_eq!(loads(&stages, &place(&stages, 4, 0, 0), 4), [35; 4]);
        // Stages smaller than the workers: 3 tasks for 5 workers.
        let stages = [(); 5].map(|()| of_all(vec![2; 3]));
        assert_eq!(loads(&stages, &place(&stages, 5, 0, 0), 5), [6; 5]);
    }

    #[test]
    fn every_stage_is_even() {
        let homes = place(&[of_all(vec![1; 137])], 132, 0, 0);
        for worker in 0..132 {
            let count = homes.iter().filter(|home| **home == worker).count();
            assert!((1..=2).contains(&count), "worker {worker} has {count}");
        }
        assert_eq!(place(&[of_all(vec![]), of_all(vec![1])], 3, 0, 0), [0]);
        assert_eq!(place(&[of_all(vec![1])], 3, 9, 0), [1]);
    }

    #[test]
    fn first_parts_have_workers_of_their_own() {
        // Two heads of three parts, of which one each is kept apart, on five workers.
        let attention = || Stage { costs: vec![4; 6], homes: Homes::Attention { part_count: 3 } };
        let before = || Stage { costs: vec![8; 3], homes: Homes::Others };
        let stages = [before(), attention(), of_all(vec![2; 5]), before(), attention()];
        let homes = place(&stages, 5, 0, 1);
        assert_eq!(homes[..9], [0, 1, 2, 3, 1, 2, 4, 0, 0]);
        let second = &homes[14..];
        assert!(second[..3].iter().all(|home| *home < 3), "{second:?}");
        assert_eq!((second[3], second[6]), (3, 4));
        // With none the same stages are dealt to all.
        assert_eq!(place(&stages, 5, 0, 0)[..3], [0, 1, 2]);
        assert!(place(&stages, 5, 0, 0)[3..9].contains(&4));
    }
}
