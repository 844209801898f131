//! Data races by the PTX memory model, with vector clocks.
//!
//! Every lane of every warp has a component in a clock. A warp's lanes share one counter, which
//! grows at each release by any of them, so that an access of a whole warp is one record: warp,
//! counter, lanes. Asynchronous copies belong to *agents*, pseudo-warps of their block whose
//! components a thread only gets by waiting for the copy.
//!
//! Shadow memory keeps, for each aligned word, the accesses that are not yet ordered before a
//! later one that covers them (as FastTrack does, with several readers or byte-wise writers).

pub(crate) use crate::clock::Clock;
use crate::shadow::{CELL_MAX, Cell};
pub(crate) use crate::shadow::{Kind, Record, Shadow, Strength};
use crate::types::Scope;
use rustc_hash::FxHashMap;

/// What has been released to an address.
#[derive(Clone, Debug, Default)]
pub(crate) struct SyncVar {
    releases: Vec<Release>,
}

#[derive(Clone, Debug)]
struct Release {
    scope: Scope,
    device: u32,
    block: u32,
    clock: Clock,
}

/// The synchronisation state of one lane.
#[derive(Clone, Debug, Default)]
pub(crate) struct Thread {
    pub(crate) clock: Clock,
    /// What a later relaxed write publishes, because of a fence before it.
    /// Clock and own counter at the fence, and its scope.
    fenced: Option<(Clock, u32, Scope)>,
    /// What a later fence acquires, because of relaxed reads before it.
    pending: Vec<Release>,
    /// What the last `fence.proxy.async` of this thread covers.
    pub(crate) proxied: Clock,
    /// The warp's counter at that fence: own accesses up to it are visible to asynchronous copies.
    pub(crate) proxied_own: u32,
}

/// Where a warp runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Home {
    pub(crate) device: u32,
    pub(crate) block: u32,
    /// Warp number in the block, or `None` for an agent.
    pub(crate) warp: Option<u32>,
}

/// All clocks.
#[derive(Default)]
pub(crate) struct Races {
    pub(crate) enabled: bool,
    pub(crate) homes: Vec<Home>,
    pub(crate) counters: Vec<u32>,
    pub(crate) threads: Vec<Thread>,
}

/// Who makes an access.
#[derive(Clone, Copy)]
pub(crate) struct Who<'a> {
    pub(crate) warp: u32,
    pub(crate) lanes: u32,
    /// The clock of an asynchronous copy: what its issuer knew.
    pub(crate) clock: Option<&'a Clock>,
    /// The issuer of such a copy: warp, lane, and its counter then.
    pub(crate) own: Option<(u32, usize, u32)>,
}

/// The lanes of a mask.
pub(crate) fn bits(mut mask: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        if mask == 0 {
            return None;
        }
        let lane = mask.trailing_zeros() as usize;
        mask &= mask - 1;
        Some(lane)
    })
}

impl Races {
    pub(crate) fn add_warp(&mut self, home: Home, start: &Clock) -> u32 {
        self.homes.push(home);
        self.counters.push(1);
        let thread = Thread { clock: start.clone(), ..Thread::default() };
        self.threads.extend(std::iter::repeat_n(thread, 32));
        self.homes.len() as u32 - 1
    }

    #[inline]
    fn index(warp: u32, lane: usize) -> usize {
        warp as usize * 32 + lane
    }

    pub(crate) fn thread(&mut self, warp: u32, lane: usize) -> &mut Thread {
        &mut self.threads[Self::index(warp, lane)]
    }

    #[inline]
    fn inside(&self, scope: Scope, a: u32, b: u32) -> bool {
        let (a, b) = (&self.homes[a as usize], &self.homes[b as usize]);
        match scope {
            Scope::Cta | Scope::Cluster => a.block == b.block,
            Scope::Gpu => a.device == b.device,
            Scope::Sys => true,
        }
    }

    #[inline]
    fn known(clock: &Clock, record: Record, lanes: u32) -> bool {
        let base = record.warp as usize * 32;
        bits(lanes).all(|lane| clock.get(base + lane) >= record.clock)
    }

