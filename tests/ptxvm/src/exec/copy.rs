//! Asynchronous copies: `cp.async` and `cp.async.bulk`. An issued copy moves its data when the
//! scheduler lets it, in any order, until somebody waits for it.

use super::Flow;
use super::mem::Place;
use crate::core::Core;
use crate::finding::FindingKind;
use crate::program::{Addr, Code, Op};
use crate::race::{Clock, Kind, Record, Strength, Thread, Who, bits};
use crate::types::Space;
use crate::warp::Warp;

/// A place in a region.
type At = (u32, u64);

/// What one lane copies.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    lane: usize,
    dst: At,
    src: At,
    bytes: u32,
    /// Bytes that come from the source; the rest is zero.
    take: u32,
    group: u32,
    /// What the issuing thread knew, and its own counter.
    known: Thread,
    counter: u32,
}

#[derive(Clone, Debug)]
enum Action {
    Small(Vec<Piece>),
    /// `cp.async.mbarrier.arrive`: lane and barrier.
    Arrive(Vec<(usize, At)>),
    BulkLoad(Piece, At),
    BulkStore(Piece),
}

/// A copy under way.
#[derive(Clone, Debug)]
pub(crate) struct Copy {
    number: u64,
    /// The warp's slot.
    warp: u32,
    warp_id: u32,
    pub(crate) block: u32,
    index: u32,
    pub(crate) pc: u32,
    /// The agent's counter: later copies have higher ones.
    clock: u32,
    action: Action,
}

impl Core {
    pub(super) fn copying(&mut self, w: &mut Warp, code: &Code, op: &Op, lanes: u32) -> Flow {
        match op {
            Op::CpCommit => {
                for lane in bits(lanes) {
                    if let Some(groups) = w.copies.get_mut(lane) {
                        groups.open += 1;
                    }
                }
            }
            Op::BulkCommit => {
                for lane in bits(lanes) {
                    w.bulk_open[lane] += 1;
                }
            }
            Op::CpWait { pending } => {
                if !self.wait_small(w, *pending, lanes) {
                    return Flow::Yield;
                }
            }
            Op::BulkWait { pending } => {
                if !self.wait_bulk(w, *pending, lanes) {
                    return Flow::Yield;
                }
            }
            Op::CpMbarArrive { addr, noinc } => self.arrive_later(w, code, addr, *noinc, lanes),
            Op::CpAsync { .. } => self.issue_small(w, code, op, lanes),
            _ => self.issue_bulk(w, code, op, lanes),
        }
        w.advance();
        Flow::On
    }

    fn issue(&mut self, w: &Warp, action: Action) {
        self.copy_count += 1;
        let block = &self.blocks[w.block as usize];
        let agent = match action {
            Action::BulkLoad(..) | Action::BulkStore(_) => block.bulk_agent,
            _ => block.copy_agents + w.index,
        };
        let clock = self.races.counters[agent as usize];
        self.races.tick(agent);
        self.copies.push(Copy {
            number: self.copy_count,
            warp: block.first_warp + w.index,
            warp_id: w.id,
            block: w.block,
            index: w.index,
            pc: w.pc,
            clock,
            action,
        });
        // What the thread does from here on is not before the copy.
        self.races.tick(w.id);
    }

    /// Finds both ends of one lane's copy.
    fn piece(
        &mut self,
        w: &Warp,
        lane: usize,
        (dst_space, dst): (Space, u64),
        (src_space, src): (Space, u64),
        (bytes, align): (u32, u32),
    ) -> Option<Piece> {
        let dst = self.place(w, lane, dst_space, dst, (bytes, align));
        let src = self.place(w, lane, src_space, src, (bytes, align));
        let (Some(Place::Region(dr, d)), Some(Place::Region(sr, s))) = (dst, src) else {
            return None;
        };
        if self.refuse_write(w, (dr, d), bytes, lane) {
            return None;
        }
        let known = self.races.thread(w.id, lane).clone();
        let counter = self.races.counters[w.id as usize];
        let (dst, src) = ((dr, d), (sr, s));
        Some(Piece { lane, dst, src, bytes, take: bytes, group: 0, known, counter })
    }

