//! Checks of accesses to memory that the host uses at the same time.
//!
//! The host's own accesses are not seen. It is taken for a thread outside the device that reads
//! what a strong write announces: so the scope has to be the system, and the plain writes that the
//! announcing lane knows of have to be released first.

use crate::core::Core;
use crate::finding::FindingKind;
use crate::program::Access;
use crate::types::{Order, Scope};
use crate::warp::Warp;

impl Core {
    /// Strong accesses of a narrower scope than the system's do not meet the host's.
    pub(super) fn check_host_scope(
        &mut self,
        w: &Warp,
        acc: &Access,
        place: (u32, u64),
        lanes: u32,
    ) {
        let is_narrow = acc.order != Order::Weak && acc.scope != Scope::Sys;
        if is_narrow && self.memory.regions[place.0 as usize].is_host() {
            let scope = format!("{:?}", acc.scope).to_lowercase();
            let message = format!("a {scope}-scope access to memory that the host uses meanwhile");
            self.report_place(FindingKind::DataRace, w, lanes, place, message);
        }
    }

    /// Keeps a plain write to host memory until it is released. A strong write that releases
    /// nothing must not come after one that the lane knows of.
    pub(super) fn check_host_write(
        &mut self,
        w: &Warp,
        acc: &Access,
        place: (u32, u64),
        lane: usize,
    ) {
        if !self.memory.regions[place.0 as usize].is_host() {
            return;
        }
        if acc.order == Order::Weak {
            let counter = self.races.counters[w.id as usize];
            self.host_writes.insert((w.id, lane), (counter, w.pc));
            return;
        }
        let index = |(warp, lane): (u32, usize)| warp as usize * 32 + lane;
        if let Some(told) = self.races.told_outside((w.id, lane), acc.order.releases()) {
            self.host_writes.retain(|writer, (counter, _)| told.get(index(*writer)) < *counter);
        }
        let known = self.races.snapshot(w.id, lane);
        let late = self.host_writes.iter().filter(|(writer, (counter, _))| {
            let block = self.races.homes[writer.0 as usize].block;
            // The end of a kernel has told the host of everything.
            self.blocks[block as usize].launch == w.launch && known.get(index(**writer)) >= *counter
        });
        // The earliest in the text, so that equal runs say the same.
        if let Some(pc) = late.map(|(_, (_, pc))| *pc).min() {
            let line = self.launches[w.launch as usize].code.insts[pc as usize].line;
            let message = format!(
                "the host may see this write before the one at line {line}, which is not released \
                 to it"
            );
            self.report_place(FindingKind::DataRace, w, 1 << lane, place, message);
        }
    }
}
