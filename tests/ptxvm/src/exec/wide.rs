//! Instructions that all members of a warp execute together.

use super::Flow;
use crate::core::Core;
use crate::finding::FindingKind;
use crate::program::{Access, Code, Op, Shfl, Src, Vote};
use crate::race::bits;
use crate::types::{Order, Scope, Space, Ty, mask};
use crate::warp::{Lanes, Parked, Warp};

const MATRIX: Access =
    Access { ty: Ty::B32, space: Space::Shared, order: Order::Weak, scope: Scope::Cta, nc: false };

impl Core {
    /// Makes the running lanes wait for the rest of their warp.
    pub(super) fn park_for_warp(&mut self, w: &mut Warp, lanes: u32) -> Flow {
        w.park(lanes, Parked::Warp, w.pc);
        if w.regroup() { Flow::On } else { Flow::Blocked }
    }

    /// Gathers the members; `None` while some are missing, and then the lanes are parked.
    fn gather(&mut self, w: &mut Warp, code: &Code, members: Option<&Src>) -> Option<u32> {
        let mut wanted = w.alive;
        if let Some(src) = members {
            let values = self.src(w, code, src, w.active);
            let lane = w.active.trailing_zeros() as usize;
            let first = values[lane] as u32;
            let same = bits(w.active).filter(|&l| values[l] as u32 == first);
            let same = same.fold(0, |m, l| m | 1u32 << l);
            if same != w.active {
                w.narrow(same);
            }
            if w.active & !first != 0 {
                let l = (w.active & !first).trailing_zeros() as usize;
                let message = format!("lane {l} is not in its own member mask {first:#010x}");
                self.blame(FindingKind::WarpSync, w, l, message);
            }
            if first & !w.alive != 0 {
                let gone = (first & !w.alive).trailing_zeros();
                let message = format!(
                    "the member mask {first:#010x} names lane {gone}, which exited or never was"
                );
                self.blame(FindingKind::WarpSync, w, lane, message);
            }
            wanted = (first | w.active) & w.alive;
        }
        let here = w.active | w.waiting_at(|pc| pc == w.pc) & wanted;
        // Compilers copy `bar.warp.sync` into the branches before it; the copies are one barrier.
        let is_barrier = |pc: u32| matches!(code.insts[pc as usize].op, Op::WarpSync { .. });
        let elsewhere =
            if is_barrier(w.pc) { w.waiting_at(is_barrier) & wanted & !here } else { 0 };
        if (here | elsewhere) & wanted != wanted {
            self.park_for_warp(w, w.active);
            return None;
        }
        if elsewhere != 0 && self.races.enabled {
            self.races.barrier(&[(w.id, here | elsewhere)]);
        }
        w.step_over(elsewhere);
        w.unpark(here | elsewhere);
        w.narrow(here);
        Some(here)
    }

    pub(super) fn warp_wide(&mut self, w: &mut Warp, code: &Code, op: &Op) -> Flow {
        let members = match op {
            Op::WarpSync { members }
            | Op::Vote { members, .. }
            | Op::Match { members, .. }
            | Op::Redux { members, .. }
            | Op::Elect { members, .. } => Some(members),
            Op::Shfl { s, .. } => Some(&s[3]),
            _ => None,
        };
        let Some(lanes) = self.gather(w, code, members) else {
            return if w.active == 0 { Flow::Blocked } else { Flow::On };
        };
        match op {
            Op::WarpSync { .. } => {
                if self.races.enabled {
                    self.races.barrier(&[(w.id, lanes)]);
                }
            }
            Op::Shfl { .. } => self.shuffle(w, code, op, lanes),
            Op::Ldmatrix { .. } | Op::Stmatrix { .. } => self.matrix(w, code, op, lanes),
            Op::Mma { shape, d, a, b, c } => {
                let frag = |core: &mut Core, list: &[Src]| {
                    let mut out = [[0; 32]; 4];
                    for (to, src) in out.iter_mut().zip(list) {
                        *to = core.src(w, code, src, lanes).map(|x| x as u32);
                    }
                    out
                };
                let (a, b) = (frag(self, a), frag(self, b));
                let c = frag(self, c);
                if lanes != u32::MAX {
                    let message = "mma needs all 32 lanes".into();
                    self.blame(FindingKind::WarpSync, w, 0, message);
                }
                let out = crate::num::mma::mma(*shape, &a, &b, &c);
                for (reg, values) in d.iter().zip(&out) {
                    w.write(*reg, lanes, &values.map(u64::from));
                }
            }
            _ => self.collective(w, code, op, lanes),
        }
        w.advance();
        Flow::On
    }