    fn issue_small(&mut self, w: &mut Warp, code: &Code, op: &Op, lanes: u32) {
        let Op::CpAsync { dst, src, bytes, take, ignore } = op else { return };
        let dsts = self.addresses(w, code, dst, lanes);
        let srcs = self.addresses(w, code, src, lanes);
        let takes = take.map(|t| self.src(w, code, &t, lanes));
        let skips = ignore.map(|(s, not)| (self.src(w, code, &s, lanes), not));
        let mut pieces = Vec::new();
        for lane in bits(lanes) {
            let mut count = takes.map_or(*bytes, |t| t[lane] as u32);
            if let Some((skip, not)) = &skips
                && (skip[lane] & 1 == 1) != *not
            {
                count = 0;
            }
            if count > *bytes {
                let message = format!("cp.async takes {count} of {bytes} bytes");
                self.blame(FindingKind::BadAccess, w, lane, message);
                count = *bytes;
            }
            let to = (Space::Shared, dsts[lane]);
            // A copy that takes nothing may have any source address.
            let from = if count == 0 { to } else { (Space::Global, srcs[lane]) };
            let Some(mut piece) = self.piece(w, lane, to, from, (*bytes, *bytes)) else { continue };
            piece.take = count;
            let groups = &mut w.copies[lane];
            piece.group = groups.open;
            match groups.left.iter_mut().find(|g| g.0 == groups.open) {
                Some(g) => g.1 += 1,
                None => groups.left.push((groups.open, 1)),
            }
            pieces.push(piece);
        }
        if !pieces.is_empty() {
            self.issue(w, Action::Small(pieces));
        }
    }

    fn arrive_later(&mut self, w: &Warp, code: &Code, addr: &Addr, noinc: bool, lanes: u32) {
        let addrs = self.addresses(w, code, addr, lanes);
        let mut places = Vec::new();
        for lane in bits(lanes) {
            let Some(at) = self.mbarrier_place(w, Space::Shared, addrs[lane], lane) else {
                continue;
            };
            let Some(bar) = self.memory.regions[at.0 as usize].mbarriers.get_mut(&at.1) else {
                let message = "this mbarrier is not initialised".into();
                self.report_place(FindingKind::Mbarrier, w, 1 << lane, at, message);
                continue;
            };
            bar.pending += i64::from(!noinc);
            places.push((lane, at));
        }
        if !places.is_empty() {
            self.issue(w, Action::Arrive(places));
        }
    }

    fn issue_bulk(&mut self, w: &mut Warp, code: &Code, op: &Op, lanes: u32) {
        let (dst, src, bytes, mbar) = match op {
            Op::BulkLoad { dst, src, bytes, mbar } => (dst, src, bytes, Some(mbar)),
            Op::BulkStore { dst, src, bytes } => (dst, src, bytes, None),
            _ => return,
        };
        let dsts = self.addresses(w, code, dst, lanes);
        let srcs = self.addresses(w, code, src, lanes);
        let sizes = self.src(w, code, bytes, lanes);
        let bars = mbar.map(|m| self.addresses(w, code, m, lanes));
        let shared = |a: u64| if a >> 32 == 0 { Space::Shared } else { Space::Generic };
        for lane in bits(lanes) {
            let size = sizes[lane] as u32;
            if size == 0 || !size.is_multiple_of(16) {
                let message = format!("a bulk copy of {size} bytes: not a multiple of 16");
                self.blame(FindingKind::Misaligned, w, lane, message);
                continue;
            }
            let (to, from) = match mbar {
                Some(_) => ((shared(dsts[lane]), dsts[lane]), (Space::Global, srcs[lane])),
                None => ((Space::Global, dsts[lane]), (shared(srcs[lane]), srcs[lane])),
            };
            let Some(mut piece) = self.piece(w, lane, to, from, (size, 16)) else { continue };
            let Some(bars) = bars else {
                piece.group = w.bulk_open[lane];
                self.issue(w, Action::BulkStore(piece));
                continue;
            };
            let space = shared(bars[lane]);
            let Some(at) = self.mbarrier_place(w, space, bars[lane], lane) else { continue };
            if !self.memory.regions[at.0 as usize].mbarriers.contains_key(&at.1) {
                let message = "the copy's mbarrier is not initialised".into();
                self.report_place(FindingKind::Mbarrier, w, 1 << lane, at, message);
                continue;
            }
            self.issue(w, Action::BulkLoad(piece, at));
        }
    }

