//! Executes instructions for the running lanes of a warp.

pub(crate) mod barrier;
mod check;
pub(crate) mod copy;
mod data;
mod host;
mod mbar;
mod mem;
mod wide;

use crate::core::Core;
use crate::finding::FindingKind;
use crate::num::float::compare;
use crate::num::int::val;
use crate::program::{BoolOp, Code, Inst, Op, Par, Reg, Src};
use crate::race::bits;
use crate::types::{SReg, Ty, mask};
use crate::warp::{Lanes, Parked, Warp};

/// What the scheduler should do after an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    /// Go on with this warp.
    On,
    /// Let others run: this warp probably waits for something.
    Yield,
    /// No lane of the warp can run now.
    Blocked,
}

impl Core {
    /// Executes one instruction. The warp has running lanes.
    pub(crate) fn step(&mut self, w: &mut Warp, code: &Code) -> Flow {
        let inst = &code.insts[w.pc as usize];
        self.steps += 1;
        self.time_ns += self.config.ns_per_step;
        self.lane_steps += u64::from(w.active.count_ones());
        let mut lanes = w.active;
        if let Some((reg, negated)) = inst.guard {
            let values = self.src(w, code, &Src::Reg(reg), lanes);
            let on = bits(lanes).filter(|&l| (values[l] & 1 == 1) != negated);
            let on = on.fold(0, |m, l| m | 1u32 << l);
            if on != lanes {
                return self.partial(w, code, inst, on);
            }
            lanes = on;
        }
        self.execute(w, code, inst, lanes)
    }

    /// A guarded instruction that only some of the running lanes execute.
    fn partial(&mut self, w: &mut Warp, code: &Code, inst: &Inst, on: u32) -> Flow {
        if on == 0 {
            w.advance();
            return Flow::On;
        }
        let off = w.active & !on;
        match &inst.op {
            Op::Bra { target } => {
                let (target, next) = (*target, w.pc + 1);
                w.scatter(|lane| if on >> lane & 1 == 1 { target } else { next });
                Flow::On
            }
            op if op.is_local() => self.execute(w, code, inst, on),
            _ => {
                // Control and waiting: the other lanes go on as a group of their own.
                w.save();
                for lane in bits(off) {
                    w.pcs[lane] = w.pc + 1;
                }
                w.narrow_to(on);
                self.execute(w, code, inst, on)
            }
        }
    }

    #[inline]
    fn execute(&mut self, w: &mut Warp, code: &Code, inst: &Inst, lanes: u32) -> Flow {
        match &inst.op {
            Op::Alu { f, par, d, s } => {
                let a = self.src(w, code, &s[0], lanes);
                let b = self.src(w, code, &s[1], lanes);
                let c = self.src(w, code, &s[2], lanes);
                let mut out = [0; 32];
                for lane in bits(lanes) {
                    out[lane] = f(par, a[lane], b[lane], c[lane]);
                }
                w.write(*d, lanes, &out);
            }
            Op::Setp { par, d, q, s, with, value } => {
                let flags = (*d, *q, *value);
                self.set_predicate(w, code, lanes, par, flags, s, with.as_ref());
            }
            Op::Bra { target } => {
                // A backward branch to itself or a short loop is where spinning shows.
                w.jump(*target);
                return Flow::On;
            }
            Op::Ld { .. } | Op::St { .. } | Op::Atom { .. } => {
                return self.memory_access(w, code, &inst.op, lanes);
            }
            _ => return self.execute_rest(w, code, &inst.op, lanes),
        }
        w.advance();
        Flow::On
    }

