//! The checks of reads, writes and atomics.

use super::mem::Place;
use crate::core::Core;
use crate::finding::FindingKind;
use crate::program::Access;
use crate::race::{Kind, Record, Strength, Who, bits};
use crate::types::{Order, Scope};
use crate::warp::Warp;

fn strength(acc: &Access) -> Strength {
    match acc.order {
        Order::Weak => Strength::Weak,
        _ => Strength::Strong(acc.scope),
    }
}

fn strong_scope(acc: &Access) -> Option<Scope> {
    (acc.order != Order::Weak).then_some(acc.scope)
}

impl Core {
    /// Initialisation, races and acquisition for the reads of a warp.
    pub(super) fn check_reads(
        &mut self,
        w: &Warp,
        acc: &Access,
        places: &[Option<Place>; 32],
        (size, total): (u32, u32),
        lanes: u32,
    ) {
        // Neighbouring lanes that read the same address count as one access.
        let mut run: Option<(u32, u64, u32)> = None;
        for lane in bits(lanes) {
            match places[lane] {
                Some(Place::Region(region, offset)) => match &mut run {
                    Some((r, o, mask)) if (*r, *o) == (region, offset) => *mask |= 1 << lane,
                    _ => {
                        if let Some(done) = run.replace((region, offset, 1 << lane)) {
                            self.check_read(w, acc, done, (size, total));
                        }
                    }
                },
                Some(Place::Local(index)) if self.config.checks.uninitialised_memory => {
                    let all = w.local_init[index..index + total as usize].iter().all(|&b| b);
                    if !all {
                        let message = "local memory is read that nothing has written".into();
                        self.blame(FindingKind::UninitialisedMemory, w, lane, message);
                    }
                }
                _ => {}
            }
        }
        if let Some(done) = run {
            self.check_read(w, acc, done, (size, total));
        }
    }

    pub(super) fn check_read(
        &mut self,
        w: &Warp,
        acc: &Access,
        (region, offset, lanes): (u32, u64, u32),
        (size, total): (u32, u32),
    ) {
        let r = &self.memory.regions[region as usize];
        if r.is_host() && acc.order != Order::Weak {
            self.host_read_at = self.steps;
        }
        if self.config.checks.uninitialised_memory && !r.is_init(offset, total) {
            self.report_place(
                FindingKind::UninitialisedMemory,
                w,
                lanes,
                (region, offset),
                format!("{total} bytes are read that nothing has written"),
            );
        }
        if !self.races.enabled {
            return;
        }
        let strength = strength(acc);
        let kind = Kind { write: false, strength, bytes: size, asynchronous: false };
        if self.memory.regions[region as usize].is_locked(offset, total.into()) {
            return;
        }
        self.check_race(w, (region, offset, total), lanes, kind);
        self.check_host_scope(w, acc, (region, offset), lanes);
        if acc.nc {
            self.check_coherence(w, (region, offset, total), lanes);
        }
        if let Some(scope) = strong_scope(acc) {
            let var = self.memory.regions[region as usize].sync.get(&offset);
            self.races.observe(var, (w.id, lanes), scope, acc.order.acquires());
        }
    }

    pub(super) fn check_race(
        &mut self,
        w: &Warp,
        (region, offset, total): (u32, u64, u32),
        lanes: u32,
        kind: Kind,
    ) {
        let record = Record::new(w.id, self.races.counters[w.id as usize], lanes, kind, w.pc);
        let who = Who { warp: w.id, lanes, clock: None, own: None };
        let shadow = &mut self.memory.regions[region as usize].shadow;
        let range = (offset, u64::from(total));
        if let Some((other, at, _)) = self.races.access(shadow, range, record, who, None) {
            let message = self.race_message(record, other);
            self.report_place(FindingKind::DataRace, w, lanes, (region, at), message);
        }
    }

    pub(super) fn race_message(&self, new: Record, old: Record) -> String {
        let home = self.races.homes[old.warp as usize];
        let block = &self.blocks[home.block as usize];
        let launch = &self.launches[block.launch as usize];
        let line = launch.code.insts.get(old.pc() as usize).map_or(0, |i| i.line);
        let source = launch.code.source(old.pc()).map_or(String::new(), |s| format!(" ({s})"));
        let device = &self.devices[home.device as usize];
        let who = match home.warp {
            Some(warp) => format!("warp {warp} lane {}", old.lanes.trailing_zeros()),
            None => "copy engine".into(),
        };
        format!(
            "this {} is not ordered after the {} at line {line}{source} by {device} block {} {who}",
            new.describe(),
            old.describe(),
            block.index
        )
    }

