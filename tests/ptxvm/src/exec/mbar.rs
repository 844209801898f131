//! `mbarrier` instructions.

use super::Flow;
use super::mem::Place;
use crate::core::Core;
use crate::finding::FindingKind;
use crate::mbarrier::{COUNT_MAX, Mbarrier};
use crate::program::{Code, Mbar, Op};
use crate::race::{Kind, Strength, bits};
use crate::types::{Scope, Space};
use crate::warp::{Lanes, Warp};

/// The token of an arrival: the phase above, the pending count below.
const TOKEN_SHIFT: u32 = 21;

impl Core {
    pub(super) fn mbarrier(&mut self, w: &mut Warp, code: &Code, op: &Op, lanes: u32) -> Flow {
        let Op::Mbarrier { op, space, addr, d } = op else { return Flow::On };
        if let Mbar::PendingCount(state) = op {
            let states = self.src(w, code, state, lanes);
            w.write(*d, lanes, &states.map(|s| s & ((1 << TOKEN_SHIFT) - 1)));
            w.advance();
            return Flow::On;
        }
        let addrs = self.addresses(w, code, addr, lanes);
        let (x, tx) = match op {
            Mbar::Init(x) | Mbar::ExpectTx(x) | Mbar::CompleteTx(x) => (Some(x), None),
            Mbar::Arrive { count, tx, .. } => (Some(count), tx.as_ref()),
            Mbar::Test { phase, .. } => (Some(phase), None),
            Mbar::Inval | Mbar::PendingCount(_) => (None, None),
        };
        let x = x.map_or([0; 32], |s| self.src(w, code, s, lanes));
        let tx = tx.map(|s| self.src(w, code, s, lanes));
        let mut out: Lanes = [0; 32];
        let mut failed = false;
        let acquires = matches!(op, Mbar::Test { acquire: true, .. }) && self.races.enabled;
        let (mut learned, mut object) = (0u32, None);
        for lane in bits(lanes) {
            let Some(at) = self.mbarrier_place(w, *space, addrs[lane], lane) else { continue };
            if learned != 0 && object != Some(at) {
                self.learn_phase(w, object, std::mem::take(&mut learned));
            }
            object = Some(at);
            let write = !matches!(op, Mbar::Test { .. });
            let strong = !matches!(op, Mbar::Init(_) | Mbar::Inval);
            self.touch_mbarrier(w, at, (write, strong), lane);
            let result = self.mbarrier_one(w, op, at, (x[lane], tx.map(|t| t[lane])), lane);
            match result {
                Ok(value) => out[lane] = value,
                Err(message) => {
                    self.report_place(FindingKind::Mbarrier, w, 1 << lane, at, message);
                }
            }
            learned |= u32::from(acquires && out[lane] == 1) << lane;
            failed |= matches!(op, Mbar::Test { .. }) && out[lane] == 0;
        }
        self.learn_phase(w, object, learned);
        if self.races.enabled && matches!(op, Mbar::Arrive { .. }) {
            self.races.tick(w.id);
        }
        w.write(*d, lanes, &out);
        w.advance();
        if failed { Flow::Yield } else { Flow::On }
    }

    /// Lanes acquire what the completed phases of an object were given.
    fn learn_phase(&mut self, w: &Warp, object: Option<(u32, u64)>, lanes: u32) {
        if lanes != 0
            && let Some((region, offset)) = object
            && let Some(bar) = self.memory.regions[region as usize].mbarriers.get(&offset)
        {
            self.races.learn(w.id, lanes, &bar.completed);
        }
    }

    pub(super) fn mbarrier_place(
        &mut self,
        w: &Warp,
        space: Space,
        addr: u64,
        lane: usize,
    ) -> Option<(u32, u64)> {
        match self.place(w, lane, space, addr, (8, 8))? {
            Place::Region(region, offset) if region == self.blocks[w.block as usize].shared => {
                Some((region, offset))
            }
            _ => {
                let message = "an mbarrier outside shared memory".into();
                self.blame(FindingKind::Mbarrier, w, lane, message);
                None
            }
        }
    }

    fn touch_mbarrier(
        &mut self,
        w: &Warp,
        (region, offset): (u32, u64),
        (write, strong): (bool, bool),
        lane: usize,
    ) {
        self.memory.regions[region as usize].set_init(offset, 8);
        if self.races.enabled {
            let strength = if strong { Strength::Strong(Scope::Cta) } else { Strength::Weak };
            let kind = Kind { write, strength, bytes: 8, asynchronous: false };
            self.check_race(w, (region, offset, 8), 1 << lane, kind);
        }
    }

    fn mbarrier_one(
        &mut self,
        w: &Warp,
        op: &Mbar,
        (region, offset): (u32, u64),
        (x, tx): (u64, Option<u64>),
        lane: usize,
    ) -> Result<u64, String> {
        let races = self.races.enabled;
        let bars = &mut self.memory.regions[region as usize].mbarriers;
        if let Mbar::Init(_) = op {
            let count = x as u32;
            if count == 0 || count > COUNT_MAX {
                return Err(format!("an mbarrier cannot expect {count} arrivals"));
            }
            let old = bars.insert(offset, Mbarrier::new(count));
            self.progress_at = self.steps;
            return match old {
                Some(b) if b.pending != i64::from(b.expected) || b.tx != 0 => Err(format!(
                    "init of an mbarrier whose phase {} still expects {} arrivals and {} bytes",
                    b.phase, b.pending, b.tx
                )),
                _ => Ok(0),
            };
        }
        let Some(bar) = bars.get_mut(&offset) else {
            return Err("this mbarrier is not initialised".into());
        };
        match op {
            Mbar::Inval => {
                bars.remove(&offset);
                Ok(0)
            }
            Mbar::Arrive { drop, release, .. } => {
                self.progress_at = self.steps;
                let token = bar.phase << TOKEN_SHIFT | bar.pending as u64;
                if races && *release {
                    self.races.release_into(&mut bar.arriving, w.id, lane);
                }
                if let Some(tx) = tx {
                    bar.expect(tx as u32)?;
                }
                if *drop {
                    bar.expected = bar.expected.saturating_sub(1);
                }
                bar.arrive(x as u32)?;
                Ok(token)
            }
            Mbar::ExpectTx(_) => bar.expect(x as u32).map(|()| 0),
            Mbar::CompleteTx(_) => {
                self.progress_at = self.steps;
                bar.complete(x as u32).map(|_| 0)
            }
            Mbar::Test { parity, .. } => {
                let over =
                    if *parity { bar.phase & 1 != x & 1 } else { bar.phase > x >> TOKEN_SHIFT };
                Ok(over.into())
            }
            Mbar::Init(_) | Mbar::PendingCount(_) => Ok(0),
        }
    }
}