    fn execute_rest(&mut self, w: &mut Warp, code: &Code, op: &Op, lanes: u32) -> Flow {
        match op {
            Op::Exit | Op::Trap | Op::Ret | Op::Call { .. } | Op::CallExtern { .. } => {
                return self.control(w, code, op, lanes);
            }
            Op::BrxIdx { index, targets } => {
                let at = self.src(w, code, index, lanes);
                if let Some(l) = bits(lanes).find(|&l| at[l] as u32 as usize >= targets.len()) {
                    let message = format!("brx.idx of {} of {} targets", at[l], targets.len());
                    self.blame(FindingKind::BadAccess, w, l, message);
                }
                let last = targets.len() - 1;
                w.scatter(|l| targets[(at[l] as u32 as usize).min(last)]);
                return Flow::On;
            }
            Op::Nanosleep { ns } => {
                let ns = self.src(w, code, ns, lanes);
                let longest = bits(lanes).map(|l| ns[l] as u32).max().unwrap_or(0);
                w.wake_at = self.time_ns + u64::from(longest);
                w.advance();
                return Flow::Yield;
            }
            Op::Bar { .. } => return self.block_barrier(w, code, op, lanes),
            Op::WarpSync { .. }
            | Op::Shfl { .. }
            | Op::Vote { .. }
            | Op::Match { .. }
            | Op::Redux { .. }
            | Op::Elect { .. }
            | Op::Ldmatrix { .. }
            | Op::Stmatrix { .. }
            | Op::Mma { .. } => return self.warp_wide(w, code, op),
            Op::Mbarrier { .. } => return self.mbarrier(w, code, op, lanes),
            Op::CpAsync { .. }
            | Op::CpCommit
            | Op::CpWait { .. }
            | Op::CpMbarArrive { .. }
            | Op::BulkLoad { .. }
            | Op::BulkStore { .. }
            | Op::BulkCommit
            | Op::BulkWait { .. } => return self.copying(w, code, op, lanes),
            Op::Fence { acquire, release, scope } => {
                if self.races.enabled {
                    for lane in bits(lanes) {
                        self.races.fence((w.id, lane), (*acquire, *release), *scope);
                    }
                    self.races.tick(w.id);
                }
            }
            Op::FenceProxy => {
                if self.races.enabled {
                    for lane in bits(lanes) {
                        self.races.proxy_fence(w.id, lane);
                    }
                    self.races.tick(w.id);
                }
            }
            Op::Nop | Op::Brkpt => {}
            _ => self.data(w, code, op, lanes),
        }
        w.advance();
        Flow::On
    }

    #[allow(clippy::too_many_arguments)]
    fn set_predicate(
        &mut self,
        w: &mut Warp,
        code: &Code,
        lanes: u32,
        par: &Par,
        (d, q, value): (Reg, Reg, bool),
        s: &[Src; 2],
        with: Option<&(BoolOp, Src, bool)>,
    ) {
        let (a, b) = (self.src(w, code, &s[0], lanes), self.src(w, code, &s[1], lanes));
        let extra = with.map(|(op, src, not)| (*op, self.src(w, code, src, lanes), *not));
        let (mut out, mut out_q) = ([0; 32], [0; 32]);
        for lane in bits(lanes) {
            let hit = compare(par, a[lane], b[lane]);
            let join = |x: bool| match &extra {
                None => x,
                Some((op, c, not)) => {
                    let c = (c[lane] & 1 == 1) != *not;
                    match op {
                        BoolOp::And => x && c,
                        BoolOp::Or => x || c,
                        BoolOp::Xor => x != c,
                    }
                }
            };
            out[lane] = join(hit).into();
            out_q[lane] = join(!hit).into();
        }
        if value {
            let truth = match par.ty {
                Ty::F32 => u64::from(1f32.to_bits()),
                _ => u64::MAX,
            };
            out = out.map(|x| if x == 1 { truth } else { 0 });
        }
        w.write(d, lanes, &out);
        w.write(q, lanes, &out_q);
    }

    /// The values of an operand. Unwritten registers are reported.
    #[inline]
    pub(crate) fn src(&mut self, w: &Warp, code: &Code, src: &Src, lanes: u32) -> Lanes {
        match src {
            Src::Reg(r) => {
                let slot = r.slot as usize;
                if self.config.checks.uninitialised_registers {
                    let missing = lanes & !w.defined[slot];
                    if missing != 0 {
                        self.unwritten(w, missing);
                    }
                }
                w.regs[slot]
            }
            Src::Imm(value) => [*value; 32],
            Src::Sym(id, offset) => {
                let base = self.launches[w.launch as usize].symbols[*id as usize];
                [base.wrapping_add(*offset as u64); 32]
            }
            Src::Special(s) => self.special(w, code, *s),
        }
    }

    #[cold]
    fn unwritten(&mut self, w: &Warp, missing: u32) {
        let lane = missing.trailing_zeros() as usize;
        let message = "a register is read that nothing has written".into();
        self.blame(FindingKind::UninitialisedRegister, w, lane, message);
    }

