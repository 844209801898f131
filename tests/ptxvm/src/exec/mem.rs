//! Loads, stores and atomics, with all their checks.

use super::Flow;
use super::data::{in_space, window};
use crate::body::LANE_PARAMS;
use crate::core::Core;
use crate::finding::FindingKind;
use crate::memory::SHARED_FIRST;
use crate::num::{float, int};
use crate::program::{Access, Addr, Alu, AtomOp, Code, Op, Par};
use crate::race::bits;
use crate::types::{Order, Round, Space, sext};
use crate::warp::{Lanes, Warp};

/// Where an access goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Region(u32, u64),
    /// Index into the warp's local memory.
    Local(usize),
    /// Index into the warp's call parameters.
    Call(usize),
    /// Offset in the kernel's parameters.
    Kernel(usize),
}

impl Core {
    pub(super) fn memory_access(&mut self, w: &mut Warp, code: &Code, op: &Op, lanes: u32) -> Flow {
        let flow = match op {
            Op::Ld { acc, addr, d, .. } => self.load(w, code, acc, addr, d, lanes),
            Op::St { acc, addr, s } => {
                let addrs = self.addresses(w, code, addr, lanes);
                let values: Vec<Lanes> = s.iter().map(|s| self.src(w, code, s, lanes)).collect();
                self.store(w, acc, &addrs, &values, lanes);
                Flow::On
            }
            _ => self.atomic(w, code, op, lanes),
        };
        w.advance();
        flow
    }

    pub(super) fn addresses(&mut self, w: &Warp, code: &Code, addr: &Addr, lanes: u32) -> Lanes {
        let mut base = self.src(w, code, &addr.base, lanes);
        for value in &mut base {
            *value = value.wrapping_add(addr.offset as u64);
        }
        base
    }

    /// Finds where an address goes, reporting it when it goes nowhere.
    pub(super) fn place(
        &mut self,
        w: &Warp,
        lane: usize,
        space: Space,
        addr: u64,
        (bytes, align): (u32, u32),
    ) -> Option<Place> {
        if !addr.is_multiple_of(u64::from(align)) {
            let message = format!("address {addr:#x} is not a multiple of {align}");
            self.blame(FindingKind::Misaligned, w, lane, message);
            return None;
        }
        let (space, addr) = match space {
            Space::Generic => {
                let spaces = [Space::Shared, Space::Local, Space::Param];
                let hit = spaces.into_iter().find(|&s| in_space(addr, s));
                let hit = hit.unwrap_or(Space::Global);
                (hit, addr.wrapping_sub(window(hit)))
            }
            other => (other, addr),
        };
        let end = addr.wrapping_add(bytes.into());
        match space {
            Space::Global | Space::Const | Space::Generic => {
                if let Some((region, offset)) = self.memory.find(addr, bytes.into()) {
                    if self.memory.regions[region as usize].in_hole(offset, bytes.into()) {
                        let message = format!("{bytes} bytes at {addr:#x}: in a forbidden range");
                        let at = (region, offset);
                        self.report_place(FindingKind::OutOfBounds, w, 1 << lane, at, message);
                        return None;
                    }
                    return Some(Place::Region(region, offset));
                }
                let near = self.memory.nearest(addr);
                self.stray(w, lane, bytes, "global", addr, &near);
            }
            Space::Shared => {
                let region = self.blocks[w.block as usize].shared;
                let addr = addr & 0xffff_ffff;
                let len = self.memory.regions[region as usize].len;
                if addr >= SHARED_FIRST && addr + u64::from(bytes) <= SHARED_FIRST + len {
                    return Some(Place::Region(region, addr - SHARED_FIRST));
                }
                let near = format!("the block has {len} bytes from {SHARED_FIRST:#x}");
                self.stray(w, lane, bytes, "shared", addr, &near);
            }
            Space::Local => {
                if end <= w.local_bytes as u64 && end >= addr {
                    return Some(Place::Local(lane * w.local_bytes + addr as usize));
                }
                let near = format!("the thread has {} bytes", w.local_bytes);
                self.stray(w, lane, bytes, "local", addr, &near);
            }
            Space::Param if addr >= LANE_PARAMS => {
                let at = (addr - LANE_PARAMS) as usize;
                if at + bytes as usize <= w.param_bytes {
                    return Some(Place::Call(lane * w.param_bytes + at));
                }
                self.stray(w, lane, bytes, "call parameter", addr, "outside");
            }
            Space::Param => {
                let len = self.launches[w.launch as usize].params.len() as u64;
                if end <= len {
                    return Some(Place::Kernel(addr as usize));
                }
                self.stray(w, lane, bytes, "parameter", addr, &format!("there are {len} bytes"));
            }
        }
        None
    }