    pub(super) fn report_place(
        &mut self,
        kind: FindingKind,
        w: &Warp,
        lanes: u32,
        (region, offset): (u32, u64),
        message: String,
    ) {
        let place = self.memory.regions[region as usize].describe(offset);
        let at = (w.block, w.index, lanes.trailing_zeros(), w.pc);
        self.report(kind, at, Some(place), message);
    }

    pub(super) fn check_write(
        &mut self,
        w: &Warp,
        acc: &Access,
        (region, offset): (u32, u64),
        (size, total): (u32, u32),
        lane: usize,
    ) {
        let r = &mut self.memory.regions[region as usize];
        r.set_init(offset, total.into());
        if !r.mbarriers.is_empty() {
            let hit = (offset & !7..offset + u64::from(total)).step_by(8);
            if let Some(at) = hit.into_iter().find(|at| r.mbarriers.contains_key(at)) {
                let message = "a plain write to a live mbarrier".to_string();
                self.report_place(FindingKind::Mbarrier, w, 1 << lane, (region, at), message);
            }
        }
        if !self.races.enabled {
            return;
        }
        let strength = strength(acc);
        let kind = Kind { write: true, strength, bytes: size, asynchronous: false };
        self.check_race(w, (region, offset, total), 1 << lane, kind);
        self.check_host_scope(w, acc, (region, offset), 1 << lane);
        self.check_host_write(w, acc, (region, offset), lane);
        let r = &mut self.memory.regions[region as usize];
        if acc.order != Order::Weak || !r.sync.is_empty() {
            let how = (strong_scope(acc), acc.order.releases(), false);
            self.races.publish(&mut r.sync, offset, (w.id, lane), how);
        }
    }

    pub(super) fn check_atomic(
        &mut self,
        w: &Warp,
        acc: &Access,
        (region, offset): (u32, u64),
        reads: bool,
        lane: usize,
    ) {
        let size = acc.ty.bytes();
        let r = &self.memory.regions[region as usize];
        if r.is_host() {
            self.host_read_at = self.steps;
        }
        if self.config.checks.uninitialised_memory && !r.is_init(offset, size) {
            let message = format!("an atomic reads {size} bytes that nothing has written");
            let kind = FindingKind::UninitialisedMemory;
            self.report_place(kind, w, 1 << lane, (region, offset), message);
        }
        self.memory.regions[region as usize].set_init(offset, size.into());
        if !self.races.enabled {
            return;
        }
        let strength = Strength::Strong(acc.scope);
        let kind = Kind { write: true, strength, bytes: size, asynchronous: false };
        self.check_race(w, (region, offset, size), 1 << lane, kind);
        self.check_host_scope(w, acc, (region, offset), 1 << lane);
        if reads {
            let var = self.memory.regions[region as usize].sync.get(&offset);
            self.races.observe(var, (w.id, 1 << lane), acc.scope, acc.order.acquires());
        }
    }

    /// `ld.global.nc` may only read what no thread writes while the kernel runs, however ordered.
    fn check_coherence(&mut self, w: &Warp, (region, offset, total): (u32, u64, u32), lanes: u32) {
        let shadow = &self.memory.regions[region as usize].shadow;
        let Some(write) = shadow.write_in(offset, total.into()) else { return };
        let block = &self.blocks[self.races.homes[write.warp as usize].block as usize];
        if block.launch == w.launch {
            let line = self.launches[w.launch as usize].code.insts[write.pc() as usize].line;
            let message = format!("ld.global.nc of memory that this kernel writes, at line {line}");
            self.report_place(FindingKind::BadAccess, w, lanes, (region, offset), message);
        }
    }

    /// Whether a write would hit memory that the host declared read-only; that is reported.
    pub(super) fn refuse_write(
        &mut self,
        w: &Warp,
        (region, offset): (u32, u64),
        bytes: u32,
        lane: usize,
    ) -> bool {
        let locked = self.memory.regions[region as usize].is_locked(offset, bytes.into());
        if locked {
            let message = format!("{bytes} bytes are written to read-only memory");
            self.report_place(FindingKind::BadAccess, w, 1 << lane, (region, offset), message);
        }
        locked
    }
}