    fn special(&mut self, w: &Warp, _: &Code, s: SReg) -> Lanes {
        let launch = &self.launches[w.launch as usize];
        let block = &self.blocks[w.block as usize];
        let axis = |a: u8, x: u32| if a == 0 { x } else { 0 };
        let size = |a: u8, x: u32| if a == 0 { x } else { 1 };
        let per_lane = |f: &dyn Fn(u32) -> u32| std::array::from_fn(|l| u64::from(f(l as u32)));
        let same: u64 = match s {
            SReg::Tid(a) => return per_lane(&|l| axis(a, w.index * 32 + l)),
            SReg::LaneId => return per_lane(&|l| l),
            SReg::LaneMaskEq => return per_lane(&|l| 1 << l),
            SReg::LaneMaskLt => return per_lane(&|l| (1 << l) - 1),
            SReg::LaneMaskLe => return per_lane(&|l| u32::MAX >> (31 - l)),
            SReg::LaneMaskGt => return per_lane(&|l| !(u32::MAX >> (31 - l))),
            SReg::LaneMaskGe => return per_lane(&|l| u32::MAX << l),
            SReg::Ntid(a) => size(a, launch.block_threads).into(),
            SReg::Ctaid(a) => axis(a, block.index).into(),
            SReg::Nctaid(a) => size(a, launch.grid).into(),
            SReg::WarpId => w.index.into(),
            SReg::NwarpId => block.warp_count.into(),
            // Every block of a launch is resident, on a multiprocessor of its own.
            SReg::SmId => block.index.into(),
            SReg::NsmId => launch.grid.into(),
            SReg::GridId => w.launch.into(),
            SReg::Clock => self.steps & 0xffff_ffff,
            SReg::ClockHi => self.steps >> 32,
            SReg::Clock64 => self.steps,
            SReg::GlobalTimer => self.time_ns,
            SReg::GlobalTimerLo => self.time_ns & 0xffff_ffff,
            SReg::GlobalTimerHi => self.time_ns >> 32,
            SReg::DynamicSmem => launch.dynamic_shared.into(),
            SReg::TotalSmem => launch.total_shared.into(),
            SReg::WarpSize => 32,
            SReg::Fixed(x) => x.into(),
        };
        [same; 32]
    }

    fn control(&mut self, w: &mut Warp, code: &Code, op: &Op, lanes: u32) -> Flow {
        match op {
            Op::Exit => self.exit_lanes(w, lanes),
            Op::Trap => self.trap(w, lanes, "trap".into()),
            Op::Ret => {
                let done = bits(lanes).filter(|&l| w.stack[l].is_empty());
                let done = done.fold(0, |m, l| m | 1u32 << l);
                if done == lanes {
                    return self.exit_lanes(w, lanes);
                }
                self.copy_results(w, code, lanes & !done);
                w.save();
                for lane in bits(lanes & !done) {
                    w.pcs[lane] = w.stack[lane].pop().unwrap_or(0);
                }
                if done != 0 {
                    w.active = done;
                    return self.exit_lanes(w, done);
                }
                w.regroup();
                Flow::On
            }
            Op::Call { callee, args, .. } => {
                for lane in bits(lanes) {
                    w.stack[lane].push(w.pc + 1);
                    let base = lane * w.param_bytes;
                    for &(from, to, bytes) in args {
                        let from = base + from as usize;
                        w.params.copy_within(from..from + bytes as usize, base + to as usize);
                    }
                }
                w.jump(code.functions[*callee as usize].start);
                Flow::On
            }
            Op::CallExtern { name, ret } => {
                if name == "__assertfail" {
                    return self.trap(w, lanes, "an assertion failed".into());
                }
                for lane in bits(lanes) {
                    if let Some((at, bytes)) = ret {
                        let at = lane * w.param_bytes + *at as usize;
                        w.params[at..at + *bytes as usize].fill(0);
                    }
                }
                w.advance();
                Flow::On
            }
            _ => Flow::On,
        }
    }

    /// Moves the result of a returning function to where its call wants it.
    fn copy_results(&mut self, w: &mut Warp, code: &Code, lanes: u32) {
        for lane in bits(lanes) {
            let Some(&back) = w.stack[lane].last() else { continue };
            if let Op::Call { ret: Some((from, to, bytes)), .. } = code.insts[back as usize - 1].op
            {
                let base = lane * w.param_bytes;
                let from = base + from as usize;
                w.params.copy_within(from..from + bytes as usize, base + to as usize);
            }
        }
    }