    #[inline]
    fn ordered(&self, record: Record, who: Who) -> bool {
        if let Some(clock) = who.clock {
            let mut lanes = record.lanes;
            if let Some((warp, lane, counter)) = who.own
                && record.warp == warp
                && record.clock <= counter
            {
                lanes &= !(1 << lane);
            }
            return Self::known(clock, record, lanes);
        }
        if record.warp == who.warp && record.lanes == who.lanes && who.lanes.is_power_of_two() {
            return true;
        }
        let mut checked: Option<&Clock> = None;
        bits(who.lanes).all(|lane| {
            let clock = &self.threads[Self::index(who.warp, lane)].clock;
            if record.warp == who.warp {
                return Self::known(clock, record, record.lanes & !(1 << lane));
            }
            // Lanes that came through the same barrier share a clock.
            checked.is_some_and(|c| c.same(clock)) || {
                checked = Some(clock);
                Self::known(clock, record, record.lanes)
            }
        })
    }

    /// Both strong, each inside the other's scope, of the same size.
    #[inline]
    fn morally_strong(&self, a: Record, b: Record) -> bool {
        let (Some(x), Some(y)) = (a.scope(), b.scope()) else { return false };
        a.same_size(b) && self.inside(x, a.warp, b.warp) && self.inside(y, a.warp, b.warp)
    }

    /// Whether the writer made `record` visible to asynchronous copies, or their issuer did.
    fn proxied(&self, record: Record, issuer: &Thread) -> bool {
        bits(record.lanes).all(|lane| {
            let index = Self::index(record.warp, lane);
            self.threads[index].proxied_own >= record.clock
                || issuer.proxied.get(index) >= record.clock
        })
    }

    /// Records an access to `[offset, offset + len)` and returns the first conflicting record,
    /// with the offset of its word. `issuer` is given for asynchronous copies: the conflict is
    /// then also one of proxies, which the flag tells.
    pub(crate) fn access(
        &self,
        shadow: &mut Shadow,
        (offset, len): (u64, u64),
        new: Record,
        who: Who,
        issuer: Option<&Thread>,
    ) -> Option<(Record, u64, bool)> {
        let mut conflict = None;
        for word in offset / 4..(offset + len).div_ceil(4) {
            let from = offset.max(word * 4) - word * 4;
            let to = (offset + len).min(word * 4 + 4) - word * 4;
            let bytes = ((1u32 << to) - 1) & !((1 << from) - 1);
            let cell = shadow.cell(word);
            let hit = self.touch(cell, new.with_bytes(bytes), who, issuer);
            if conflict.is_none() {
                conflict = hit.map(|(record, proxy)| (record, word * 4, proxy));
            }
        }
        conflict
    }

    #[inline]
    fn touch(
        &self,
        cell: &mut Cell,
        new: Record,
        who: Who,
        issuer: Option<&Thread>,
    ) -> Option<(Record, bool)> {
        if !new.is_write() {
            return self.touch_read(cell, new, who, issuer);
        }
        let mut conflict = None;
        // True when the new record stands for the old one as well.
        let mut stale = |old: &mut Record| {
            if old.bytes() & new.bytes() == 0 {
                return false;
            }
            conflict = conflict.or_else(|| self.conflict(*old, new, who, issuer));
            new.stands_for(*old)
        };
        if let Some(more) = &mut cell.more {
            more.retain_mut(|r| !stale(r));
        }
        for slot in &mut cell.near {
            if slot.is_some() && stale(slot) {
                *slot = Record::default();
            }
        }
        self.insert(cell, new, who);
        conflict
    }

    /// Whether an old access and a new one, one of them a write, are a race, or (true) one of proxies.
    #[inline]
    fn conflict(
        &self,
        old: Record,
        new: Record,
        who: Who,
        issuer: Option<&Thread>,
    ) -> Option<(Record, bool)> {
        if !self.ordered(old, who) && !self.morally_strong(old, new) {
            return Some((old, false));
        }
        let plain_write = old.is_write() && !old.is_async();
        let unfenced = issuer.is_some_and(|i| plain_write && !self.proxied(old, i));
        unfenced.then_some((old, true))
    }

