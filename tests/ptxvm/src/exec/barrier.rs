//! Named barriers of a block.

use super::Flow;
use crate::core::{Barrier, Core};
use crate::finding::FindingKind;
use crate::program::{Bar, BoolOp, Code, Op};
use crate::race::bits;
use crate::warp::{Parked, Warp};

impl Core {
    pub(super) fn block_barrier(&mut self, w: &mut Warp, code: &Code, op: &Op, lanes: u32) -> Flow {
        let Op::Bar { kind, id, count, aligned, .. } = op else { return Flow::On };
        if *aligned && lanes != w.alive {
            // All lanes of the warp must come here; they do so together or not at all.
            let here = lanes | w.waiting_at(|pc| pc == w.pc);
            if here != w.alive {
                return self.park_for_warp(w, lanes);
            }
            w.unpark(here);
            w.active = here;
        }
        let lanes = w.active;
        let ids = self.src(w, code, id, lanes);
        let counts = count.map(|c| self.src(w, code, &c, lanes));
        let lane = lanes.trailing_zeros() as usize;
        let id = ids[lane] as usize;
        let count = counts.map(|c| c[lane] as u32);
        if id >= 17 || bits(lanes).any(|l| ids[l] as usize != id) {
            let message = format!("barrier number {id} differs between lanes or is not below 16");
            self.blame(FindingKind::Barrier, w, lane, message);
            w.advance();
            return Flow::On;
        }
        if let Some(n) = count
            && (n == 0 || n % 32 != 0)
        {
            let message = format!("the thread count {n} of barrier {id} is no multiple of 32");
            self.blame(FindingKind::Barrier, w, lane, message);
        }
        let mut hits = 0;
        if let Bar::Red(_, pred, negated) = kind {
            let values = self.src(w, code, pred, lanes);
            hits = bits(lanes).filter(|&l| (values[l] & 1 == 1) != *negated).count() as u32;
        }
        let waits = !matches!(kind, Bar::Arrive);
        let threads = if *aligned { 32 } else { lanes.count_ones() };
        self.join_barrier(w, id, count, (lanes, threads, hits, waits));
        if waits {
            w.park(lanes, Parked::Barrier(id as u8), w.pc + 1);
            w.regroup();
        } else {
            w.advance();
        }
        self.try_open(w.block, id, Some(w));
        if w.active == 0 && !w.regroup() { Flow::Blocked } else { Flow::On }
    }

    fn join_barrier(
        &mut self,
        w: &Warp,
        id: usize,
        count: Option<u32>,
        (lanes, threads, hits, waits): (u32, u32, u32, bool),
    ) {
        let barriers = &mut self.blocks[w.block as usize].barriers;
        if barriers.len() <= id {
            barriers.resize_with(id + 1, Barrier::default);
        }
        let bar = &mut barriers[id];
        let mut problem = None;
        if bar.arrived.is_empty() {
            bar.expected = count;
            bar.pc = w.pc;
        } else if bar.expected != count {
            problem = Some(format!(
                "barrier {id} is waited for with different thread counts: {:?} and {count:?}",
                bar.expected
            ));
        }
        bar.arrived.push((w.index, lanes, waits));
        bar.threads += threads;
        bar.votes.0 += hits;
        bar.votes.1 += lanes.count_ones();
        bar.clocks.push((w.id, lanes));
        let over = count.filter(|&n| bar.threads > n);
        if let Some(n) = over {
            problem = Some(format!("{} threads arrive at barrier {id} of {n}", bar.threads));
        }
        // An arrival without waiting releases what was done before it, not what comes after.
        if self.races.enabled && !waits {
            let (arrived, lanes) = (w.id, lanes);
            let clocks: Vec<_> = bits(lanes).map(|l| self.races.snapshot(arrived, l)).collect();
            let bar = &mut self.blocks[w.block as usize].barriers[id];
            bar.clocks.pop();
            for clock in &clocks {
                bar.early.join(clock);
            }
            self.races.tick(arrived);
        }
        if let Some(message) = problem {
            self.blame(FindingKind::Barrier, w, lanes.trailing_zeros() as usize, message);
        }
    }

    fn full(&self, block: u32, id: usize) -> bool {
        let b = &self.blocks[block as usize];
        let Some(bar) = b.barriers.get(id) else { return false };
        if bar.arrived.is_empty() {
            return false;
        }
        if let Some(n) = bar.expected {
            return bar.threads >= n;
        }
        b.alive.iter().enumerate().all(|(index, &alive)| {
            let mine = bar.arrived.iter().filter(|a| a.0 == index as u32);
            mine.fold(0, |m, a| m | a.1) & alive == alive
        })
    }

    /// Opens a barrier if everybody has come. `running` is the warp that is out of its slot.
    pub(super) fn try_open(&mut self, block: u32, id: usize, mut running: Option<&mut Warp>) {
        if !self.full(block, id) {
            return;
        }
        let b = &mut self.blocks[block as usize];
        let bar = std::mem::take(&mut b.barriers[id]);
        let first_warp = b.first_warp;
        if bar.expected.is_none() && b.exited_early {
            let (index, lanes, _) = bar.arrived[0];
            let message = format!("barrier {id} opens although some threads exited without it");
            self.report(
                FindingKind::Barrier,
                (block, index, lanes.trailing_zeros(), bar.pc),
                None,
                message,
            );
        }
        self.progress();
        if self.races.enabled {
            self.races.barrier(&bar.clocks);
            for &(warp, lanes) in &bar.clocks {
                for lane in bits(lanes) {
                    self.races.thread(warp, lane).clock.join(&bar.early);
                }
            }
        }
        let launch = self.blocks[block as usize].launch;
        let code = self.launches[launch as usize].code.clone();
        for &(index, lanes, waits) in &bar.arrived {
            if !waits {
                continue;
            }
            let number = first_warp + index;
            match &mut running {
                Some(w) if w.index == index => release(w, &code, lanes, &bar),
                _ => {
                    if let Some(w) = &mut self.warps[number as usize] {
                        release(w, &code, lanes, &bar);
                        if w.active == 0 {
                            w.regroup();
                        }
                    }
                    if !self.ready.contains(&number) {
                        self.ready.push(number);
                    }
                }
            }
        }
    }

    /// After threads exited: barriers of the block may be complete without them.
    pub(super) fn recheck_barriers(&mut self, w: &mut Warp) {
        for id in 0..self.blocks[w.block as usize].barriers.len() {
            self.try_open(w.block, id, Some(w));
        }
    }
}

/// Lets the lanes of a warp go on behind the barrier, with the result of a reduction.
fn release(w: &mut Warp, code: &Code, lanes: u32, bar: &Barrier) {
    w.unpark(lanes);
    let Some(lane) = bits(lanes).next() else { return };
    let pc = w.pcs[lane] - 1;
    if let Op::Bar { kind: Bar::Red(logic, ..), d, .. } = &code.insts[pc as usize].op {
        let (hits, voters) = bar.votes;
        let value = match logic {
            None => hits,
            Some(BoolOp::And) => u32::from(hits == voters),
            Some(_) => u32::from(hits > 0),
        };
        w.write(*d, lanes, &[value.into(); 32]);
    }
}