    fn exit_lanes(&mut self, w: &mut Warp, lanes: u32) -> Flow {
        w.exit(lanes);
        self.progress();
        let block = &mut self.blocks[w.block as usize];
        block.alive[w.index as usize] = w.alive;
        block.exited_early |= block.alive.iter().any(|&a| a != 0);
        self.recheck_barriers(w);
        self.recheck_warp(w);
        if w.active == 0 { Flow::Blocked } else { Flow::On }
    }

    /// Ends the whole launch.
    pub(crate) fn trap(&mut self, w: &mut Warp, lanes: u32, message: String) -> Flow {
        self.blame(FindingKind::Trap, w, lanes.trailing_zeros() as usize, message);
        self.dead_launches.push(w.launch);
        w.alive = 0;
        w.active = 0;
        Flow::Blocked
    }

    /// Lanes that left may complete what the rest of the warp waits for.
    fn recheck_warp(&mut self, w: &mut Warp) {
        if w.active == 0 && w.parked_mask != 0 {
            // Waiting lanes execute their instruction anew and count the members again.
            let waiting = bits(w.parked_mask).filter(|&l| w.parked[l] == Parked::Warp);
            let waiting = waiting.fold(0, |m, l| m | 1u32 << l);
            w.unpark(waiting & w.alive);
            w.regroup();
        }
    }

    /// Bit-field insertion, carries, packing: what is rare or has an odd shape.
    fn data(&mut self, w: &mut Warp, code: &Code, op: &Op, lanes: u32) {
        match op {
            Op::Bfi { par, d, s, at, len } => {
                let (a, b) = (self.src(w, code, &s[0], lanes), self.src(w, code, &s[1], lanes));
                let (at, len) = (self.src(w, code, at, lanes), self.src(w, code, len, lanes));
                let out = std::array::from_fn(|l| {
                    crate::num::int::bfi(par, a[l], b[l], at[l] & 0xff | (len[l] & 0xff) << 8)
                });
                w.write(*d, lanes, &out);
            }
            Op::Carry { .. } => self.carry(w, code, op, lanes),
            _ => self.moves(w, code, op, lanes),
        }
    }

    fn carry(&mut self, w: &mut Warp, code: &Code, op: &Op, lanes: u32) {
        let Op::Carry { ty, d, s, mad, flags } = op else { return };
        let [take, give, minus] = *flags;
        let a = self.src(w, code, &s[0], lanes);
        let b = self.src(w, code, &s[1], lanes);
        let c = if mad.is_some() { self.src(w, code, &s[2], lanes) } else { [0; 32] };
        let bits_count = ty.bits();
        let cut = u128::from(mask(ty.bytes()));
        let mut out = [0; 32];
        for lane in bits(lanes) {
            let carry = u128::from(take && w.carry >> lane & 1 == 1);
            let (x, y) = match mad {
                None => (u128::from(a[lane]) & cut, u128::from(b[lane]) & cut),
                Some(high) => {
                    let product = val(*ty, a[lane]) * val(*ty, b[lane]);
                    let part = if *high { product >> bits_count } else { product };
                    (part as u128 & cut, u128::from(c[lane]) & cut)
                }
            };
            let sum = if minus { x.wrapping_sub(y).wrapping_sub(carry) } else { x + y + carry };
            out[lane] = sum as u64;
            if give {
                let carried = sum >> bits_count & 1 == 1;
                w.carry = w.carry & !(1 << lane) | u32::from(carried) << lane;
            }
        }
        w.write(*d, lanes, &out);
    }
}

impl Op {
    /// Whether the instruction concerns each lane alone and never waits or jumps.
    fn is_local(&self) -> bool {
        matches!(
            self,
            Op::Alu { .. }
                | Op::Bfi { .. }
                | Op::Carry { .. }
                | Op::Setp { .. }
                | Op::Pack { .. }
                | Op::Unpack { .. }
                | Op::Mov128 { .. }
                | Op::Cvta { .. }
                | Op::Isspacep { .. }
                | Op::Ld { .. }
                | Op::St { .. }
                | Op::Atom { .. }
                | Op::Fence { .. }
                | Op::FenceProxy
                | Op::Nop
                | Op::Brkpt
                | Op::Createpolicy { .. }
                | Op::ActiveMask { .. }
                | Op::Mbarrier { .. }
                | Op::CpAsync { .. }
                | Op::CpCommit
                | Op::CpMbarArrive { .. }
                | Op::BulkLoad { .. }
                | Op::BulkStore { .. }
                | Op::BulkCommit
                | Op::Mapa { .. }
        )
    }
}