    /// One pass for reads, which are most accesses: other warps' reads are only passed over.
    fn touch_read(
        &self,
        cell: &mut Cell,
        new: Record,
        who: Who,
        issuer: Option<&Thread>,
    ) -> Option<(Record, bool)> {
        let mut conflict = None;
        let mut placed = false;
        for old in cell.near.iter_mut().chain(cell.more.iter_mut().flat_map(|m| m.iter_mut())) {
            if old.is_write() {
                if conflict.is_none() && old.bytes() & new.bytes() != 0 {
                    conflict = self.conflict(*old, new, who, issuer);
                }
            } else if old.warp == new.warp && old.is_some() {
                if new.repeats(*old) {
                    return None;
                }
                if !placed && old.joins(new) {
                    old.lanes |= new.lanes;
                    placed = true;
                } else if old.lanes & !new.lanes == 0 && new.stands_for(*old) {
                    *old = if placed { Record::default() } else { new };
                    placed = true;
                }
            }
        }
        if !placed {
            self.insert(cell, new, who);
        }
        conflict
    }

    #[inline]
    fn insert(&self, cell: &mut Cell, new: Record, who: Who) {
        for slot in cell.near.iter_mut().chain(cell.more.iter_mut().flat_map(|m| m.iter_mut())) {
            if slot.joins(new) {
                slot.lanes |= new.lanes;
                return;
            }
        }
        if let Some(free) = cell.near.iter_mut().find(|s| !s.is_some()) {
            *free = new;
            return;
        }
        let more = cell.more.get_or_insert_default();
        // Now and then, reads that are ordered before this access make room: what comes after
        // this access comes after them.
        if more.len() >= 16 && more.len().is_power_of_two() {
            more.retain(|r| {
                let kept = r.is_write() || r.bytes() & !new.bytes() != 0 || !self.ordered(*r, who);
                r.is_some() && kept
            });
        }
        if more.len() >= CELL_MAX {
            more.remove(0);
        }
        more.push(new);
    }

    /// What lane knows now, itself included.
    pub(crate) fn snapshot(&self, warp: u32, lane: usize) -> Clock {
        let index = Self::index(warp, lane);
        let mut clock = self.threads[index].clock.clone();
        clock.raise(index, self.counters[warp as usize]);
        clock
    }

    /// Raises a clock to what a lane knows, itself included.
    pub(crate) fn release_into(&self, clock: &mut Clock, warp: u32, lane: usize) {
        let index = Self::index(warp, lane);
        clock.join(&self.threads[index].clock);
        clock.raise(index, self.counters[warp as usize]);
    }

    /// Starts a new interval of a warp, after one of its lanes released.
    pub(crate) fn tick(&mut self, warp: u32) {
        self.counters[warp as usize] += 1;
    }

    /// A write reached `var`: a plain one ends what was released there, and a fence before a
    /// strong one, or its own order, releases anew.
    pub(crate) fn publish(
        &mut self,
        sync: &mut FxHashMap<u64, SyncVar>,
        at: u64,
        (warp, lane): (u32, usize),
        (scope, releases, rmw): (Option<Scope>, bool, bool),
    ) {
        if !rmw && let Some(var) = sync.get_mut(&at) {
            var.releases.clear();
        }
        let Some(scope) = scope else { return };
        let thread = &self.threads[Self::index(warp, lane)];
        let (fenced, scope) = match &thread.fenced {
            _ if releases => (None, scope),
            Some((clock, own, fence_scope)) => (Some((clock, *own)), scope.min(*fence_scope)),
            None => return,
        };
        let Home { device, block, .. } = self.homes[warp as usize];
        let var = sync.entry(at).or_default();
        let same = |r: &Release| r.scope == scope && r.device == device && r.block == block;
        let at = var.releases.iter().position(same).unwrap_or_else(|| {
            var.releases.push(Release { scope, device, block, clock: Clock::default() });
            var.releases.len() - 1
        });
        let clock = &mut var.releases[at].clock;
        match fenced {
            Some((fenced, own)) => {
                clock.join(fenced);
                clock.raise(Self::index(warp, lane), own);
            }
            None => self.release_into(clock, warp, lane),
        }
        if releases {
            self.tick(warp);
        }
    }

    /// What a strong write of a lane, which `releases` or not, tells those outside its device.
    pub(crate) fn told_outside(&self, (warp, lane): (u32, usize), releases: bool) -> Option<Clock> {
        if releases {
            return Some(self.snapshot(warp, lane));
        }
        let index = Self::index(warp, lane);
        let (clock, own, _) = self.threads[index].fenced.as_ref().filter(|f| f.2 == Scope::Sys)?;
        let mut clock = clock.clone();
        clock.raise(index, *own);
        Some(clock)
    }