    #[cold]
    fn stray(&mut self, w: &Warp, lane: usize, bytes: u32, what: &str, addr: u64, near: &str) {
        let message = format!("{bytes} bytes at {what} address {addr:#x}: {near}");
        self.blame(FindingKind::OutOfBounds, w, lane, message);
    }

    fn load(
        &mut self,
        w: &mut Warp,
        code: &Code,
        acc: &Access,
        addr: &Addr,
        d: &[crate::program::Reg],
        lanes: u32,
    ) -> Flow {
        let addrs = self.addresses(w, code, addr, lanes);
        let size = acc.ty.bytes();
        let total = size * d.len() as u32;
        let mut out = [[0u64; 32]; 8];
        let mut places: [Option<Place>; 32] = [None; 32];
        for lane in bits(lanes) {
            places[lane] = self.place(w, lane, acc.space, addrs[lane], (total, total));
        }
        self.check_reads(w, acc, &places, (size, total), lanes);
        for lane in bits(lanes) {
            let Some(place) = places[lane] else { continue };
            for (i, values) in out.iter_mut().enumerate().take(d.len()) {
                values[lane] = self.load_one(w, place, i as u32 * size, size);
            }
        }
        for (reg, values) in d.iter().zip(&mut out) {
            if acc.ty.signed() {
                for value in values.iter_mut() {
                    *value = sext(*value, acc.ty.bits()) as u64;
                }
            }
            w.write(*reg, lanes, values);
        }
        if acc.order == Order::Weak {
            return Flow::On;
        }
        // A strong read that sees the same again is polling: let others run.
        let seen = (w.pc, bits(lanes).fold(0u64, |h, l| h.rotate_left(7) ^ out[0][l]));
        let polling = seen == w.last_poll;
        w.last_poll = seen;
        if polling { Flow::Yield } else { Flow::On }
    }

    fn load_one(&mut self, w: &Warp, place: Place, at: u32, size: u32) -> u64 {
        let bytes = match place {
            Place::Region(region, offset) => {
                return self.memory.regions[region as usize].load(offset + u64::from(at), size);
            }
            Place::Local(index) => &w.local[index + at as usize..],
            Place::Call(index) => &w.params[index + at as usize..],
            Place::Kernel(index) => &self.launches[w.launch as usize].params[index + at as usize..],
        };
        let mut raw = [0; 8];
        raw[..size as usize].copy_from_slice(&bytes[..size as usize]);
        u64::from_le_bytes(raw)
    }

