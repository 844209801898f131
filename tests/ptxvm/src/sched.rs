//! The seeded scheduler: which warp runs, for how long, and when copies complete.

use crate::core::Core;
use crate::exec::Flow;
use crate::finding::FindingKind;
use crate::race::bits;
use crate::vm::RunState;
use crate::warp::{Parked, Warp};

/// The longest bursts of instructions that one warp gets; each seed takes one of them.
const BURSTS: [usize; 4] = [4, 16, 64, 256];

/// One in so many scheduling decisions completes a copy.
const COPY_ODDS: [usize; 4] = [2, 4, 8, 32];

/// Warps that a report of a hang lists for one place.
const WAITERS_SHOWN: usize = 16;

/// A place where warps wait: launch, pc and how; the first of them; all in words.
struct Waiting {
    key: (u32, u32, Parked),
    first: (u32, u32, u32, u32),
    all: Vec<String>,
}

/// The places where a warp's lanes are: pc, lanes, and why they do not run.
fn waiting_lanes(w: &Warp) -> Vec<(u32, u32, Parked)> {
    let mut places: Vec<(u32, u32, Parked)> = Vec::new();
    for lane in bits(w.alive) {
        let parked = w.parked[lane];
        let running = w.active >> lane & 1 == 1;
        let pc = if running { w.pc } else { w.pcs[lane] };
        // Lanes in a barrier go on behind it.
        let pc = if matches!(parked, Parked::Barrier(_)) { pc - 1 } else { pc };
        match places.iter_mut().find(|p| p.0 == pc && p.2 == parked) {
            Some(place) => place.1 |= 1 << lane,
            None => places.push((pc, 1 << lane, parked)),
        }
    }
    places
}

impl Core {
    /// Runs one warp for a while, or completes a copy. `Some` when `run` should return.
    pub(crate) fn burst(&mut self, end: u64) -> Option<RunState> {
        if self.stuck {
            return Some(RunState::Stuck);
        }
        if !self.dead_launches.is_empty() {
            self.bury();
        }
        if self.launches.iter().all(|l| l.blocks_left == 0) {
            return Some(RunState::Finished);
        }
        if self.steps >= self.config.step_limit {
            self.report_running();
            self.stuck = true;
            return Some(RunState::Stuck);
        }
        if self.steps >= end {
            return Some(RunState::Running);
        }
        if self.steps - self.progress_at.max(self.host_read_at) > self.config.stall_steps {
            self.report_waiting("nothing has changed for a long time");
            self.stuck = true;
            return Some(RunState::Stuck);
        }
        let mood = (self.config.seed % 4) as usize;
        let odds = COPY_ODDS[(self.config.seed / 4 % 4) as usize];
        if !self.copies.is_empty() && (self.ready.is_empty() || self.rng.below(odds) == 0) {
            let choice = self.rng.below(self.copies.len());
            self.complete_copy(choice);
            return None;
        }
        if self.ready.is_empty() {
            self.report_waiting("every thread waits for another");
            self.stuck = true;
            return Some(RunState::Stuck);
        }
        let at = self.pick()?;
        let steps = 1 + self.rng.below(BURSTS[mood]);
        self.run_warp(at, steps);
        None
    }

    /// A ready warp that is awake. When all sleep, time passes or a copy completes.
    fn pick(&mut self) -> Option<usize> {
        let count = self.ready.len();
        let mut start = self.rng.below(count);
        // One warp at a time is slow, so that the others run far ahead of it.
        if self.rng.below(512) == 0 {
            self.slow = self.ready[start];
        }
        if self.ready[start] == self.slow && self.rng.below(16) != 0 {
            start += 1;
        }
        for i in 0..count {
            let at = (start + i) % count;
            let awake = |w: &Warp| w.wake_at <= self.time_ns;
            if self.warps[self.ready[at] as usize].as_deref().is_some_and(awake) {
                return Some(at);
            }
        }
        if !self.copies.is_empty() {
            let choice = self.rng.below(self.copies.len());
            self.complete_copy(choice);
            return None;
        }
        let wake = |&n: &u32| self.warps[n as usize].as_deref().map_or(u64::MAX, |w| w.wake_at);
        if let Some(first) = self.ready.iter().map(wake).min() {
            self.time_ns = self.time_ns.max(first);
        }
        None
    }