    fn shuffle(&mut self, w: &mut Warp, code: &Code, op: &Op, lanes: u32) {
        let Op::Shfl { mode, d, p, s } = op else { return };
        let a = self.src(w, code, &s[0], lanes);
        let b = self.src(w, code, &s[1], lanes);
        let c = self.src(w, code, &s[2], lanes);
        let (mut out, mut valid) = ([0; 32], [0; 32]);
        for lane in bits(lanes) {
            let at = lane as i64;
            let (by, clamp) = ((b[lane] & 31) as i64, (c[lane] & 31) as i64);
            let segment = (c[lane] >> 8 & 31) as i64;
            let top = at & segment | clamp & !segment;
            let bottom = at & segment;
            let (from, ok) = match mode {
                Shfl::Up => (at - by, at - by >= top),
                Shfl::Down => (at + by, at + by <= top),
                Shfl::Bfly => (at ^ by, at ^ by <= top),
                Shfl::Idx => {
                    let from = bottom | by & !segment;
                    (from, from <= top)
                }
            };
            let from = if ok { from } else { at } as usize & 31;
            if lanes >> from & 1 == 0 {
                let message = format!("lane {lane} shuffles from lane {from}, which takes no part");
                self.blame(FindingKind::WarpSync, w, lane, message);
            }
            out[lane] = a[from];
            valid[lane] = ok.into();
        }
        w.write(*d, lanes, &out);
        w.write(*p, lanes, &valid);
    }

    fn collective(&mut self, w: &mut Warp, code: &Code, op: &Op, lanes: u32) {
        match op {
            Op::Vote { mode, d, s, not, .. } => {
                let values = self.src(w, code, s, lanes);
                let yes = bits(lanes).filter(|&l| (values[l] & 1 == 1) != *not);
                let yes = yes.fold(0, |m, l| m | 1u32 << l);
                let out = match mode {
                    Vote::All => u32::from(yes == lanes),
                    Vote::Any => u32::from(yes != 0),
                    Vote::Uni => u32::from(yes == lanes || yes == 0),
                    Vote::Ballot => yes,
                };
                w.write(*d, lanes, &[out.into(); 32]);
            }
            Op::Match { all, bytes, d, p, s, .. } => {
                let values = self.src(w, code, s, lanes).map(|x| x & mask(*bytes));
                let equal = |l: usize| {
                    bits(lanes).filter(|&m| values[m] == values[l]).fold(0, |m, l| m | 1u32 << l)
                };
                let first = equal(lanes.trailing_zeros() as usize);
                let out: Lanes = if *all {
                    [u64::from(if first == lanes { lanes } else { 0 }); 32]
                } else {
                    std::array::from_fn(|l| equal(l).into())
                };
                w.write(*d, lanes, &out);
                w.write(*p, lanes, &[u64::from(first == lanes); 32]);
            }
            Op::Redux { f, par, d, s, .. } => {
                let values = self.src(w, code, s, lanes);
                let sum = bits(lanes).map(|l| values[l]).reduce(|x, y| f(par, x, y, 0));
                w.write(*d, lanes, &[sum.unwrap_or(0); 32]);
            }
            Op::Elect { d, p, .. } => {
                let leader = lanes.trailing_zeros() as usize;
                w.write(*d, lanes, &[leader as u64; 32]);
                w.write(*p, lanes, &std::array::from_fn(|l| u64::from(l == leader)));
            }
            _ => {}
        }
    }

    /// `ldmatrix` and `stmatrix`: lane i of group g gives the address of row i of matrix g.
    fn matrix(&mut self, w: &mut Warp, code: &Code, op: &Op, lanes: u32) {
        let (addr, count, trans) = match op {
            Op::Ldmatrix { addr, d, trans } => (addr, d.len(), *trans),
            Op::Stmatrix { addr, s, trans } => (addr, s.len(), *trans),
            _ => return,
        };
        let addrs = self.addresses(w, code, addr, lanes);
        let addrs = addrs.map(|a| if a >> 32 != 0 { a - crate::memory::SHARED_WINDOW } else { a });
        // Element (row, col) belongs to lane row * 4 + col / 2, half col % 2; transposed, the
        // roles of row and col change.
        let owner = |row: usize, col: usize| {
            let (row, col) = if trans { (col, row) } else { (row, col) };
            (row * 4 + col / 2, 16 * (col % 2))
        };
        for g in 0..count {
            let mut values = [0u64; 32];
            if let Op::Stmatrix { s, .. } = op {
                values = self.src(w, code, &s[g], lanes);
            }
            for row in 0..8 {
                let lane = g * 8 + row;
                let place = self.place(w, lane, Space::Shared, addrs[lane], (16, 16));
                let Some(super::mem::Place::Region(region, offset)) = place else { continue };
                if let Op::Ldmatrix { .. } = op {
                    self.check_read(w, &MATRIX, (region, offset, 1 << lane), (4, 16));
                    for col in 0..8 {
                        let (to, shift) = owner(row, col);
                        let r = &self.memory.regions[region as usize];
                        values[to] |= r.load(offset + col as u64 * 2, 2) << shift;
                    }
                } else {
                    let mut words = [[0u64; 32]; 4];
                    for col in 0..8 {
                        let (from, shift) = owner(row, col);
                        let half = values[from] >> shift & 0xffff;
                        words[col / 2][lane] |= half << (16 * (col % 2));
                    }
                    self.store(w, &MATRIX, &addrs, &words, 1 << lane);
                }
            }
            if let Op::Ldmatrix { d, .. } = op {
                w.write(d[g], lanes, &values);
            }
        }
    }
}