    fn matches(&self, release: &Release, warp: u32, scope: Scope) -> bool {
        let home = &self.homes[warp as usize];
        let inside = |s: Scope| match s {
            Scope::Cta | Scope::Cluster => release.block == home.block,
            Scope::Gpu => release.device == home.device,
            Scope::Sys => true,
        };
        inside(release.scope) && inside(scope)
    }

    /// Lanes come to know what a clock holds.
    pub(crate) fn learn(&mut self, warp: u32, lanes: u32, clock: &Clock) {
        // Lanes that shared a clock go on sharing one.
        let mut last: Option<(Clock, Clock)> = None;
        for lane in bits(lanes) {
            let mine = &mut self.threads[Self::index(warp, lane)].clock;
            match &last {
                Some((before, after)) if before.same(mine) => mine.clone_from(after),
                _ => {
                    let before = mine.clone();
                    mine.join(clock);
                    last = Some((before, mine.clone()));
                }
            }
        }
    }

    /// Strong reads of some lanes saw `var`.
    pub(crate) fn observe(
        &mut self,
        var: Option<&SyncVar>,
        (warp, lanes): (u32, u32),
        scope: Scope,
        acquires: bool,
    ) {
        let Some(var) = var else { return };
        for release in &var.releases {
            if !self.matches(release, warp, scope) {
                continue;
            }
            if acquires {
                self.learn(warp, lanes, &release.clock);
            } else {
                for lane in bits(lanes) {
                    self.remember(warp, lane, release);
                }
            }
        }
    }

    /// Keeps a release for a later fence. What that takes over depends on the narrower of two
    /// scopes; the read's is checked already.
    fn remember(&mut self, warp: u32, lane: usize, release: &Release) {
        let thread = &mut self.threads[Self::index(warp, lane)];
        if thread.pending.iter().any(|r| r.clock.same(&release.clock)) {
            return;
        }
        let older = |r: &Release| r.block == release.block && release.clock.covers(&r.clock);
        match thread.pending.iter().position(older) {
            Some(at) => thread.pending[at] = release.clone(),
            None => thread.pending.push(release.clone()),
        }
    }

    /// A fence of one lane. The caller ticks the warp once afterwards.
    pub(crate) fn fence(
        &mut self,
        (warp, lane): (u32, usize),
        (acquire, release): (bool, bool),
        scope: Scope,
    ) {
        let index = Self::index(warp, lane);
        if acquire {
            for pending in std::mem::take(&mut self.threads[index].pending) {
                if self.matches(&pending, warp, scope) {
                    self.threads[index].clock.join(&pending.clock);
                } else {
                    self.threads[index].pending.push(pending);
                }
            }
        }
        if release {
            let clock = self.threads[index].clock.clone();
            self.threads[index].fenced = Some((clock, self.counters[warp as usize], scope));
        }
    }

    /// Everybody listed knows afterwards what each of them knew.
    pub(crate) fn barrier(&mut self, members: &[(u32, u32)]) {
        let mut all = Clock::default();
        let mut seen: Vec<Clock> = Vec::new();
        for &(warp, lanes) in members {
            for lane in bits(lanes) {
                let clock = &self.threads[Self::index(warp, lane)].clock;
                if !seen.iter().rev().take(8).any(|s| s.same(clock)) {
                    seen.push(clock.clone());
                    all.join(clock);
                }
            }
        }
        for &(warp, lanes) in members {
            for lane in bits(lanes).collect::<Vec<_>>().into_iter().rev() {
                all.raise(Self::index(warp, lane), self.counters[warp as usize]);
            }
        }
        for &(warp, lanes) in members {
            for lane in bits(lanes) {
                self.threads[Self::index(warp, lane)].clock = all.clone();
            }
            self.tick(warp);
        }
    }

    /// `fence.proxy.async` of one lane. The caller ticks the warp once afterwards.
    pub(crate) fn proxy_fence(&mut self, warp: u32, lane: usize) {
        let counter = self.counters[warp as usize];
        let thread = self.thread(warp, lane);
        thread.proxied.clone_from(&thread.clock);
        thread.proxied_own = counter;
    }
}