    fn run_warp(&mut self, at: usize, steps: usize) {
        let number = self.ready[at];
        let Some(mut w) = self.warps[number as usize].take() else {
            self.ready.swap_remove(at);
            return;
        };
        let code = self.launches[w.launch as usize].code.clone();
        w.free_run = false;
        if w.active == 0 {
            w.regroup();
        }
        if w.diverged() {
            let odds = if w.spun { 2 } else { 16 };
            if self.rng.below(odds) == 0 {
                let choice = self.rng.next() as u32;
                w.rotate(choice);
            }
        }
        w.spun = false;
        let mut flow = if w.active == 0 { Flow::Blocked } else { Flow::On };
        for _ in 0..steps {
            if flow != Flow::On {
                break;
            }
            flow = self.step(&mut w, &code);
            // A new finding is annotated while its block still does what it is about.
            if self.findings.len() > self.noted {
                break;
            }
        }
        w.spun = flow == Flow::Yield;
        let ended = w.alive == 0;
        let block = w.block;
        self.warps[number as usize] = if ended { None } else { Some(w) };
        if (ended || flow == Flow::Blocked)
            && let Some(at) = self.ready.iter().position(|&n| n == number)
        {
            self.ready.swap_remove(at);
        }
        if ended && self.dead_launches.is_empty() {
            self.finish_warp(block);
        }
    }

    /// Ends all blocks of launches that trapped.
    fn bury(&mut self) {
        for launch in std::mem::take(&mut self.dead_launches) {
            for block in 0..self.blocks.len() {
                let b = &mut self.blocks[block];
                if b.launch != launch {
                    continue;
                }
                b.alive.fill(0);
                let (first, count, shared) = (b.first_warp, b.warp_count, b.shared);
                for warp in first..first + count {
                    self.warps[warp as usize] = None;
                    self.ready.retain(|&n| n != warp);
                }
                self.copies.retain(|c| c.block != block as u32);
                self.memory.drop_shared(shared);
            }
            self.launches[launch as usize].blocks_left = 0;
        }
        self.progress();
    }

    /// Says of every waiting warp where it waits: one finding for each place.
    fn report_waiting(&mut self, why: &str) {
        let mut places: Vec<Waiting> = Vec::new();
        for w in self.warps.iter().flatten() {
            for (pc, lanes, parked) in waiting_lanes(w) {
                let block = self.blocks[w.block as usize].index;
                let who = format!("block {block} warp {} lanes {lanes:#x}", w.index);
                let key = (w.launch, pc, parked);
                match places.iter_mut().find(|p| p.key == key) {
                    Some(place) => place.all.push(who),
                    None => {
                        let first = (w.block, w.index, lanes.trailing_zeros(), pc);
                        places.push(Waiting { key, first, all: vec![who] });
                    }
                }
            }
        }
        for Waiting { key: (_, _, parked), first, all } in places {
            let (kind, what) = match parked {
                Parked::Barrier(id) => (FindingKind::Barrier, format!("in barrier {id}")),
                Parked::Warp => (FindingKind::WarpSync, "for other lanes of the warp".into()),
                Parked::No => (FindingKind::NoProgress, "in a loop".into()),
            };
            let shown = all[..all.len().min(WAITERS_SHOWN)].join(", ");
            let more = match all.len().saturating_sub(WAITERS_SHOWN) {
                0 => String::new(),
                n => format!(" and {n} more warps"),
            };
            let owed = match parked {
                Parked::No => self.owed_bytes(first.0),
                _ => String::new(),
            };
            let message = format!("{why}: these wait {what}: {shown}{more}{owed}");
            self.report(kind, first, None, message);
        }
    }

    /// The block's mbarriers that more or fewer bytes have reached than they were told to expect.
    fn owed_bytes(&self, block: u32) -> String {
        let region = &self.memory.regions[self.blocks[block as usize].shared as usize];
        let mut owed: Vec<_> = region.mbarriers.iter().filter(|(_, bar)| bar.tx != 0).collect();
        owed.sort_by_key(|(offset, _)| **offset);
        let owed = owed.iter().map(|(offset, bar)| {
            let place = region.describe(**offset);
            format!("; the mbarrier {place} still expects {} bytes", bar.tx)
        });
        owed.collect()
    }

    /// Reports blocks that have not ended.
    pub(crate) fn report_running(&mut self) {
        for block in 0..self.blocks.len() {
            let b = &self.blocks[block];
            let Some(index) = b.alive.iter().position(|&a| a != 0) else { continue };
            let number = (b.first_warp + index as u32) as usize;
            let pc = self.warps[number].as_deref().map_or(0, |w| {
                if w.active != 0 { w.pc } else { w.pcs[w.alive.trailing_zeros() as usize] }
            });
            let message = format!("block {} has not ended", b.index);
            self.report(
                FindingKind::StillRunning,
                (block as u32, index as u32, 0, pc),
                None,
                message,
            );
        }
    }
}
