//! Moves between registers and address spaces.

use crate::core::Core;
use crate::memory::{LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, WINDOW};
use crate::program::{Code, Op, Reg};
use crate::race::bits;
use crate::types::Space;
use crate::warp::Warp;

/// Where a state space begins among generic addresses.
pub(crate) fn window(space: Space) -> u64 {
    match space {
        Space::Shared => SHARED_WINDOW,
        Space::Local => LOCAL_WINDOW,
        Space::Param => PARAM_WINDOW,
        Space::Generic | Space::Global | Space::Const => 0,
    }
}

/// Whether a generic address lies in a space.
pub(crate) fn in_space(addr: u64, space: Space) -> bool {
    let inside = |base: u64| addr >= base && addr - base < WINDOW;
    match space {
        Space::Shared => inside(SHARED_WINDOW),
        Space::Local => inside(LOCAL_WINDOW),
        Space::Param => inside(PARAM_WINDOW),
        Space::Const => false,
        Space::Generic => true,
        Space::Global => ![SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW].into_iter().any(inside),
    }
}

impl Core {
    pub(super) fn moves(&mut self, w: &mut Warp, code: &Code, op: &Op, lanes: u32) {
        match op {
            Op::Pack { .. } | Op::Unpack { .. } => self.repack(w, code, op, lanes),
            Op::Mov128 { d, s: crate::program::Src::Reg(from) } => {
                for part in 0..2 {
                    let values = w.regs[(from.slot + part) as usize];
                    w.write(Reg { slot: d.slot + part, bytes: 8 }, lanes, &values);
                }
            }
            Op::Cvta { d, s, space, to } => {
                let base = window(*space);
                let values = self.src(w, code, s, lanes);
                let moved =
                    values.map(|x| if *to { x.wrapping_sub(base) } else { x.wrapping_add(base) });
                w.write(*d, lanes, &moved);
            }
            Op::Isspacep { d, s, space } => {
                let values = self.src(w, code, s, lanes);
                w.write(*d, lanes, &values.map(|x| in_space(x, *space).into()));
            }
            Op::ActiveMask { d } => w.write(*d, lanes, &[w.active.into(); 32]),
            // Policies are opaque; a recognisable number helps in a dump.
            Op::Createpolicy { d } => w.write(*d, lanes, &[0x14f0_0000_0000_0000; 32]),
            Op::Mapa { d, s, rank } => {
                let values = self.src(w, code, s, lanes);
                let ranks = self.src(w, code, rank, lanes);
                if let Some(lane) = bits(lanes).find(|&l| ranks[l] as u32 != 0) {
                    let message = format!("mapa to block {} of a cluster of one", ranks[lane]);
                    self.blame(crate::finding::FindingKind::BadAccess, w, lane, message);
                }
                w.write(*d, lanes, &values);
            }
            _ => {}
        }
    }

    /// Between a register and its parts.
    fn repack(&mut self, w: &mut Warp, code: &Code, op: &Op, lanes: u32) {
        let mut out = [0u64; 32];
        match op {
            Op::Pack { d, s, bits: width } if d.bytes == 16 => {
                let half = s.len() / 2;
                for (word, parts) in [&s[..half], &s[half..]].into_iter().enumerate() {
                    let mut out = [0u64; 32];
                    for (i, part) in parts.iter().enumerate() {
                        let values = self.src(w, code, part, lanes);
                        for lane in bits(lanes) {
                            out[lane] |= values[lane] << (i as u32 * width);
                        }
                    }
                    w.write(Reg { slot: d.slot + word as u32, bytes: 8 }, lanes, &out);
                }
            }
            Op::Pack { d, s, bits: width } => {
                for (i, part) in s.iter().enumerate() {
                    let values = self.src(w, code, part, lanes);
                    for lane in bits(lanes) {
                        let value = values[lane] & ((1u64 << width) - 1);
                        out[lane] |= value << (i as u32 * width);
                    }
                }
                w.write(*d, lanes, &out);
            }
            Op::Unpack { d, s, bits: width } => {
                let wide = matches!(s, crate::program::Src::Reg(r) if r.bytes == 16);
                let values = self.src(w, code, s, lanes);
                let mut upper = [0; 32];
                if let (true, crate::program::Src::Reg(r)) = (wide, s) {
                    upper = w.regs[r.slot as usize + 1];
                }
                for (i, reg) in d.iter().enumerate() {
                    let shift = i as u32 * width;
                    for lane in bits(lanes) {
                        let from = if shift >= 64 { upper[lane] } else { values[lane] };
                        let part = from >> (shift % 64);
                        out[lane] = if *width >= 64 { part } else { part & ((1 << width) - 1) };
                    }
                    w.write(*reg, lanes, &out);
                }
            }
            _ => {}
        }
    }
}