    pub(super) fn store(
        &mut self,
        w: &mut Warp,
        acc: &Access,
        addrs: &Lanes,
        values: &[Lanes],
        lanes: u32,
    ) {
        let size = acc.ty.bytes();
        let total = size * values.len() as u32;
        for lane in bits(lanes) {
            if acc.space == Space::Const {
                self.blame(FindingKind::BadAccess, w, lane, "a write to constant memory".into());
                continue;
            }
            let Some(place) = self.place(w, lane, acc.space, addrs[lane], (total, total)) else {
                continue;
            };
            if let Place::Region(region, offset) = place
                && self.refuse_write(w, (region, offset), total, lane)
            {
                continue;
            }
            for (i, value) in values.iter().enumerate() {
                let (at, raw) = (i * size as usize, value[lane].to_le_bytes());
                let raw = &raw[..size as usize];
                match place {
                    Place::Region(region, offset) => {
                        let region = &mut self.memory.regions[region as usize];
                        if region.store(offset + at as u64, size, value[lane]) {
                            self.progress_at = self.steps;
                        }
                    }
                    Place::Local(index) => {
                        let range = index + at..index + at + raw.len();
                        w.local[range.clone()].copy_from_slice(raw);
                        w.local_init[range].fill(true);
                    }
                    Place::Call(index) => {
                        w.params[index + at..index + at + raw.len()].copy_from_slice(raw);
                    }
                    Place::Kernel(_) => {
                        let message = "a write to a kernel's parameters".into();
                        self.blame(FindingKind::BadAccess, w, lane, message);
                    }
                }
            }
            if let Place::Region(region, offset) = place {
                self.check_write(w, acc, (region, offset), (size, total), lane);
            }
        }
    }

    fn atomic(&mut self, w: &mut Warp, code: &Code, op: &Op, lanes: u32) -> Flow {
        let Op::Atom { op, acc, addr, d, s } = op else { return Flow::On };
        let addrs = self.addresses(w, code, addr, lanes);
        let b = self.src(w, code, &s[0], lanes);
        let c = self.src(w, code, &s[1], lanes);
        let size = acc.ty.bytes();
        let mut out = [0; 32];
        let mut moved = false;
        for lane in bits(lanes) {
            let place = self.place(w, lane, acc.space, addrs[lane], (size, size));
            let Some(Place::Region(region, offset)) = place else {
                if place.is_some() {
                    let message = "an atomic outside global and shared memory".into();
                    self.blame(FindingKind::BadAccess, w, lane, message);
                }
                continue;
            };
            if self.refuse_write(w, (region, offset), size, lane) {
                continue;
            }
            self.check_atomic(w, acc, (region, offset), d.is_some(), lane);
            let f = |old| combine(*op, acc, old, b[lane], c[lane]);
            let (old, changed) = self.memory.regions[region as usize].update(offset, size, f);
            out[lane] = old;
            moved |= changed;
            if self.races.enabled {
                let r = &mut self.memory.regions[region as usize];
                let how = (Some(acc.scope), acc.order.releases(), true);
                self.races.publish(&mut r.sync, offset, (w.id, lane), how);
            }
        }
        if moved {
            self.progress();
        }
        if let Some(d) = d {
            if acc.ty.signed() {
                out = out.map(|x| sext(x, acc.ty.bits()) as u64);
            }
            w.write(*d, lanes, &out);
        }
        if moved { Flow::On } else { Flow::Yield }
    }
}

/// The new value of an atomic operation.
fn combine(op: AtomOp, acc: &Access, old: u64, b: u64, c: u64) -> u64 {
    let ty = acc.ty;
    let round = Round::Rn;
    let par = Par { ty, from: ty, round, ftz: false, sat: false, relu: false, nan: false, sel: 0 };
    let float = ty.float();
    let f: Alu = match op {
        AtomOp::Exch => return b,
        AtomOp::Cas => {
            let m = crate::types::mask(ty.bytes());
            return if old & m == b & m { c } else { old };
        }
        AtomOp::Inc => return if int::val(ty, old) >= int::val(ty, b) { 0 } else { old + 1 },
        AtomOp::Dec => {
            let wrap = int::val(ty, old) == 0 || int::val(ty, old) > int::val(ty, b);
            return if wrap { b } else { old - 1 };
        }
        AtomOp::Add if float => float::add,
        AtomOp::Min if float => float::min,
        AtomOp::Max if float => float::max,
        AtomOp::Add => int::add,
        AtomOp::Min => int::min,
        AtomOp::Max => int::max,
        AtomOp::And => int::and,
        AtomOp::Or => int::or,
        AtomOp::Xor => int::xor,
    };
    f(&par, old, b, 0)
}