    /// Whether the awaited groups are done; if so the lanes know what they wrote.
    fn wait_small(&mut self, w: &mut Warp, pending: Option<u32>, lanes: u32) -> bool {
        if w.copies.is_empty() {
            return true;
        }
        let limit = |open: u32| pending.map_or(i64::MAX, |n| i64::from(open) - i64::from(n));
        let ready = bits(lanes).all(|lane| {
            let groups = &w.copies[lane];
            groups.left.iter().all(|g| i64::from(g.0) >= limit(groups.open))
        });
        if !ready {
            return false;
        }
        let agent = self.blocks[w.block as usize].copy_agents + w.index;
        for lane in bits(lanes) {
            let groups = &mut w.copies[lane];
            let bound = limit(groups.open);
            let done = groups.done.iter().filter(|g| i64::from(g.0) < bound).map(|g| g.1).max();
            groups.done.retain(|g| i64::from(g.0) >= bound);
            if let (Some(clock), true) = (done, self.races.enabled) {
                let at = agent as usize * 32 + lane;
                self.races.thread(w.id, lane).clock.raise(at, clock);
            }
        }
        true
    }

    fn wait_bulk(&mut self, w: &mut Warp, pending: u32, lanes: u32) -> bool {
        let limit = |lane: usize| i64::from(w.bulk_open[lane]) - i64::from(pending);
        let waiting = self.copies.iter().any(|c| match &c.action {
            Action::BulkStore(p) => {
                c.warp_id == w.id && lanes >> p.lane & 1 == 1 && i64::from(p.group) < limit(p.lane)
            }
            _ => false,
        });
        if waiting {
            return false;
        }
        for &(lane, group, at, clock) in &w.bulk_done {
            if lanes >> lane & 1 == 1 && i64::from(group) < limit(lane) {
                self.races.thread(w.id, lane).clock.raise(at, clock);
            }
        }
        let open = w.bulk_open;
        w.bulk_done.retain(|d| {
            let limit = i64::from(open[d.0]) - i64::from(pending);
            lanes >> d.0 & 1 == 0 || i64::from(d.1) >= limit
        });
        true
    }

    /// Completes one copy, chosen by number among those that can. False when there is none.
    pub(crate) fn complete_copy(&mut self, choice: usize) -> bool {
        let count = self.copies.len();
        for i in 0..count {
            let at = (choice + i) % count;
            if self.can_complete(at) {
                let copy = self.copies.swap_remove(at);
                self.progress();
                self.complete(&copy);
                return true;
            }
        }
        false
    }

    /// Completes what a block left under way, so that its races are seen too.
    pub(crate) fn drain_copies(&mut self, block: u32) {
        let all = std::mem::take(&mut self.copies);
        let (mut mine, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|c| c.block == block);
        self.copies = others;
        mine.sort_by_key(|c| c.number);
        for copy in &mine {
            self.complete(copy);
        }
    }

    fn can_complete(&self, at: usize) -> bool {
        let copy = &self.copies[at];
        let Action::Arrive(places) = &copy.action else { return true };
        let earlier = |c: &&Copy| c.warp_id == copy.warp_id && c.number < copy.number;
        !self.copies.iter().filter(earlier).any(|c| match &c.action {
            Action::Small(pieces) => {
                pieces.iter().any(|p| places.iter().any(|place| place.0 == p.lane))
            }
            _ => false,
        })
    }

    fn complete(&mut self, copy: &Copy) {
        let block = &self.blocks[copy.block as usize];
        let (bulk_agent, small_agent) = (block.bulk_agent, block.copy_agents + copy.index);
        let clock = copy.clock;
        match &copy.action {
            Action::Small(pieces) => {
                for piece in pieces {
                    self.transfer(copy, piece, (small_agent, piece.lane as u32, clock), false);
                }
                let Some(w) = &mut self.warps[copy.warp as usize] else { return };
                for piece in pieces {
                    let groups = &mut w.copies[piece.lane];
                    match groups.done.iter_mut().find(|g| g.0 == piece.group) {
                        Some(g) => g.1 = g.1.max(clock),
                        None => groups.done.push((piece.group, clock)),
                    }
                    if let Some(g) = groups.left.iter_mut().find(|g| g.0 == piece.group) {
                        g.1 -= 1;
                    }
                    groups.left.retain(|g| g.1 != 0);
                }
            }
            Action::Arrive(places) => {
                for &(lane, at) in places {
                    self.finish_phase(copy, at, lane, |bar| {
                        bar.arriving.raise(small_agent as usize * 32 + lane, clock);
                        bar.arrive(1)
                    });
                }
            }
            Action::BulkLoad(piece, mbar) => {
                let lane = self.agent_lane(copy.block, mbar.1);
                self.transfer(copy, piece, (bulk_agent, lane, clock), true);
                let bytes = piece.bytes;
                self.finish_phase(copy, *mbar, piece.lane, |bar| {
                    bar.arriving.raise(bulk_agent as usize * 32 + lane as usize, clock);
                    bar.complete(bytes)
                });
            }
            Action::BulkStore(piece) => {
                let thread = (u64::from(copy.index) * 32 + piece.lane as u64) | 1 << 40;
                let lane = self.agent_lane(copy.block, thread);
                self.transfer(copy, piece, (bulk_agent, lane, clock), true);
                let at = bulk_agent as usize * 32 + lane as usize;
                if let Some(w) = &mut self.warps[copy.warp as usize] {
                    w.bulk_done.push((piece.lane, piece.group, at, clock));
                }
            }
        }
    }

    /// The component of a block's copy engine that stands for a barrier or storing thread.
    fn agent_lane(&mut self, block: u32, key: u64) -> u32 {
        let lanes = &mut self.blocks[block as usize].agent_lanes;
        let next = lanes.len() as u32 % 32;
        *lanes.entry(key).or_insert(next)
    }

    fn finish_phase(
        &mut self,
        copy: &Copy,
        (region, offset): At,
        lane: usize,
        f: impl FnOnce(&mut crate::mbarrier::Mbarrier) -> Result<bool, String>,
    ) {
        let result = match self.memory.regions[region as usize].mbarriers.get_mut(&offset) {
            Some(bar) => f(bar),
            None => Err("an mbarrier vanished while a copy was to arrive at it".into()),
        };
        if let Err(message) = result {
            let place = self.memory.regions[region as usize].describe(offset);
            let at = (copy.block, copy.index, lane as u32, copy.pc);
            self.report(FindingKind::Mbarrier, at, Some(place), message);
        }
    }

    /// Moves the bytes of one lane, as the agent `(warp, lane, clock)`.
    fn transfer(&mut self, copy: &Copy, piece: &Piece, agent: (u32, u32, u32), proxy: bool) {
        let mut data = vec![0; piece.bytes as usize];
        let taken = &mut data[..piece.take as usize];
        self.memory.regions[piece.src.0 as usize].read(piece.src.1, taken);
        let at = (copy.block, copy.index, piece.lane as u32, copy.pc);
        let source = &self.memory.regions[piece.src.0 as usize];
        if self.config.checks.uninitialised_memory && !source.is_init(piece.src.1, piece.take) {
            let place = source.describe(piece.src.1);
            let message = "an asynchronous copy reads bytes that nothing has written".into();
            self.report(FindingKind::UninitialisedMemory, at, Some(place), message);
        }
        self.memory.regions[piece.dst.0 as usize].write(piece.dst.1, &data);
        if !self.races.enabled {
            return;
        }
        let own = Some((copy.warp_id, piece.lane, piece.counter));
        for (write, (region, offset), len) in
            [(false, piece.src, piece.take), (true, piece.dst, piece.bytes)]
        {
            let locked = self.memory.regions[region as usize].is_locked(offset, len.into());
            if locked {
                // Only the host writes here, and a write by a copy was refused when it was issued.
                continue;
            }
            let strength = Strength::Weak;
            let kind = Kind { write, strength, bytes: 16, asynchronous: proxy };
            let record = Record::new(agent.0, agent.2, 1 << agent.1, kind, copy.pc);
            let clock: Option<&Clock> = Some(&piece.known.clock);
            let who = Who { warp: agent.0, lanes: 1 << agent.1, clock, own };
            let issuer = proxy.then_some(&piece.known);
            let shadow = &mut self.memory.regions[region as usize].shadow;
            let range = (offset, u64::from(len));
            let Some((old, word, of_proxies)) =
                self.races.access(shadow, range, record, who, issuer)
            else {
                continue;
            };
            let place = Some(self.memory.regions[region as usize].describe(word));
            let (kind, mut message) = (FindingKind::DataRace, self.race_message(record, old));
            if of_proxies {
                message = message
                    .replace("is not ordered after", "has no fence.proxy.async between itself and");
                self.report(FindingKind::ProxyRace, at, place, message);
            } else {
                self.report(kind, at, place, message);
            }
        }
    }
}
